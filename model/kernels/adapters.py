"""Products with low-rank adapters, one set a row of the batch, as autograd nodes around plain batched products.

Adapters that read the same input share their first product; the second ones are added where the frozen matrix product
stands already, so that nothing of the activations' size is added or joined apart. Where a set brings buffers for its
gradient, the backward writes there, and autograd never holds a copy.
"""

# S rows (one adapter set each), T tokens, K adapters of one input, R lora_rank, D inputs, W outputs

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.adapter_update import scale_rows
from model.kernels.dispatch import uses_triton

Product = Callable[[Tensor, Tensor], Tensor]


class GradientBuffers(NamedTuple):
    """Where the gradients of one LowRank go; anchor is any tensor that requires a gradient (it gets none)."""

    a: Tensor
    b: dict[str, Tensor]
    anchor: Tensor


class LowRank(NamedTuple):
    """Adapters that read one input: a (S, K R, D), K blocks in b's order, and b[kind] (S, W, R)."""

    a: Tensor
    b: dict[str, Tensor]
    buffers: GradientBuffers | None = None

    @property
    def lora_rank(self) -> int:
        """R."""
        return self.a.size(1) // len(self.b)

    @property
    def anchor(self) -> Tensor | None:
        """What makes autograd record a product whose inputs are all constants."""
        return None if self.buffers is None else self.buffers.anchor


def adapt_product(
    x: Tensor, weight: Tensor, adapters: LowRank, columns: dict[str, tuple[int, int]], apply: Product
) -> tuple[Tensor, Tensor | None]:
    """Return (x weight^T with each adapter of columns added to its columns, the others' x A^T or None).

    x (S, T, D); weight (W, D); columns: [first, end) of W by kind, the leading kinds of adapters.b. The second result
    is (S, T, R) of the last kind where columns leave one out. apply(x, weight) is the frozen matrix product.
    """
    kinds = tuple(adapters.b)
    assert kinds[: len(columns)] == tuple(columns), (kinds, tuple(columns))
    assert len(kinds) - len(columns) in (0, 1), (kinds, tuple(columns))
    places = tuple(columns.values())
    tensors = [value.to(x.dtype) for value in (adapters.a, *adapters.b.values())]
    y, rest = _AdaptedProduct.apply(x, weight, places, apply, adapters.buffers, adapters.anchor, *tensors)
    return y, rest


def reduce_inputs(x: Tensor, adapters: LowRank) -> tuple[Tensor, Tensor]:
    """Return x A^T (S, T, R) for the one adapter of x (S, T, D), and x for its one other reader.

    The gradient from there comes through here, and takes up this one where it stands.
    """
    h, x = _Reduce.apply(x, adapters.a.to(x.dtype), adapters.buffers, adapters.anchor)
    return h, x


def add_low_rank_(y: Tensor, reduced: Tensor, adapters: LowRank, kind: str) -> Tensor:
    """Return y + reduced B^T, written over y (S, T, W); reduced (S, T, R)."""
    z: Tensor = _AddLowRank.apply(y, reduced, adapters.b[kind].to(y.dtype), kind, adapters.buffers)
    return z


def add_product(x: Tensor, weight: Tensor, reduced: Tensor, adapters: LowRank, kind: str, apply: Product) -> Tensor:
    """Return x weight^T + reduced B^T (S, T, W) for x (S, T, any), weight (W, any) and reduced (S, T, R).

    apply(x, weight) is the frozen matrix product.
    """
    y: Tensor = _AddedProduct.apply(x, weight, reduced, adapters.b[kind].to(x.dtype), kind, adapters.buffers, apply)
    return y


