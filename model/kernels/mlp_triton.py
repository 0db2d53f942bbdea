# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the MLP's activation, leaky_relu(x, slope 0.5)^2, and of its backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers a program


@triton.jit
def _activate(x_ptr, y_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    leaky = tl.where(x >= 0, x, 0.5 * x)
    tl.store(y_ptr + at, (leaky * leaky).to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def _activate_backward(grad_ptr, x_ptr, y_ptr, numel, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    leaky = tl.where(x >= 0, x, 0.5 * x)
    grad *= tl.where(x >= 0, 2 * leaky, leaky)  # 2 leaky(x) times the slope
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=at < numel)
    if HAS_Y:
        tl.store(y_ptr + at, (leaky * leaky).to(y_ptr.dtype.element_ty), mask=at < numel)


def activate(x: Tensor) -> Tensor:
    """Return leaky_relu(x, 0.5)^2."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _activate[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), BLOCK=BLOCK, num_warps=8)
    return y


def activate_backward_(grad: Tensor, x: Tensor, *, needs_y: bool) -> Tensor | None:
    """Turn grad of the activation into that of x, in place (both contiguous); return the activation if needs_y."""
    assert grad.is_contiguous(), grad.stride()
    assert x.is_contiguous(), x.stride()
    y = torch.empty_like(x) if needs_y else None
    _activate_backward[(triton.cdiv(x.numel(), BLOCK),)](grad, x, y, x.numel(), HAS_Y=needs_y, BLOCK=BLOCK, num_warps=8)
    return y
