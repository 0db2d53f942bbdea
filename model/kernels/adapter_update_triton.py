# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of adapters: stored rows gathered into the compute type and stepped by Adam, and their product."""

# S slots, B rows of a batch (one adapter set each), P numbers of one document
# T tokens, D inputs, W outputs, K adapters of one input, R lora_rank

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.launch import launch
from model.kernels.mlp_triton import has_bulk_copies

TILE_M, TILE_N, DEPTH = 128, 128, 64  # rows and columns of a product's tile, and how many inputs it reads at a time
STEP, WARPS, STAGES = 32, 4, 3  # how many of a rank it reads at a time
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


@triton.jit
def _scale(x_ptr, scale_ptr, y_ptr, size, x_row, y_row, R: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_row + at, mask=at < size, other=0.0).to(tl.float32)
    x *= tl.load(scale_ptr + at // R, mask=at < size, other=0.0)
    tl.store(y_ptr + row * y_row + at, x.to(y_ptr.dtype.element_ty), mask=at < size)


def launch_scale(x: Tensor, scale: Tensor, out: Tensor | None) -> Tensor:
    """Return x (S, N, W, R), whose sets lie without gaps, times scale (N, W), in out (laid out so) or a new tensor."""
    y, size = x.new_empty(x.shape) if out is None else out, scale.numel() * x.size(3)
    launch(
        _scale, (triton.cdiv(size, BLOCK), x.size(0)),
        x, scale.float().contiguous(), y, size, x.stride(0), y.stride(0), R=x.size(3), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return y


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


@triton.jit
def _adapted(
    x_box, weight_box, h_box, b_box, y_box, depth, rank, end0, end1, first1, first2,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * N
    row = tl.program_id(1) * M
    place = tl.program_id(2)
    total = tl.zeros((M, N), tl.float32)
    for k in range(0, depth, K):
        x = tl.reshape(x_box.load([place, row, k]), (M, K))
        total = tl.dot(x, weight_box.load([column, k]).T, total)
    first = tl.where(column < end0, 0, tl.where(column < end1, first1, first2))  # in h, of this column's adapter
    for r in range(0, rank, R):  # what h has behind the rank is another's: b's zeros undo it while it is finite
        h = tl.reshape(h_box.load([place, row, first + r]), (M, R))
        b = tl.reshape(b_box.load([place, column, r]), (N, R))
        total = tl.dot(h, b.T, total)
    y_box.store([place, row, column], tl.reshape(total.to(y_box.dtype), (1, M, N)))


def adapted(
    x: Tensor, weight: Tensor, h: Tensor, b: Sequence[Tensor], places: Sequence[tuple[int, int]]
) -> Tensor | None:
    """Return x weight^T plus, in columns from places[i][0] up to places[i][1], the i-th part of h times b[i]^T.

    x (B, T, D), weight (W, D), h (B, T, K R), b[i] (B, columns, R), all of 16-bit floats; returns (B, T, W). None where
    the kernel does not serve them: it wants Hopper's bulk copies, and whole tiles of rows and of each b's columns.
    """
    rank, width, ends, kinds = b[0].size(2), weight.size(0), [0], list[int | None]()
    for i, (first, end) in enumerate((*places, (width, width))):
        for edge, kind in ((first, None), (end, i)):  # None: columns that no adapter adds to
            if edge > ends[-1]:
                ends.append(edge)
                kinds.append(kind)
    is_tiled = x.size(1) >= TILE_M and x.size(2) % 8 == rank % 16 == 0 and not any(end % TILE_N for end in ends)
    if len(kinds) > 3 or not (is_tiled and has_bulk_copies(x.device)):
        return None
    widths, firsts = [end - start for start, end in pairwise(ends)], [(kind or 0) * rank for kind in kinds]
    parts = [x.new_zeros(len(x), n, rank) if kind is None else b[kind] for kind, n in zip(kinds, widths, strict=True)]
    y = x.new_empty(*x.shape[:2], width)
    tensors = x.contiguous(), weight.contiguous(), h, torch.cat(parts, dim=1) if len(parts) > 1 else b[0], y
    blocks = [1, TILE_M, DEPTH], [TILE_N, DEPTH], [1, TILE_M, STEP], [1, TILE_N, STEP], [1, TILE_M, TILE_N]
    launch(
        _adapted, (width // TILE_N, triton.cdiv(x.size(1), TILE_M), x.size(0)),
        *map(TensorDescriptor.from_tensor, tensors, blocks), x.size(2), rank, *(ends[1:] * 2)[:2], *(firsts * 3)[1:3],
        M=TILE_M, N=TILE_N, K=DEPTH, R=STEP, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return y
