# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels over the stored adapters: gather rows into the compute type, step rows by Adam."""

# S slots, B rows of a batch, P numbers of one document

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch

BLOCK = 4096  # numbers a program: 32 a thread


@triton.jit
def _gather(values_ptr, index_ptr, out_ptr, size, factor, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(index_ptr + row).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + slot * size + at, mask=at < size)
    tl.store(out_ptr + row * size + at, (x * factor).to(out_ptr.dtype.element_ty), mask=at < size)


@triton.jit
def _adam(
    values_ptr, moments_ptr, index_ptr, gradients_ptr, correction_ptr, size,
    lr, decay, beta2, one_minus_beta2, eps, factor, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(index_ptr + row).to(tl.int64)
    correction = tl.load(correction_ptr + row).to(tl.float32)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = at < size
    gradient = tl.load(gradients_ptr + row * size + at, mask=known, other=0.0).to(tl.float32) * factor
    moment = tl.load(moments_ptr + slot * size + at, mask=known, other=0.0)
    value = tl.load(values_ptr + slot * size + at, mask=known, other=0.0)
    moment = beta2 * moment + one_minus_beta2 * gradient * gradient
    step = gradient / (tl.sqrt(moment / correction) + eps)
    tl.store(moments_ptr + slot * size + at, moment, mask=known)
    tl.store(values_ptr + slot * size + at, value * decay - lr * step, mask=known)


def launch_gather(values: Tensor, index: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """Return rows index (B,) int64 of values (S, P) float32 times factor, in dtype."""
    size = values.size(1)
    out = torch.empty(index.numel(), size, dtype=dtype, device=values.device)
    launch(
        _gather, (triton.cdiv(size, BLOCK), index.numel()),
        values, index.contiguous(), out, size, factor, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def launch_adam(
    values: Tensor, moments: Tensor, index: Tensor, gradients: Tensor, correction: Tensor,
    lr: float, weight_decay: float, beta2: float, eps: float, factor: float,
) -> None:  # fmt: skip
    """Step rows index (B,) int64 of values and moments (S, P) float32, in place; gradients (B, P) contiguous.

    The gradients are those of factor times the values.
    """
    size = values.size(1)
    assert gradients.is_contiguous(), gradients.stride()
    assert moments.is_contiguous(), moments.stride()
    launch(
        _adam, (triton.cdiv(size, BLOCK), index.numel()),
        values, moments, index.contiguous(), gradients, correction.float(), size,
        lr, 1 - lr * weight_decay, beta2, 1 - beta2, eps, factor, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
