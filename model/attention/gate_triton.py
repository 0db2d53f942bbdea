# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels that take a token's own value out of attention's output, multiply each head by its factor, or both.

Our attention does both itself: of these it uses spread alone, the rest serves the others.
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
SPREAD_ROWS = 128
SPREAD_PROGRAMS = 132 * 4


@triton.jit
def _gate(
    y_ptr, v_ptr, columns_ptr, weights_ptr, z_ptr, num_rows, v_stride, V_HEAD: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None, None]
    kv = tl.arange(0, K)[None, :, None, None]
    head = kv * G + tl.arange(0, G)[None, None, :, None]
    e = tl.arange(0, E)[None, None, None, :]
    col = tl.arange(0, COLS)[None, None, None, :]
    inside = rows < num_rows
    z = tl.load(y_ptr + rows * (K * G * E) + head * E + e, mask=inside, other=0.0).to(tl.float32)
    if v_ptr is not None:
        v = tl.load(v_ptr + rows * v_stride + kv * V_HEAD + e, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(v * v, axis=3))[:, :, :, None]
        w = v / tl.maximum(norm, TINY)
        z = z - tl.sum(z * w, axis=3)[:, :, :, None] * w
    if columns_ptr is not None:
        columns = tl.load(columns_ptr + rows * W + col, mask=inside & (col < W), other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + head * W + col, mask=col < W, other=0.0).to(tl.float32)
        z = z * (2 * tl.sigmoid(tl.sum(columns * weights, axis=3))[:, :, :, None])
    tl.store(z_ptr + rows * (K * G * E) + head * E + e, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    grad_ptr, y_ptr, v_ptr, columns_ptr, weights_ptr, grad_y_ptr, grad_v_ptr, slope_ptr, num_rows, v_stride,
    V_HEAD: tl.constexpr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None, None]
    kv = tl.arange(0, K)[None, :, None, None]
    head = kv * G + tl.arange(0, G)[None, None, :, None]
    e = tl.arange(0, E)[None, None, None, :]
    col = tl.arange(0, COLS)[None, None, None, :]
    inside = rows < num_rows
    at = rows * (K * G * E) + head * E + e
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = y
    if v_ptr is not None:
        v = tl.load(v_ptr + rows * v_stride + kv * V_HEAD + e, mask=inside, other=0.0).to(tl.float32)
        norm = tl.sqrt(tl.sum(v * v, axis=3))[:, :, :, None]
        inverse = 1.0 / tl.maximum(norm, TINY)
        w = v * inverse
        along_y = tl.sum(y * w, axis=3)[:, :, :, None]
        z = y - along_y * w
    if columns_ptr is not None:
        columns = tl.load(columns_ptr + rows * W + col, mask=inside & (col < W), other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + head * W + col, mask=col < W, other=0.0).to(tl.float32)
        share = tl.sigmoid(tl.sum(columns * weights, axis=3))[:, :, :, None]  # the factor is 2 share
        slope = tl.sum(grad * z, axis=3)[:, :, :, None] * 2 * share * (1 - share)
        tl.store(slope_ptr + head * num_rows + rows, slope, mask=inside)
        grad = grad * 2 * share
    if v_ptr is not None:
        along_grad = tl.sum(grad * w, axis=3)[:, :, :, None]
        grad_w = -tl.sum(along_grad * y + along_y * grad, axis=2)[:, :, None, :]
        along_w = tl.sum(grad_w * w, axis=3)[:, :, :, None]
        grad_v = inverse * (grad_w - tl.where(norm > TINY, along_w * w, 0.0))
        tl.store(grad_v_ptr + rows * (K * E) + kv * E + e, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)
        grad = grad - along_grad * w
    tl.store(grad_y_ptr + at, grad.to(grad_y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    slope_ptr, columns_ptr, weights_ptr, grad_columns_ptr, partial_ptr, num_rows, H: tl.constexpr, W: tl.constexpr,
    HEADS: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.arange(0, HEADS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    is_weight = (head < H) & (col < W)
    weights = tl.load(weights_ptr + head * W + col, mask=is_weight, other=0.0).to(columns_ptr.dtype.element_ty)
    sums = tl.zeros((HEADS, COLS), tl.float32)
    for tile in range(tl.program_id(0), (num_rows + ROWS - 1) // ROWS, tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        at = head.to(tl.int64) * num_rows + row[None, :]
        slope = tl.load(slope_ptr + at, mask=(head < H) & (row[None, :] < num_rows), other=0.0).to(weights.dtype)
        places = row.to(tl.int64)[:, None] * W + col
        inside = (row[:, None] < num_rows) & (col < W)
        if partial_ptr is not None:
            sums = tl.dot(slope, tl.load(columns_ptr + places, mask=inside, other=0.0), sums)
        tl.store(grad_columns_ptr + places, tl.dot(slope.T, weights).to(weights.dtype), mask=inside)
    if partial_ptr is not None:
        tl.store(partial_ptr + tl.program_id(0) * (H * W) + head * W + col, sums, mask=is_weight)


def _sizes(num_heads: int, v: Tensor, columns: Tensor | None) -> dict[str, int]:
    width = 0 if columns is None else columns.size(1)
    return {
        "K": v.size(1), "G": num_heads // v.size(1), "W": width, "COLS": triton.next_power_of_2(max(width, 1)),
        "ROWS": ROWS, "num_warps": 4,
    }  # fmt: skip


def gate(y: Tensor, v: Tensor, columns: Tensor | None, weights: Tensor | None, *, is_value_excluded: bool) -> Tensor:
    """Return y (N, H, E), without its component along v (N, K, E) if that is excluded, times each head's factor.

    columns (N, W), weights (H, W), both None: no factor; rows and heads of v may be strided.
    """
    num_rows, num_heads, head_dim = y.shape
    z = torch.empty_like(y)
    launch(
        _gate, (triton.cdiv(num_rows, ROWS),),
        y, v if is_value_excluded else None, columns, weights, z, num_rows, v.stride(0), V_HEAD=v.stride(1), E=head_dim,
        **_sizes(num_heads, v, columns),
    )  # fmt: skip
    return z


def gate_backward(
    grad: Tensor, y: Tensor, v: Tensor, columns: Tensor | None, weights: Tensor | None, *, is_value_excluded: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of y (N, H, E), v (N, K, E) and the factors' arguments (H, N); None for what had no part."""
    num_rows, num_heads, head_dim = y.shape
    grad_v = y.new_empty(num_rows, v.size(1), head_dim) if is_value_excluded else None
    slope = None if columns is None else y.new_empty(num_heads, num_rows, dtype=torch.float32)
    grad_y = torch.empty_like(y)
    launch(
        _gate_backward, (triton.cdiv(num_rows, ROWS),),
        grad, y, v if is_value_excluded else None, columns, weights, grad_y, grad_v, slope, num_rows, v.stride(0),
        V_HEAD=v.stride(1), E=head_dim, **_sizes(num_heads, v, columns),
    )  # fmt: skip
    return grad_y, grad_v, slope


def spread(slope: Tensor, columns: Tensor, weights: Tensor, *, needs_weights: bool) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of columns (N, W) and, if wanted, weights (H, W), from that of weights columns^T (H, N)."""
    (num_heads, num_rows), width = slope.shape, columns.size(1)
    programs = min(SPREAD_PROGRAMS, triton.cdiv(num_rows, SPREAD_ROWS))
    grad_columns = torch.empty_like(columns)
    partial = slope.new_empty(programs, num_heads, width) if needs_weights else None
    launch(
        _spread, (programs,), slope, columns, weights, grad_columns, partial, num_rows, H=num_heads, W=width,
        HEADS=max(16, triton.next_power_of_2(num_heads)), COLS=max(16, triton.next_power_of_2(width)), ROWS=SPREAD_ROWS,
        num_warps=4,
    )  # fmt: skip
    return grad_columns, None if partial is None else partial.sum(0).to(weights.dtype)
