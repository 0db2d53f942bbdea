"""Fused kernels: on a GPU each agrees with its plain twin in float64, forward and backward, over random shapes.

The twin is the same function: it serves float64 anywhere, so every comparison is one call in bf16 and one in float64.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import model.kernels
from model.attention.backends import attention, is_available
from model.attention.bounds import window_bounds
from model.attention.self_attention import Factors, Rows, self_attention
from model.attention.window import window_attention
from model.data.packing import Packing, cu_seqlens_from_bos
from model.gpt import GPT, Projection
from model.kernels import cross_entropy
from model.kernels.adapters import LowRank, adapt_product, add_product
from model.kernels.cross_entropy import projected_cross_entropy, softcap_cross_entropy
from model.kernels.lanes import merge_norm
from model.kernels.mlp import mlp, project_and_activate
from model.kernels.residual import Mix, Skip, Stream, add_norm, mix_norm
from model.layers import rotary_tables
from model.presets import tiny
from tests.fake_triton import load_kernels

TOLERANCE = 0.01  # relative, of whole tensors: bf16 rounds each number by up to 0.004
SHAPES = [(1, 1, 64), (1, 13, 512), (2, 100, 512), (3, 7, 48), (1, 5000, 512)]
Function = Callable[..., Tensor | Sequence[Tensor]]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted| over the whole tensor."""
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def run(
    function: Function, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], *, is_frozen: bool = False
) -> list[Tensor]:
    """Return the outputs and the gradients of the inputs, or, as in adaptation, of those that are no parameters."""
    leaves = [x if x is None else x.detach().clone().requires_grad_(not is_frozen or x.dim() >= 3) for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((y.double() * g).sum() for y, g in zip(outputs, grads, strict=True))
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x is not None and x.requires_grad])]


def check(function: Function, inputs: Sequence[Tensor | None], *, tolerance: float = TOLERANCE) -> None:
    """Compare function in bf16 (vectors in float32) on the GPU with itself in float64."""
    torch.manual_seed(1)
    wide = [x if x is None else x.double() for x in inputs]
    with torch.no_grad():
        shapes = function(*wide)
    shapes = [shapes] if isinstance(shapes, Tensor) else shapes
    grads = [torch.randn_like(y) for y in shapes]
    for is_frozen in (False, True):
        found = [run(function, each, grads, is_frozen=is_frozen) for each in (inputs, wide)]
        for number, (got, wanted) in enumerate(zip(*found, strict=True)):
            assert relative_error(got, wanted) < tolerance, f"tensor {number} of outputs and gradients, {is_frozen=}"


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """Return random bf16 numbers on the GPU."""
    return (scale * torch.randn(shape, device="cuda")).bfloat16()


def vector(*shape: int) -> Tensor:
    """Return a random float32 parameter on the GPU, away from zero."""
    return 1 + 0.3 * torch.randn(shape, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_delta", [False, True])
def test_add_norm_kernel(shape: tuple[int, ...], has_delta: bool) -> None:
    check(lambda x, d: add_norm(Stream(x, d), 0.7), [draw(*shape), draw(*shape) if has_delta else None])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("has_skip", [False, True])
def test_mix_norm_kernel(shape: tuple[int, ...], has_delta: bool, has_skip: bool) -> None:
    width = shape[-1]

    def function(x: Tensor, d: Tensor, first: Tensor, mix: Tensor, *skip: Tensor) -> tuple[Tensor, ...]:
        mixed = mix_norm(Stream(x, d), Mix(first, mix), 0.7, Skip(*skip) if has_skip else None)
        return tuple(y for y in mixed if y is not None)  # the first state too, as a later visit has it

    inputs = [draw(*shape), draw(*shape) if has_delta else None, draw(*shape), vector(2, width)]
    check(function, inputs + ([draw(*shape), vector(width), vector(width)] if has_skip else []))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[1:])  # the scalar's gradient is a sum over everything: one row cancels
