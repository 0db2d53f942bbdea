"""Attention for test-time-training windows: rows padded on the left, queries only for the last positions."""

# B sequences, T tokens, N queries, H query heads, K kv heads, E head_dim

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(q: Tensor, k: Tensor, v: Tensor, left_padding: Tensor | None) -> Tensor:
    """Return causal attention (B, N, H, E) of the last N positions over all T of their row.

    q (B, N, H, E) stands for positions T-N..T-1; k and v (B, T, K, E); left_padding (B,) counts leading keys that
    nobody may see. A padded query sees itself alone, so that no row of the softmax is empty.
    """
    num_queries, time = q.size(1), k.size(1)
    positions = torch.arange(time, device=q.device)
    rows = positions[time - num_queries :, None]  # (N, 1)
    visible = positions <= rows  # (N, T)
    if left_padding is not None:
        inside = positions >= left_padding[:, None, None]  # (B, 1, T)
        visible = (visible & inside) | (positions == rows)
        visible = visible[:, None]  # (B, 1, N, T)
    groups = q.size(2) // k.size(2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
