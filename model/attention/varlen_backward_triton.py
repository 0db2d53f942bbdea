# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Backward of causal attention inside the segments of a pack, the same bits every time.

Two kernels, each of which recomputes the weights from the scores and the forward's log-sums: a program of the first
owns a block of queries and adds up their gradient over the keys they see; one of the second owns a block of keys and
goes over the queries that see them. That is seven matrix products instead of five, but nothing is added up in memory.

Where the forward took from its output y the component c w along the query's own value v, w = v / |v|, there is z = y -
c w and c, and a gradient g of z. That of y is g - a w with a = g w, which the first kernel writes for the second. That
of v, besides y's, is the sum of -(a z + c (g - a w)) / |v| over the query heads, which the second kernel begins with.
Where z was then multiplied by a factor, both begin by undoing that. The output times its gradient is always y times its
own: what the softmax needs.

Where queries and keys came from projections by a norm, rotary and a gain, each kernel takes those back at its end and
writes gradients of the projections.
"""

# T query tokens, H query heads, K kv heads, G query heads a kv head, E head_dim, M query rows and N keys of a tile

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.attention.bounds import Bounds
from model.attention.heads_triton import write_gradient
from model.attention.varlen_tiles_triton import (
    LN_2,
    LOG2_E,
    TILE_FIELDS,
    TINY,
    Tiling,
    addressable,
    directions,
    list_key_tiles,
    list_query_tiles,
)
from model.kernels.launch import launch

QUERY_TILING = Tiling(64, 64, 4, 3, max_registers=168)  # measured on an H200, heads of 64
KEY_TILING = Tiling(64, 64, 4, 2, max_registers=168)
WIDE_QUERY_TILING = Tiling(64, 64, 4, 2)  # heads of 128
WIDE_KEY_TILING = Tiling(64, 64, 8, 2)


@triton.jit
def _walk_keys(
    acc, q, grad, lse, delta, k_ptr, v_ptr, k_box, v_box, key, column, first, last, diagonal, scale,
    KV_ROW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add what keys first..last - 1, which every row sees unless IS_MASKED, give to the queries' gradient (M, E)."""
    n = tl.arange(0, BLOCK_N)
    last_seen = tl.arange(0, BLOCK_M) + diagonal
    places = n[:, None] * KV_ROW + tl.arange(0, E)[None, :]
    for start in range(first, last, BLOCK_N):
        k_at = k_ptr + start * KV_ROW + places
        v_at = v_ptr + start * KV_ROW + places
        if IS_MASKED:
            exists = (start + n < last)[:, None]
            k = tl.load(k_at, mask=exists, other=0.0)
            v = tl.load(v_at, mask=exists, other=0.0)
        else:
            k = k_box.load([key + start, column])
            v = v_box.load([key + start, column])
        weights = tl.exp2(tl.dot(q, k.T) * scale - lse[:, None])  # (M, keys) float32
        if IS_MASKED:
            weights = tl.where((start + n)[None, :] <= last_seen[:, None], weights, 0.0)
        slopes = weights * tl.dot(grad, v.T, tl.broadcast_to(delta[:, None], weights.shape))
        acc = tl.dot(slopes.to(k.dtype), k, acc)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "table_rows", "num_queries", "missing"])
