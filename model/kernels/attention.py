"""Causal grouped-query attention inside the segments of a pack, behind one function with several backends.

On a CPU (and for float32 anywhere) segments of similar length are padded to a common one and given to PyTorch's fused
attention, so nothing of size (tokens, tokens) exists. On CUDA a variable-length kernel reads the pack as it lies.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ATTENTION_BACKENDS
from model.kernels.dispatch import has_triton

if TYPE_CHECKING:
    from model.data.packing import Packing

# B rows, T tokens of a row, H query heads, K key/value heads, E head_dim, N segments of a bucket, L their padded length


def attention(q: Tensor, k: Tensor, v: Tensor, packing: Packing | None = None, *, backend: str = "auto") -> Tensor:
    """Return softmax(q k^T / sqrt(E)) v, causal, every query seeing only its own segment.

    q (B, T, H, E); k and v (B, T, K, E), H a multiple of K: query head j reads key/value head j // (H // K).
    packing cuts the one row (B = 1) into segments; without it every row is one causal sequence. Returns (B, T, H, E)
    in q's type. backend "auto" is "sdpa" on a CPU, for 32 or 64-bit floats and for dense rows, and for packs otherwise
    "triton", or "varlen" where our kernel cannot run; probe_backends measures which is fastest.
    Raises ValueError for an unknown or unusable backend, or a pack of more than one row.
    """
    if packing is not None and q.size(0) != 1:
        raise ValueError(f"attention with a packing got {q.size(0)} rows: give one row per pack")
    name = resolve_backend(backend, q, is_packed=packing is not None)
    if name == "sdpa":
        return _dense(q, k, v) if packing is None else _bucketed(q, k, v, packing)
    bounds = segment_bounds(packing, q.size(0), q.size(1), q.device)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return VARLEN_KERNELS[name](*flat, bounds).reshape(q.shape)


class Bounds(NamedTuple):
    """Where the segments of packed queries and keys lie: cu_seqlens int32 of both, and their longest segments.

    A segment with fewer queries than keys has the last ones.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int


def segment_bounds(packing: Packing | None, num_rows: int, row_len: int, device: torch.device) -> Bounds:
    """Return the bounds of a pack, or of whole rows laid end to end."""
    if packing is not None:
        return Bounds(packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
    starts = torch.arange(0, (num_rows + 1) * row_len, row_len, dtype=torch.int32, device=device)
    return Bounds(starts, starts, row_len, row_len)


def window_bounds(
    left_padding: Tensor | None, num_rows: int, row_len: int, num_queries: int, device: torch.device
) -> Bounds:
    """Return the bounds of rows (num_rows, row_len) of which left_padding (num_rows,) leading keys are nobody's.

    Only the last num_queries positions of each row are queries. Padding is a segment of its own, so that every kernel
    can skip it; with fewer queries than keys it has none, and no padded position may be among them.
    """
    if left_padding is None:
        keys = torch.arange(0, (num_rows + 1) * row_len, row_len, dtype=torch.int32, device=device)
        queries = torch.arange(0, (num_rows + 1) * num_queries, num_queries, dtype=torch.int32, device=device)
        return Bounds(queries, keys, num_queries, row_len)
    rows = torch.arange(num_rows, device=device)
    padded_queries = (left_padding - (row_len - num_queries)).clamp_min(0)

    def entries(length: int, padding: Tensor) -> Tensor:
        starts = torch.stack((rows * length, rows * length + padding), dim=1).flatten()
        return torch.cat((starts, starts.new_tensor([num_rows * length]))).to(torch.int32)

    return Bounds(entries(num_queries, padded_queries), entries(row_len, left_padding), num_queries, row_len)


def resolve_backend(backend: str, q: Tensor, *, is_packed: bool) -> str:
    """Return the backend that backend="..." means for a tensor like q. Raises ValueError if it cannot run here."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown: use one of {', '.join(ATTENTION_BACKENDS)}")
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        if not (is_packed and q.is_cuda and is_half):
            return "sdpa"
        return "triton" if is_available("triton") and q.size(-1) in TRITON_HEAD_DIMS else "varlen"
    if backend not in ("sdpa", "flex") and not (q.is_cuda and is_half):
        raise ValueError(f"attention backend {backend!r} needs bfloat16 on CUDA, got {q.dtype} on {q.device}: use auto")
    return backend


def is_available(backend: str) -> bool:
    """Return whether the package behind a CUDA backend can be imported, and the device can run our own kernel."""
    if backend == "triton":
        return _runs_triton()
    if backend not in FLASH_MODULES:
        return backend in ATTENTION_BACKENDS
    package, _, _ = FLASH_MODULES[backend].partition(".")
    return all(importlib.util.find_spec(name) is not None for name in (package, FLASH_MODULES[backend]))


@lru_cache(maxsize=1)
def _runs_triton() -> bool:
    if torch.version.hip is not None or not (has_triton() and torch.cuda.is_available()):
        return False
    return torch.cuda.get_device_capability()[0] == 9  # Hopper, the only kind it was tested on


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
    y: Tensor = _Pad.apply(x, layout.source, layout.target)
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


# ---- variable-length kernels: q (tokens, H, E), k and v (tokens, K, E), and the bounds of their segments -------------


@lru_cache(maxsize=1)
def _varlen_attn() -> Callable[..., Any]:
    """Return PyTorch's kernel; imported when it is first used, since it brings PyTorch's whole compiler with it."""
    from torch.nn.attention.varlen import varlen_attn

    # Grouped heads need this argument from torch 2.12 on; 2.11 takes them without and does not know it.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **options)  # left -1 and right 0: causal


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    return _first(_varlen_attn()(q, k, v, *bounds))


def _flex(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    from model.kernels.flex import flex_varlen

    return flex_varlen(q, k, v, bounds.keys)


def _triton(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    from model.kernels.varlen_triton import triton_varlen

    return triton_varlen(q, k, v, bounds)


def _flash(module: str) -> Callable[..., Tensor]:
    """Return the variable-length function of a FlashAttention package, imported at the first call."""

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
        function = importlib.import_module(module).flash_attn_varlen_func
        longest = {"max_seqlen_q": bounds.max_queries, "max_seqlen_k": bounds.max_keys}
        return _first(function(q, k, v, cu_seqlens_q=bounds.queries, cu_seqlens_k=bounds.keys, **longest, causal=True))

    return run


def _first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output of a kernel that may return its log-sum-exp beside it."""
    return y[0] if isinstance(y, tuple) else y


TRITON_HEAD_DIMS = (16, 32, 64, 128)
FLASH_MODULES = {"fa2": "flash_attn.flash_attn_interface", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
VARLEN_KERNELS: dict[str, Callable[..., Tensor]] = {
    "varlen": _varlen,
    "flex": _flex,
    "triton": _triton,
    **{name: _flash(module) for name, module in FLASH_MODULES.items()},
}
