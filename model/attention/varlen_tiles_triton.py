# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""A table of the tiles that attention over a pack has to work on, made on the device: the host never learns lengths."""

# N segments, M rows of a tile

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.attention.bounds import Bounds
from model.kernels.launch import launch

ENTRIES = 256  # segments that the table's kernel looks at together
TILE_FIELDS: tl.constexpr = tl.constexpr(4)
LOG2_E: tl.constexpr = tl.constexpr(math.log2(math.e))
LN_2: tl.constexpr = tl.constexpr(math.log(2.0))
TINY: tl.constexpr = tl.constexpr(1e-12)


class Tiling(NamedTuple):
    """Query rows and keys of a tile, and how a program runs it.

    max_registers of a thread: fewer than the compiler would take, so that more programs share a processor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def addressable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as the kernels address them, copied where needed: heads whole, k and v with the same strides."""
    q = q if q.stride(2) == 1 else q.contiguous()
    if k.stride() != v.stride() or k.stride(2) != 1:
        k, v = k.contiguous(), v.contiguous()
    return q, k, v


@triton.jit
def directions(v):
    """Return rows v (M, E) over their lengths, float32, and the lengths (M,), none below TINY."""
    wide = v.to(tl.float32)
    norm = tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), TINY)
    return wide / norm[:, None], norm


@triton.jit
def _length(starts_ptr, segment, inside):
    start = tl.load(starts_ptr + segment, mask=inside, other=0)
    return tl.load(starts_ptr + segment + 1, mask=inside, other=0) - start


@triton.jit(do_not_specialize=["num_segments"])
def _list_tiles(
    tiles_ptr, rows_ptr, others_ptr, num_segments, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Write the tiles of one segment behind those of every longer one; program 0 also writes how many tiles exist."""
    segment = tl.program_id(0)
    first_row = tl.load(rows_ptr + segment)
    num_rows = tl.load(rows_ptr + segment + 1) - first_row
    first_other = tl.load(others_ptr + segment)
    num_others = tl.load(others_ptr + segment + 1) - first_other
    before = 0
    total = 0
    for start in range(0, num_segments, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < num_segments
        length = _length(others_ptr, entry, inside)
        num_blocks = (_length(rows_ptr, entry, inside) + BLOCK - 1) // BLOCK
        is_before = (length > num_others) | ((length == num_others) & (entry < segment))
        before += tl.sum(tl.where(is_before, num_blocks, 0))
        total += tl.sum(num_blocks)
    if segment == 0:
        tl.store(tiles_ptr, total)
    num_blocks = (num_rows + BLOCK - 1) // BLOCK
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        inside = block < num_blocks
        row = block * BLOCK
        place = num_blocks - 1 - block if LAST_FIRST else block
        at = tiles_ptr + TILE_FIELDS * (1 + before + place)
        tl.store(at, first_row + row, mask=inside)
        tl.store(at + 1, num_rows - row, mask=inside)
        tl.store(at + 2, tl.zeros_like(row) + first_other, mask=inside)
        tl.store(at + 3, num_others - num_rows + row, mask=inside)


def _list(bounds: Bounds, num_tokens: int, block: int, *, last_first: bool) -> Tensor:
    made, key = bounds.tables if bounds.tables is not None else {}, (bounds.max_queries, last_first, block)
    if key in made:
        return made[key]
    rows, others, longest = bounds[:3] if last_first else (bounds.keys, bounds.queries, bounds.max_keys)
    num_segments = rows.numel() - 1
    slots = min(num_tokens // block + num_segments, num_segments * triton.cdiv(longest, block))
    made[key] = tiles = torch.empty(1 + slots, TILE_FIELDS.value, dtype=torch.int32, device=rows.device)
    launch(
        _list_tiles, (num_segments,), tiles, rows, others, num_segments,
        LAST_FIRST=last_first, BLOCK=block, ENTRIES=ENTRIES, BLOCKS=32, num_warps=2,
    )  # fmt: skip
    return tiles


def list_query_tiles(bounds: Bounds, num_queries: int, block: int) -> Tensor:
    """Return the tiles of block queries, int32 (1 + slots, 4), without asking the device how many there are.

    Row 0 begins with their number; each further row is a tile's first query, the number of queries from there to the
    end of its segment, the segment's first key, and the last key, counted from that one, that the first query sees.
    Tiles of segments with many keys come first, in a segment those that see the most.
    """
    return _list(bounds, num_queries, block, last_first=True)


def list_key_tiles(bounds: Bounds, num_keys: int, block: int) -> Tensor:
    """Return the tiles of block keys, int32 (1 + slots, 4), as list_query_tiles with keys and queries exchanged.

    The last field is the first query, counted from the segment's first, that sees the tile's first key: it is negative
    for keys before those of the first query.
    """
    return _list(bounds, num_keys, block, last_first=False)
