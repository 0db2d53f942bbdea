"""The entropy coder: exact for any codes, close to the entropy, and firm with anything it did not write."""

from __future__ import annotations

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import brotli
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quant import rans
from model.quant.compression import compress
from tests.fake_triton import as_value, load_kernels
from tests.memory import peak_bytes


def gaussian_codes(seed: int, size: int, *, std: float, qmax: int) -> np.ndarray:
    """Return codes as quantized weights look."""
    draws = np.random.default_rng(seed).standard_normal(size) * std
    return np.clip(np.rint(draws), -qmax, qmax).astype(np.int8)


def entropy_bytes(array: np.ndarray) -> float:
    """Return the order-0 entropy of an array, in bytes for all of it."""
    share = np.unique(array, return_counts=True)[1] / array.size
    return float(-(share * np.log2(share)).sum()) * array.size / 8


def assert_round_trip(arrays: list[np.ndarray]) -> bytes:
    """Check that decoding gives the arrays back; returns the stream."""
    data = rans.encode(arrays)
    decoded = rans.decode(data, [array.size for array in arrays])
    for array, back in zip(arrays, decoded, strict=True):
        assert back.dtype == np.int8
        assert np.array_equal(array.reshape(-1), back)
    return data


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 700), st.sampled_from([0.0, 0.3, 2.4, 40.0]), st.integers(0, 2**16)),
        min_size=1,
        max_size=6,
    )
)
def test_any_arrays_round_trip(plan: list[tuple[int, float, int]]) -> None:
    arrays = [gaussian_codes(seed, size, std=std, qmax=127) for size, std, seed in plan]
    assert_round_trip(arrays)


# ---- tables ----------------------------------------------------------------------------------------------------------


def histogram(counts: list[int]) -> np.ndarray:
    """Return counts (A,) int64 of the first symbols, 0 for the others."""
    return np.array(counts + [0] * (rans.ALPHABET - len(counts)), dtype=np.int64)


