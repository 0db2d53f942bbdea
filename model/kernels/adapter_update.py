"""What happens to the stored adapters between two forwards: rows gathered for a batch, scaled, and stepped by Adam.

All numbers of one document lie in one row, so each is one pass over memory: Triton for float32 on CUDA
(model.kernels.adapter_update_triton), plain PyTorch elsewhere.
"""

# S slots, B rows of a batch, P numbers of one document

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kernels.dispatch import has_triton, uses_triton


class AdamSettings(NamedTuple):
    """Adam without first moment, with decoupled weight decay."""

    lr: float
    weight_decay: float
    beta2: float
    eps: float


def gather_rows(values: Tensor, index: Tensor, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
    """Return rows index (B,) of values (S, P) times factor, in dtype."""
    if _is_served(values):
        from model.kernels.adapter_update_triton import launch_gather

        return launch_gather(values, index, dtype, factor)
    return values.index_select(0, index).mul_(factor).to(dtype)


def adam_rows_(
    values: Tensor,
    moments: Tensor,
    index: Tensor,
    gradients: Tensor,
    correction: Tensor,
    settings: AdamSettings,
    factor: float = 1.0,
) -> None:
    """Step rows index (B,) of values and their second moments (S, P), in place.

    gradients (B, P) of any float type, for what gather_rows returned with this factor; correction (B,) is
    1 - beta2^t. A row named twice has an undefined result.
    """
    if _is_served(values):
        from model.kernels.adapter_update_triton import launch_adam

        launch_adam(values, moments, index, gradients, correction, *settings, factor)
        return
    lr, weight_decay, beta2, eps = settings
    gradient = gradients.to(values.dtype) * factor
    moment = moments[index].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    moments[index] = moment
    root = (moment / correction.to(values.dtype).unsqueeze(1)).sqrt_().add_(eps)
    values[index] = values[index].mul_(1 - lr * weight_decay).addcdiv_(gradient, root, value=-lr)


def scale_rows(x: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """Return x (S, N, W, R) times scale (N, W), in x's type; out: where to, x itself perhaps."""
    is_dense = x.stride()[1:] == (x.size(2) * x.size(3), x.size(3), 1)
    if uses_triton(x) and is_dense and not (x.requires_grad or scale.requires_grad):
        from model.kernels.adapter_update_triton import launch_scale

        return launch_scale(x, scale, out)
    return torch.mul(x, scale.to(x.dtype).unsqueeze(-1), out=out)


def _is_served(values: Tensor) -> bool:
    return values.is_cuda and values.dtype == torch.float32 and values.is_contiguous() and has_triton()
