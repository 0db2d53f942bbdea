"""The gradients of a step: gathered, measured and clipped."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model.data.loader import Batch
from model.distributed import Dist
from model.gpt import GPT


def gradient_norm(grads: list[Tensor]) -> Tensor:
    """Return the L2 norm over all gradients together, float32 scalar on their device."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(grads)]).norm()


def clip_(grads: list[Tensor], max_norm: float) -> Tensor:
    """Scale grads in place by min(1, max_norm / (norm + 1e-6)) and return the norm from before; no host wait."""
    norm = gradient_norm(grads)
    # the factor stays a tensor: to compare the norm with a limit in Python would wait for the device
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def collect_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that exist; a parameter that no layer used gets zeros, so that it is still decayed."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


def accumulate_gradients(
    model: GPT, batches: list[Batch], *, is_looped: bool, clip: str, max_norm: float, dist: Dist
) -> tuple[Tensor, Tensor]:
    """Leave this rank's clipped mean gradient over its micro-batches in parameter.grad.

    TRAP: with "per_rank" a score depends on the number of GPUs: eight ranks clip eight micro-batches where one GPU
    clips their mean. "per_micro_batch" is the arithmetic of the published eight on any number.

    Returns (mean loss, gradient norm before clipping; per_micro_batch: the mean of the norms), device scalars.
    "global" averages over the ranks before it clips; averaging again afterwards changes nothing.
    """
    parameters = list(model.parameters())
    total: list[Tensor] | None = None
    losses, norms = [], []
    for batch in batches:
        loss = model(batch.inputs, batch.targets, is_looped=is_looped, packing=batch.packing)
        losses.append(loss.detach())
        loss.backward()  # not of loss / len(batches): scaling a loss costs a pass over the gradient of its logits
        dist.tick()
        if clip != "per_micro_batch":
            continue
        grads = collect_gradients(parameters)
        norms.append(clip_(grads, max_norm))
        # Each micro-batch is clipped by its own norm, so autograd must not add it to the ones before.
        if len(batches) > 1:
            if total is None:
                total = grads
            else:
                torch._foreach_add_(total, grads)
            for parameter in parameters:
                parameter.grad = None
    if total is not None:
        torch._foreach_div_(total, len(batches))
        for parameter, grad in zip(parameters, total, strict=True):
            parameter.grad = grad
    elif clip != "per_micro_batch":
        grads = collect_gradients(parameters)
        torch._foreach_div_(grads, len(batches))
        if clip == "global":
            for grad in grads:
                dist.mean_(grad)
        norms.append(clip_(grads, max_norm))
    return torch.stack(losses).mean(), torch.stack(norms).mean()
