"""Cross-entropy behind a tanh softcap, computed in float32 from logits of any type."""

# B sequences, T tokens, D model_dim, V vocab

from __future__ import annotations

from collections.abc import Callable

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


def projected_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    cap: float,
    project: Callable[[Tensor, Tensor], Tensor],
    *,
    reduction: str = "mean",
) -> Tensor:
    """Return softcap_cross_entropy of project(x, weight), which is x weight^T for x (B, T, D) and weight (V, D).

    Where the kernels serve x and a loss that is one number needs a gradient, project is not called: both products'
    gradients are made with the loss, part by part, and whole logits never exist. TRAP: such a loss serves one backward.
    """
    if reduction != "none" and uses_triton(x) and x.requires_grad:
        from model.kernels.cross_entropy_triton import ProjectedCrossEntropy

        rows = x.reshape(-1, x.size(-1)).contiguous()
        loss: Tensor = ProjectedCrossEntropy.apply(rows, weight, targets.flatten(), cap, reduction)
        return loss
    return softcap_cross_entropy(project(x, weight.to(x.dtype)), targets, cap, reduction=reduction)


def _fused(logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
    from model.kernels.cross_entropy_triton import SoftcapCrossEntropy, row_nll

    needs_grad = torch.is_grad_enabled() and logits.requires_grad
    nll: Tensor = (SoftcapCrossEntropy.apply if needs_grad else row_nll)(logits, targets, cap)
    return nll if reduction == "none" else nll.mean() if reduction == "mean" else nll.sum()
