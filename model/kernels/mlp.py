"""The MLP as one autograd node that keeps its input and the hidden state before the activation, nothing else."""

# B rows, T tokens, D model_dim, M mlp_hidden

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.layers import squared_leaky_relu

Linear = Callable[[Tensor, Tensor], Tensor]


def mlp(x: Tensor, up: Tensor, down: Tensor, apply_up: Linear, apply_down: Linear) -> Tensor:
    """Return leaky_relu(x up^T, 0.5)^2 down^T for x (B, T, D), up (M, D), down (D, M).

    apply_up and apply_down take (input, weight) and multiply them: modules, so that calibration can hook their inputs.
    """
    if uses_triton(x):
        y: Tensor = _Mlp.apply(x, up, down, apply_up, apply_down)
        return y
    return apply_down(squared_leaky_relu(apply_up(x, up)), down)


class _Mlp(torch.autograd.Function):
    """The activation is computed again in the backward, in the pass that applies its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, apply_up: Linear, apply_down: Linear) -> Tensor:
        from model.kernels.mlp_triton import activate

        hidden = apply_up(x, up)  # (B, T, M)
        y = apply_down(activate(hidden), down)
        ctx.save_for_backward(x, hidden, up, down)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from model.kernels.mlp_triton import activate_backward_

        x, hidden, up, down = ctx.saved_tensors
        _, needs_up, needs_down, _, _ = ctx.needs_input_grad
        grad = grads[0].flatten(0, -2)  # (B T, D)
        grad_hidden = grad @ down  # (B T, M)
        activated = activate_backward_(grad_hidden, hidden.flatten(0, -2), needs_y=needs_down)
        grad_down = grad.mT @ activated if activated is not None else None
        grad_up = grad_hidden.mT @ x.flatten(0, -2) if needs_up else None
        grad_x = (grad_hidden @ up).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_up, grad_down, None, None
