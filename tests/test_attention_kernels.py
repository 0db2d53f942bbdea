"""Attention's kernels, run in numpy: self_attention by them, forward and backward, is what its plain twin is.

The kernels run in float32 and the twin in float64, over packs and windows that cut tiles at odd places.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.attention
from model.attention import self_attention
from model.attention.backends import VARLEN_KERNELS
from model.attention.bounds import Bounds
from model.attention.self_attention import Factors, HeadGate, Rows
from model.data.packing import cu_seqlens_from_bos
from model.layers import rotary_tables
from tests.fake_triton import load_kernels

TIME, HEAD_DIM, ROPE_DIMS, GATE_WIDTH = 90, 16, 8, 5
PACK = Rows(cu_seqlens_from_bos(np.array([0, 1, 2, 20]), TIME, max_segment=67))
ROWS = {
    "pack": (PACK, 1),
    "windows": (Rows(), 2),
    "padded windows": (Rows(None, torch.tensor([0, 89])), 2),
    "narrow padded windows": (Rows(None, torch.tensor([0, 10, 85]), 66), 3),
}


def other_kernel(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Return attention by its definition; it stands for others' kernels, which see as many keys as queries."""
    assert q.size(1) == k.size(1) or not q.requires_grad
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    ys = []
    for (a, b), (c, d) in zip(*(pairwise(x.tolist()) for x in (bounds.queries, bounds.keys)), strict=True):
        scores = torch.einsum("qhe,khe->hqk", q[a:b], k[c:d]) / q.size(2) ** 0.5
        is_hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
        ys.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(is_hidden, float("-inf")).softmax(-1), v[c:d]))
    return torch.cat(ys)


