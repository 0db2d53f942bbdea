"""Cross-entropy behind a tanh softcap, computed in float32 from logits of any type."""

# B sequences, T tokens, V vocab

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from model.layers import softcap


def softcap_cross_entropy(logits: Tensor, targets: Tensor, cap: float, *, reduction: str = "mean") -> Tensor:
    """Return the negative log-likelihood in nats of targets under softmax(cap * tanh(logits / cap)).

    logits (B, T, V) before the cap; targets (B, T) integers. reduction "mean" or "sum" gives a scalar, "none" gives
    (B, T); float32, or float64 for float64 logits.
    """
    capped = softcap(logits, cap)
    nll = F.cross_entropy(capped.flatten(0, 1), targets.flatten().long(), reduction=reduction)
    return nll.view(targets.shape) if reduction == "none" else nll
