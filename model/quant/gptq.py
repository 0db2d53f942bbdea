"""GPTQ: weights rounded to integers so that a layer's outputs, not its weights, change least.

Rows of a matrix never mix, so all matrices that read the same kind of input are rounded together, as one batch with
their rows side by side. Only `_round_block` walks column by column; everything around it is batched matrix work, on
whichever device the weights are. Source: GPTQ, arXiv:2210.17323; row-sigma clipping as in the reference record.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.quant.low_rank import SMALLEST_HALF

# Shapes: N matrices of one batch, R rows (out), C columns (in), K columns of one block


class HessianFactor(NamedTuple):
    """What rounding needs of a batch of Hessians, columns in the order in which they are rounded."""

    upper: Tensor  # (N, C, C) float32, upper triangular, U^T U = H^-1 of the damped and reordered Hessian
    order: Tensor  # (N, C) int64, falling diagonal
    is_dead: Tensor  # (N, C) bool, in the original order: inputs that were always zero


def largest_code(bits: int) -> int:
    """Return qmax, the largest magnitude of a signed code of that many bits; ValueError outside 2..8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be between 2 and 8")
    return (1 << (bits - 1)) - 1


def row_scales(weight: Tensor, *, qmax: int, clip_sigmas: float | Tensor) -> Tensor:
    """Return clip_sigmas * std / qmax of each row, rounded to float16 and never zero.

    weight (..., R, C) float32, C at least 2 (std divides by C - 1). clip_sigmas: of all rows, or (..., R). A row
    whose scale would round to zero, because it is constant or nearly so, takes the scale that just holds its largest
    entry. Returns (..., R) float16.
    """
    scales = (clip_sigmas * weight.std(dim=-1) / qmax).half()
    largest = (weight.abs().amax(dim=-1) / qmax).clamp_min(SMALLEST_HALF).half()
    return torch.where(scales > 0, scales, largest)


def factor_hessians(hessians: Tensor, *, damping_frac: float, names: Sequence[str] = ()) -> HessianFactor:
    """Damp, reorder and factor a batch of Hessians (N, C, C) float32.

    A zero on the diagonal (a dead input) becomes 1; then damping_frac of the mean diagonal is added to all of it.
    Raises ValueError naming the Hessian that is not positive definite or not finite.
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)  # (N, C)
    is_dead = diagonal == 0
    diagonal = torch.where(is_dead, 1.0, diagonal)
    diagonal = diagonal + damping_frac * diagonal.mean(dim=-1, keepdim=True)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    damped = hessians.clone()
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    damped = damped.take_along_dim(order[:, :, None], dim=1).take_along_dim(order[:, None, :], dim=2)
    # H = R R^T with R upper is a Cholesky factor of the matrix read backwards, and U = R^-1. One factorization,
    # and the inverse of H is never formed.
    lower, info = torch.linalg.cholesky_ex(damped.flip(-2, -1))
    failed = ((info != 0) | ~lower.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if failed:
        raise ValueError(
            f"hessian of {names[failed[0]] if names else failed[0]} is not positive definite: "
            f"check calibration for infinities or raise quant.damping_frac={damping_frac}"
        )
    identity = torch.eye(hessians.shape[-1], device=hessians.device, dtype=hessians.dtype)
    upper = torch.linalg.solve_triangular(lower.flip(-2, -1), identity.expand_as(lower), upper=True)
    return HessianFactor(upper, order, is_dead)


def _round_block(block: Tensor, upper: Tensor, scales: Tensor, qmax: int) -> Tensor:
    """Round one block column by column, each error leaving the block's later columns at once.

    block (N, K, R) float32, columns along the middle axis; holds the codes afterwards. upper (N, K, K); scales (N, R).
    Returns the errors (N, K, R), already divided by the factor's diagonal.
    """
    errors = torch.empty_like(block)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)  # (N, K)
    for j in range(block.shape[1]):
        column = block[:, j]  # (N, R)
        codes = (column / scales).round_().clamp_(-qmax, qmax)
        torch.div(column - codes * scales, diagonal[:, j, None], out=errors[:, j])
        block[:, j] = codes
        block[:, j + 1 :].addcmul_(upper[:, j, j + 1 :, None], errors[:, j, None], value=-1)
    return errors


def round_batch(
    weights: Tensor, factor: HessianFactor, *, qmax: int, clip_sigmas: float | Tensor, block_columns: int
) -> tuple[Tensor, Tensor]:
    """Round a batch of matrices against factored Hessians.

    weights (N, R, C) float32, not changed. clip_sigmas: of all rows, or (N, R).
    Returns codes (N, R, C) int8 and scales (N, R) float16.
    """
    scales = row_scales(weights, qmax=qmax, clip_sigmas=clip_sigmas)  # over the row as it was, dead columns included
    steps = scales.float()
    columns = weights.masked_fill(factor.is_dead[:, None, :], 0.0).transpose(1, 2)  # (N, C, R)
    columns = columns.take_along_dim(factor.order[:, :, None], dim=1).contiguous()
    num_columns = columns.shape[1]
    for start in range(0, num_columns, block_columns):
        stop = min(start + block_columns, num_columns)
        upper = factor.upper[:, start:stop]  # (N, K, C)
        errors = _round_block(columns[:, start:stop], upper[:, :, start:stop].contiguous(), steps, qmax)
        if stop < num_columns:
            columns[:, stop:].baddbmm_(upper[:, :, stop:].transpose(1, 2), errors, alpha=-1)
    inverse = factor.order.argsort(dim=-1)
    codes = columns.to(torch.int8).take_along_dim(inverse[:, :, None], dim=1)
    return codes.transpose(1, 2).contiguous(), scales
