"""Attention over packs: every backend that runs on a CPU agrees with a written-out masked softmax in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import probe
from model.attention.backends import VARLEN_KERNELS, attention, is_available, resolve_backend
from model.attention.bounds import Bounds
from model.attention.probe import probe_backends
from model.pipeline import warm_up

LENGTHS = st.lists(st.sampled_from([1, 1, 2, 3, 5, 8, 9, 17, 33, 40]), min_size=1, max_size=12)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3)])


def pack(lengths: list[int], padded: int = 0) -> SimpleNamespace:
    """Return segment bounds for lengths, the total repeated padded more times."""
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    cu_seqlens = torch.tensor(bounds + [bounds[-1]] * padded, dtype=torch.int32)
    return SimpleNamespace(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))


def draw(
    num_rows: int, length: int, heads: tuple[int, int], seed: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Return random q, k, v (leaves that want gradients) and an output gradient."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_rows, length, h, 8) for h in (heads[0], heads[1], heads[1], heads[0])]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def masked_softmax(q: Tensor, k: Tensor, v: Tensor, packing: SimpleNamespace | None = None) -> Tensor:
    """Return the definition of attention, with the whole score matrix written out."""
    length = q.size(1)
    k, v = (x.repeat_interleave(q.size(2) // x.size(2), dim=2) for x in (k, v))
    scores = torch.einsum("bqhe,bkhe->bhqk", q, k) / q.size(3) ** 0.5
    places = torch.arange(length)
    is_visible = places[:, None] >= places[None, :]
    if packing is not None:
        segment = torch.bucketize(places, packing.cu_seqlens[1:].long(), right=True)
        is_visible = is_visible & (segment[:, None] == segment[None, :])
    weights = scores.masked_fill(~is_visible, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhe->bqhe", weights, v)


def forward_backward(function: Callable[..., Tensor], inputs: list[Tensor], *args: object) -> list[Tensor]:
    """Return the output and the gradients of q, k, v."""
    q, k, v, grad = inputs
    y = function(q, k, v, *args)
    return [y, *torch.autograd.grad(y, (q, k, v), grad)]


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, heads=HEADS, padded=st.integers(0, 3), seed=st.integers(0, 99))
def test_segments_attend_to_themselves_only(lengths: list[int], heads: tuple[int, int], padded: int, seed: int) -> None:
    inputs, packing = draw(1, sum(lengths), heads, seed), pack(lengths, padded)
    wanted = forward_backward(masked_softmax, inputs, packing)
    for got, want in zip(forward_backward(attention, inputs, packing), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (6, 1)])
def test_rows_without_a_packing_are_one_causal_sequence_each(heads: tuple[int, int]) -> None:
    inputs = draw(3, 21, heads, seed=5)
    wanted = forward_backward(masked_softmax, inputs)
    for got, want in zip(forward_backward(attention, inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_smaller_types_agree_and_keep_their_type(dtype: torch.dtype, tolerance: float) -> None:
    packing, inputs = pack([30, 1, 7, 64, 2]), draw(1, 104, (4, 2), seed=3, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3].double()]
    wanted = forward_backward(masked_softmax, wide, packing)
    for got, want in zip(forward_backward(attention, inputs, packing), wanted, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() / want.norm() < tolerance


def test_results_are_the_same_bits_every_time() -> None:
    lengths = [1, 100, 3, 64, 64, 257, 5, 5, 5, 31] * 3
    inputs, packing = draw(1, sum(lengths), (4, 2), seed=1, dtype=torch.float32), pack(lengths, 4)
    first = forward_backward(attention, inputs, packing)
    for got, want in zip(forward_backward(attention, inputs, packing), first, strict=True):
        assert torch.equal(got, want)


def test_a_segment_does_not_feel_what_stands_beside_it() -> None:
    q, k, v, _ = draw(1, 90, (4, 2), seed=2, dtype=torch.float32)
    y = attention(q, k, v, pack([40, 13, 37]))
    spoiled = [x.detach().clone() for x in (q, k, v)]
    for x in spoiled:
        x[:, :40] = float("nan")
        x[:, 53:] = float("inf")
    assert torch.equal(attention(*spoiled, pack([40, 13, 37]))[:, 40:53], y[:, 40:53])


def test_unusable_backends_are_refused() -> None:
    q, k, v, _ = draw(2, 4, (2, 1), seed=0)
    with pytest.raises(ValueError, match="attention backend 'fa9' is unknown"):
        attention(q, k, v, backend="fa9")
    with pytest.raises(ValueError, match="'varlen' needs bfloat16 on CUDA"):
        attention(q, k, v, backend="varlen")
    with pytest.raises(ValueError, match="2 rows: give one row per pack"):
        attention(q, k, v, pack([4]))
    with pytest.raises(ValueError, match="must cover the row's 4 tokens"):
        attention(q[:1], k[:1], v[:1], pack([3]))
    assert resolve_backend("auto", q, is_packed=True) == "sdpa"


def test_our_own_kernel_wants_cuda() -> None:
    q, k, v, _ = draw(1, 4, (2, 1), seed=0)
    if not torch.cuda.is_available():
        assert not is_available("triton")
    with pytest.raises(ValueError, match="'triton' needs bfloat16 on CUDA"):
        attention(q, k, v, pack([4]), backend="triton")


def test_a_backend_that_is_alone_is_checked_and_not_timed() -> None:
    q, k, v, _ = draw(1, 8, (4, 2), seed=0, dtype=torch.float32)
    choice = probe_backends(q, k, v, pack([5, 3]))
    assert choice.name == "sdpa"
    assert choice.timings_ms == {}
    assert choice.errors["sdpa"] < 1e-5
    assert choice.rejected == {}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return a table of made-up backends, filled by a test: name -> milliseconds, below 0 for a wrong one."""
    table: dict[str, float] = {}
    right = probe.attention

    def attend(q: Any, k: Any, v: Any, packing: Any, *, backend: str) -> torch.Tensor:
        if backend in table:
            return right(q, k, v, packing, backend="sdpa") * (1.0 if table[backend] > 0 else 1.5)
        return right(q, k, v, packing, backend=backend)

    monkeypatch.setattr(probe, "attention", attend)
    monkeypatch.setattr(probe, "_time_ms", lambda call, _device: table[call.args[3]])
    return table


