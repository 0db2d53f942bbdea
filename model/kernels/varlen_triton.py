# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Causal attention inside the segments of a pack: a Triton forward, FlashAttention-2's backward.

PyTorch's FlashAttention-2 launches a program for every block of the longest segment in every segment. Here a table made
on the device lists only the query tiles that exist, tiles of long segments first.
"""

# T query tokens, H query heads, K kv heads, G query heads a kv head, E head_dim, N segments, M query rows of a tile

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from model.kernels.attention import Bounds

LOG2_E = math.log2(math.e)
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
ENTRIES = 256  # segments that the table's kernel looks at together
TILE_FIELDS: tl.constexpr = tl.constexpr(4)


class Tiling(NamedTuple):
    """Query rows and keys of a tile, and how a program runs it.

    max_registers of a thread: fewer than the compiler would take, so that more programs share a processor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


TILING = Tiling(64, 64, 4, 3, max_registers=128)  # measured on an H200, heads of 64
WIDE_TILING = Tiling(128, 64, 8, 2)  # heads of 128


@triton.jit
def _length(starts_ptr, segment, inside):
    start = tl.load(starts_ptr + segment, mask=inside, other=0)
    return tl.load(starts_ptr + segment + 1, mask=inside, other=0) - start


@triton.jit(do_not_specialize=["num_segments"])
def _list_tiles(
    tiles_ptr, queries_ptr, keys_ptr, num_segments, BLOCK_M: tl.constexpr, ENTRIES: tl.constexpr, BLOCKS: tl.constexpr
):
    """Write the tiles of one segment behind those of every longer one; program 0 also writes how many tiles exist."""
    segment = tl.program_id(0)
    query = tl.load(queries_ptr + segment)
    num_queries = tl.load(queries_ptr + segment + 1) - query
    key = tl.load(keys_ptr + segment)
    num_keys = tl.load(keys_ptr + segment + 1) - key
    before = 0
    total = 0
    for start in range(0, num_segments, ENTRIES):
        other = start + tl.arange(0, ENTRIES)
        inside = other < num_segments
        count = _length(queries_ptr, other, inside)
        length = _length(keys_ptr, other, inside)
        num_blocks = (count + BLOCK_M - 1) // BLOCK_M
        is_before = (length > num_keys) | ((length == num_keys) & (other < segment))
        before += tl.sum(tl.where(is_before, num_blocks, 0))
        total += tl.sum(num_blocks)
    if segment == 0:
        tl.store(tiles_ptr, total)
    num_blocks = (num_queries + BLOCK_M - 1) // BLOCK_M
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        row = block * BLOCK_M
        # The last block of a segment sees the most keys: it comes first.
        at = tiles_ptr + TILE_FIELDS * (1 + before + num_blocks - 1 - block)
        tl.store(at, query + row, mask=inside)
        tl.store(at + 1, tl.minimum(num_queries - row, BLOCK_M), mask=inside)
        tl.store(at + 2, tl.zeros_like(row) + key, mask=inside)
        tl.store(at + 3, num_keys - num_queries + row, mask=inside)


@triton.jit
def _attend_keys(
    acc, total, peak, q, k_ptr, v_ptr, kv_row, first, last, diagonal, scale,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Go over keys first..last - 1, which every row sees unless IS_MASKED."""
    n = tl.arange(0, BLOCK_N)
    ahead = n[None, :] - tl.arange(0, BLOCK_M)[:, None]
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
            scores = tl.where(ahead <= diagonal - start, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
        peak = new_peak
    return acc, total, peak


@triton.jit(do_not_specialize=["num_tokens"])
def _attend(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, tiles_ptr, num_tokens, scale, q_row, q_head, kv_row, kv_head,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // H
    head = tl.program_id(0) % H
    if tile >= tl.load(tiles_ptr):
        return
    at = tiles_ptr + TILE_FIELDS * (1 + tile)
    first_row = tl.load(at).to(tl.int64)
    num_rows = tl.load(at + 1)
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
    out_at = out_ptr + (first_row * H + head) * E + m[:, None] * (H * E) + e
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None])
    lse = (peak + tl.log2(total)) * LN_2
    tl.store(lse_ptr + head.to(tl.int64) * num_tokens + first_row + m, lse, mask=is_row)


def list_tiles(bounds: Bounds, num_tokens: int, block_m: int) -> Tensor:
    """Return the query tiles of bounds, int32 (1 + slots, 4), without asking the device how many there are.

    Row 0 begins with their number; each further row is a tile's first query token, its number of rows, the first key
    of its segment, and the key (counted from that one) on which the diagonal meets its first row.
    """
    num_segments = bounds.queries.numel() - 1
    blocks = triton.cdiv(bounds.max_queries, block_m)
    slots = min(num_tokens // block_m + num_segments, num_segments * blocks)
    tiles = torch.empty(1 + slots, TILE_FIELDS.value, dtype=torch.int32, device=bounds.queries.device)
    _list_tiles[(num_segments,)](
        tiles, bounds.queries, bounds.keys, num_segments, BLOCK_M=block_m, ENTRIES=ENTRIES, BLOCKS=32, num_warps=2
    )
    return tiles


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds, tiling: Tiling | None = None) -> tuple[Tensor, Tensor]:
    """Return causal attention (T, H, E) and the log of each query's summed weights (H, T) float32.

    q (T, H, E), k and v (any, K, E): any strides of rows and heads, none within a head; K divides H.
    tiling: for measurements; the constants above otherwise.
    Raises ValueError for shapes that the kernel cannot serve.
    """
    num_tokens, num_heads, head_dim = q.shape
    if head_dim not in (16, 32, 64, 128):
        raise ValueError(f"attention backend 'triton' got head_dim={head_dim}: it serves 16, 32, 64 and 128")
    if num_heads % k.size(1) or k.shape != v.shape:
        raise ValueError(f"attention backend 'triton' got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    tiling = tiling or (TILING if head_dim <= 64 else WIDE_TILING)
    q = q if q.stride(2) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    tiles = list_tiles(bounds, num_tokens, tiling.block_m)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=q.device)
    _attend[((tiles.size(0) - 1) * num_heads,)](
        q, k, v, out, lse, tiles, num_tokens, LOG2_E / math.sqrt(head_dim),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        H=num_heads, G=num_heads // k.size(1), E=head_dim, BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, maxnreg=tiling.max_registers,
    )  # fmt: skip
    return out, lse


class _Attention(torch.autograd.Function):
    """(q, k, v, bounds) -> attention, differentiated by FlashAttention-2's own kernel."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
        out, lse = attend(q, k, v, bounds)
        ctx.save_for_backward(q, k, v, out, lse, bounds.queries, bounds.keys)
        ctx.lengths = bounds.max_queries, bounds.max_keys
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        unused = torch.empty(2, dtype=torch.uint64, device=grads[0].device)  # the random state of a dropout of 0
        grad_q, grad_k, grad_v = torch.ops.aten._flash_attention_backward(
            grads[0], *ctx.saved_tensors, *ctx.lengths, 0.0, True, unused, unused,
            window_size_left=-1, window_size_right=0,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None


def triton_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    """Return causal attention (T, H, E) inside the segments of bounds. Shapes and errors as in attend."""
    y: Tensor = _Attention.apply(q, k, v, bounds)
    return y