def test_merge_norm_kernel(shape: tuple[int, ...]) -> None:
    inputs = [*(draw(*shape) for _ in range(4)), torch.tensor(0.4, device="cuda")]
    check(lambda a, da, b, db, share: merge_norm(Stream(a, da), Stream(b, db), share), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 7, 64, 128), (2, 300, 512, 2048), (1, 33, 48, 100), (3, 77, 40, 264), (1, 200, 72, 520)]
)
def test_mlp_node(shape: tuple[int, ...]) -> None:
    batch, time, width, hidden = shape
    weights = [draw(hidden, width, scale=width**-0.5), draw(width, hidden, scale=hidden**-0.5)]
    check(
        lambda x, up, down: mlp(x, up, down, project_and_activate, F.linear, 0.5), [draw(batch, time, width), *weights]
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "time"), [(1, 128), (3, 200), (2, 1984), (5, 64)])  # 64: not by the one kernel
@pytest.mark.parametrize(("kinds", "rank"), [("qkvo", 96), ("qvo", 80)])
def test_adapted_product(rows: int, time: int, kinds: str, rank: int) -> None:
    """Queries, keys and values at once; a tile that reaches beyond a row's end must not touch the next row."""
    weight = draw(1024, 512, scale=512**-0.5)
    places = {"q": (0, 512), "k": (512, 768), "v": (768, 1024)}
    columns = {kind: places[kind] for kind in kinds[:-1]}

    out_weight = draw(512, 512, scale=512**-0.5)

    def function(x: Tensor, seen: Tensor, a: Tensor, *b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        adapters = LowRank(a, dict(zip(kinds, b, strict=True)))  # that of o is for another product
        y, rest = adapt_product(x, weight.to(x.dtype), adapters, columns, F.linear)
        assert rest is not None
        return y, rest, add_product(seen, out_weight.to(x.dtype), rest, adapters, "o", F.linear)

    widths = [*(end - first for first, end in columns.values()), 512]
    b = [draw(rows, width, rank, scale=rank**-0.5) for width in widths]
    inputs = [draw(rows, time, 512), draw(rows, time, 512), draw(rows, len(kinds) * rank, 512, scale=512**-0.5), *b]
    check(function, inputs, tolerance=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [256, 1000, 8192])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_kernel(vocab: int, reduction: str) -> None:
    targets = torch.randint(vocab, (2, 150), device="cuda")

    def function(logits: Tensor) -> Tensor:
        return softcap_cross_entropy(logits * 1, targets, 30.0, reduction=reduction)  # a copy: it is overwritten

    logits = draw(2, 150, vocab, scale=15.0)
    check(function, [logits])
    with torch.no_grad():
        before = logits.clone()
        got = softcap_cross_entropy(logits, targets, 30.0, reduction=reduction)
        assert torch.equal(logits, before)
        assert relative_error(got, softcap_cross_entropy(logits.double(), targets, 30.0, reduction=reduction)) < 1e-5


@pytest.mark.parametrize("vocab", [64, 50])
@pytest.mark.parametrize("cap", [30.0, 80.0, 88.0, 200.0, 5000.0])
def test_the_cross_entropy_kernel_is_finite_and_right_under_any_cap(
    cap: float, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels(Path(cross_entropy.__file__).with_name("cross_entropy_triton.py"), monkeypatch)
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([0.0, 0.0, -60.0, 60.0, -3 * cap, 3 * cap]).unsqueeze(1)
    logits = middles + torch.randn(6, vocab, generator=generator)
    logits[1] *= 20
    targets = torch.randint(vocab, (6,), generator=generator)
    exact = logits.double().requires_grad_()
    wanted = softcap_cross_entropy(exact.unsqueeze(0), targets.unsqueeze(0), cap, reduction="none")[0]
    (grad,) = torch.autograd.grad(wanted.sum(), exact)
    assert relative_error(kernels.row_nll(logits.clone(), targets, cap), wanted) < 1e-5
    overwritten = logits.clone()
    nll = kernels.row_nll(overwritten, targets, cap, 1.0)
    assert torch.isfinite(nll).all()
    assert torch.isfinite(overwritten).all()
    assert float((overwritten - grad).abs().max()) < 2e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_projected_loss_makes_its_gradients_part_by_part(
    reduction: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels(Path(cross_entropy.__file__).with_name("cross_entropy_triton.py"), monkeypatch)
    monkeypatch.setitem(sys.modules, "model.kernels.cross_entropy_triton", kernels)
    monkeypatch.setattr(model.kernels, "cross_entropy_triton", kernels, raising=False)
    monkeypatch.setattr(kernels, "LOGIT_ROWS", 4)  # of ten: two whole parts and a shorter one
    monkeypatch.setattr(cross_entropy, "uses_triton", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (50, 8)))
    targets, heard = torch.randint(50, (2, 5), generator=generator), []

    def project(x: Tensor, weight: Tensor) -> Tensor:
        heard.append(x.dtype)
        return F.linear(x, weight)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return factor * projected_cross_entropy(x, weight, targets, 30.0, project, reduction=reduction)

    exact = run(loss, [x.double(), weight.double()], [torch.ones((), dtype=torch.float64)])
    for got, wanted in zip(run(loss, [x, weight], [torch.ones(())]), exact, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert heard == [torch.float64], "logits were made as a whole"
    with torch.no_grad():
        assert relative_error(loss(x, weight), exact[0]) < 1e-5
    again = loss(x.clone().requires_grad_(), weight)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward of this loss is not possible"):
        again.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_cross_entropy(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels import cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "LOGIT_ROWS", 128)  # of 300: two whole parts and a shorter one
    targets = torch.randint(8192, (2, 150), device="cuda")

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return projected_cross_entropy(x, weight, targets, 30.0, F.linear, reduction=reduction)

    weight = draw(8192, 512, scale=0.3).to(dtype)
    check(function, [draw(2, 150, 512), weight])
    x = draw(2, 150, 512).requires_grad_()
    losses = [projected_cross_entropy(x, weight, targets, 30.0, F.linear, reduction=reduction) for _ in range(2)]
    assert torch.equal(*(torch.autograd.grad(loss.sum(), x)[0] for loss in losses))


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [30.0, 80.0, 88.0, 1000.0])
def test_cross_entropy_kernel_under_any_cap(cap: float) -> None:
    targets = torch.randint(1000, (2, 150), device="cuda")
    for middle in (0.0, -60.0, 60.0):
        logits = draw(2, 150, 1000, scale=5.0) + middle
        check(lambda x: softcap_cross_entropy(x * 1, targets, cap), [logits])


@pytest.mark.gpu
def test_overwritten_logits_cannot_be_used_by_another_backward() -> None:
    hidden = draw(1, 8, 64).requires_grad_()
    logits = hidden * 2
    squares = (logits * logits).sum()  # keeps the logits for its backward
    loss = softcap_cross_entropy(logits, torch.zeros(1, 8, dtype=torch.long, device="cuda"), 30.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()


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


@pytest.mark.gpu
@pytest.mark.parametrize("is_looped", [False, True])
def test_the_model_in_bf16_agrees_with_itself_in_float64(is_looped: bool) -> None:
    """One micro-batch through every node at once, loss and gradients; and evaluation gives the same loss."""
    config = replace(tiny().model, model_dim=256, num_heads=4, num_kv_heads=2)
    time = 700
    packing = cu_seqlens_from_bos(np.array([0, 5, 300, 301]), time, max_segment=256).to("cuda")
    tokens, targets = torch.randint(config.vocab_size, (2, 1, time), device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        model = GPT(config, compute_dtype=dtype)
        model.init_weights(1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for bank in (model.qo_bank[config.num_layers :], model.mlp_down_bank):
                bank.copy_(0.05 * torch.randn(bank.shape, generator=generator))
        model = model.to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
        loss = model(tokens, targets, is_looped=is_looped, packing=packing)
        loss.backward()
        with torch.no_grad():
            again = model(tokens, targets, is_looped=is_looped, packing=packing, reduction="none").mean()
        torch.testing.assert_close(loss.detach(), again, rtol=1e-5, atol=0)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((float(loss.detach()), torch.cat([g.double().flatten() for g in grads])))
    (narrow_loss, narrow), (wide_loss, wide) = found
    assert abs(narrow_loss / wide_loss - 1) < 0.002
    assert relative_error(narrow, wide) < 0.06  # bf16 noise over all layers: 0.038 measured


# ---- what runs without a GPU ----------------------------------------------------------------------------------------


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


def test_the_plain_twins_are_the_written_out_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x, d, first, other = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    mix, weight, gate = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (2, 1, 1))

    def rms(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()

    share = torch.sigmoid(gate[0])
    merged = share * (x + d) + (1 - share) * weight[0] * other
    mixed = mix[0] * merged + mix[1] * first
    found = mix_norm(Stream(x, d), Mix(first, mix), 0.5, Skip(other, weight[0], gate[0]))[:3]
    for got, wanted in zip(found, (merged, mixed, 0.5 * rms(mixed)), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(add_norm(Stream(x, d), 0.5)[1], 0.5 * rms(x + d))
    merged = merge_norm(Stream(x, d), Stream(first, other), torch.tensor(0.25))
    torch.testing.assert_close(merged, rms(0.25 * (x + d) + 0.75 * (first + other)))


def test_packing_is_a_bound_on_whole_rows_too() -> None:
    bounds = window_bounds(None, 3, 7, 2, torch.device("cpu"))
    assert bounds.queries.tolist() == [0, 2, 4, 6]
    assert bounds.keys.tolist() == [0, 7, 14, 21]
    assert isinstance(Rows(Packing(bounds.keys, 7)).packing, Packing)