@pytest.mark.parametrize(
    ("table", "candidates", "fallback", "name", "timed", "rejected"),
    [
        ({"fa2": 2.0, "triton": 1.0, "varlen": 0.5}, ["fa2", "triton"], "varlen", "triton", ["fa2", "triton"], []),
        ({"fa2": 1.0, "triton": 2.0, "varlen": 0.5}, ["fa2", "triton"], "varlen", "fa2", ["fa2", "triton"], []),
        ({"triton": 2.0, "varlen": 0.5}, ["triton"], "varlen", "triton", [], []),
        ({"fa2": -1.0, "triton": 2.0, "varlen": 0.5}, ["fa2", "triton"], "varlen", "triton", [], ["fa2"]),
        ({"triton": -2.0, "varlen": 0.5}, ["triton"], "varlen", "varlen", [], ["triton"]),
        ({"fa2": -2.0, "triton": -2.0, "varlen": 0.5}, ["fa2", "triton"], "varlen", "varlen", [], ["fa2", "triton"]),
    ],
)
def test_only_several_right_backends_are_timed_and_the_fallback_waits_for_none(
    kernels: dict[str, float], table: dict[str, float], candidates: list[str], fallback: str, name: str,
    timed: list[str], rejected: list[str],
) -> None:  # fmt: skip
    kernels.update(table)
    q, k, v, _ = draw(1, 8, (4, 2), seed=0, dtype=torch.float32)
    choice = probe_backends(q, k, v, pack([5, 3]), candidates=candidates, fallback=fallback)
    assert choice.name == name
    assert list(choice.timings_ms) == timed
    assert list(choice.rejected) == rejected
    assert ("varlen" in choice.errors) == (name == "varlen")  # else not even imported
    assert set(choice.errors) >= {*candidates}


