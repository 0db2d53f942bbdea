"""The MLP as one autograd node that keeps its input and one tensor of the hidden state's size.

That is the hidden state, or its activation and one bit for each number: whether it was below zero.
"""

# B rows, T tokens, D model_dim, M mlp_hidden, N = B T

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.layers import squared_leaky_relu

Up = Callable[[Tensor, Tensor, bool, float], tuple[Tensor | None, Tensor]]
Down = Callable[[Tensor, Tensor], Tensor]


def mlp(x: Tensor, up: Tensor, down: Tensor, apply_up: Up, apply_down: Down, slope: float) -> Tensor:
    """Return leaky_relu(x up^T, slope)^2 down^T for x (B, T, D), up (M, D), down (D, M).

    apply_up is project_and_activate, apply_down(y, down) a matrix product: modules, so that calibration can hook their
    inputs.
    """
    if uses_triton(x) and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, up, down)):
        y: Tensor = _Mlp.apply(x, up, down, apply_up, apply_down, slope)
        return y
    return apply_down(apply_up(x, up, False, slope)[1], down)


def project_and_activate(x: Tensor, weight: Tensor, needs_hidden: bool, slope: float) -> tuple[Tensor | None, Tensor]:
    """Return the hidden state x weight^T and its activation leaky_relu(hidden, slope)^2, both (B, T, M).

    Instead of the first there may be its signs (up_and_activate), and without needs_hidden None.
    """
    if not uses_triton(x):
        hidden = F.linear(x, weight)
        return hidden, squared_leaky_relu(hidden, slope)
    from model.kernels.mlp_triton import activate, fits_products, up_and_activate

    rows = x.reshape(-1, x.size(-1))
    if fits_products(rows, weight.size(0)):
        signs, y = up_and_activate(rows, weight, needs_signs=needs_hidden, slope=slope)
        return signs, y.view(*x.shape[:-1], weight.size(0))
    hidden = F.linear(x, weight)
    return hidden, activate(hidden, slope)


class _Mlp(torch.autograd.Function):
    """Where the hidden state is kept, the activation is computed again in the pass that applies its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, apply_up: Up, apply_down: Down, slope: float) -> Tensor:
        kept, y = apply_up(x, up, True, slope)  # (B, T, M)
        assert kept is not None
        ctx.save_for_backward(x, kept, y if kept.dtype == torch.int32 else None, up, down)
        ctx.slope = slope
        return apply_down(y, down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from model.kernels.mlp_triton import activate_backward_, down_backward

        x, kept, activated, up, down = ctx.saved_tensors
        needs_x, needs_up, needs_down, *_ = ctx.needs_input_grad
        grad, rows = (y.flatten(0, -2).contiguous() for y in (grads[0], x))  # (N, D)
        if activated is not None:
            activated = activated.flatten(0, -2)
            grad_hidden = down_backward(grad, down, kept, activated, slope=ctx.slope)  # (N, M)
        else:
            grad_hidden, hidden = grad @ down, kept.flatten(0, -2).contiguous()
            activated = activate_backward_(grad_hidden, hidden, needs_y=needs_down, slope=ctx.slope)
        grad_down = grad.mT @ activated if needs_down else None
        grad_up = grad_hidden.mT @ rows if needs_up else None
        grad_x = (grad_hidden @ up).view(x.shape) if needs_x else None
        return grad_x, grad_up, grad_down, None, None, None
