"""The layer formulas of the model as pure functions of tensors; gpt.py strings them together.

Norms and rotations are computed in float32 (float64 where the input is) and returned in the input's type, so that
bf16 activations stay bf16 on every torch release.
"""

# B sequences, T tokens, D model_dim, H query heads, K kv heads, E head_dim, R lora_rank

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RMS_EPS = 2.0**-23  # float32's spacing at 1; written out so that bf16 and float64 use it too
LEAKY_SLOPE = 0.5


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged where it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, scale: float = 1.0) -> Tensor:
    """Return scale * x / sqrt(mean(x^2) + 2^-23) over the last axis, in x's type; no learned gain."""
    wide = widen(x)
    return (wide * (torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS) * scale)).to(x.dtype)


def rotary_tables(positions: Tensor, *, rope_dims: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cos and sin (..., rope_dims // 2) of position * base^(-2m / rope_dims), positions (...) integers.

    The frequencies are rounded to float32 whatever dtype is, as the reference record's are.
    """
    exponents = torch.arange(0, rope_dims, 2, dtype=torch.float32, device=positions.device) / rope_dims
    frequencies = (1.0 / (base**exponents)).to(dtype)
    angles = positions.to(dtype).unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def normalize_and_rotate(x: Tensor, cos: Tensor, sin: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return heads x (B, T, H, E) after rms norm, rotation of the leading dims and the per-head gain (H,).

    cos and sin (T or B x T, rope_dims // 2) turn by MINUS the angle: the usual sign disagrees with the record.
    """
    wide = widen(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_EPS)
    half = cos.size(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, rope_dims // 2)
    p, r, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = torch.cat((p * cos + r * sin, r * cos - p * sin, rest), dim=-1)
    if gain is not None:
        turned = turned * widen(gain).unsqueeze(-1)
    return turned.to(x.dtype)


def exclude_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Return attention output y (B, T, H, E) without its component along the token's own value v (B, T, K, E)."""
    batch, time, heads, width = y.shape
    kv_heads = v.size(2)
    direction = widen(v)
    direction = (direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)).unsqueeze(3)  # (B, T, K, 1, E)
    grouped = widen(y).reshape(batch, time, kv_heads, heads // kv_heads, width)
    kept = grouped - (grouped * direction).sum(-1, keepdim=True) * direction
    kept = kept.reshape(batch, time, heads, width)
    return kept.to(y.dtype)


def squared_leaky_relu(x: Tensor) -> Tensor:
    """Return leaky_relu(x, slope 0.5)^2."""
    return F.leaky_relu(x, LEAKY_SLOPE).square()


def merge_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """Return (1 - g) * weight * skip + g * x with g = sigmoid(gate); weight and gate (D,) float32."""
    share = torch.sigmoid(widen(gate)).to(x.dtype)
    return (1 - share) * (weight.to(x.dtype) * skip) + share * x


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap) in float32 (float64 where logits are)."""
    return cap * torch.tanh(widen(logits) / cap)
