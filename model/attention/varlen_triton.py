# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Causal attention inside the segments of a pack, forward, and the node that differentiates it.

PyTorch's FlashAttention-2 launches a program for every block of the longest segment in every segment. Here a table made
on the device lists only the query tiles that exist, tiles of long segments first.
"""

# T query tokens, H query heads, K kv heads, G query heads a kv head, E head_dim, N segments, M query rows of a tile
# W columns that the heads' gate reads

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention.bounds import TRITON_HEAD_DIMS, Bounds
from model.attention.varlen_backward_triton import Attended, Rotation, attend_backward
from model.attention.varlen_tiles_triton import (
    LN_2,
    LOG2_E,
    TILE_FIELDS,
    Tiling,
    addressable,
    directions,
    list_query_tiles,
)
from model.kernels.launch import launch

TILING = Tiling(64, 64, 4, 3, max_registers=128)  # measured on an H200, heads of 64
WIDE_TILING = Tiling(128, 64, 8, 2)  # heads of 128


@triton.jit
def _attend_keys(
    acc, total, peak, q, k_ptr, v_ptr, kv_row, first, last, diagonal, scale,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Go over keys first..last - 1, which every row sees unless IS_MASKED."""
    n = tl.arange(0, BLOCK_N)
    last_seen = tl.arange(0, BLOCK_M) + diagonal
    places = n[:, None] * kv_row + tl.arange(0, E)[None, :]
    for start in range(first, last, BLOCK_N):
        k_at = k_ptr + start * kv_row + places
        v_at = v_ptr + start * kv_row + places
        if IS_MASKED:
            exists = (start + n < last)[:, None]
            k = tl.load(k_at, mask=exists, other=0.0)
            v = tl.load(v_at, mask=exists, other=0.0)
        else:
            k = tl.load(k_at)
            v = tl.load(v_at)
        scores = tl.dot(q, k.T)  # (M, keys) float32
        if IS_MASKED:
            scores = tl.where((start + n)[None, :] <= last_seen[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_tokens"])
def _attend(
    q_ptr, k_ptr, v_ptr, columns_ptr, weights_ptr, out_ptr, lse_ptr, along_ptr, factor_ptr, tiles_ptr, num_tokens,
    scale, q_row, q_head, kv_row, kv_head, H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, W: tl.constexpr,
    COLS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // H
    head = tl.program_id(0) % H
    if tile >= tl.load(tiles_ptr):
        return
    at = tiles_ptr + TILE_FIELDS * (1 + tile)
    first_row = tl.load(at).to(tl.int64)
    num_rows = tl.minimum(tl.load(at + 1), BLOCK_M)
    first_key = tl.load(at + 2).to(tl.int64)  # of the segment
    diagonal = tl.load(at + 3)  # the last key that row 0 sees, counted from first_key
    e = tl.arange(0, E)[None, :]
    m = tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    q_at = q_ptr + first_row * q_row + head * q_head
    q = tl.load(q_at + m[:, None] * q_row + e, mask=is_row[:, None], other=0.0)
    k_at = k_ptr + first_key * kv_row + (head // G) * kv_head
    v_at = v_ptr + first_key * kv_row + (head // G) * kv_head

    acc = tl.zeros((BLOCK_M, E), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # base 2, scale included
    full = (diagonal + 1) // BLOCK_N * BLOCK_N
    acc, total, peak = _attend_keys(
        acc, total, peak, q, k_at, v_at, kv_row, 0, full, diagonal, scale, E, BLOCK_M, BLOCK_N, False
    )
    acc, total, peak = _attend_keys(
        acc, total, peak, q, k_at, v_at, kv_row, full, diagonal + num_rows, diagonal, scale, E, BLOCK_M, BLOCK_N, True
    )

    out = acc / total[:, None]
    row = head.to(tl.int64) * num_tokens + first_row + m
    if along_ptr is not None:  # a query's own value is that of the last key it sees
        own_at = v_at + (diagonal + m)[:, None] * kv_row + e
        own, _ = directions(tl.load(own_at, mask=is_row[:, None], other=0.0))
        along = tl.sum(out * own, axis=1)
        out -= along[:, None] * own
        tl.store(along_ptr + row, along, mask=is_row)
    if columns_ptr is not None:
        col = tl.arange(0, COLS)[None, :]
        column_at = columns_ptr + (first_row + m)[:, None] * W + col
        columns = tl.load(column_at, mask=is_row[:, None] & (col < W), other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + head * W + col, mask=col < W, other=0.0).to(tl.float32)
        factor = 2 * tl.sigmoid(tl.sum(columns * weights, axis=1))
        out *= factor[:, None]
        tl.store(factor_ptr + row, factor, mask=is_row)
    out_at = out_ptr + (first_row * H + head) * E + m[:, None] * (H * E) + e
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    tl.store(lse_ptr + row, (peak + tl.log2(total)) * LN_2, mask=is_row)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, tiling: Tiling | None = None, *, is_value_excluded: bool = False,
    columns: Tensor | None = None, weights: Tensor | None = None,
) -> Attended:  # fmt: skip
    """Return causal attention out (T, H, E) and what its backward needs.

    q (T, H, E), k and v (any, K, E): any strides of rows and heads, none within a head; K divides H.
    tiling: for measurements; the constants above otherwise. is_value_excluded takes from each output its component
    along the query's own value. columns (T, W) and weights (H, W) make a factor on each head of what is left, see
    model.layers.gate_heads. Raises ValueError for shapes that the kernel cannot serve.
    """
    num_tokens, num_heads, head_dim = q.shape
    if head_dim not in TRITON_HEAD_DIMS:
        served = ", ".join(map(str, TRITON_HEAD_DIMS))
        raise ValueError(f"attention backend 'triton' got head_dim={head_dim}: it serves {served}")
    if num_heads % k.size(1) or k.shape != v.shape:
        raise ValueError(f"attention backend 'triton' got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    tiling = tiling or (TILING if head_dim <= 64 else WIDE_TILING)
    q, k, v = addressable(q, k, v)
    tiles = list_query_tiles(bounds, num_tokens, tiling.block_m)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    along = torch.empty_like(lse) if is_value_excluded else None
    factor, width = (None, 0) if columns is None else (torch.empty_like(lse), columns.size(1))
    launch(
        _attend, ((tiles.size(0) - 1) * num_heads,),
        q, k, v, columns, weights, out, lse, along, factor, tiles, num_tokens, LOG2_E.value / math.sqrt(head_dim),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), H=num_heads, G=num_heads // k.size(1), E=head_dim, W=width,
        COLS=triton.next_power_of_2(max(width, 1)), BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers,
    )  # fmt: skip
    return Attended(out, lse, along, factor)


class _Attention(torch.autograd.Function):
    """(q, k, v, bounds) -> attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
        found = attend(q, k, v, bounds)
        ctx.save_for_backward(q, k, v, *found)
        ctx.bounds = bounds
        return found.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *found = ctx.saved_tensors
        into = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        attend_backward(grads[0], q, k, v, Attended(*found), ctx.bounds, into, Rotation())
        return *into, None


def triton_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Return causal attention (T, H, E) inside the segments of bounds. Shapes and errors as in attend."""
    y: Tensor = _Attention.apply(q, k, v, bounds)
    return y
