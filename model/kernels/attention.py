"""Causal grouped-query attention inside the segments of a pack, behind one function with several backends.

On a CPU (and for float32 anywhere) segments of similar length are padded to a common one and given to PyTorch's fused
attention, so nothing of size (tokens, tokens) exists. On CUDA a variable-length kernel reads the pack as it lies.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

if TYPE_CHECKING:
    from model.data.packing import Packing

# B rows, T tokens of a row, H query heads, K key/value heads, E head_dim, N segments of a bucket, L their padded length

BACKENDS = ("auto", "sdpa", "varlen", "flex", "fa2", "fa3", "fa4")


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None, *, backend: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v, causal, every query seeing only its own segment.

    q (B, T, H, E); k and v (B, T, K, E), H a multiple of K: query head j reads key/value head j // (H // K).
    packing cuts the one row (B = 1) into segments; without it every row is one causal sequence. Returns (B, T, H, E)
    in q's type. backend "auto" is "sdpa" on a CPU and for 32 or 64-bit floats, "varlen" (packs) or "sdpa" (dense rows)
    otherwise; probe_backends measures which is fastest.
    Raises ValueError for an unknown or unusable backend, or a pack of more than one row.
    """
    if packing is not None and q.size(0) != 1:
        raise ValueError(f"attention with a packing got {q.size(0)} rows: give one row per pack")
    name = resolve_backend(backend, q, is_packed=packing is not None)
    if name == "sdpa":
        return _dense(q, k, v) if packing is None else _bucketed(q, k, v, packing)
    num_rows, row_len, _, head_dim = q.shape
    if packing is None:
        cu_seqlens = torch.arange(0, (num_rows + 1) * row_len, row_len, dtype=torch.int32, device=q.device)
        max_seqlen = row_len
    else:
        cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
    flat = (x.reshape(num_rows * row_len, x.size(2), head_dim) for x in (q, k, v))
    return VARLEN_KERNELS[name](*flat, cu_seqlens, max_seqlen).reshape(q.shape)


def resolve_backend(backend: str, q: Tensor, *, is_packed: bool) -> str:
    """Return the backend that backend="..." means for a tensor like q. Raises ValueError if it cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        return "varlen" if is_packed and q.is_cuda and is_half else "sdpa"
    if backend not in ("sdpa", "flex") and not (q.is_cuda and is_half):
        raise ValueError(f"attention backend {backend!r} needs bfloat16 on CUDA, got {q.dtype} on {q.device}: use auto")
    return backend


def is_available(backend: str) -> bool:
    """Return whether the package behind a CUDA backend can be imported."""
    if backend not in FLASH_MODULES:
        return backend in BACKENDS
    package, _, _ = FLASH_MODULES[backend].partition(".")
    return all(importlib.util.find_spec(name) is not None for name in (package, FLASH_MODULES[backend]))


# ---- dense rows and buckets of padded segments ----------------------------------------------------------------------


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
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
    y: Tensor = _Pad.apply(x, layout.source, layout.target)  # type: ignore[no-untyped-call]
    return y


def _bucketed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
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
        results.append(_dense(*parts).reshape(end - offset, *q.shape[2:]))
        offset = end
    return torch.cat(results).index_select(0, layout.target)[None]


# ---- variable-length kernels: (tokens, heads, E), cu_seqlens int32, longest segment ---------------------------------

# Grouped heads need this argument from torch 2.12 on; 2.11 takes them without and does not know it.
GQA_OPTION: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    # A left window of -1 and a right one of 0 is causal attention.
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **GQA_OPTION)
    return _first(y)


def _flex(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    from model.kernels.flex import flex_varlen

    return flex_varlen(q, k, v, cu_seqlens, max_seqlen)


def _flash(module: str) -> Callable[..., Tensor]:
    """Return the variable-length function of a FlashAttention package, imported at the first call."""

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        function = importlib.import_module(module).flash_attn_varlen_func
        bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        return _first(function(q, k, v, **bounds, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, causal=True))

    return run


def _first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of a kernel that may return its log-sum-exp beside it."""
    return y[0] if isinstance(y, tuple) else y


FLASH_MODULES = {"fa2": "flash_attn", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
VARLEN_KERNELS: dict[str, Callable[..., Tensor]] = {
    "varlen": _varlen,
    "flex": _flex,
    **{name: _flash(module) for name, module in FLASH_MODULES.items()},
}