def test_a_wrong_fallback_is_refused_like_any_other(kernels: dict[str, float]) -> None:
    kernels.update({"triton": -1.0, "varlen": -1.0})
    q, k, v, _ = draw(1, 8, (4, 2), seed=0, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no attention backend passed .*triton: relative error .*; varlen: relative"):
        probe_backends(q, k, v, pack([5, 3]), candidates=["triton"], fallback="varlen")


@pytest.mark.parametrize(
    ("available", "candidates", "fallback"),
    [
        ({"varlen"}, ["varlen"], None),
        ({"varlen", "fa2"}, ["varlen", "fa2"], None),
        ({"varlen", "triton"}, ["triton"], "varlen"),
        ({"varlen", "fa4", "triton"}, ["fa4", "triton"], "varlen"),
    ],
)
def test_pytorchs_own_kernel_is_a_candidate_only_where_ours_does_not_run(
    monkeypatch: pytest.MonkeyPatch, available: set[str], candidates: list[str], fallback: str | None
) -> None:
    monkeypatch.setattr(warm_up, "is_available", lambda name: name in available)
    assert warm_up.list_candidates() == (candidates, fallback)


def test_a_probe_says_why_a_backend_was_rejected() -> None:
    q, k, v, _ = draw(1, 8, (4, 2), seed=0, dtype=torch.float32)
    choice = probe_backends(q, k, v, pack([5, 3]), candidates=("varlen", "sdpa"))
    assert choice.name == "sdpa"
    assert "needs bfloat16 on CUDA" in choice.rejected["varlen"]
    with pytest.raises(ValueError, match="no attention backend passed its check: varlen: "):
        probe_backends(q, k, v, pack([5, 3]), candidates=("varlen",))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # what the compilers behind fa4 have to say
@pytest.mark.parametrize("backend", ["varlen", "fa2", "fa3", "fa4", "triton"])
@pytest.mark.parametrize("lengths", [[1], [1000], [1, 500, 64, 3, 432], [128] * 5])
def test_cuda_backends_agree_with_float64(backend: str, lengths: list[int]) -> None:
    if not is_available(backend):
        pytest.skip(f"the package of {backend} is not installed")
    packing = pack(lengths, padded=3)
    packing.cu_seqlens = packing.cu_seqlens.cuda()
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, sum(lengths), heads, 64) for heads in (8, 4, 4, 8)]
    inputs = [torch.randn(s, generator=generator).bfloat16().cuda() for s in shapes]
    narrow = [x.requires_grad_() for x in inputs[:3]] + inputs[3:]
    wide = [x.detach().double().requires_grad_() for x in inputs[:3]] + [inputs[3].double()]
    wanted = forward_backward(attention, wide, packing)
    for got, want in zip(forward_backward(partial(attention, backend=backend), narrow, packing), wanted, strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm() + 1e-4


def segment_by_segment(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Return attention (T, H, E) with every segment's score matrix written out; its queries are its last tokens."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    ys = []
    for (a, b), (c, d) in zip(*(pairwise(x.tolist()) for x in (bounds.queries, bounds.keys)), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q[a:b], k[c:d]) / q.size(2) ** 0.5
        is_hidden = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).triu(d - c - (b - a) + 1)
        ys.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(is_hidden, float("-inf")).softmax(-1), v[c:d]))
    return torch.cat(ys)


