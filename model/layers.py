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


def gate_heads(y: Tensor, columns: Tensor, gate: Tensor) -> Tensor:
    """Return attention output y (B, T, H, E) times 2 sigmoid(gate . columns), a factor for each token and head.

    columns (B, T, W): the first ones of the vector that the queries were made of; gate (H, W). A gate of zeros
    changes nothing. Source: parameter-golf PR #1667.
    """
    wide = widen(columns)
    return y * (2 * torch.sigmoid(wide @ gate.to(wide.dtype).mT)).unsqueeze(-1).to(y.dtype)


def token_factor(x: Tensor, gate: Tensor) -> Tensor:
    """Return sigmoid(bias + weights . first columns of x), (B, T, 1) for x (B, T, D).

    gate (P,) holds the bias and then the weights of the first P - 1 columns; those beyond D count for nothing.
    """
    wide = widen(x[..., : gate.numel() - 1])
    gate = gate[: wide.size(-1) + 1].to(wide.dtype)
    return torch.sigmoid(wide @ gate[1:] + gate[0]).unsqueeze(-1).to(x.dtype)


def smear(x: Tensor, gate: Tensor, strength: Tensor, has_neighbor: Tensor) -> Tensor:
    """Return x plus strength * sigmoid(gate . first columns of x) times the token before, where it is a neighbor.

    x (B, T, D), gate (W,), strength a scalar, has_neighbor (B, T) booleans, false at position 0.
    """
    wide = widen(x)
    share = strength.to(wide.dtype) * torch.sigmoid(wide[..., : gate.numel()] @ gate.to(wide.dtype))
    before = F.pad(wide[:, :-1], (0, 0, 1, 0)) * has_neighbor.unsqueeze(-1)
    return (wide + share.unsqueeze(-1) * before).to(x.dtype)


def squared_leaky_relu(x: Tensor, slope: float) -> Tensor:
    """Return leaky_relu(x, slope)^2."""
    return F.leaky_relu(x, slope).square()


def merge_skip(x: Tensor, skip: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """Return (1 - g) * weight * skip + g * x with g = sigmoid(gate); weight and gate (D,) float32."""
    share = torch.sigmoid(widen(gate)).to(x.dtype)
    return (1 - share) * (weight.to(x.dtype) * skip) + share * x


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(logits / cap) in float32 (float64 where logits are)."""
    return cap * torch.tanh(widen(logits) / cap)
