# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the residual stream: add, merge a skip, mix with the first state, normalize, in one pass."""

# N rows (tokens), D columns (model_dim), P programs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch

EPS: tl.constexpr = tl.constexpr(2.0**-23)
ROWS = 4  # rows of one tile: 16 numbers a thread at 512 columns and 4 warps
BACKWARD_PROGRAMS = 132 * 16  # each adds up the column sums of its rows; the host adds the programs


@triton.jit
def _forward(
    x_ptr, delta_ptr, skip_ptr, first_ptr, mix_ptr, weight_ptr, gate_ptr, sum_ptr, mixed_ptr, normed_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_MIX: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SKIP:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=cols < D, other=0.0).to(tl.float32))[None, :]
        skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (1 - gate) * weight * skip + gate * x
    if HAS_DELTA or HAS_SKIP:
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if HAS_MIX:
        a = tl.load(mix_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        b = tl.load(mix_ptr + D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        x = a * x + b * tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(mixed_ptr + at, x.to(mixed_ptr.dtype.element_ty), mask=inside)
    inverse = scale * tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(normed_ptr + at, (x * inverse[:, None]).to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_sum_ptr, grad_mixed_ptr, grad_normed_ptr, sum_ptr, mixed_ptr, skip_ptr, first_ptr, mix_ptr, weight_ptr,
    gate_ptr, grad_x_ptr, grad_skip_ptr, grad_first_ptr, partial_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_MIX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    known = cols < D
    a = tl.full((1, COLS), 1.0, tl.float32)
    b, weight, gate = a, a, a
    if HAS_MIX:
        a = tl.load(mix_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        b = tl.load(mix_ptr + D + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    if HAS_SKIP:
        weight = tl.load(weight_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=known, other=0.0).to(tl.float32))[None, :]
    sum_a = tl.zeros((ROWS, COLS), tl.float32)
    sum_b = tl.zeros((ROWS, COLS), tl.float32)
    sum_weight = tl.zeros((ROWS, COLS), tl.float32)
    sum_gate = tl.zeros((ROWS, COLS), tl.float32)
    num_tiles = (num_rows + ROWS - 1) // ROWS
    for tile in range(program, num_tiles, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = rows[:, None] * D + cols[None, :]
        inside = (rows < num_rows)[:, None] & known[None, :]
        normalized = tl.load(mixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + at, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(normalized * normalized, axis=1) / D + EPS)[:, None]
        normalized *= inverse
        along = tl.sum(grad * normalized, axis=1)[:, None] / D
        grad = scale * inverse * (grad - normalized * along)
        if HAS_MIX:
            grad += tl.load(grad_mixed_ptr + at, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
            first = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_a += grad * x
            sum_b += grad * first
            tl.store(grad_first_ptr + at, (b * grad).to(grad_first_ptr.dtype.element_ty), mask=inside)
            grad = a * grad
        if HAS_GRAD_SUM:
            grad += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SKIP:
            skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_weight += grad * skip
            sum_gate += grad * (x - weight * skip)
            grad_skip = (1 - gate) * weight * grad
            tl.store(grad_skip_ptr + at, grad_skip.to(grad_skip_ptr.dtype.element_ty), mask=inside)
            grad = gate * grad
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=inside)
    if HAS_MIX:
        place = partial_ptr + program * 4 * D + cols
        tl.store(place, tl.sum(sum_a, axis=0), mask=known)
        tl.store(place + D, tl.sum(sum_b, axis=0), mask=known)
    if HAS_SKIP:
        place = partial_ptr + program * 4 * D + cols
        # The gate's share is (x - weight * skip) g (1 - g) for x before the merge; after it the bracket has g in it.
        tl.store(place + 2 * D, tl.sum((1 - gate) * sum_weight, axis=0), mask=known)
        tl.store(place + 3 * D, tl.sum((1 - gate) * sum_gate, axis=0), mask=known)


def launch_forward(
    x: Tensor, delta: Tensor | None, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None,
    first: Tensor | None, mix: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (sum, mixed, normed) for x (N, D); sum is x itself, and mixed is sum, where nothing was to be done."""
    num_rows, width = x.shape
    has_sum = delta is not None or skip is not None
    total = torch.empty_like(x) if has_sum else x
    mixed = torch.empty_like(x) if mix is not None else total
    normed = torch.empty_like(x)
    launch(
        _forward, (triton.cdiv(num_rows, ROWS),),
        x, delta, skip, first, mix, weight, gate, total, mixed, normed, num_rows, scale,
        D=width, COLS=triton.next_power_of_2(width), ROWS=ROWS,
        HAS_DELTA=delta is not None, HAS_SKIP=skip is not None, HAS_MIX=mix is not None, num_warps=4,
    )  # fmt: skip
    return total, mixed, normed


class MixNorm(torch.autograd.Function):
    """(x, delta, skip, weight, gate, first, mix, scale) -> (sum, mixed, normed); see model.kernels.residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None,
        first: Tensor | None, mix: Tensor | None, scale: float,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:  # fmt: skip
        total, mixed, normed = launch_forward(x, delta, skip, weight, gate, first, mix, scale)
        ctx.save_for_backward(total, mixed if mix is not None else None, skip, weight, gate, first, mix)
        ctx.scale, ctx.has_delta = scale, delta is not None
        ctx.set_materialize_grads(False)
        return (None if total is x else total), (None if mix is None else mixed), normed

    @staticmethod
    def backward(
        ctx: Any, grad_sum: Tensor | None, grad_mixed: Tensor | None, grad_normed: Tensor
    ) -> tuple[Tensor | None, ...]:
        total, mixed, skip, weight, gate, first, mix = ctx.saved_tensors
        num_rows, width = total.shape
        has_skip, has_mix = skip is not None, mix is not None
        if has_mix and grad_mixed is None:
            grad_mixed = torch.zeros_like(total)
        grads = [None if g is None else g.contiguous() for g in (grad_sum, grad_mixed, grad_normed)]
        grad_x = torch.empty_like(total)
        grad_skip = torch.empty_like(total) if has_skip else None
        grad_first = torch.empty_like(total) if has_mix else None
        programs = min(BACKWARD_PROGRAMS, triton.cdiv(num_rows, ROWS))
        has_sums = has_mix or has_skip
        partial = torch.empty(programs, 4, width, device=total.device, dtype=torch.float32) if has_sums else None
        launch(
            _backward, (programs,),
            *grads, total, mixed if has_mix else total, skip, first, mix, weight, gate,
            grad_x, grad_skip, grad_first, partial, num_rows, ctx.scale,
            D=width, COLS=triton.next_power_of_2(width), ROWS=ROWS,
            HAS_GRAD_SUM=grad_sum is not None, HAS_SKIP=has_skip, HAS_MIX=has_mix, num_warps=4,
        )  # fmt: skip
        sums = partial.sum(0) if partial is not None else None
        grad_mix = sums[:2].to(mix.dtype) if sums is not None and has_mix else None
        grad_weight = sums[2].to(weight.dtype) if sums is not None and has_skip else None
        grad_gate = sums[3].to(gate.dtype) if sums is not None and has_skip else None
        return (
            grad_x, grad_x if ctx.has_delta else None, grad_skip, grad_weight, grad_gate, grad_first, grad_mix, None,
        )  # fmt: skip


@triton.jit
def _merge(
    a_ptr, delta_a_ptr, b_ptr, delta_b_ptr, share_ptr, y_ptr, num_rows,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    share = tl.load(share_ptr).to(tl.float32)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(delta_a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(delta_b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = share * a + (1 - share) * b
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(y_ptr + at, (x * inverse[:, None]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _merge_backward(
    grad_ptr, a_ptr, delta_a_ptr, b_ptr, delta_b_ptr, share_ptr, grad_a_ptr, grad_b_ptr, partial_ptr, num_rows,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    share = tl.load(share_ptr).to(tl.float32)
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(delta_a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(delta_b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed = share * a + (1 - share) * b
    inverse = tl.rsqrt(tl.sum(normed * normed, axis=1) / D + EPS)[:, None]
    normed *= inverse
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(grad * normed, axis=1)[:, None] / D
    grad = inverse * (grad - normed * along)
    tl.store(grad_a_ptr + at, (share * grad).to(grad_a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_b_ptr + at, ((1 - share) * grad).to(grad_b_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(grad * (a - b), axis=1), axis=0))


class MergeNorm(torch.autograd.Function):
    """(a, delta_a, b, delta_b, share) -> rms(share (a + delta_a) + (1 - share) (b + delta_b)), all (N, D)."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, delta_a: Tensor, b: Tensor, delta_b: Tensor, share: Tensor) -> Tensor:
        num_rows, width = a.shape
        y = torch.empty_like(a)
        launch(
            _merge, (triton.cdiv(num_rows, ROWS),),
            a, delta_a, b, delta_b, share, y, num_rows,
            D=width, COLS=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(a, delta_a, b, delta_b, share)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        a, delta_a, b, delta_b, share = ctx.saved_tensors
        num_rows, width = a.shape
        grad_a, grad_b = torch.empty_like(a), torch.empty_like(b)
        programs = triton.cdiv(num_rows, ROWS)
        partial = torch.empty(programs, device=a.device, dtype=torch.float32)
        launch(
            _merge_backward, (programs,),
            grads[0].contiguous(), a, delta_a, b, delta_b, share, grad_a, grad_b, partial, num_rows,
            D=width, COLS=triton.next_power_of_2(width), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
        return grad_a, grad_a, grad_b, grad_b, partial.sum().to(share.dtype)
