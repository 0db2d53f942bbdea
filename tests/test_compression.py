"""Byte shuffling in the published format, and brotli with a bound on what comes out."""

from __future__ import annotations

from pathlib import Path

import brotli
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.quant.compression import byte_shuffle, byte_unshuffle, compress, decompress
from tests.memory import peak_bytes

GOLDEN = Path(__file__).parent / "golden" / "byte_shuffle.npz"


def test_golden_bytes_of_the_published_shuffle() -> None:
    golden = np.load(GOLDEN)
    raw = golden["raw"].tobytes()
    for stride in (2, 3):
        shuffled = golden[f"shuffled_stride{stride}"].tobytes()
        assert byte_shuffle(raw, stride) == shuffled
        assert byte_unshuffle(shuffled) == raw


def test_data_shorter_than_the_stride_is_left_alone() -> None:
    assert byte_shuffle(b"A", 2) == b"A"
    assert byte_shuffle(b"", 2) == b""
    assert byte_shuffle(b"AB", 2) == b"BSHF\x02AB"
    assert byte_shuffle(b"ABC", 2) == b"BSHF\x02ACB"


@given(st.binary(max_size=64) | st.binary(max_size=8).map(lambda tail: b"BSHF" + tail), st.integers(1, 5))
def test_unshuffle_undoes_shuffle(data: bytes, stride: int) -> None:
    assert byte_unshuffle(byte_shuffle(data, stride)) == data


@pytest.mark.parametrize("data", [b"BSHF\x00abc", b"BSHF\x09abcdefghijk", b"BSHF\x03ab"])
def test_an_impossible_stride_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"byte shuffle of stride \d over \d+ bytes is impossible"):
        byte_unshuffle(data)


def test_brotli_returns_exactly_what_was_announced() -> None:
    data = np.random.default_rng(0).integers(0, 9, 30_000, dtype=np.uint8).tobytes() * 100  # several pieces
    packed = compress(data)
    assert decompress(packed, num_bytes=3_000_000) == data
    assert decompress(compress(b""), num_bytes=0) == b""
    for num_bytes in (2_999_999, 3_000_001, 0):
        with pytest.raises(ValueError, match=f"does not hold exactly {num_bytes} bytes"):
            decompress(packed, num_bytes=num_bytes)


def test_damaged_and_cut_brotli_is_refused() -> None:
    packed = compress(b"seed" * 1000)
    for broken in (packed[:-1], packed[:1], b"", packed + b"\0", b"\xff" * 40):
        with pytest.raises(ValueError, match="brotli stream"):
            decompress(broken, num_bytes=4000)


def test_a_brotli_bomb_costs_a_few_pieces_at_most() -> None:
    bomb = brotli.compress(bytes(100_000_000), quality=1)

    def attempt() -> None:
        with pytest.raises(ValueError, match="does not hold exactly 1000 bytes"):
            decompress(bomb, num_bytes=1000)

    assert peak_bytes(attempt) < 20_000_000
