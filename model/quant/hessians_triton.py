# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the lower half of a second moment: the upper one is the same numbers, and half of the work."""

# N rows (tokens), C columns, P parts of the rows

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.launch import launch
from model.kernels.mlp_triton import has_bulk_copies

TILE_M, TILE_N, DEPTH = 128, 256, 64
LEAST_WIDTH = 1024  # below it the whole is made of too few tiles to gain by leaving some out
PARTS = 11  # of the rows, each with sums of its own: 2,048 columns make 72 tiles, with 11 parts six for each of 132


@triton.jit(do_not_specialize=["num_rows"])
def _half_moment(
    left_box, right_box, sums_ptr, num_rows, width,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * N
    row = tl.program_id(1) * M
    part = tl.program_id(2)
    if column >= row + M:
        return
    rows = tl.cdiv(tl.cdiv(num_rows, PARTS), K) * K
    total = tl.zeros((M, N), tl.float32)
    for k in range(part * rows, tl.minimum(part * rows + rows, num_rows), K):
        total = tl.dot(left_box.load([k, row]).T, right_box.load([k, column]), total)
    at = (part * width + row + tl.arange(0, M)).to(tl.int64)[:, None] * width + column + tl.arange(0, N)[None, :]
    tl.store(sums_ptr + at, total)


def fits_half(x: Tensor) -> bool:
    """Return whether half_moment serves x (N, C) and gains by it."""
    return x.size(1) >= LEAST_WIDTH and x.size(1) % TILE_N == 0 and x.is_contiguous() and has_bulk_copies(x.device)


def half_moment(x: Tensor) -> Tensor:
    """Return sum over rows of x x^T (C, C) float32 for x (N, C); what lies above the diagonal is undefined."""
    width = x.size(1)
    sums = torch.empty(PARTS, width, width, dtype=torch.float32, device=x.device)
    launch(
        _half_moment, (width // TILE_N, width // TILE_M, PARTS),
        *(TensorDescriptor.from_tensor(x, [DEPTH, tile]) for tile in (TILE_M, TILE_N)), sums, x.size(0), width,
        M=TILE_M, N=TILE_N, K=DEPTH, PARTS=PARTS, num_warps=8, num_stages=3,
    )  # fmt: skip
    return sums.sum(0)