def _product(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor | None:
    """Return a @ b, or write it to out and return None: autograd then carries nothing further."""
    if out is None:
        return torch.bmm(a, b)
    torch.bmm(a, b, out=out)
    return None


class _AdaptedProduct(torch.autograd.Function):
    """(x, weight, places, apply, buffers, anchor, a, *b) -> (y, rest); see adapted_product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, places: tuple[tuple[int, int], ...], apply: Product,
        buffers: GradientBuffers | None, _anchor: Tensor | None, a: Tensor, *b: Tensor,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        rank = a.size(1) // len(b)
        h = torch.bmm(x, a.mT)  # (S, T, K R)
        y = None
        if uses_triton(x) and 2 * sum(end - first for first, end in places) > weight.size(0):  # else it costs more
            from model.kernels.adapter_update_triton import adapted

            y = adapted(x, weight, h, b[: len(places)], places)
        if y is None:
            y = apply(x, weight)
            for i, (first, end) in enumerate(places):
                y[..., first:end].baddbmm_(h[..., i * rank : (i + 1) * rank], b[i].mT)
        ctx.save_for_backward(x, weight, h, a, *b)
        ctx.places, ctx.buffers = places, buffers
        ctx.set_materialize_grads(False)
        return y, h[..., len(places) * rank :] if len(places) < len(b) else None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, h, a, *b = ctx.saved_tensors
        buffers, rank = ctx.buffers, a.size(1) // len(b)
        begin, rest = len(ctx.places) * rank, grads[1]
        if rest is not None and (rest.stride(1), rest.storage_offset()) == (h.size(2), begin):
            grad_h = rest.as_strided(h.shape, h.stride(), 0)  # _low_rank_gradients left room beside its own
        else:
            grad_h = torch.empty_like(h)
            if begin < h.size(2):
                grad_h[..., begin:] = 0 if rest is None else rest
        grad_y = grads[0].contiguous() if grads[0] is not None else x.new_zeros(*x.shape[:-1], weight.size(0))
        outs = list(buffers.b.values()) if buffers is not None else [None] * len(b)
        grad_b: list[Tensor | None] = [None] * len(b)
        for i, (first, end) in enumerate(ctx.places):
            part, block = grad_y[..., first:end], slice(i * rank, (i + 1) * rank)
            torch.bmm(part, b[i], out=grad_h[..., block])
            grad_b[i] = _product(part.mT, h[..., block], outs[i])
        grad_a = _product(grad_h.mT, x, buffers.a if buffers is not None else None)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_y.flatten(0, 1) @ weight).view(x.shape).baddbmm_(grad_h, a)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_y.flatten(0, 1).mT @ x.flatten(0, 1)
        return grad_x, grad_weight, None, None, None, None, grad_a, *grad_b


class _Reduce(torch.autograd.Function):
    """(x, a, buffers, anchor) -> (x a^T, x)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, buffers: GradientBuffers | None, _anchor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, a)
        ctx.buffers = buffers
        return torch.bmm(x, a.mT), x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a = ctx.saved_tensors
        grad_a = _product(grads[0].mT, x, ctx.buffers.a if ctx.buffers is not None else None)
        grad_x = None
        if ctx.needs_input_grad[0]:  # one pass on a GPU; apart on a CPU, where the last bits would depend on it
            is_joined = grads[1].is_cuda
            grad_x = grads[1].baddbmm_(grads[0], a) if is_joined else grads[1] + torch.bmm(grads[0], a)
        return grad_x, grad_a, None, None


class _AddLowRank(torch.autograd.Function):
    """(y, h, b, kind, buffers) -> y + h b^T, in place."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, b: Tensor, kind: str, buffers: GradientBuffers | None) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, b)
        ctx.buffer = None if buffers is None else buffers.b[kind]
        return y.baddbmm_(h, b.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        h, b = ctx.saved_tensors
        return grad, *_low_rank_gradients(grad, h, b, ctx.buffer), None, None


class _AddedProduct(torch.autograd.Function):
    """(x, weight, h, b, kind, buffers, apply) -> x weight^T + h b^T."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, h: Tensor, b: Tensor, kind: str, buffers: GradientBuffers | None,
        apply: Product,
    ) -> Tensor:  # fmt: skip
        y = None
        if uses_triton(x):
            from model.kernels.adapter_update_triton import adapted

            y = adapted(x, weight, h, [b], [(0, weight.size(0))])
        if y is None:
            y = apply(x, weight).baddbmm_(h, b.mT)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, h, b)
        ctx.buffer = None if buffers is None else buffers.b[kind]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, b = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_h, grad_b = _low_rank_gradients(grad, h, b, ctx.buffer)
        rows = grad.flatten(0, 1)
        grad_x = (rows @ weight).view(*grad.shape[:2], -1) if ctx.needs_input_grad[0] else None
        return grad_x, None if x is None else rows.mT @ x.flatten(0, 1), grad_h, grad_b, None, None, None


def _low_rank_gradients(grad: Tensor, h: Tensor, b: Tensor, buffer: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the gradients of h and b from grad (S, T, W) of h b^T; b's goes to buffer where there is one."""
    # laid out as h, which may be the last part of the reduced inputs of several: see _AdaptedProduct
    grad_h = grad.new_empty(*h.shape[:2], h.stride(1))[..., h.stride(1) - h.size(2) :]
    return torch.bmm(grad, b, out=grad_h), _product(grad.mT, h, buffer)


class ScaleGradients(torch.autograd.Function):
    """(anchor, scaled) -> another anchor; its backward, which comes when all gradients are in their buffers, scales.

    scaled: buffers (S, N, W, R) and what to multiply each by (N, W).
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, scaled: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.scaled = scaled
        ctx.set_materialize_grads(False)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor | None) -> tuple[None, None]:
        for buffer, scale in ctx.scaled:
            scale_rows(buffer, scale, out=buffer)
        return None, None
