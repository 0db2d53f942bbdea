# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the residual stream: add, merge a skip, mix with the first state, normalize, in one pass.

And the first state itself: embeddings smeared over their neighbors and normalized.
"""

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
# Each adds up the column sums of its rows; the host adds the programs. One warp each waits for no other, and with 168
# registers a thread 12 fit a multiprocessor at a time.
BACKWARD_PROGRAMS = 132 * 24
WARP_COLUMNS = 512  # of a row: 16 numbers a thread
# where a shift comes in, 0 for nowhere: before a skip is merged, or behind what is kept as the stream's value
BEFORE_SKIP: tl.constexpr = tl.constexpr(1)
BEHIND_SUM: tl.constexpr = tl.constexpr(2)


@triton.jit
def _forward(
    x_ptr, delta_ptr, skip_ptr, first_ptr, mix_ptr, weight_ptr, gate_ptr, factor_ptr, shift_ptr,
    sum_ptr, mixed_ptr, normed_ptr, columns_ptr, inverse_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
    HAS_DELTA: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_MIX: tl.constexpr,
    FACTOR: tl.constexpr, SHIFT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    at = rows[:, None] * D + cols[None, :]
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if FACTOR > 0:
            over = tl.load(factor_ptr + 1 + cols, mask=cols < FACTOR, other=0.0)[None, :]
            delta *= tl.sigmoid(tl.sum(x * over, axis=1) + tl.load(factor_ptr))[:, None]
        x += delta
    if SHIFT == BEFORE_SKIP:
        x += tl.load(shift_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if HAS_SKIP:
        weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=cols < D, other=0.0).to(tl.float32))[None, :]
        skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = (1 - gate) * weight * skip + gate * x
    if HAS_DELTA or HAS_SKIP:
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), mask=inside)
    if SHIFT == BEHIND_SUM:
        x += tl.load(shift_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
    if HAS_MIX:
        a = tl.load(mix_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        b = tl.load(mix_ptr + D + cols, mask=cols < D, other=0.0).to(tl.float32)[None, :]
        x = a * x + b * tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(mixed_ptr + at, x.to(mixed_ptr.dtype.element_ty), mask=inside)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    tl.store(inverse_ptr + rows, inverse, mask=rows < num_rows)
    normed = (x * (scale * inverse)[:, None]).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + at, normed, mask=inside)
    if COLUMNS > 0:
        tl.store(columns_ptr + rows[:, None] * COLUMNS + cols[None, :], normed, mask=inside & (cols < COLUMNS)[None, :])


@triton.jit
def _backward(
    grad_sum_ptr, grad_mixed_ptr, grad_normed_ptr, grad_columns_ptr, grad_later_ptr,
    x_ptr, kept_ptr, inverse_ptr, skip_ptr, first_ptr, mix_ptr, weight_ptr, gate_ptr, factor_ptr, shift_ptr,
    grad_x_ptr, grad_delta_ptr, grad_skip_ptr, grad_first_ptr, partial_ptr, factor_partial_ptr,
    num_rows, scale, D: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_MIX: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_LATER: tl.constexpr, HAS_SUMS: tl.constexpr,
    FACTOR: tl.constexpr, WIDTH: tl.constexpr, NEAR: tl.constexpr, SHIFT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of _forward, one row after the other; what it kept is the sum of a mixture, and else the norm that it wrote."""
    program = tl.program_id(0)
    cols = tl.arange(0, COLS)
    known = cols < D
    if HAS_MIX:
        a = tl.load(mix_ptr + cols, mask=known, other=0.0).to(tl.float32)
        b = tl.load(mix_ptr + D + cols, mask=known, other=0.0).to(tl.float32)
        sum_a = tl.zeros((COLS,), tl.float32)
        sum_b = tl.zeros((COLS,), tl.float32)
    if HAS_SKIP:
        sum_weight = tl.zeros((COLS,), tl.float32)
        if HAS_GRAD_SUM:
            sum_gate = tl.zeros((COLS,), tl.float32)
    if FACTOR > 0:
        over = tl.load(factor_ptr + 1 + cols, mask=cols < FACTOR, other=0.0)
        bias = tl.load(factor_ptr)
        near = tl.arange(0, NEAR)
        sum_factor = tl.zeros((NEAR,), tl.float32)
        sum_bias = 0.0
    if SHIFT > 0:
        shift = tl.load(shift_ptr + cols, mask=known, other=0.0).to(tl.float32)
        sum_shift = tl.zeros((COLS,), tl.float32)
    for number in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        at = row * D + cols
        # All loads of rows come first: the compiler moves none before a store, which might write what it reads.
        made = tl.load(kept_ptr + at, mask=known, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + at, mask=known, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + row)
        if HAS_MIX:
            grad_mixed = tl.load(grad_mixed_ptr + at, mask=known, other=0.0)
            first = tl.load(first_ptr + at, mask=known, other=0.0).to(tl.float32)
        if HAS_LATER:
            later = tl.load(grad_later_ptr + at, mask=known, other=0.0)
        if HAS_GRAD_SUM:
            grad_sum = tl.load(grad_sum_ptr + at, mask=known, other=0.0)
        if HAS_SKIP and (HAS_SUMS or FACTOR > 0):
            skip = tl.load(skip_ptr + at, mask=known, other=0.0).to(tl.float32)
        if FACTOR > 0:
            before = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)
            read = tl.load(x_ptr + row * D + near, mask=near < WIDTH, other=0.0).to(tl.float32)
        if COLUMNS > 0:
            grad += tl.load(grad_columns_ptr + row * COLUMNS + cols, mask=cols < COLUMNS, other=0.0).to(tl.float32)
        if HAS_MIX:
            mixed = made + shift if SHIFT == BEHIND_SUM else made
            normed = (a * mixed + b * first) * inverse
        else:
            normed = made / scale
            made = normed / inverse
        grad = scale * inverse * (grad - normed * (tl.sum(grad * normed, axis=0) / D))
        if HAS_MIX:
            grad += grad_mixed.to(tl.float32)
            sum_a += grad * mixed
            sum_b += grad * first
            if HAS_FIRST:
                grad_first = b * grad
                if HAS_LATER:
                    grad_first += later.to(tl.float32)
                tl.store(grad_first_ptr + at, grad_first.to(grad_first_ptr.dtype.element_ty), mask=known)
            grad = a * grad
            if SHIFT == BEHIND_SUM:
                sum_shift += grad
        if HAS_GRAD_SUM:
            grad += grad_sum.to(tl.float32)
        if HAS_SKIP:
            # read for every row, from the cache: kept, they would take registers that are scarce above
            weight = tl.load(weight_ptr + cols, mask=known, other=0.0).to(tl.float32)
            gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=known, other=0.0).to(tl.float32))
            if HAS_SUMS:
                sum_weight += grad * skip
            if HAS_GRAD_SUM:
                sum_gate += grad * made
            grad_skip = (1 - gate) * weight * grad
            tl.store(grad_skip_ptr + at, grad_skip.to(grad_skip_ptr.dtype.element_ty), mask=known)
            outer = grad
            grad = gate * grad
        if SHIFT == BEFORE_SKIP:
            sum_shift += grad
        if FACTOR > 0:
            # factor * delta is what the sum holds besides x (and shift and skip): delta need not be kept for it.
            # With a skip it is there times the skip's gate, and so is this gradient: neither is divided.
            if HAS_SKIP:
                made -= (1 - gate) * weight * skip + gate * before
                if SHIFT == BEFORE_SKIP:
                    made -= gate * shift
                along_made = tl.sum(outer * made, axis=0)
            else:
                along_made = tl.sum(grad * (made - before), axis=0)
            factor = tl.sigmoid(tl.sum(before * over, axis=0) + bias)
            slope = (1 - factor) * along_made  # of the sigmoid's argument
            tl.store(grad_delta_ptr + at, (factor * grad).to(grad_delta_ptr.dtype.element_ty), mask=known)
            sum_factor += slope * read
            sum_bias += slope
            grad += slope * over
        tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=known)
    if HAS_SUMS and FACTOR > 0:
        place = factor_partial_ptr + program * (FACTOR + 1)
        tl.store(place, sum_bias)
        tl.store(place + 1 + near, sum_factor, mask=near < FACTOR)
    if HAS_SUMS and HAS_MIX:
        place = partial_ptr + program * PARTS * D + cols
        tl.store(place, sum_a, mask=known)
        tl.store(place + D, sum_b, mask=known)
        if HAS_SKIP:
            weight = tl.load(weight_ptr + cols, mask=known, other=0.0).to(tl.float32)
            gate = tl.sigmoid(tl.load(gate_ptr + cols, mask=known, other=0.0).to(tl.float32))
            # The gate's share is (x - weight * skip) g (1 - g), x before the merge; the sum has one g in it already.
            along_sum = sum_gate if HAS_GRAD_SUM else a * sum_a  # else the mixture's gradient is all that the sum has
            tl.store(place + 2 * D, (1 - gate) * sum_weight, mask=known)
            tl.store(place + 3 * D, (1 - gate) * (along_sum - weight * sum_weight), mask=known)
        if SHIFT > 0:
            tl.store(place + (PARTS - 1) * D, sum_shift, mask=known)


