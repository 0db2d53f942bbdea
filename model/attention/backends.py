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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.attention.bounds import TRITON_HEAD_DIMS, Bounds, segment_bounds
from model.attention.padded import attend_padded, attend_rows
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
        return attend_rows(q, k, v) if packing is None else attend_padded(q, k, v, packing)
    bounds = segment_bounds(packing, q.size(0), q.size(1), q.device)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return VARLEN_KERNELS[name](*flat, bounds).reshape(q.shape)


def resolve_backend(backend: str, q: Tensor, *, is_packed: bool) -> str:
    """Return the backend that backend="..." means for a tensor like q. Raises ValueError if it cannot run here."""
    if backend not in ATTENTION_BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown: use one of {', '.join(ATTENTION_BACKENDS)}")
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if backend == "auto":
        if not (is_packed and q.is_cuda and is_half):
            return "sdpa"
        return "triton" if is_available("triton") and q.size(-1) in TRITON_HEAD_DIMS else "varlen"
    if backend != "sdpa" and not (q.is_cuda and is_half):
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


# ---- variable-length kernels: q (tokens, H, E), k and v (tokens, K, E), and the bounds of their segments -------------


@lru_cache(maxsize=1)
def _varlen_attn() -> Callable[..., Any]:
    """Return PyTorch's kernel; imported when it is first used, since it brings PyTorch's whole compiler with it."""
    from torch.nn.attention.varlen import varlen_attn

    # Grouped heads need this argument from torch 2.12 on; 2.11 takes them without and does not know it.
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return partial(varlen_attn, window_size=(-1, 0), **options)  # left -1 and right 0: causal


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    return _first(_varlen_attn()(q, k, v, *bounds[:4]))


def _triton(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> Tensor:
    from model.attention.varlen_triton import triton_varlen

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


FLASH_MODULES = {"fa2": "flash_attn.flash_attn_interface", "fa3": "flash_attn_interface", "fa4": "flash_attn.cute"}
VARLEN_KERNELS: dict[str, Callable[..., Tensor]] = {
    "varlen": _varlen,
    "triton": _triton,
    **{name: _flash(module) for name, module in FLASH_MODULES.items()},
}