@st.composite
def histograms(draw: st.DrawFn) -> np.ndarray:
    """Histograms of every kind: flat ones and nearly flat ones, lone symbols, rare ones, huge counts, at any place."""
    num_symbols = draw(st.integers(1, rans.ALPHABET))
    base = draw(st.sampled_from([1, 2, 63, 127, 1000, 6351, 1 << 20, 1 << 40]))
    kind = draw(st.sampled_from(["flat", "nearly flat", "one and rare ones", "two levels", "any"]))
    if kind == "flat":
        counts = [base] * num_symbols
    elif kind == "nearly flat":
        spread = draw(st.integers(0, max(1, base // 50)))
        counts = draw(st.lists(st.integers(base, base + spread), min_size=num_symbols, max_size=num_symbols))
    elif kind == "one and rare ones":
        counts = [base << 6] + [draw(st.integers(1, 2))] * (num_symbols - 1)
    elif kind == "two levels":
        num_high = draw(st.integers(0, num_symbols))
        high = base + base * draw(st.integers(0, 100)) // 100
        counts = [high] * num_high + [base] * (num_symbols - num_high)
    else:
        counts = draw(st.lists(st.integers(0, base), min_size=num_symbols, max_size=num_symbols))
    return np.roll(histogram(counts), draw(st.integers(0, rans.ALPHABET - 1)))


@settings(max_examples=150, deadline=None)
@given(histograms())
def test_any_histogram_becomes_a_table_that_codes_every_symbol(count: np.ndarray) -> None:
    table = rans._normalize(count).astype(np.int64)
    assert int(table.sum()) == rans.TOTAL
    assert (table[count > 0] >= 1).all()
    assert int(table.max()) < rans.TOTAL
    share = count / max(1, count.sum()) * rans.TOTAL
    used = count > 0
    excess_bits = float((count[used] * np.log2(share[used] / table[used])).sum()) / max(1, int(count.sum()))
    assert excess_bits < 0.08  # bits a symbol over the entropy: a table that fits its histogram


@settings(max_examples=25, deadline=None)
@given(histograms().filter(lambda count: count.sum() < 200_000), st.integers(0, 2**16))
def test_codes_of_any_histogram_round_trip(count: np.ndarray, seed: int) -> None:
    codes = np.repeat(np.arange(rans.ALPHABET), count).astype(np.uint8)
    np.random.default_rng(seed).shuffle(codes)
    assert_round_trip([(codes ^ np.uint8(128)).view(np.int8)])


@pytest.mark.parametrize("symbols", ["high first", "high last"])
def test_a_nearly_flat_histogram_round_trips(symbols: str) -> None:
    # 250 shares of 63.51 round up, 6 of 84.4 down: together 120 more than there are, which no single entry has
    counts = [6351] * 250 + [8440] * 6
    counts = counts[::-1] if symbols == "high first" else counts
    codes = np.repeat(np.arange(-128, 128), counts).astype(np.int8)
    np.random.default_rng(0).shuffle(codes)
    data = assert_round_trip([codes])
    assert len(data) < 1.002 * entropy_bytes(codes)


@pytest.mark.parametrize(("std", "qmax"), [(0.3, 31), (2.41, 31), (6.3, 127), (40.0, 127)])
def test_the_largest_entry_alone_pays_for_rounding_where_it_can(std: float, qmax: int) -> None:
    # so the codes of quantized weights have the tables, and the bytes, that they have in earlier artifacts
    codes = gaussian_codes(11, 60_000, std=std, qmax=qmax)
    count = np.bincount(codes.view(np.uint8) ^ np.uint8(128), minlength=rans.ALPHABET)
    rounded = np.maximum((count * rans.TOTAL + codes.size // 2) // codes.size, count > 0)
    moved = np.flatnonzero(rans._normalize(count) != rounded)
    assert moved.tolist() in ([], [int(rounded.argmax())])


def test_every_byte_value_round_trips() -> None:
    assert_round_trip([np.arange(-128, 128, dtype=np.int8).reshape(16, 16), np.full(5, -128, dtype=np.int8)])


@pytest.mark.parametrize("size", [1, 15, 16, 17, 131_071, 131_072, 131_089])
def test_sizes_around_the_lane_steps_round_trip(size: int) -> None:
    assert_round_trip([gaussian_codes(0, size, std=2.4, qmax=31)])


def test_the_stream_is_within_a_fifth_of_a_percent_of_the_entropy() -> None:
    arrays = [gaussian_codes(seed, 1 << 18, std=2.41, qmax=31) for seed in range(4)]
    arrays.append(gaussian_codes(9, 1 << 18, std=6.3, qmax=127))
    data = assert_round_trip(arrays)
    assert len(data) < 1.002 * sum(entropy_bytes(array) for array in arrays)


def test_alike_arrays_share_a_table_and_unlike_ones_do_not() -> None:
    alike = [gaussian_codes(seed, 50_000, std=2.4, qmax=31) for seed in range(3)]
    other = gaussian_codes(5, 50_000, std=9.0, qmax=31)
    assert rans.PREFIX.unpack_from(rans.encode(alike))[0] == 1
    assert rans.PREFIX.unpack_from(rans.encode([*alike, other]))[0] == 2


def test_equal_arrays_give_equal_bytes() -> None:
    arrays = [gaussian_codes(1, 40_000, std=2.4, qmax=31)]
    assert rans.encode(arrays) == rans.encode([arrays[0].copy()])


def test_every_cut_is_refused() -> None:
    data = rans.encode([gaussian_codes(2, 300, std=2.4, qmax=31)])
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"rans|brotli"):
            rans.decode(data[:length], [300])


def test_wrong_sizes_are_refused() -> None:
    data = rans.encode([gaussian_codes(3, 20_000, std=2.4, qmax=31)])
    for sizes in ([19_999], [20_001], [10_000, 10_001], [100_000], []):
        with pytest.raises(ValueError, match=r"rans|brotli"):
            rans.decode(data, sizes)


def test_random_damage_is_refused_or_decodes_to_the_announced_size() -> None:
    arrays = [gaussian_codes(seed, 900, std=2.4, qmax=31) for seed in range(2)]
    data, rng, num_refused = rans.encode(arrays), random.Random(0), 0
    for _ in range(200):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        try:
            assert [array.size for array in rans.decode(bytes(broken), [900, 900])] == [900, 900]
        except ValueError:
            num_refused += 1
    assert num_refused > 150


def test_tables_that_do_not_add_up_are_refused() -> None:
    head = compress(np.zeros(1 + rans.ALPHABET, dtype="<u2").tobytes())
    data = rans.PREFIX.pack(1, len(head)) + head + bytes(4 * rans.MIN_LANES)
    with pytest.raises(ValueError, match="a table whose frequencies do not add up"):
        rans.decode(data, [10])


def test_a_lying_table_count_takes_no_memory() -> None:
    head = brotli.compress(bytes(1 << 26), quality=1)
    data = rans.PREFIX.pack(60_000, len(head)) + head + bytes(1 << 10)

    def attempt() -> None:
        with pytest.raises(ValueError, match="rans"):
            rans.decode(data, [100])

    assert peak_bytes(attempt) < 5_000_000


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def draw_codes(*plan: tuple[int, float, int]) -> list[np.ndarray]:
    """Return arrays of so many codes each, normal with a deviation, up to a magnitude."""
    rng = np.random.default_rng(3)
    return [np.clip(np.rint(rng.normal(0, std, n)), -most, most).astype(np.int8) for n, std, most in plan]


def check_device_coder(kernels: Any, device: torch.device, arrays: list[np.ndarray]) -> None:
    """The GPU's bytes are numpy's, each reads the other's, and both refuse the same damage in the same words."""
    sizes = [array.size for array in arrays]
    data = rans.encode(arrays)
    damaged = (data[:-2], data[:-6], data + b"ab")

    def refuse(stream: bytes) -> str:
        with pytest.raises(ValueError, match="rans stream") as caught:
            rans.decode(stream, sizes)
        return str(caught.value)

    refusals = [refuse(stream) for stream in damaged]
    with kernels.coding_on(device):
        assert rans.encode(arrays) == data
        assert all(map(np.array_equal, rans.decode(data, sizes), arrays))
        assert [refuse(stream) for stream in damaged] == refusals
    assert len(rans.coders) == 1


@pytest.mark.parametrize("plan", [[(100, 3.0, 31)], [(1, 1.0, 3), (17, 2.0, 31), (1500, 9.0, 127), (333, 0.2, 7)]])
def test_the_kernels_give_the_same_bytes(plan: list[tuple[int, float, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels(Path(rans.__file__).with_name("rans_triton.py"), monkeypatch)
    kernels.tl.__dict__.update(
        where=lambda chosen, x, y: as_value(np.where(chosen, x, y)), int32=np.int32, uint8=np.uint8,
        sum=lambda x, axis: as_value(np.sum(x, axis=axis)), cumsum=lambda x, axis: as_value(np.cumsum(x, axis=axis)),
    )  # fmt: skip
    monkeypatch.setattr(kernels, "FIELDS", type("Three", (int,), {"value": 3})(3))
    monkeypatch.setattr(kernels, "MAX_LANES", 32)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    check_device_coder(kernels, torch.device("cpu"), draw_codes(*plan))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [[(100, 3.0, 31)], [(1, 1.0, 3), (5_000_000, 3.2, 31), (3_000_001, 20.0, 127)]])
def test_a_gpu_gives_the_same_bytes(plan: list[tuple[int, float, int]]) -> None:
    from model.quant import rans_triton

    check_device_coder(rans_triton, torch.device("cuda"), draw_codes(*plan))