class MixNorm(torch.autograd.Function):
    """(x, delta, skip, weight, gate, first, mix, scale, factor, shift, num_columns) -> Mixed of model.kernels.residual.

    The sum is None where it is x, mixed where it is the sum, columns where there are none. For the backward pass a
    mixture is made again of the sum and first; without one the norm serves, which the product behind it keeps anyway.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, skip: Tensor | None, weight: Tensor | None, gate: Tensor | None,
        first: Tensor | None, mix: Tensor | None, scale: float, factor: Tensor | None = None,
        shift: Tensor | None = None, num_columns: int = 0,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        num_rows, width = x.shape
        factor = None if delta is None else factor
        total = torch.empty_like(x) if delta is not None or skip is not None else x
        mixed = torch.empty_like(x) if mix is not None else total
        normed = torch.empty_like(x)
        columns = x.new_empty(num_rows, num_columns) if num_columns else None
        inverse = x.new_empty(num_rows, dtype=torch.float32)
        launch(
            _forward, (triton.cdiv(num_rows, ROWS),),
            x, delta, skip, first, mix, weight, gate, factor, shift, total, mixed, normed, columns, inverse,
            num_rows, scale, D=width, COLS=triton.next_power_of_2(width), ROWS=ROWS,
            HAS_DELTA=delta is not None, HAS_SKIP=skip is not None, HAS_MIX=mix is not None,
            FACTOR=gate_sizes(factor, width)["WIDTH"], SHIFT=0 if shift is None else 1 if skip is not None else 2,
            COLUMNS=num_columns, num_warps=4,
        )  # fmt: skip
        kept = normed if mix is None else total
        before = None if factor is None else x
        ctx.save_for_backward(before, kept, inverse, skip, first, mix, weight, gate, factor, shift)
        ctx.scale, ctx.has_delta = scale, delta is not None
        ctx.set_materialize_grads(False)
        if first is not None and not ctx.needs_input_grad[5]:
            ctx.mark_non_differentiable(first)  # else every later visit would make a gradient of it
        return (None if total is x else total), (None if mix is None else mixed), normed, columns, first

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, kept, inverse, skip, first, mix, weight, gate, factor, shift = ctx.saved_tensors
        num_rows, width = kept.shape
        has_skip, has_mix, has_factor, has_shift = (t is not None for t in (skip, mix, factor, shift))
        # adaptation learns adapters alone: no vector has a gradient then, and neither has the first state
        has_first, has_sums = ctx.needs_input_grad[5], any((*ctx.needs_input_grad[3:5], *ctx.needs_input_grad[6:]))
        given = [None if g is None else g.contiguous() for g in grads]
        for place in (1, 2) if has_mix else (2,):
            if given[place] is None:  # nobody read a settled stream's norm, or the mixture where crossed lanes part
                given[place] = torch.zeros_like(kept)
        made = [torch.empty_like(kept) if has else None for has in (True, has_factor, has_skip, has_first)]
        programs, parts = min(BACKWARD_PROGRAMS, num_rows), 2 * has_mix + 2 * has_skip + has_shift
        shapes = ((parts, width), (factor.numel(),) if has_factor else None)
        partial, factor_partial = (
            kept.new_empty(programs, *shape, dtype=torch.float32) if has_sums and shape else None for shape in shapes
        )
        launch(
            _backward, (programs,),
            *given, x, kept, inverse, skip, first, mix, weight, gate, factor, shift,
            *made, partial, factor_partial, num_rows, ctx.scale,
            D=width, COLS=triton.next_power_of_2(width), PARTS=parts,
            HAS_GRAD_SUM=grads[0] is not None, HAS_SKIP=has_skip, HAS_MIX=has_mix,
            HAS_FIRST=has_first, HAS_LATER=has_first and grads[4] is not None, HAS_SUMS=has_sums,
            SHIFT=0 if shift is None else 1 if skip is not None else 2,
            COLUMNS=0 if grads[3] is None else grads[3].size(1),
            num_warps=max(1, triton.next_power_of_2(width) // WARP_COLUMNS), **gate_sizes(factor, width),
        )  # fmt: skip
        grad_x, grad_delta, grad_skip, grad_first = made
        sums: Any = (None,) * 4 if partial is None else partial.sum(0)
        grad_weight, grad_gate = sums[2:4] if has_skip else (None, None)
        return (
            grad_x, grad_x if ctx.has_delta and not has_factor else grad_delta, grad_skip, grad_weight, grad_gate,
            grad_first, sums[:2] if has_mix and has_sums else None, None,
            None if factor_partial is None else factor_partial.sum(0), sums[-1] if has_shift else None, None,
        )  # fmt: skip


@triton.jit
def _smeared(
    x_ptr, tokens_ptr, padding_ptr, over, strength, rows, cols, num_rows, time, bos_id,
    D: tl.constexpr, HAS_BOS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Return rows of smeared embeddings, the sigmoid's share, the neighbor (zero where there is none), the strength."""
    is_row = rows < num_rows
    place = rows % time
    has_neighbor = is_row & (place > 0)
    if HAS_PADDING:
        has_neighbor = has_neighbor & (place > tl.load(padding_ptr + rows // time, mask=is_row, other=0))
    if HAS_BOS:
        has_neighbor = has_neighbor & (tl.load(tokens_ptr + rows, mask=is_row, other=0) != bos_id)
    at = rows[:, None] * D + cols[None, :]
    known = (cols < D)[None, :]
    x = tl.load(x_ptr + at, mask=is_row[:, None] & known, other=0.0).to(tl.float32)
    neighbor = tl.load(x_ptr + (at - D), mask=has_neighbor[:, None] & known, other=0.0).to(tl.float32)
    share = tl.sigmoid(tl.sum(x * over, axis=1))
    acting = tl.where(has_neighbor, strength, 0.0)
    return x + (acting * share)[:, None] * neighbor, share, neighbor, acting


@triton.jit
def _smear(
    x_ptr, tokens_ptr, padding_ptr, gate_ptr, strength_ptr, y_ptr, num_rows, time, bos_id,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    HAS_BOS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    over = tl.load(gate_ptr + cols, mask=cols < W, other=0.0).to(tl.float32)[None, :]
    strength = tl.load(strength_ptr).to(tl.float32)
    x, _share, _neighbor, _acting = _smeared(
        x_ptr, tokens_ptr, padding_ptr, over, strength, rows, cols, num_rows, time, bos_id, D, HAS_BOS, HAS_PADDING
    )
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    at = rows[:, None] * D + cols[None, :]
    tl.store(y_ptr + at, (x * inverse[:, None]).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(grad_ptr, x, rows, cols, num_rows, D: tl.constexpr):
    """Return the gradient of rows x from that of their norm."""
    inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
    grad = tl.load(grad_ptr + rows[:, None] * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
    normed = x * inverse
    return inverse * (grad - normed * (tl.sum(grad * normed, axis=1)[:, None] / D))


@triton.jit
def _smear_backward(
    grad_ptr, x_ptr, tokens_ptr, padding_ptr, gate_ptr, strength_ptr, grad_x_ptr, partial_ptr, num_rows, time, bos_id,
    D: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr, NEAR: tl.constexpr,
    HAS_BOS: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, COLS)
    near = tl.arange(0, NEAR)
    over = tl.load(gate_ptr + cols, mask=cols < W, other=0.0).to(tl.float32)[None, :]
    strength = tl.load(strength_ptr).to(tl.float32)
    sum_gate = tl.zeros((ROWS, NEAR), tl.float32)
    sum_strength = tl.zeros((ROWS,), tl.float32)
    for tile in range(tl.program_id(0), (num_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        x, share, neighbor, acting = _smeared(
            x_ptr, tokens_ptr, padding_ptr, over, strength, rows, cols, num_rows, time, bos_id, D, HAS_BOS, HAS_PADDING
        )
        grad = _norm_backward(grad_ptr, x, rows, cols, num_rows, D)
        along = tl.sum(grad * neighbor, axis=1) * share
        slope = acting * along * (1 - share)  # of the sigmoid's argument
        # A row's own gradient, and what the row behind it, whose neighbor it is, sends back.
        behind, share_behind, _neighbor, acting_behind = _smeared(
            x_ptr, tokens_ptr, padding_ptr, over, strength, rows + 1, cols, num_rows, time, bos_id, D, HAS_BOS,
            HAS_PADDING,
        )  # fmt: skip
        grad_behind = _norm_backward(grad_ptr, behind, rows + 1, cols, num_rows, D)
        total = grad + slope[:, None] * over + (acting_behind * share_behind)[:, None] * grad_behind
        inside = (rows < num_rows)[:, None] & (cols < D)[None, :]
        at = rows[:, None] * D + cols[None, :]
        tl.store(grad_x_ptr + at, total.to(grad_x_ptr.dtype.element_ty), mask=inside)
        seen = (rows < num_rows)[:, None] & (near < W)[None, :]
        read = tl.load(x_ptr + rows[:, None] * D + near[None, :], mask=seen, other=0.0).to(tl.float32)
        sum_gate += slope[:, None] * read
        sum_strength += along
    place = partial_ptr + tl.program_id(0) * (W + 1)
    tl.store(place, tl.sum(sum_strength, axis=0))
    tl.store(place + 1 + near, tl.sum(sum_gate, axis=0), mask=near < W)


class SmearNorm(torch.autograd.Function):
    """(x, tokens, left_padding, gate, strength, bos_id, time) -> rms of the smeared x (N, D), rows of time tokens.

    tokens (N,), or None where no token is special; left_padding (N / time,) or None; gate (W,), strength a scalar.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tokens: Tensor | None, left_padding: Tensor | None, gate: Tensor, strength: Tensor,
        bos_id: int | None, time: int,
    ) -> Tensor:  # fmt: skip
        num_rows, width = x.shape
        y = torch.empty_like(x)
        ctx.options = {
            "D": width, "COLS": triton.next_power_of_2(width), "ROWS": ROWS, "W": gate.numel(),
            "HAS_BOS": tokens is not None, "HAS_PADDING": left_padding is not None, "num_warps": 4,
        }  # fmt: skip
        ctx.time, ctx.bos_id = time, bos_id or 0
        launch(
            _smear, (triton.cdiv(num_rows, ROWS),),
            x, tokens, left_padding, gate, strength, y, num_rows, time, ctx.bos_id, **ctx.options,
        )  # fmt: skip
        ctx.save_for_backward(x, tokens, left_padding, gate, strength)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, tokens, left_padding, gate, strength = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        programs = min(BACKWARD_PROGRAMS, triton.cdiv(x.size(0), ROWS))
        partial = x.new_empty(programs, gate.numel() + 1, dtype=torch.float32)
        launch(
            _smear_backward, (programs,),
            grads[0].contiguous(), x, tokens, left_padding, gate, strength, grad_x, partial, x.size(0), ctx.time,
            ctx.bos_id, NEAR=triton.next_power_of_2(gate.numel()), **ctx.options,
        )  # fmt: skip
        sums = partial.sum(0)
        return grad_x, None, None, sums[1:].to(gate.dtype), sums[0].to(strength.dtype), None, None
