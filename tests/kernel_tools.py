"""A kernel held against its plain twin in float64: random inputs, a call of each, errors relative to whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = 0.01  # relative, of whole tensors: bf16 rounds each number by up to 0.004
Function = Callable[..., Tensor | Sequence[Tensor]]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted| over the whole tensor."""
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def run(
    function: Function, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], *, is_frozen: bool = False
) -> list[Tensor]:
    """Return the outputs and the gradients of the inputs, or, as in adaptation, of those that are no parameters."""
    leaves = [x if x is None else x.detach().clone().requires_grad_(not is_frozen or x.dim() >= 3) for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    loss = sum((y.double() * g).sum() for y, g in zip(outputs, grads, strict=True))
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x is not None and x.requires_grad])]


def check(function: Function, inputs: Sequence[Tensor | None], *, tolerance: float = TOLERANCE) -> None:
    """Compare function in bf16 (vectors in float32) on the GPU with itself in float64."""
    torch.manual_seed(1)
    wide = [x if x is None else x.double() for x in inputs]
    with torch.no_grad():
        shapes = function(*wide)
    shapes = [shapes] if isinstance(shapes, Tensor) else shapes
    grads = [torch.randn_like(y) for y in shapes]
    for is_frozen in (False, True):
        found = [run(function, each, grads, is_frozen=is_frozen) for each in (inputs, wide)]
        for number, (got, wanted) in enumerate(zip(*found, strict=True)):
            assert relative_error(got, wanted) < tolerance, f"tensor {number} of outputs and gradients, {is_frozen=}"


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """Return random bf16 numbers on the GPU."""
    return (scale * torch.randn(shape, device="cuda")).bfloat16()


def vector(*shape: int) -> Tensor:
    """Return a random float32 parameter on the GPU, away from zero."""
    return 1 + 0.3 * torch.randn(shape, device="cuda")
