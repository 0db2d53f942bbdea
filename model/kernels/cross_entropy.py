"""Cross-entropy behind a tanh softcap, computed in float32 from logits of any type."""

# B sequences, T tokens, V vocab

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.layers import softcap


def softcap_cross_entropy(logits: Tensor, targets: Tensor, cap: float, *, reduction: str = "mean") -> Tensor:
    """Return the negative log-likelihood in nats of targets under softmax(cap * tanh(logits / cap)).

    logits (B, T, V) before the cap; targets (B, T) integers. reduction "mean" or "sum" gives a scalar, "none" gives
    (B, T); float32, or float64 for float64 logits. TRAP: 16-bit logits on CUDA that need a gradient are overwritten
    with it, so that nothing of their size is allocated; the caller must not use them again.
    """
    if uses_triton(logits):
        nll = _fused(logits.flatten(0, 1), targets.flatten(), cap, reduction)
    else:
        nll = F.cross_entropy(softcap(logits, cap).flatten(0, 1), targets.flatten().long(), reduction=reduction)
    return nll.view(targets.shape) if reduction == "none" else nll


def _fused(logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
    from model.kernels.cross_entropy_triton import SoftcapCrossEntropy, row_nll

    if torch.is_grad_enabled() and logits.requires_grad:
        loss: Tensor = SoftcapCrossEntropy.apply(logits, targets, cap, reduction)
        return loss
    nll = row_nll(logits, targets, cap)
    return nll if reduction == "none" else nll.mean() if reduction == "mean" else nll.sum()