def random_bounds(seed: int) -> Bounds:
    """Return bounds on the GPU: empty segments, lengths around the kernel's tiles, and for odd seeds fewer queries."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 200, 255, 257, 384, 700])
    keys = lengths[torch.randint(len(lengths), (12,), generator=generator)]
    keys[3], keys[-2:] = 129, 0
    queries = keys if seed % 2 == 0 else (keys * torch.rand(12, generator=generator)).ceil().long()
    queries[1] *= 1 - seed % 2  # keys that no query reads
    starts = [torch.cat((torch.zeros(1, dtype=torch.long), x.cumsum(0))).int().cuda() for x in (queries, keys)]
    return Bounds(*starts, int(queries.max()), int(keys.max()) + seed)


def random_inputs(bounds: Bounds, heads: tuple[int, int], head_dim: int, seed: int) -> list[Tensor]:
    """Return bfloat16 q, k, v on the GPU, views of one buffer as in the model, and an output gradient."""
    num_queries, num_keys = (int(x[-1]) for x in bounds[:2])
    num_heads, num_kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    joined = torch.randn(num_keys, num_heads + 2 * num_kv_heads, head_dim, generator=generator).bfloat16().cuda()
    q, k, v = joined.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    grad = torch.randn(num_queries, num_heads, head_dim, generator=generator).bfloat16().cuda()
    return [x.detach().requires_grad_() for x in (q[:num_queries], k, v)] + [grad]


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 4), (6, 2)])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_the_triton_kernels_agree_with_float64(heads: tuple[int, int], head_dim: int, seed: int) -> None:
    if not is_available("triton"):
        pytest.skip("no Triton")
    bounds = random_bounds(seed)
    narrow = random_inputs(bounds, heads, head_dim, seed)
    wide = [x.detach().double().requires_grad_() for x in narrow[:3]] + [narrow[3].double()]
    wanted = forward_backward(segment_by_segment, wide, bounds)
    for got, want in zip(forward_backward(VARLEN_KERNELS["triton"], narrow, bounds), wanted, strict=True):
        assert (got.double() - want).norm() <= 0.01 * want.norm() + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_the_triton_kernels_give_the_same_bits_every_time(heads: tuple[int, int]) -> None:
    if not is_available("triton"):
        pytest.skip("no Triton")
    bounds = random_bounds(0)
    inputs = random_inputs(bounds, heads, 64, seed=0)
    first = forward_backward(VARLEN_KERNELS["triton"], inputs, bounds)
    for _ in range(5):
        for got, want in zip(forward_backward(VARLEN_KERNELS["triton"], inputs, bounds), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.gpu
def test_keys_that_no_query_reads_get_gradients_of_zero() -> None:
    if not is_available("triton"):
        pytest.skip("no Triton")
    queries, keys = [0, 0, 100, 100, 140], [0, 300, 400, 465, 565]
    bounds = Bounds(*(torch.tensor(x, dtype=torch.int32, device="cuda") for x in (queries, keys)), 100, 300)
    inputs = random_inputs(bounds, (4, 2), 64, seed=0)
    torch.full((1 << 20,), float("nan"), device="cuda")  # what the gradients' memory holds before they are written
    _, _, grad_k, grad_v = forward_backward(VARLEN_KERNELS["triton"], inputs, bounds)
    is_read = torch.zeros(565, dtype=torch.bool, device="cuda")
    is_read[300:400] = is_read[465:] = True
    for grad in (grad_k, grad_v):
        assert torch.equal(grad.abs().amax((1, 2)) > 0, is_read)
        assert grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
def test_the_tables_of_tiles_hold_every_token_once(seed: int) -> None:
    if not is_available("triton"):
        pytest.skip("no Triton")
    from model.attention.varlen_tiles_triton import list_key_tiles, list_query_tiles

    bounds = random_bounds(seed)
    for list_tiles, own, other in (
        (list_query_tiles, bounds.queries, bounds.keys),
        (list_key_tiles, bounds.keys, bounds.queries),
    ):
        total = int(own[-1])
        table = list_tiles(bounds, total, 64).tolist()
        tiles = table[1 : 1 + table[0][0]]
        rows = sorted(row for first, count, _, _ in tiles for row in range(first, first + min(count, 64)))
        assert rows == list(range(total))
        ends = own[1:].tolist()
        assert all(first + count in ends for first, count, _, _ in tiles)
        assert {first for _, _, first, _ in tiles} <= set(other.tolist())
        lengths = [count + diagonal for _, count, _, diagonal in tiles]  # of the other kind, in the tile's segment
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.gpu
def test_the_triton_kernel_feels_no_neighbor() -> None:
    if not is_available("triton"):
        pytest.skip("no Triton")
    starts = torch.tensor([0, 200, 333, 500], dtype=torch.int32, device="cuda")
    bounds = Bounds(starts, starts, 200, 200)
    inputs = random_inputs(bounds, (4, 4), 64, seed=0)
    wanted = forward_backward(VARLEN_KERNELS["triton"], inputs, bounds)
    spoiled = [x.detach().clone() for x in inputs]
    for x in spoiled:
        x[:200] = float("nan")
        x[333:] = float("inf")
    spoiled = [x.requires_grad_() for x in spoiled[:3]] + spoiled[3:]
    for got, want in zip(forward_backward(VARLEN_KERNELS["triton"], spoiled, bounds), wanted, strict=True):
        assert torch.equal(got[200:333], want[200:333])


def test_another_kernel_is_told_where_segments_lie_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []

    def listen(*args: object) -> Tensor:
        heard.extend(args)
        return q

    monkeypatch.setattr("model.attention.backends._varlen_attn", lambda: listen)
    entries, q = torch.tensor([0, 3, 8], dtype=torch.int32), torch.zeros(8, 2, 16)
    VARLEN_KERNELS["varlen"](q, q, q, Bounds(entries, entries, 5, 5, tables={}))
    assert [x for x in heard if isinstance(x, int)] == [5, 5]
    assert len(heard) == 7  # tables are our own kernels' business