def _grad_queries(
    grad_ptr, q_ptr, k_ptr, v_ptr, k_box, v_box, out_ptr, lse_ptr, along_ptr, factor_ptr, sums_ptr, grad_q_ptr,
    grad_y_ptr, along_grad_ptr, slope_ptr, tiles_ptr, inverse_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, num_tokens,
    scale, q_row, q_head, kv_head, grad_row, table_rows, num_queries, missing, KV_ROW: tl.constexpr, H: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of queries, and for each its base-2 log-sum and delta, minus out times grad."""
    tile = tl.program_id(0) // H
    head = tl.program_id(0) % H
    if tile >= tl.load(tiles_ptr):
        return
    at = tiles_ptr + TILE_FIELDS * (1 + tile)
    first = tl.load(at)
    first_row = first.to(tl.int64)
    num_rows = tl.minimum(tl.load(at + 1), BLOCK_M)
    key = tl.load(at + 2)  # the first of the segment
    first_key = key.to(tl.int64)
    column = (head // G) * kv_head
    diagonal = tl.load(at + 3)  # the last key that row 0 sees, counted from first_key
    e = tl.arange(0, E)[None, :]
    m = tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    places = (first_row * H + head) * E + m[:, None] * (H * E) + e
    q_at = q_ptr + first_row * q_row + head * q_head
    q = tl.load(q_at + m[:, None] * q_row + e, mask=is_row[:, None], other=0.0)
    grad = tl.load(grad_ptr + places, mask=is_row[:, None], other=0.0)
    out = tl.load(out_ptr + places, mask=is_row[:, None], other=0.0).to(tl.float32)
    row = head.to(tl.int64) * num_tokens + first_row + m
    k_at = k_ptr + first_key * KV_ROW + column
    v_at = v_ptr + first_key * KV_ROW + column
    # y times its gradient, whatever was made of it: neither the factor nor the excluded part changes the product
    product = tl.sum(out * grad.to(tl.float32), axis=1)
    if factor_ptr is not None:
        factor = tl.load(factor_ptr + row, mask=is_row, other=1.0)
        # the product is also the factor times its gradient; the factor is 2 s(x), and s' = s (1 - s)
        tl.store(slope_ptr + row, product * (1 - factor / 2), mask=is_row)
        grad = (grad.to(tl.float32) * factor[:, None]).to(grad.dtype)
    if along_ptr is not None:
        own_at = v_at + (diagonal + m)[:, None] * KV_ROW + e
        own, _ = directions(tl.load(own_at, mask=is_row[:, None], other=0.0))
        along_grad = tl.sum(grad.to(tl.float32) * own, axis=1)
        grad = (grad.to(tl.float32) - along_grad[:, None] * own).to(grad.dtype)
        tl.store(along_grad_ptr + row, along_grad, mask=is_row)
    if grad_y_ptr is not None:
        tl.store(grad_y_ptr + places, grad, mask=is_row[:, None])
    lse = tl.load(lse_ptr + row, mask=is_row, other=float("inf")) * LOG2_E  # no weights for rows that are not there
    tl.store(sums_ptr + 2 * row, lse, mask=is_row)
    tl.store(sums_ptr + 2 * row + 1, -product, mask=is_row)

    acc = tl.zeros((BLOCK_M, E), tl.float32)
    full = (diagonal + 1) // BLOCK_N * BLOCK_N
    acc = _walk_keys(
        acc, q, grad, lse, -product, k_at, v_at, k_box, v_box, key, column, 0, full, diagonal, scale,
        KV_ROW, E, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip
    last = diagonal + num_rows
    acc = _walk_keys(
        acc, q, grad, lse, -product, k_at, v_at, k_box, v_box, key, column, full, last, diagonal, scale,
        KV_ROW, E, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    if partial_ptr is not None:
        partial_ptr += head.to(tl.int64) * num_tokens + first
    first += (first // num_queries + 1) * missing  # among the projections
    write_gradient(
        acc, scale * LN_2, grad_q_ptr + first.to(tl.int64) * grad_row + head * E, grad_row, q_at, q_row, first, head,
        num_rows, inverse_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, table_rows, H, H // G, E, HALF, BLOCK_M,
    )  # fmt: skip


@triton.jit
def _walk_queries(
    grad_k, grad_v, k, v, q_ptr, grad_ptr, q_box, grad_box, query, q_column, grad_column, sums_ptr, first, last,
    diagonal, scale,
    Q_ROW: tl.constexpr, GRAD_ROW: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Add what queries first..last - 1 give to the gradients (N, E) of keys; IS_MASKED: not all of them see all."""
    m = tl.arange(0, BLOCK_M)
    seen_from = tl.maximum(tl.arange(0, BLOCK_N) + diagonal, 0)
    e = tl.arange(0, E)[None, :]
    both = 2 * m[:, None] + tl.arange(0, 2)[None, :]
    for start in range(first, last, BLOCK_M):
        q_at = q_ptr + start * Q_ROW + (m[:, None] * Q_ROW + e)
        grad_at = grad_ptr + start * GRAD_ROW + (m[:, None] * GRAD_ROW + e)
        # Loaded together, the two are as many as a program's threads: fewer would be loaded once a warp.
        sums_at = sums_ptr + start * 2 + both
        if IS_MASKED:
            exists = (start + m >= 0)[:, None]
            q = tl.load(q_at, mask=exists, other=0.0)
            grad = tl.load(grad_at, mask=exists, other=0.0)
            lse, delta = tl.split(tl.load(sums_at, mask=exists, other=0.0))
        else:
            q = q_box.load([query + start, q_column])
            grad = grad_box.load([query + start, grad_column])
            lse, delta = tl.split(tl.load(sums_at))
        weights = tl.exp2(tl.dot(k, q.T) * scale - lse[None, :])  # (N, queries) float32
        if IS_MASKED:
            weights = tl.where((start + m)[None, :] >= seen_from[:, None], weights, 0.0)
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v)
        slopes = weights * tl.dot(v, grad.T, tl.broadcast_to(delta[None, :], weights.shape))
        grad_k = tl.dot(slopes.to(q.dtype), q, grad_k)
    return grad_k, grad_v


