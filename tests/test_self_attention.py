"""The node of attention on a GPU agrees with its plain twin in float64; bounds and packings say what it may see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention.backends import attention, is_available
from model.attention.bounds import window_bounds
from model.attention.self_attention import Factors, Rows, self_attention
from model.attention.window import window_attention
from model.data.packing import Packing, cu_seqlens_from_bos
from model.gpt import Projection
from model.layers import rotary_tables
from tests.kernel_tools import check, draw, relative_error, vector

# query heads, kv heads, head_dim, rotated
HEADS = [(8, 4, 64, 16), (4, 2, 32, 16), (4, 4, 16, 8), (8, 1, 64, 64), (4, 2, 128, 128), (4, 2, 64, 24)]


def check_heads(
    heads: tuple[int, int, int, int], batch: int, time: int, rows: Rows, positions: Tensor, **how: Any
) -> None:
    """Compare self_attention with its twin; positions (T or B x T)."""
    how = {"is_value_excluded": True} | how
    num_heads, num_kv_heads, head_dim, rope_dims = heads
    n = rows.num_queries or time
    keep = torch.ones(batch, n, 1, device="cuda")
    if rows.left_padding is not None:  # what padding computes is nobody's business
        keep = (torch.arange(time - n, time, device="cuda") >= rows.left_padding[:, None]).float().unsqueeze(-1)

    def function(qkv: Tensor, gain: Tensor) -> Tensor:
        cos, sin = rotary_tables(positions, rope_dims=rope_dims, base=1e4, dtype=torch.float32)
        wide = qkv.dtype == torch.float64
        tables = (cos.double(), sin.double()) if wide else (cos, sin)
        served = {"backend": "auto"} if wide else {}
        y = self_attention(qkv, *tables, gain, rows, num_kv_heads=num_kv_heads, **how | served)
        return y.masked_fill(keep == 0, 0.0)

    check(function, [draw(batch, time, (num_heads + 2 * num_kv_heads) * head_dim), vector(num_heads)], tolerance=0.03)


WAYS = [(True, "auto"), (False, "auto"), (True, "varlen"), (False, "varlen")]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "is_value_excluded", "backend"),
    [*((HEADS[0], *way) for way in WAYS), *((heads, *WAYS[0]) for heads in HEADS[1:])],
)
@pytest.mark.parametrize("starts", [[0], [0, 1, 2, 150], [0, 64, 128, 700, 701]])
def test_self_attention_over_a_pack(
    heads: tuple[int, int, int, int], starts: list[int], is_value_excluded: bool, backend: str
) -> None:
    time = 1000
    packing = cu_seqlens_from_bos(np.array(starts), time, max_segment=256).to("cuda")
    how = {"is_value_excluded": is_value_excluded, "backend": backend}
    check_heads(heads, 1, time, Rows(packing), torch.arange(time, device="cuda"), **how)


@pytest.mark.gpu
@pytest.mark.parametrize("num_queries", [None, 64])
@pytest.mark.parametrize(
    ("heads", "padding", "backend"),
    [
        *(
            (heads, padding, "auto")
            for heads in (*HEADS[:2], HEADS[4])
            for padding in (None, [0, 100, 37], [0, 200, 255])
        ),
        (HEADS[0], None, "varlen"),
    ],
)
def test_self_attention_over_windows(
    heads: tuple[int, int, int, int], num_queries: int | None, padding: list[int] | None, backend: str
) -> None:
    left_padding = None if padding is None else torch.tensor(padding, device="cuda")
    positions = torch.arange(256, device="cuda")
    if left_padding is not None:
        positions = (positions - left_padding[:, None]).clamp_min(0)
    check_heads(heads, 3, 256, Rows(None, left_padding, num_queries), positions, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_queries", [None, 70])
def test_a_frozen_gain_or_one_of_zero_and_rows_that_nobody_asks_for(head_dim: int, num_queries: int | None) -> None:
    """Every number of a gradient is written: what lay in its memory before, not a number, is nowhere in it."""
    time, n = 200, num_queries or 200
    qkv, grad, gain = draw(2, time, 16 * head_dim), draw(2, n, 8 * head_dim), vector(8)
    gain[3] = 0
    tables = rotary_tables(torch.arange(time, device="cuda"), rope_dims=16, base=1e4, dtype=torch.float32)
    found = []
    for is_frozen in (False, True):
        leaves = [qkv.clone().requires_grad_(), gain.clone().requires_grad_(not is_frozen)]
        y = self_attention(
            leaves[0], *tables, leaves[1], Rows(num_queries=num_queries), num_kv_heads=4, is_value_excluded=True
        )
        torch.full((1 << 24,), float("nan"), device="cuda")
        found.append(torch.autograd.grad(y, [x for x in leaves if x.requires_grad], grad))
    (grad_qkv, grad_gain), (alone,) = found
    assert relative_error(alone, grad_qkv) < 1e-3  # sums may come in another order
    assert grad_qkv.isfinite().all()
    assert grad_gain.isfinite().all()
    assert grad_gain[3] == 0
    queries = grad_qkv[..., : 8 * head_dim].reshape(2, time, 8, head_dim).abs().amax(-1)
    assert not queries[:, : time - n].any()
    assert not queries[:, :, 3].any()
    assert queries[:, max(time - n, 1) :, :3].all()  # the first token sees nothing but itself


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[1], (2, 2, 32, 16), (2, 1, 64, 64)])
@pytest.mark.parametrize("num_queries", [None, 64])
def test_self_attention_that_makes_its_projections(heads: tuple[int, int, int, int], num_queries: int | None) -> None:
    num_heads, num_kv_heads, head_dim, rope_dims = heads
    heard = []

    def apply(x: Tensor, weight: Tensor, function: Callable[..., Any] = F.linear) -> Any:
        heard.append((x.dtype, function is F.linear))
        return function(x, weight)

    def function(x: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
        cos, sin = rotary_tables(torch.arange(300, device="cuda"), rope_dims=rope_dims, base=1e4, dtype=torch.float32)
        tables = (cos.double(), sin.double()) if x.dtype == torch.float64 else (cos, sin)
        rows = Rows(num_queries=num_queries)
        how: dict[str, Any] = {"num_kv_heads": num_kv_heads, "is_value_excluded": True}
        return self_attention(Factors(x, weight, apply), *tables, gain, rows, **how)

    weight = draw((num_heads + 2 * num_kv_heads) * head_dim, 200, scale=200**-0.5)
    check(function, [draw(3, 300, 200), weight, vector(num_heads)], tolerance=0.03)
    assert set(heard) == {(torch.float64, True), (torch.bfloat16, not is_available("triton"))}


@pytest.mark.gpu
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("rows", [Rows(), Rows(num_queries=100)])
def test_self_attention_gives_the_same_bits_every_time(rows: Rows, has_weight: bool) -> None:
    weight = draw(16 * 64, 512, scale=512**-0.5).requires_grad_() if has_weight else None
    x, gain = draw(3, 300, 512 if has_weight else 16 * 64).requires_grad_(), vector(8).requires_grad_()
    tables = rotary_tables(torch.arange(300, device="cuda"), rope_dims=16, base=1e4, dtype=torch.float32)
    grad = draw(3, rows.num_queries or 300, 8 * 64)

    def attend() -> Tensor:
        # a copy, for it is overwritten
        qkv = x.clone() if weight is None else Factors(x, weight, Projection())
        return self_attention(qkv, *tables, gain, rows, num_kv_heads=4, is_value_excluded=True)

    def outputs() -> list[Tensor]:
        y = attend()
        with torch.no_grad():
            assert torch.equal(attend(), y)
        return [y, *torch.autograd.grad(y, [t for t in (x, gain, weight) if t is not None], grad)]

    first = outputs()
    for _ in range(3):
        assert all(map(torch.equal, outputs(), first))


@settings(max_examples=30, deadline=None)
@given(padding=st.lists(st.integers(0, 11), min_size=1, max_size=4), num_queries=st.sampled_from([3, 12]))
def test_window_bounds_say_what_window_attention_does(padding: list[int], num_queries: int) -> None:
    """Attention segment by segment, queries at the segment's end, gives the rows of window_attention."""
    generator = torch.Generator().manual_seed(len(padding))
    rows, time = len(padding), 12
    q, k, v = (torch.randn(rows, n, 2, 4, generator=generator, dtype=torch.float64) for n in (num_queries, time, time))
    left_padding = torch.tensor(padding)
    bounds = window_bounds(left_padding, rows, time, num_queries, torch.device("cpu"))
    assert bounds.queries[-1] == rows * num_queries
    assert bounds.keys[-1] == rows * time
    wanted = window_attention(q, k, v, left_padding).flatten(0, 1)
    flat_q, flat_k, flat_v = (x.flatten(0, 1) for x in (q, k, v))
    for i in range(1, 2 * rows, 2):  # the odd segments are the rows, the even ones their padding
        keys, queries = (slice(int(x[i]), int(x[i + 1])) for x in (bounds.keys, bounds.queries))
        count = queries.stop - queries.start
        lead = keys.stop - keys.start - count
        padded_q = torch.cat((flat_k[keys][:lead], flat_q[queries])).unsqueeze(0)
        got = attention(padded_q, flat_k[keys].unsqueeze(0), flat_v[keys].unsqueeze(0))[0, lead:]
        torch.testing.assert_close(got, wanted[queries], rtol=1e-10, atol=1e-12)


def test_packing_is_a_bound_on_whole_rows_too() -> None:
    bounds = window_bounds(None, 3, 7, 2, torch.device("cpu"))
    assert bounds.queries.tolist() == [0, 2, 4, 6]
    assert bounds.keys.tolist() == [0, 7, 14, 21]
    assert isinstance(Rows(Packing(bounds.keys, 7)).packing, Packing)
