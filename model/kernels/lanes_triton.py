# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the two lanes: what both take after a visit, the norms that the next one reads, and their end."""

# N rows (tokens), D columns (model_dim), P programs, W columns that a gate reads

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import gate_sizes, launch

EPS: tl.constexpr = tl.constexpr(2.0**-23)
ROWS = 4  # rows of one tile: 16 numbers a thread at 512 columns and 4 warps
CROSS_ROWS = 2  # of crossed lanes, where a row has twice the numbers
BACKWARD_PROGRAMS = 132 * 16  # each adds up the column sums of its rows; the host adds the programs


@triton.jit
def _take(
    lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, rows, cols, num_rows,
    D: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Return both lanes after they took what attention and the MLP made."""
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    lane1 = tl.load(lane1_ptr + at, mask=inside, other=0.0).to(tl.float32)
    mlp = tl.load(mlp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if FACTOR > 0:
        over = tl.load(factor_ptr + 1 + cols, mask=cols < FACTOR, other=0.0)[None, :]
        mlp *= tl.sigmoid(tl.sum(lane1 * over, axis=1) + tl.load(factor_ptr))[:, None]
    attention = tl.load(attention_ptr + at, mask=inside, other=0.0).to(tl.float32)
    lane0 = tl.load(lane0_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(routes_ptr) * lane0 + tl.load(routes_ptr + 2) * attention + tl.load(routes_ptr + 4) * mlp
    y = tl.load(routes_ptr + 1) * lane1 + tl.load(routes_ptr + 3) * attention + tl.load(routes_ptr + 5) * mlp
    return x, y


@triton.jit
def _cross(
    lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr,
    skip_ptr, weight_ptr, gate_ptr, first_ptr, mix_ptr, out0_ptr, out1_ptr, normed0_ptr, normed1_ptr, columns_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    FACTOR: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    known = cols < D
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & known[None, :]
    x, y = _take(lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, rows, cols, num_rows, D, FACTOR)
    tl.store(out1_ptr + at, y.to(out1_ptr.dtype.element_ty), mask=inside)
    inverse = scale * tl.rsqrt(tl.sum(y * y, axis=1) / D + EPS)
    tl.store(normed1_ptr + at, (y * inverse[:, None]).to(normed1_ptr.dtype.element_ty), mask=inside)
    if HAS_SKIP:
        weight = tl.load(weight_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=known, other=0.0).to(tl.float32))[None, :]
        skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (1 - gate) * weight * skip + gate * x
    tl.store(out0_ptr + at, x.to(out0_ptr.dtype.element_ty), mask=inside)
    a = tl.load(mix_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    b = tl.load(mix_ptr + D + cols, mask=known, other=0.0).to(tl.float32)[None, :]
    mixed = a * x + b * tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inverse0 = scale * tl.rsqrt(tl.sum(mixed * mixed, axis=1) / D + EPS)
    normed = (mixed * inverse0[:, None]).to(normed0_ptr.dtype.element_ty)
    tl.store(normed0_ptr + at, normed, mask=inside)
    if COLUMNS > 0:
        tl.store(columns_ptr + rows[:, None] * COLUMNS + cols[None, :], normed, mask=inside & (cols < COLUMNS)[None, :])


@triton.jit
def _mean(
    lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, y_ptr, num_rows,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    x, y = _take(lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, rows, cols, num_rows, D, FACTOR)
    x = 0.5 * (x + y)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    tl.store(y_ptr + at, (x * inverse[:, None]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(grad, x, scale, D: tl.constexpr):
    """Return the gradient of rows x from that of scale times their norm."""
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    normed = x * inverse
    return scale * inverse * (grad - normed * (tl.sum(grad * normed, axis=1)[:, None] / D))


@triton.jit
def _cross_backward(
    grad0_ptr, grad1_ptr, grad_normed0_ptr, grad_normed1_ptr, grad_columns_ptr, grad_later_ptr,
    lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, out0_ptr, out1_ptr,
    skip_ptr, weight_ptr, gate_ptr, first_ptr, mix_ptr,
    grad_lane0_ptr, grad_lane1_ptr, grad_attention_ptr, grad_mlp_ptr, grad_skip_ptr, grad_first_ptr,
    partial_ptr, routes_partial_ptr, factor_partial_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, IS_END: tl.constexpr,
    HAS_GRAD0: tl.constexpr, HAS_GRAD1: tl.constexpr, HAS_SKIP: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LATER: tl.constexpr, HAS_SUMS: tl.constexpr,
    FACTOR: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Of _cross, or of _mean (IS_END): then the norm's gradient is all there is."""
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    known = cols < D
    near = tl.arange(0, NEAR)
    keep0, keep1 = tl.load(routes_ptr), tl.load(routes_ptr + 1)
    attention0, attention1 = tl.load(routes_ptr + 2), tl.load(routes_ptr + 3)
    mlp0, mlp1 = tl.load(routes_ptr + 4), tl.load(routes_ptr + 5)
    if not IS_END:
        a = tl.load(mix_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        b = tl.load(mix_ptr + D + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        sum_a = tl.zeros((ROWS, COLS), tl.float32)
        sum_b = tl.zeros((ROWS, COLS), tl.float32)
    if HAS_SKIP:
        weight = tl.load(weight_ptr + cols, mask=known, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=known, other=0.0).to(tl.float32))[None, :]
        sum_weight = tl.zeros((ROWS, COLS), tl.float32)
        sum_gate = tl.zeros((ROWS, COLS), tl.float32)
    if FACTOR > 0:
        over = tl.load(factor_ptr + 1 + cols, mask=cols < FACTOR, other=0.0)[None, :]
        bias = tl.load(factor_ptr)
        sum_factor = tl.zeros((ROWS, NEAR), tl.float32)
        sum_bias = tl.zeros((ROWS,), tl.float32)
    sum_keep0, sum_keep1 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    sum_attention0, sum_attention1 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    sum_mlp0, sum_mlp1 = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for tile in range(program, (num_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        at = rows[:, None] * D + cols[None, :]
        inside = (rows < num_rows)[:, None] & known[None, :]
        grad = tl.load(grad_normed0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if IS_END:
            x, y = _take(
                lane0_ptr, lane1_ptr, attention_ptr, mlp_ptr, routes_ptr, factor_ptr, rows, cols, num_rows, D, FACTOR
            )  # fmt: skip
            grad0 = 0.5 * _norm_backward(grad, 0.5 * (x + y), scale, D)
            grad1 = grad0
        else:
            if COLUMNS > 0:
                place = grad_columns_ptr + rows[:, None] * COLUMNS + cols[None, :]
                grad += tl.load(place, mask=inside & (cols < COLUMNS)[None, :], other=0.0).to(tl.float32)
            x = tl.load(out0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            first = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad = _norm_backward(grad, a * x + b * first, scale, D)
            sum_a += grad * x
            sum_b += grad * first
            if HAS_FIRST:
                grad_first = b * grad
                if HAS_LATER:
                    grad_first += tl.load(grad_later_ptr + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_first_ptr + at, grad_first.to(grad_first_ptr.dtype.element_ty), mask=inside)
            grad0 = a * grad
            if HAS_GRAD0:
                grad0 += tl.load(grad0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            if HAS_SKIP:
                if HAS_SUMS:
                    skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
                    sum_weight += grad0 * skip
                    sum_gate += grad0 * (x - weight * skip)
                grad_skip = (1 - gate) * weight * grad0
                tl.store(grad_skip_ptr + at, grad_skip.to(grad_skip_ptr.dtype.element_ty), mask=inside)
                grad0 = gate * grad0
            grad = tl.load(grad_normed1_ptr + at, mask=inside, other=0.0).to(tl.float32)
            y = tl.load(out1_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad1 = _norm_backward(grad, y, scale, D)
            if HAS_GRAD1:
                grad1 += tl.load(grad1_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SUMS:
            lane0 = tl.load(lane0_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_keep0 += tl.sum(grad0 * lane0, axis=1)
        tl.store(grad_lane0_ptr + at, (keep0 * grad0).to(grad_lane0_ptr.dtype.element_ty), mask=inside)
        if HAS_SUMS:
            attention = tl.load(attention_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_attention0 += tl.sum(grad0 * attention, axis=1)
            sum_attention1 += tl.sum(grad1 * attention, axis=1)
        grad_attention = attention0 * grad0 + attention1 * grad1
        tl.store(grad_attention_ptr + at, grad_attention.to(grad_attention_ptr.dtype.element_ty), mask=inside)
        if HAS_SUMS or FACTOR > 0:
            lane1 = tl.load(lane1_ptr + at, mask=inside, other=0.0).to(tl.float32)
            sum_keep1 += tl.sum(grad1 * lane1, axis=1)
            mlp = tl.load(mlp_ptr + at, mask=inside, other=0.0).to(tl.float32)
            along0 = tl.sum(grad0 * mlp, axis=1)
            along1 = tl.sum(grad1 * mlp, axis=1)
        grad_mlp = mlp0 * grad0 + mlp1 * grad1
        grad_lane1 = keep1 * grad1
        if FACTOR > 0:
            factor = tl.sigmoid(tl.sum(lane1 * over, axis=1) + bias)
            slope = factor * (1 - factor) * (mlp0 * along0 + mlp1 * along1)  # of the sigmoid's argument
            along0 *= factor
            along1 *= factor
            grad_mlp *= factor[:, None]
            grad_lane1 += slope[:, None] * over
            seen = (rows < num_rows)[:, None] & (near < WIDTH)[None, :]
            read = tl.load(lane1_ptr + rows[:, None] * D + near[None, :], mask=seen, other=0.0).to(tl.float32)
            sum_factor += slope[:, None] * read
            sum_bias += slope
        if HAS_SUMS:
            sum_mlp0 += along0
            sum_mlp1 += along1
        tl.store(grad_mlp_ptr + at, grad_mlp.to(grad_mlp_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_lane1_ptr + at, grad_lane1.to(grad_lane1_ptr.dtype.element_ty), mask=inside)
    if HAS_SUMS:
        tl.store(routes_partial_ptr + program * 8, tl.sum(sum_keep0, axis=0))
        tl.store(routes_partial_ptr + program * 8 + 1, tl.sum(sum_keep1, axis=0))
        tl.store(routes_partial_ptr + program * 8 + 2, tl.sum(sum_attention0, axis=0))
        tl.store(routes_partial_ptr + program * 8 + 3, tl.sum(sum_attention1, axis=0))
        tl.store(routes_partial_ptr + program * 8 + 4, tl.sum(sum_mlp0, axis=0))
        tl.store(routes_partial_ptr + program * 8 + 5, tl.sum(sum_mlp1, axis=0))
        if FACTOR > 0:
            tl.store(factor_partial_ptr + program * (FACTOR + 1), tl.sum(sum_bias, axis=0))
            place = factor_partial_ptr + program * (FACTOR + 1) + 1 + near
            tl.store(place, tl.sum(sum_factor, axis=0), mask=near < FACTOR)
        if not IS_END:
            place = partial_ptr + program * 4 * D + cols
            tl.store(place, tl.sum(sum_a, axis=0), mask=known)
            tl.store(place + D, tl.sum(sum_b, axis=0), mask=known)
            if HAS_SKIP:
                # as in model.kernels.residual_triton: x is merged already, and has one factor of the gate in it
                tl.store(place + 2 * D, tl.sum((1 - gate) * sum_weight, axis=0), mask=known)
                tl.store(place + 3 * D, tl.sum((1 - gate) * sum_gate, axis=0), mask=known)


def _sizes(width: int) -> dict[str, int]:
    return {"D": width, "COLS": triton.next_power_of_2(width), "ROWS": CROSS_ROWS, "num_warps": 4}


class CrossNorm(torch.autograd.Function):
    """(lane 0, lane 1, attention, mlp, routes, factor, skip, weight, gate, first, mix, scale, num_columns) -> Crossed.

    Lanes and what was made (N, D); routes (8,); factor (P,) or None. See model.kernels.lanes.
    """

    @staticmethod
    def forward(
        ctx: Any, lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, routes: Tensor, factor: Tensor | None,
        skip: Tensor | None, weight: Tensor | None, gate: Tensor | None, first: Tensor, mix: Tensor, scale: float,
        num_columns: int,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        num_rows, width = lane0.shape
        out0, out1, normed0, normed1 = (torch.empty_like(lane0) for _ in range(4))
        columns = lane0.new_empty(num_rows, num_columns) if num_columns else None
        launch(
            _cross, (triton.cdiv(num_rows, CROSS_ROWS),),
            lane0, lane1, attention, mlp, routes, factor, skip, weight, gate, first, mix,
            out0, out1, normed0, normed1, columns, num_rows, scale,
            FACTOR=gate_sizes(factor, width)["WIDTH"], HAS_SKIP=skip is not None, COLUMNS=num_columns, **_sizes(width),
        )  # fmt: skip
        ctx.save_for_backward(lane0, lane1, attention, mlp, routes, factor, out0, out1, skip, weight, gate, first, mix)
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        if not ctx.needs_input_grad[9]:
            ctx.mark_non_differentiable(first)
        return out0, out1, normed0, normed1, columns, first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # the last visit may want its norms for some positions only, and then nothing of a lane itself
        norms = [torch.zeros_like(ctx.saved_tensors[0]) if g is None else g for g in grads[2:4]]
        given = [None if g is None else g.contiguous() for g in (*grads[:2], *norms, *grads[4:])]
        needs = ctx.needs_input_grad  # in adaptation only streams need gradients, no vector and not the first state
        made, sums, *rest = _launch_backward(
            given, ctx.saved_tensors, ctx.scale, has_first=needs[9], has_sums=any(needs[i] for i in (4, 5, 7, 8, 10))
        )
        grad_mix, columns = (None, (None, None)) if sums is None else (sums[:2], sums[2:])
        grad_skip = made[4], *(columns if made[4] is not None else (None, None))
        return *made[:4], *rest, *grad_skip, made[5], grad_mix, None, None


class MeanNorm(torch.autograd.Function):
    """(lane 0, lane 1, attention, mlp, routes, factor) -> rms of the mean of both lanes after they took (N, D)."""

    @staticmethod
    def forward(
        ctx: Any, lane0: Tensor, lane1: Tensor, attention: Tensor, mlp: Tensor, routes: Tensor, factor: Tensor | None
    ) -> Tensor:
        num_rows, width = lane0.shape
        y = torch.empty_like(lane0)
        launch(
            _mean, (triton.cdiv(num_rows, CROSS_ROWS),),
            lane0, lane1, attention, mlp, routes, factor, y, num_rows,
            FACTOR=gate_sizes(factor, width)["WIDTH"], **_sizes(width),
        )  # fmt: skip
        ctx.save_for_backward(lane0, lane1, attention, mlp, routes, factor)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        given, saved = [None, None, grads[0].contiguous(), None, None, None], (*ctx.saved_tensors, *(None,) * 7)
        made, _, *rest = _launch_backward(given, saved, 1.0, has_first=False, has_sums=any(ctx.needs_input_grad[4:]))
        return *made[:4], *rest


def _launch_backward(
    grads: list[Tensor | None], saved: tuple[Tensor | None, ...], scale: float, *, has_first: bool, has_sums: bool
) -> tuple[Any, ...]:
    """Return [gradients of lanes 0 and 1, attention, mlp, skip, first] and, if has_sums, of columns, routes, factor."""
    lane0, factor, skip, is_end = saved[0], saved[5], saved[8], saved[11] is None
    assert lane0 is not None
    num_rows, width = lane0.shape
    made = [torch.empty_like(lane0) if each else None for each in (*(True,) * 4, skip is not None, has_first)]
    programs = min(BACKWARD_PROGRAMS, num_rows)
    warps = max(1, triton.next_power_of_2(width) // 512) * (1 if skip is None else 2)  # a skip needs more registers
    sizes = _sizes(width) | {"ROWS": 1, "num_warps": warps}  # a row of one warp waits for no other
    shapes = None if is_end else (4, width), (8,), None if factor is None else factor.shape  # six of eight are routes
    sums = [lane0.new_zeros(programs, *s, dtype=torch.float32) if has_sums and s else None for s in shapes]
    launch(
        _cross_backward, (programs,),
        *grads, *saved, *made, *sums, num_rows, scale,
        IS_END=is_end, HAS_GRAD0=grads[0] is not None, HAS_GRAD1=grads[1] is not None, HAS_SKIP=skip is not None,
        COLUMNS=0 if grads[4] is None else grads[4].size(1), HAS_FIRST=has_first, HAS_SUMS=has_sums,
        HAS_LATER=has_first and grads[5] is not None, **gate_sizes(factor, width), **sizes,
    )  # fmt: skip
    return made, *(None if x is None else x.sum(0) for x in sums)


@triton.jit
def _merged(a_ptr, delta_a_ptr, b_ptr, delta_b_ptr, share, at, inside, D: tl.constexpr):
    """Return the norm of both lanes' merged sums, its inverse root, and the sums' difference."""
    a = tl.load(a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(delta_a_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b += tl.load(delta_b_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = share * a + (1 - share) * b
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    return x * inverse, inverse, a - b


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
    normed, _inverse, _difference = _merged(a_ptr, delta_a_ptr, b_ptr, delta_b_ptr, share, at, inside, D)
    tl.store(y_ptr + at, normed.to(y_ptr.dtype.element_ty), mask=inside)


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
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    normed, inverse, difference = _merged(a_ptr, delta_a_ptr, b_ptr, delta_b_ptr, share, at, inside, D)
    grad = inverse * (grad - normed * (tl.sum(grad * normed, axis=1)[:, None] / D))
    tl.store(grad_a_ptr + at, (share * grad).to(grad_a_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_b_ptr + at, ((1 - share) * grad).to(grad_b_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.sum(grad * difference, axis=1), axis=0))


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