@triton.jit
def _grad_own(
    grad_v, v, out_ptr, grad_ptr, along_ptr, along_grad_ptr, factor_ptr, queries, exists, num_tokens, kv_head_index,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add to the gradient (N, E) of values what excluding them from the outputs of their own queries (N,) gives."""
    own, norm = directions(v)
    bend = tl.where(norm > TINY, 0.0, 2.0)  # a length that is held at TINY has no gradient
    for member in range(G):
        head = kv_head_index * G + member
        places = (queries[:, None] * (K * G) + head) * E + tl.arange(0, E)[None, :]
        out = tl.load(out_ptr + places, mask=exists[:, None], other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + places, mask=exists[:, None], other=0.0).to(tl.float32)
        row = head.to(tl.int64) * num_tokens + queries
        if factor_ptr is not None:  # out before it, to as many digits; a factor of zero left none
            factor = tl.load(factor_ptr + row, mask=exists, other=1.0)
            out *= tl.where(factor > 0, 1 / tl.where(factor > 0, factor, 1.0), 0.0)[:, None]
        along = tl.load(along_ptr + row, mask=exists, other=0.0)
        along_grad = tl.load(along_grad_ptr + row, mask=exists, other=0.0)
        grad += (bend * along_grad)[:, None] * own
        grad_v -= (along_grad[:, None] * out + along[:, None] * grad) / norm[:, None]
    return grad_v


@triton.jit(do_not_specialize=["num_tokens", "table_rows"])
def _grad_keys(
    grad_ptr, q_ptr, k_ptr, v_ptr, q_box, grad_box, sums_ptr, out_ptr, along_ptr, along_grad_ptr, factor_ptr,
    grad_k_ptr, grad_v_ptr, tiles_ptr, inverse_ptr, cos_ptr, sin_ptr, gain_ptr, num_tokens, scale, q_head, kv_row,
    kv_head, grad_row, table_rows, Q_ROW: tl.constexpr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of keys and values."""
    tile = tl.program_id(0) // K
    kv_head_index = tl.program_id(0) % K
    if tile >= tl.load(tiles_ptr):
        return
    at = tiles_ptr + TILE_FIELDS * (1 + tile)
    key = tl.load(at)
    first_key = key.to(tl.int64)
    num_keys = tl.load(at + 1)  # to the segment's end
    query = tl.load(at + 2)  # the first of the segment
    first_query = query.to(tl.int64)
    diagonal = tl.load(at + 3)  # the first query that sees key 0, counted from first_query
    num_queries = diagonal + num_keys
    e = tl.arange(0, E)[None, :]
    n = tl.arange(0, BLOCK_N)[:, None]
    kv_at = first_key * kv_row + kv_head_index * kv_head + n * kv_row + e
    k = tl.load(k_ptr + kv_at, mask=n < num_keys, other=0.0)
    v = tl.load(v_ptr + kv_at, mask=n < num_keys, other=0.0)

    # Blocks of queries end where the segment ends, so that only those at the diagonal need a mask.
    begin = tl.maximum(diagonal, 0)
    num_full = tl.maximum(num_queries - tl.maximum(diagonal + BLOCK_N - 1, 0), 0) // BLOCK_M
    full = num_queries - num_full * BLOCK_M
    first = full - (full - begin + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    grad_k = tl.zeros((BLOCK_N, E), tl.float32)
    grad_v = tl.zeros((BLOCK_N, E), tl.float32)
    if along_ptr is not None:
        itself = diagonal + tl.arange(0, BLOCK_N)  # the query of each key's token, counted from first_query
        exists = (itself >= 0) & (tl.arange(0, BLOCK_N) < num_keys)
        grad_v = _grad_own(
            grad_v, v, out_ptr, grad_ptr, along_ptr, along_grad_ptr, factor_ptr, first_query + itself, exists,
            num_tokens, kv_head_index, K, G, E,
        )  # fmt: skip
    for member in range(G):
        head = kv_head_index * G + member
        q_at = q_ptr + first_query * Q_ROW + head * q_head
        grad_at = grad_ptr + (first_query * (K * G) + head) * E
        sums_at = sums_ptr + 2 * (head.to(tl.int64) * num_tokens + first_query)
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, q_at, grad_at, q_box, grad_box, query, head * q_head, head * E, sums_at, first, full,
            diagonal, scale, Q_ROW, K * G * E, E, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        grad_k, grad_v = _walk_queries(
            grad_k, grad_v, k, v, q_at, grad_at, q_box, grad_box, query, head * q_head, head * E, sums_at, full,
            num_queries, diagonal, scale, Q_ROW, K * G * E, E, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    places = first_key * grad_row + kv_head_index * E
    tl.store(grad_v_ptr + places + n * grad_row + e, grad_v, mask=n < num_keys)
    write_gradient(
        grad_k, scale * LN_2, grad_k_ptr + places, grad_row, k_ptr + first_key * kv_row + kv_head_index * kv_head,
        kv_row, key, K * G + kv_head_index, num_keys, inverse_ptr, cos_ptr, sin_ptr, gain_ptr, None, table_rows, K * G,
        K, E, HALF, BLOCK_N,
    )  # fmt: skip


def _boxes(x: Tensor, y: Tensor, rows: int) -> list[TensorDescriptor]:
    """Describe blocks of rows of one head of x and y (any, heads, E) to the tensor memory accelerator."""
    return [
        TensorDescriptor(z, [z.size(0), (z.size(1) - 1) * z.stride(1) + z.size(2)], [z.stride(0), 1], [rows, z.size(2)])
        for z in (x, y)
    ]


class Rotation(NamedTuple):
    """What rotate made queries and keys with, N rows of projections, and which rows the queries are of.

    inverse (N, H + K); cos, sin (rows, E'), which no segment reaches across; gain (H,). Queries stand for the last
    num_queries of every num_queries + missing rows.
    """

    inverse: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    gain: Tensor | None = None
    num_queries: int = 1
    missing: int = 0
    needs_gain: bool = False


class Attended(NamedTuple):
    """Attention's output (T, H, E) and, each (H, T) float32, what its backward needs.

    lse: the log of each query's summed weights. along: the length of the component along the query's own value that was
    taken from the output. factor: what each head was multiplied by then. None for what was not done.
    """

    out: Tensor
    lse: Tensor
    along: Tensor | None
    factor: Tensor | None


class Prepared(NamedTuple):
    """What the keys' kernel reads of the queries' kernel.

    sums (H, T, 2) float32: log2 of the summed weights, and delta, minus the sum of y times its gradient over a head.
    grad (T, H, E): the gradient of y; along (H, T) float32: the length of what it lost, or None as in attend.
    """

    sums: Tensor
    grad: Tensor
    along: Tensor | None


def grad_queries(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Attended, tiles: Tensor, tiling: Tiling, grad_q: Tensor,
    rotation: Rotation,
) -> tuple[Tensor | None, Tensor | None, Prepared]:  # fmt: skip
    """Fill grad_q, and return the other gradients that attend_backward returns, and what grad_keys needs.

    tiles: list_query_tiles with tiling's block_m. Others as in attend_backward, with contiguous grad and out.
    """
    num_tokens, num_heads, head_dim = q.shape
    inverse, cos, sin, gain, num_queries, missing, needs_gain = rotation
    table_rows, half = (1, 1) if cos is None else cos.shape
    partial = torch.empty_like(found.lse) if needs_gain else None
    along_grad, slope = (None if x is None else torch.empty_like(x) for x in (found.along, found.factor))
    grad_y = None if along_grad is None and slope is None else torch.empty_like(grad)
    sums = torch.empty(num_heads, num_tokens, 2, dtype=torch.float32, device=q.device)
    launch(
        _grad_queries, ((tiles.size(0) - 1) * num_heads,),
        grad, q, k, v, *_boxes(k, v, tiling.block_n), *found, sums, grad_q, grad_y, along_grad, slope, tiles,
        inverse, cos, sin, gain, partial, num_tokens, LOG2_E.value / math.sqrt(head_dim), q.stride(0), q.stride(1),
        k.stride(1), grad_q.stride(0), table_rows, num_queries, missing, KV_ROW=k.stride(0),
        H=num_heads, G=num_heads // k.size(1), E=head_dim, HALF=half,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers,
    )  # fmt: skip
    prepared = Prepared(sums, grad if grad_y is None else grad_y, along_grad)
    return None if partial is None else partial.sum(1), slope, prepared


def grad_keys(
    prepared: Prepared, q: Tensor, k: Tensor, v: Tensor, found: Attended, tiles: Tensor, tiling: Tiling,
    grad_k: Tensor, grad_v: Tensor, rotation: Rotation,
) -> None:  # fmt: skip
    """Fill grad_k and grad_v, of the same strides. tiles: list_key_tiles with tiling's block_n."""
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.size(1)
    sums, grad, along_grad = prepared
    inverse, cos, sin, gain, *_ = rotation
    table_rows, half = (1, 1) if cos is None else cos.shape
    launch(
        _grad_keys, ((tiles.size(0) - 1) * num_kv_heads,),
        grad, q, k, v, *_boxes(q, grad, tiling.block_m), sums, found.out, found.along, along_grad, found.factor, grad_k,
        grad_v, tiles, inverse, cos, sin, gain, num_tokens, LOG2_E.value / math.sqrt(head_dim), q.stride(1),
        k.stride(0), k.stride(1), grad_k.stride(0), table_rows, Q_ROW=q.stride(0), K=num_kv_heads,
        G=num_heads // num_kv_heads, E=head_dim, HALF=half,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers,
    )  # fmt: skip


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, found: Attended, bounds: Bounds,
    into: tuple[Tensor, Tensor, Tensor], rotation: Rotation,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Fill into with the gradients of q, k and v from that of out (T, H, E).

    Returns those of the gain (H,), if wanted, and of the argument of each factor's sigmoid (H, T), where there are any.
    q, k, v, bounds as attend got them, found as it returned it. bounds must cover every key and query:
    gradients of others are left undefined. A key that no query sees has a gradient of zero. With rotation the
    gradients are those of the projections (N, H or K, E), and rows that are no queries' are left out of the first.
    Into's rows may be strided, alike for k and v; heads not.
    """
    q, k, v = addressable(q, k, v)
    query_tiling, key_tiling = tilings(q.size(2))
    tiles = list_query_tiles(bounds, q.size(0), query_tiling.block_m)
    grad_gain, slope, prepared = grad_queries(grad.contiguous(), q, k, v, found, tiles, query_tiling, into[0], rotation)
    tiles = list_key_tiles(bounds, k.size(0), key_tiling.block_n)
    grad_keys(prepared, q, k, v, found, tiles, key_tiling, *into[1:], rotation)
    return grad_gain, slope


def tilings(head_dim: int) -> tuple[Tiling, Tiling]:
    """Return the tilings of the queries' and the keys' kernel."""
    return (QUERY_TILING, KEY_TILING) if head_dim <= 64 else (WIDE_QUERY_TILING, WIDE_KEY_TILING)