@pytest.fixture(params=["triton", "fa2"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve float32 by the kernels and this attention, and float64 by the twin."""
    products = load_kernels(Path(self_attention.__file__).parent.with_name("kernels") / "mlp_triton.py", monkeypatch)
    monkeypatch.setattr(products, "grid", lambda *_: (3,))
    monkeypatch.setitem(sys.modules, "model.kernels.mlp_triton", products)
    for name in ("heads", "heads_product", "gate", "varlen_tiles", "varlen_backward", "varlen"):
        path = Path(self_attention.__file__).with_name(f"{name}_triton.py")
        kernels = load_kernels(path, monkeypatch)
        monkeypatch.setitem(sys.modules, f"model.attention.{name}_triton", kernels)
        monkeypatch.setattr(model.attention, f"{name}_triton", kernels, raising=False)
        if name == "gate":
            monkeypatch.setattr(kernels, "SPREAD_PROGRAMS", 3)
            monkeypatch.setattr(kernels, "SPREAD_ROWS", 8)
        if name == "heads_product":
            monkeypatch.setattr(kernels, "TILING", products.Tiling(8, 64, 8, 1, 1, 1))
            monkeypatch.setattr(kernels, "fits_heads", lambda x, *_sizes: x.dtype == torch.float32)
    monkeypatch.setattr(self_attention, "uses_triton", lambda x, *_sizes: x.dtype == torch.float32)
    monkeypatch.setattr(self_attention, "resolve_backend", lambda *_args, **_options: request.param)
    monkeypatch.setitem(VARLEN_KERNELS, "fa2", other_kernel)
    name: str = request.param
    return name


def outputs_and_gradients(
    inputs: list[Tensor], rows: Rows, how: dict[str, object], grad: Tensor, rope_dims: int = ROPE_DIMS
) -> list[Tensor]:
    """Return self_attention's output and the gradients of qkv, gain and the gate's columns and weights."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    qkv, gain, *gate = leaves
    positions = torch.arange(TIME)
    if rows.left_padding is not None:
        positions = (positions - rows.left_padding[:, None]).clamp_min(0)
    tables = rotary_tables(positions, rope_dims=rope_dims, base=1e4, dtype=torch.float32)
    tables = (tables[0].to(qkv.dtype), tables[1].to(qkv.dtype))
    how = how | {"gate": HeadGate(gate[0], gate[1]) if gate else None}
    y = self_attention.self_attention(qkv, *tables, gain, rows, **how)  # type: ignore[arg-type]
    return [y, *torch.autograd.grad((y.double() * grad).sum(), leaves)]


@pytest.mark.parametrize(("is_value_excluded", "is_gated"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("rows", "heads"), [*((rows, (4, 2)) for rows in ROWS), ("pack", (2, 2)), ("pack", (4, 1))])
def test_self_attention_by_its_kernels(
    backend: str, rows: str, heads: tuple[int, int], is_value_excluded: bool, is_gated: bool
) -> None:
    layout, batch = ROWS[rows]
    num_heads, num_kv_heads = heads
    n = layout.num_queries or TIME
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = [draw(batch, TIME, (num_heads + 2 * num_kv_heads) * HEAD_DIM), 1 + 0.3 * draw(num_heads)]
    if is_gated:
        inputs += [draw(batch, n, GATE_WIDTH), draw(num_heads, GATE_WIDTH)]
        inputs[2][:, -3] *= 1e4  # a factor of exactly zero or two
    values = inputs[0][..., -num_kv_heads * HEAD_DIM :]
    values[:, -2] *= 1e-14  # below what a length is held at
    values[:, -5] = 0
    grad = draw(batch, n, num_heads * HEAD_DIM).double()
    if layout.left_padding is not None:  # what padding computes is nobody's business
        grad *= (torch.arange(TIME - n, TIME) >= layout.left_padding[:, None]).unsqueeze(-1)
    how = {"num_kv_heads": num_kv_heads, "is_value_excluded": is_value_excluded}
    found = outputs_and_gradients(inputs, layout, how, grad)
    wanted = outputs_and_gradients([x.double() for x in inputs], layout, how, grad)
    real = grad.abs().amax(-1, keepdim=True) > 0
    for got, right in zip([found[0] * real, *found[1:]], [wanted[0] * real, *wanted[1:]], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rope_dims", [HEAD_DIM, 12, 2])
@pytest.mark.parametrize("rows", ["pack", "narrow padded windows"])
def test_gradients_are_turned_back_by_any_number_of_columns(backend: str, rows: str, rope_dims: int) -> None:
    """A gain of exactly zero leaves nothing to find its gradient by: it gets zero, and its head's queries too."""
    layout, batch = ROWS[rows]
    n = layout.num_queries or TIME
    generator = torch.Generator().manual_seed(1)
    qkv, grad = (torch.randn(batch, size, width, generator=generator) for size, width in ((TIME, 128), (n, 64)))
    if layout.left_padding is not None:
        grad *= (torch.arange(TIME - n, TIME) >= layout.left_padding[:, None]).unsqueeze(-1)
    inputs, how = [qkv, torch.tensor([1.5, 0, -0.7, 1e-3])], {"num_kv_heads": 2, "is_value_excluded": True}
    found = outputs_and_gradients(inputs, layout, how, grad.double(), rope_dims)
    wanted = outputs_and_gradients([x.double() for x in inputs], layout, how, grad.double(), rope_dims)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-4, atol=1e-4)
    assert found[2][1] == 0
    assert torch.equal(found[1][..., HEAD_DIM : 2 * HEAD_DIM], torch.zeros(batch, TIME, HEAD_DIM))
    wanted[2][1] = 0
    torch.testing.assert_close(found[2].double(), wanted[2], rtol=1e-3, atol=1e-3)


def test_a_frozen_gain_changes_no_other_gradient(backend: str) -> None:
    qkv, gain = torch.randn(1, TIME, 8 * HEAD_DIM), torch.tensor([1.5, 0.5, -0.7, 1.0])
    tables = rotary_tables(torch.arange(TIME), rope_dims=ROPE_DIMS, base=1e4, dtype=torch.float32)
    found = []
    for is_frozen in (False, True):
        leaves = [qkv.clone().requires_grad_(), gain.clone().requires_grad_(not is_frozen)]
        y = self_attention.self_attention(leaves[0], *tables, leaves[1], PACK, num_kv_heads=2, is_value_excluded=True)
        y.square().sum().backward()
        found.append(leaves[0].grad)
        assert (leaves[1].grad is None) == is_frozen
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
@pytest.mark.parametrize("is_value_excluded", [False, True])
def test_our_attention_keeps_each_head_once_and_where_it_stood(backend: str, is_value_excluded: bool) -> None:
    """Kept for the backward: the heads, the output that the next product keeps anyway, and few numbers a head."""
    qkv = torch.randn(1, TIME, 8 * HEAD_DIM, requires_grad=True)
    tables = rotary_tables(torch.arange(TIME), rope_dims=ROPE_DIMS, base=1e4, dtype=torch.float32)
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        y = self_attention.self_attention(
            qkv, *tables, torch.ones(4), PACK, num_kv_heads=2, is_value_excluded=is_value_excluded
        )
    kept.pop(y.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) <= TIME * (8 * HEAD_DIM + ROPE_DIMS + 3 * 4 + 2) + 4
    assert qkv.untyped_storage().data_ptr() in kept, "the heads are not turned where they stand"


def test_visits_share_where_their_segments_lie(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once a pass for whole rows, and once for the last visit's fewer queries; without tables by each visit."""
    made: list[int] = []

    def count(*arguments: Any, make: Any = self_attention.window_bounds) -> Bounds:
        made.append(arguments[3])
        bounds: Bounds = make(*arguments)
        return bounds

    monkeypatch.setattr(self_attention, "window_bounds", count)
    qkv, positions = torch.randn(2, TIME, 8 * HEAD_DIM), torch.arange(TIME)
    cos, sin = rotary_tables(positions, rope_dims=ROPE_DIMS, base=1e4, dtype=torch.float32)
    for tables, wanted in ((None, [TIME, TIME, 66]), ({}, [TIME, 66])):
        made.clear()
        found = []
        for num_queries in (None, None, 66):
            rows = Rows(None, torch.tensor([0, 89]), num_queries, tables)
            how = {"num_kv_heads": 2, "is_value_excluded": True}
            found.append(self_attention.self_attention(qkv.clone(), cos, sin, torch.ones(4), rows, **how))  # type: ignore[arg-type]
        assert made == wanted
        assert torch.equal(found[0], found[1])
        torch.testing.assert_close(found[2][0], found[0][0, -66:])


@pytest.mark.parametrize(("rows", "heads"), [*((rows, (4, 2)) for rows in ROWS), ("pack", (2, 2)), ("pack", (4, 1))])
def test_self_attention_that_makes_its_projections(backend: str, rows: str, heads: tuple[int, int]) -> None:
    """The kernel that multiplies gives what is multiplied apart, to any layout; whoever listens hears the input."""
    layout, batch = ROWS[rows]
    num_heads, num_kv_heads = heads
    width, n = (num_heads + 2 * num_kv_heads) * HEAD_DIM, layout.num_queries or TIME
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(shape, generator=generator)
        for shape in ((batch, TIME, 20), (width, 20), (num_heads,), (batch, n, GATE_WIDTH), (num_heads, GATE_WIDTH))
    ]
    grad = torch.randn(batch, n, num_heads * HEAD_DIM, generator=generator).double()
    if layout.left_padding is not None:
        grad *= (torch.arange(TIME - n, TIME) >= layout.left_padding[:, None]).unsqueeze(-1)
    heard: list[tuple[Tensor, str]] = []

    def apply(x: Tensor, weight: Tensor, function: Callable[..., Any] = F.linear) -> Any:
        heard.append((x.detach().reshape(inputs[0].shape), "plain" if function is F.linear else "own"))
        return function(x, weight)

    def made(*given: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in given]
        x, weight, gain, *gate = leaves
        positions = torch.arange(TIME)
        if layout.left_padding is not None:
            positions = (positions - layout.left_padding[:, None]).clamp_min(0)
        cos, sin = rotary_tables(positions, rope_dims=ROPE_DIMS, base=1e4, dtype=torch.float32)
        y = self_attention.self_attention(
            Factors(x, weight, apply), cos.to(x.dtype), sin.to(x.dtype), gain, layout, num_kv_heads=num_kv_heads,
            is_value_excluded=True, gate=HeadGate(*gate),
        )  # fmt: skip
        return [y, *torch.autograd.grad((y.double() * grad).sum(), leaves)]

    found, wanted = made(*inputs), made(*(x.double() for x in inputs))
    assert [kind for _, kind in heard] == ["own" if backend == "triton" else "plain", "plain"]
    assert torch.equal(heard[0][0], inputs[0])
    real = grad.abs().amax(-1, keepdim=True) > 0
    for got, right in zip([found[0] * real, *found[1:]], [wanted[0] * real, *wanted[1:]], strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4 * float(right.detach().abs().max()))


def test_the_product_kernel_is_asked_for_whole_heads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    products = load_kernels(Path(self_attention.__file__).parent.with_name("kernels") / "mlp_triton.py", monkeypatch)
    monkeypatch.setitem(sys.modules, "model.kernels.mlp_triton", products)
    monkeypatch.setattr(products, "has_bulk_copies", lambda _device: True)
    kernels = load_kernels(Path(self_attention.__file__).with_name("heads_product_triton.py"), monkeypatch)
    x = torch.zeros(128, 64, dtype=torch.bfloat16)
    sizes = [(64, 8), (32, 8), (64, 16), (64, 32), (64, 4), (64, 24), (128, 8), (48, 8)]
    assert [kernels.fits_heads(x, *each) for each in sizes] == [True] * 4 + [False] * 4
    assert not kernels.fits_heads(x[:127], 64, 8)
    assert not kernels.fits_heads(x.half(), 64, 8)
