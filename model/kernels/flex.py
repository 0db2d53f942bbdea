"""FlexAttention over a pack: the block mask is computed from the segment bounds, block by block.

torch's create_block_mask evaluates a mask for every pair of tokens, which costs more than the attention itself. A
pack's segments are contiguous, so the key blocks of a query block are two ranges, known from two numbers a block.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# T tokens, n mask blocks of BLOCK tokens
BLOCK = 128

_last_mask: tuple[weakref.ref[Tensor], int, BlockMask] | None = None


def flex_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention inside segments; q (T, H, E), k and v (T, K, E). Compiled on CUDA, for small tests elsewhere."""
    mask = cached_block_mask(cu_seqlens, q.size(0))
    run = _compiled() if q.is_cuda else cast(Callable[..., Any], flex_attention)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, T, E)
    y: Tensor = run(*heads_first, block_mask=mask, enable_gqa=q.size(1) != k.size(1))
    return y[0].transpose(0, 1)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=False)


def cached_block_mask(cu_seqlens: Tensor, num_tokens: int) -> BlockMask:
    """Return segment_block_mask, computed once for the visits that share one cu_seqlens tensor."""
    global _last_mask
    if torch.compiler.is_compiling():
        return segment_block_mask(cu_seqlens, num_tokens)
    if _last_mask is not None:
        reference, version, mask = _last_mask
        if reference() is cu_seqlens and version == cu_seqlens._version:
            return mask
    mask = segment_block_mask(cu_seqlens, num_tokens)
    _last_mask = (weakref.ref(cu_seqlens), cu_seqlens._version, mask)
    return mask


def segment_block_mask(cu_seqlens: Tensor, num_tokens: int) -> BlockMask:
    """Return the BlockMask of causal attention inside segments, without a (T, T) mask and without a host sync.

    cu_seqlens (any,) int32: segment starts, then the total as often as wanted. Query block i needs the key blocks
    first[i]..i; those in whole[i]..i-1 lie inside the one segment of all its queries and need no mask.
    """
    device = cu_seqlens.device
    num_blocks = -(-num_tokens // BLOCK)
    tokens = torch.arange(num_tokens, device=device, dtype=torch.int32)
    # Repeated bounds (zero-length segments, padding) all sort before the token that starts there.
    start = cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1]  # (T,) first token of own segment
    blocks = torch.arange(num_blocks, device=device)
    first = start[blocks * BLOCK].long() // BLOCK
    last_token = torch.clamp((blocks + 1) * BLOCK, max=num_tokens) - 1
    whole = torch.minimum(-(-start[last_token].long() // BLOCK), blocks)
    place = torch.arange(num_blocks, device=device)[None]  # (1, n)

    masked = whole - first  # masked key blocks first..whole-1, then the diagonal block
    kv_indices = torch.where(place < masked[:, None], first[:, None] + place, blocks[:, None])
    full_kv_indices = whole[:, None] + place
    # The same seen from key block j: query blocks before reach[j] have first <= j, those before free[j] whole <= j.
    reach = torch.searchsorted(first, blocks, right=True)
    free = torch.maximum(torch.searchsorted(whole, blocks, right=True), blocks + 1)
    q_indices = torch.where(place < 1, blocks[:, None], free[:, None] + place - 1)
    full_q_indices = blocks[:, None] + 1 + place

    def as_index(x: Tensor) -> Tensor:
        return x.clamp(max=num_blocks - 1).to(torch.int32)[None, None].contiguous()

    def is_visible(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= start[query])

    return BlockMask(
        (num_tokens, num_tokens),
        as_count(masked + 1), as_index(kv_indices),
        as_count(blocks - whole), as_index(full_kv_indices),
        as_count(reach - free + 1), as_index(q_indices),
        as_count(free - blocks - 1), as_index(full_q_indices),
        (BLOCK, BLOCK),
        is_visible,
    )  # fmt: skip


def as_count(x: Tensor) -> Tensor:
    """Return x (n,) as the (1, 1, n) int32 counts a BlockMask holds."""
    return x.to(torch.int32)[None, None].contiguous()
