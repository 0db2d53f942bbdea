"""What happens to the residual stream between two matrix products, as one function each.

Every function has a plain PyTorch form, which serves CPUs and the tests, and a Triton kernel that reads and writes each
tensor once (model.kernels.residual_triton), which serves 16-bit floats on CUDA.
"""

# B sequences, T tokens, D model_dim

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.layers import merge_skip, rms_norm


class Skip(NamedTuple):
    """A skip connection to merge: source (B, T, D), weight and gate (D,)."""

    source: Tensor
    weight: Tensor
    gate: Tensor


def add_norm(x: Tensor, delta: Tensor | None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (x + delta, scale * rms(x + delta)) for x and delta (B, T, D)."""
    if uses_triton(x):
        total, _, normed = _fused(x, delta, None, None, None, scale)
        return total, normed
    total = x if delta is None else x + delta
    return total, rms_norm(total, scale)


def mix_norm(
    x: Tensor, delta: Tensor | None, first: Tensor, mix: Tensor, scale: float, skip: Skip | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, m, scale * rms(m)): y = x + delta, merged with skip where there is one, m = mix[0] y + mix[1] first.

    x, delta and first (B, T, D); mix (2, D).
    """
    if uses_triton(x):
        return _fused(x, delta, skip, first, mix, scale)
    total = x if delta is None else x + delta
    if skip is not None:
        total = merge_skip(total, *skip)
    a, b = mix.to(x.dtype)
    mixed = a * total + b * first
    return total, mixed, rms_norm(mixed, scale)


def merge_norm(a: Tensor, delta_a: Tensor, b: Tensor, delta_b: Tensor, share: Tensor) -> Tensor:
    """Return rms(share (a + delta_a) + (1 - share) (b + delta_b)), the end of the two lanes; share a scalar tensor."""
    if uses_triton(a):
        from model.kernels.residual_triton import MergeNorm

        flat = (_rows(x) for x in (a, delta_a, b, delta_b))
        y: Tensor = MergeNorm.apply(*flat, share)
        return y.view(a.shape)
    share = share.to(a.dtype)
    return rms_norm(share * (a + delta_a) + (1 - share) * (b + delta_b))


def _rows(x: Tensor | None) -> Tensor | None:
    """Return x (..., D) as contiguous rows (N, D)."""
    return None if x is None else x.reshape(-1, x.size(-1)).contiguous()


def _fused(
    x: Tensor, delta: Tensor | None, skip: Skip | None, first: Tensor | None, mix: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from model.kernels.residual_triton import MixNorm

    source, weight, gate = skip if skip is not None else (None, None, None)
    flat, flat_delta, flat_source, flat_first = _rows(x), _rows(delta), _rows(source), _rows(first)
    outputs = MixNorm.apply(flat, flat_delta, flat_source, weight, gate, flat_first, mix, scale)
    total, mixed, normed = (None if y is None else y.view(x.shape) for y in outputs)
    assert normed is not None
    total = x if total is None else total
    return total, total if mixed is None else mixed, normed
