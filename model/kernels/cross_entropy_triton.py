# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the softcapped cross-entropy: one read of the logits, the gradient written where they stood."""

# N rows (targets), V vocab

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch

SCALING_PROGRAMS = 132 * 8


@triton.jit
def _cross_entropy(
    logits_ptr, targets_ptr, nll_ptr, stride, cap, grad_scale,
    V: tl.constexpr, COLS: tl.constexpr, HAS_GRAD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    place = logits_ptr + row * stride + cols
    at_target = logits_ptr + row * stride + tl.load(targets_ptr + row)
    target_unit = _tanh(tl.load(at_target).to(tl.float32) / cap)
    unit = _tanh(tl.load(place, mask=cols < V, other=0.0).to(tl.float32) * (1.0 / cap))
    # No logit exceeds cap, so cap is subtracted before the exponential where softmax usually takes the maximum.
    weight = tl.exp(cap * unit - cap)
    if V < COLS:
        weight = tl.where(cols < V, weight, 0.0)
    total = tl.sum(weight, axis=0)
    tl.store(nll_ptr + row, tl.log(total) + cap * (1 - target_unit))
    if HAS_GRAD:
        factor = grad_scale / total
        grad = weight * factor * (1 - unit * unit)
        tl.store(place, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)
        target_grad = (tl.exp(cap * target_unit - cap) * factor - grad_scale) * (1 - target_unit * target_unit)
        tl.debug_barrier()  # the whole row is written before its target is corrected
        tl.store(at_target, target_grad.to(logits_ptr.dtype.element_ty))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _scale_rows(x_ptr, factor_ptr, num_rows, stride, factor_stride, V: tl.constexpr, COLS: tl.constexpr):
    cols = tl.arange(0, COLS)
    for number in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        factor = tl.load(factor_ptr + row * factor_stride).to(tl.float32)
        if factor != 1.0:
            place = x_ptr + row * stride + cols
            x = tl.load(place, mask=cols < V, other=0.0).to(tl.float32)
            tl.store(place, (x * factor).to(x_ptr.dtype.element_ty), mask=cols < V)


def row_nll(logits: Tensor, targets: Tensor, cap: float, grad_scale: float | None = None) -> Tensor:
    """Return the nll (N,) float32 of logits (N, V); with grad_scale the logits become grad_scale * d nll / d logits."""
    num_rows, vocab = logits.shape
    nll = torch.empty(num_rows, device=logits.device, dtype=torch.float32)
    launch(
        _cross_entropy, (num_rows,),
        logits, targets, nll, logits.stride(0), cap, 1.0 if grad_scale is None else grad_scale,
        V=vocab, COLS=triton.next_power_of_2(vocab), HAS_GRAD=grad_scale is not None, num_warps=16,
    )  # fmt: skip
    return nll


class SoftcapCrossEntropy(torch.autograd.Function):
    """(logits (N, V), targets (N,), cap, reduction) -> nll (N,) or its mean or sum. TRAP: overwrites logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
        nll = row_nll(logits, targets, cap, 1.0 / logits.size(0) if reduction == "mean" else 1.0)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for a backward is told by an error
        ctx.grad = logits.detach()
        return nll if reduction == "none" else nll.mean() if reduction == "mean" else nll.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        if grad is None:
            raise RuntimeError("the logits' gradient was already used: a second backward is not possible")
        num_rows, vocab = grad.shape
        factor = grads[0].contiguous()
        # A factor of one, as in training, costs a look at it for every row: few programs take many rows each.
        launch(
            _scale_rows, (min(num_rows, SCALING_PROGRAMS),),
            grad, factor, num_rows, grad.stride(0), 1 if factor.dim() else 0,
            V=vocab, COLS=triton.next_power_of_2(vocab), num_warps=8,
        )  # fmt: skip
        return grad, None, None, None
