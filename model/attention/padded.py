"""Attention over segments of similar length, padded to a common one: what a CPU and wide floats use."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from model.data.packing import Packing


def attend_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within each whole row. Shapes as in attention."""
    groups = q.size(2) // k.size(2)
    if groups > 1 and not q.is_cuda:  # the CPU's fused kernel wants as many key heads as query heads
        k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, E)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.is_cuda and groups > 1).transpose(1, 2)


class _Buckets(NamedTuple):
    """Where every token of a pack sits in a layout of padded segments.

    source (R,): token read by each padded row; target (T,): padded row of each token; shapes: (N, L) of the buckets.
    """

    source: Tensor
    target: Tensor
    shapes: tuple[tuple[int, int], ...]


def bucket_length(length: int) -> int:
    """Return length rounded up to a quarter of its power of two: at most 25 % of padding, few distinct values."""
    step = max(1, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


@lru_cache(maxsize=16)
def _buckets(bounds: tuple[int, ...], device: torch.device) -> _Buckets:
    """Group the segments [bounds[i], bounds[i + 1]) by padded length. All index arrays are int64 on device."""
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(bounds):
        if end > start:
            by_length.setdefault(bucket_length(end - start), []).append((start, end))
    sources, shapes, target = [], [], torch.empty(bounds[-1], dtype=torch.long)
    offset = 0
    for length in sorted(by_length):
        starts, ends = torch.tensor(by_length[length]).T  # (N,) each
        tokens = starts[:, None] + torch.arange(length)  # (N, L)
        is_token = tokens < ends[:, None]
        target[tokens[is_token]] = offset + is_token.flatten().nonzero().flatten()
        # Padding repeats its segment's last token: it stands after every real query, so no result depends on it.
        sources.append(torch.minimum(tokens, ends[:, None] - 1).flatten())
        shapes.append((len(starts), length))
        offset += tokens.numel()
    return _Buckets(torch.cat(sources).to(device), target.to(device), tuple(shapes))


class _Pad(torch.autograd.Function):
    """Copy tokens (T, ...) into padded rows (R, ...); padding passes no gradient back, so the backward is a gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(target)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def _pad(x: Tensor, layout: _Buckets) -> Tensor:
    y: Tensor = _Pad.apply(x, layout.source, layout.target)
    return y


def attend_padded(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """Attend bucket by bucket. Shapes as in attention with B = 1; the order of sums is fixed by packing alone."""
    bounds = tuple(packing.cu_seqlens.tolist())
    if bounds[0] != 0 or bounds[-1] != q.size(1):
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]}, it must cover the row's {q.size(1)} tokens"
        )
    layout = _buckets(bounds, q.device)
    padded = [_pad(x[0], layout) for x in (q, k, v)]  # (R, heads, E) each
    results, offset = [], 0
    for count, length in layout.shapes:
        end = offset + count * length
        parts = (x[offset:end].view(count, length, *x.shape[1:]) for x in padded)  # (N, L, heads, E) each
        results.append(attend_rows(*parts).reshape(end - offset, *q.shape[2:]))
        offset = end
    return torch.cat(results).index_select(0, layout.target)[None]
