# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels that take a token's own value out of attention's output and multiply each head by its factor.

The factor is 2 sigmoid(weights . columns), by token and head: see model.layers.gate_heads.
"""

# N tokens, H query heads, K kv heads, G query heads a kv head, E head_dim, W columns that the gate reads, P programs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch

TINY: tl.constexpr = tl.constexpr(1e-12)
ROWS = 4  # tokens of one tile
BACKWARD_PROGRAMS = 132 * 8


@triton.jit
def _gate(
    y_ptr, v_ptr, columns_ptr, weights_ptr, z_ptr, num_rows, v_stride, V_HEAD: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr, EXCLUDES: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None, None]
    kv = tl.arange(0, K)[None, :, None, None]
    head = kv * G + tl.arange(0, G)[None, None, :, None]
    e = tl.arange(0, E)[None, None, None, :]
    col = tl.arange(0, COLS)[None, None, None, :]
    inside = rows < num_rows
    columns = tl.load(columns_ptr + rows * W + col, mask=inside & (col < W), other=0.0).to(tl.float32)
    weights = tl.load(weights_ptr + head * W + col, mask=col < W, other=0.0).to(tl.float32)
    factor = 2 * tl.sigmoid(tl.sum(columns * weights, axis=3))[:, :, :, None]  # (ROWS, K, G, 1)
    z = tl.load(y_ptr + rows * (K * G * E) + head * E + e, mask=inside, other=0.0).to(tl.float32)
    if EXCLUDES:
        v = tl.load(v_ptr + rows * v_stride + kv * V_HEAD + e, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(v * v, axis=3))[:, :, :, None]
        w = v / tl.maximum(norm, TINY)
        z = z - tl.sum(z * w, axis=3)[:, :, :, None] * w
    z = z * factor
    tl.store(z_ptr + rows * (K * G * E) + head * E + e, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    grad_ptr, y_ptr, v_ptr, columns_ptr, weights_ptr, grad_y_ptr, grad_v_ptr, grad_columns_ptr, partial_ptr,
    num_rows, v_stride, V_HEAD: tl.constexpr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    COLS: tl.constexpr, ROWS: tl.constexpr, EXCLUDES: tl.constexpr,
):  # fmt: skip
    kv = tl.arange(0, K)[None, :, None, None]
    head = kv * G + tl.arange(0, G)[None, None, :, None]
    e = tl.arange(0, E)[None, None, None, :]
    col = tl.arange(0, COLS)[None, None, None, :]
    weights = tl.load(weights_ptr + head * W + col, mask=col < W, other=0.0).to(tl.float32)  # (1, K, G, COLS)
    sums = tl.zeros((ROWS, K, G, COLS), tl.float32)
    for tile in range(tl.program_id(0), (num_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        rows = row[:, None, None, None]
        inside = rows < num_rows
        at = rows * (K * G * E) + head * E + e
        columns = tl.load(columns_ptr + rows * W + col, mask=inside & (col < W), other=0.0).to(tl.float32)
        share = tl.sigmoid(tl.sum(columns * weights, axis=3))[:, :, :, None]  # (ROWS, K, G, 1)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = y
        if EXCLUDES:
            v = tl.load(v_ptr + rows * v_stride + kv * V_HEAD + e, mask=inside, other=0.0).to(tl.float32)
            norm = tl.sqrt(tl.sum(v * v, axis=3))[:, :, :, None]
            inverse = 1.0 / tl.maximum(norm, TINY)
            w = v * inverse
            along_y = tl.sum(y * w, axis=3)[:, :, :, None]
            z = y - along_y * w
        # of the sigmoid's argument: the factor is 2 share
        slope = tl.sum(grad * z, axis=3)[:, :, :, None] * 2 * share * (1 - share)
        sums += slope * columns
        along = tl.sum(tl.sum(slope * weights, axis=2), axis=1)  # (ROWS, COLS)
        near = tl.arange(0, COLS)[None, :]
        known = (row[:, None] < num_rows) & (near < W)
        place = grad_columns_ptr + row[:, None] * W + near
        tl.store(place, along.to(grad_columns_ptr.dtype.element_ty), mask=known)
        grad = grad * 2 * share
        if EXCLUDES:
            along_grad = tl.sum(grad * w, axis=3)[:, :, :, None]
            grad_w = -tl.sum(along_grad * y + along_y * grad, axis=2)[:, :, None, :]
            along_w = tl.sum(grad_w * w, axis=3)[:, :, :, None]
            grad_v = inverse * (grad_w - tl.where(norm > TINY, along_w * w, 0.0))
            tl.store(grad_v_ptr + rows * (K * E) + kv * E + e, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)
            grad = grad - along_grad * w
        tl.store(grad_y_ptr + at, grad.to(grad_y_ptr.dtype.element_ty), mask=inside)
    total = tl.sum(sums, axis=0)  # (K, G, COLS)
    first = (tl.arange(0, K)[:, None, None] * G + tl.arange(0, G)[None, :, None]) * W
    near_col = tl.arange(0, COLS)[None, None, :]
    tl.store(partial_ptr + tl.program_id(0) * (K * G * W) + first + near_col, total, mask=near_col < W)


def gate(y: Tensor, v: Tensor, columns: Tensor, weights: Tensor, *, is_value_excluded: bool) -> Tensor:
    """Return y (N, H, E), without its component along v (N, K, E) if that is excluded, times each head's factor.

    columns (N, W), weights (H, W); rows and heads of v may be strided.
    """
    num_rows, num_heads, head_dim = y.shape
    z = torch.empty_like(y)
    launch(
        _gate, (triton.cdiv(num_rows, ROWS),),
        y, v, columns, weights, z, num_rows, v.stride(0), V_HEAD=v.stride(1), K=v.size(1), G=num_heads // v.size(1),
        E=head_dim, W=columns.size(1), COLS=triton.next_power_of_2(columns.size(1)), ROWS=ROWS,
        EXCLUDES=is_value_excluded, num_warps=4,
    )  # fmt: skip
    return z


def gate_backward(
    grad: Tensor, y: Tensor, v: Tensor, columns: Tensor, weights: Tensor, *, is_value_excluded: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of y (N, H, E), v (N, K, E, None if it is not excluded), columns (N, W), weights (H, W)."""
    num_rows, num_heads, head_dim = y.shape
    num_kv_heads, width = v.size(1), columns.size(1)
    grad_y, grad_columns = torch.empty_like(y), torch.empty_like(columns)
    grad_v = None
    if is_value_excluded:
        grad_v = torch.empty(num_rows, num_kv_heads, head_dim, device=y.device, dtype=y.dtype)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(num_rows, ROWS))
    partial = torch.empty(programs, num_heads, width, device=y.device, dtype=torch.float32)
    launch(
        _gate_backward, (programs,),
        grad, y, v, columns, weights, grad_y, grad_v, grad_columns, partial, num_rows, v.stride(0),
        V_HEAD=v.stride(1), K=num_kv_heads, G=num_heads // num_kv_heads, E=head_dim, W=width,
        COLS=triton.next_power_of_2(width), ROWS=ROWS, EXCLUDES=is_value_excluded, num_warps=4,
    )  # fmt: skip
    return grad_y, grad_v, grad_columns, partial.sum(0).to(weights.dtype)
