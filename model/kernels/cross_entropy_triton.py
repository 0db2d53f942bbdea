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
LOGIT_ROWS = 16384  # of logits that exist at a time where a loss is one number: every product still fills a GPU
LARGEST_SHIFT = 40.0  # exp(-2 * 40) is a normal float32, with room for the sum; exp(-88) is not


@triton.jit
def _cross_entropy(
    logits_ptr, targets_ptr, nll_ptr, stride, cap, grad_scale,
    V: tl.constexpr, COLS: tl.constexpr, HAS_GRAD: tl.constexpr, IS_CAP_LARGE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    place = logits_ptr + row * stride + cols
    at_target = logits_ptr + row * stride + tl.load(targets_ptr + row)
    target_logit = tl.load(at_target).to(tl.float32)
    logit = tl.load(place, mask=cols < V, other=0.0).to(tl.float32)
    if IS_CAP_LARGE:
        # All logits may lie so far below cap that their exponentials vanish, and cap times tanh's error is felt.
        target_unit = _exact_tanh(target_logit / cap)
        unit = _exact_tanh(logit / cap)
        most = cap * tl.max(tl.where(cols < V, unit, -1.0), axis=0)
    else:
        # No logit exceeds cap, so cap is subtracted before the exponential where softmax usually takes the maximum.
        target_unit = _tanh(target_logit / cap)
        unit = _tanh(logit * (1.0 / cap))
        most = cap
    weight = tl.exp(cap * unit - most)
    if V < COLS:
        weight = tl.where(cols < V, weight, 0.0)
    total = tl.sum(weight, axis=0)
    if IS_CAP_LARGE:
        tl.store(nll_ptr + row, tl.log(total) + (most - cap * target_unit))
    else:
        tl.store(nll_ptr + row, tl.log(total) + cap * (1 - target_unit))
    if HAS_GRAD:
        factor = grad_scale / total
        grad = weight * factor * (1 - unit * unit)
        tl.store(place, grad.to(logits_ptr.dtype.element_ty), mask=cols < V)
        target_grad = (tl.exp(cap * target_unit - most) * factor - grad_scale) * (1 - target_unit * target_unit)
        tl.debug_barrier()  # the whole row is written before its target is corrected
        tl.store(at_target, target_grad.to(logits_ptr.dtype.element_ty))


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _exact_tanh(x):
    # Below 0.1 the difference of two numbers near 1 would leave few digits: the series, to 2e-10 of itself.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, series, _tanh(x))


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
        V=vocab, COLS=triton.next_power_of_2(vocab), HAS_GRAD=grad_scale is not None,
        IS_CAP_LARGE=cap > LARGEST_SHIFT, num_warps=16,
    )  # fmt: skip
    return nll


class _MadeBefore(torch.autograd.Function):
    """A function whose forward pass leaves the first inputs' gradients in ctx.made, up to the factor that arrives."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("a second backward of this loss is not possible")
        factor = grads[0].contiguous()
        for grad in made:
            num_rows, width = grad.shape
            # A factor of one, as in training, costs a look at it for every row: few programs take many rows each.
            launch(
                _scale_rows, (min(num_rows, SCALING_PROGRAMS),),
                grad, factor, num_rows, grad.stride(0), 1 if factor.dim() else 0,
                V=width, COLS=triton.next_power_of_2(width), num_warps=8,
            )  # fmt: skip
        return *made, *(None,) * (len(ctx.needs_input_grad) - len(made))


class SoftcapCrossEntropy(_MadeBefore):
    """(logits (N, V), targets (N,), cap) -> nll (N,). TRAP: overwrites logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, cap: float) -> Tensor:
        nll = row_nll(logits, targets, cap, 1.0)
        torch.autograd.graph.increment_version(logits)  # whoever saved the logits for a backward is told by an error
        ctx.made = (logits.detach(),)
        return nll


class ProjectedCrossEntropy(_MadeBefore):
    """(x (N, D), weight (V, D), targets (N,), cap, reduction) -> mean or sum of the nll of x weight^T.

    Both gradients are made at once, a part of the rows after the other, so that all logits never exist together;
    the weight's is added up in float32, in the order of the rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, cap: float, reduction: str) -> Tensor:
        narrow, scale = weight.to(x.dtype), 1.0 / x.size(0) if reduction == "mean" else 1.0
        buffer = x.new_empty(min(x.size(0), LOGIT_ROWS), weight.size(0))
        grad_x, grad_weight, nll = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32), []
        parts = (t.split(LOGIT_ROWS) for t in (x, targets, grad_x))
        for rows, row_targets, grad_rows in zip(*parts, strict=True):
            logits = torch.mm(rows, narrow.mT, out=buffer[: rows.size(0)])
            nll.append(row_nll(logits, row_targets, cap, scale))  # the logits' gradient stands there now
            torch.mm(logits, narrow, out=grad_rows)
            grad_weight += logits.mT @ rows
        ctx.made = grad_x, grad_weight
        return torch.cat(nll).mean() if reduction == "mean" else torch.cat(nll).sum()
