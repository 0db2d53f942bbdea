# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels of the MLP's activation, leaky_relu(x, slope)^2, and of its backward.

Alone, and at the end of a matrix product: persistent kernels over tiles that come and go by Hopper's bulk copies, the
activation or its derivative applied to a tile before it leaves, so that no pass over the hidden state remains.
"""

# N rows (tokens), D model_dim, M mlp_hidden

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.launch import launch

BLOCK = 4096  # numbers a program


@triton.jit
def _activate(x_ptr, y_ptr, numel, SLOPE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    leaky = tl.where(x >= 0, x, SLOPE * x)
    tl.store(y_ptr + at, (leaky * leaky).to(y_ptr.dtype.element_ty), mask=at < numel)


@triton.jit
def _activate_backward(
    grad_ptr, x_ptr, y_ptr, numel, SLOPE: tl.constexpr, HAS_Y: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=at < numel, other=0.0).to(tl.float32)
    leaky = tl.where(x >= 0, x, SLOPE * x)
    grad *= tl.where(x >= 0, 2 * leaky, 2 * SLOPE * leaky)  # 2 leaky(x) times the slope
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=at < numel)
    if HAS_Y:
        tl.store(y_ptr + at, (leaky * leaky).to(y_ptr.dtype.element_ty), mask=at < numel)


def activate(x: Tensor, slope: float) -> Tensor:
    """Return leaky_relu(x, slope)^2."""
    x = x.contiguous()
    y = torch.empty_like(x)
    launch(_activate, (triton.cdiv(x.numel(), BLOCK),), x, y, x.numel(), SLOPE=slope, BLOCK=BLOCK, num_warps=8)
    return y


def activate_backward_(grad: Tensor, x: Tensor, *, needs_y: bool, slope: float) -> Tensor | None:
    """Turn grad of the activation into that of x, in place (both contiguous); return the activation if needs_y."""
    assert grad.is_contiguous(), grad.stride()
    assert x.is_contiguous(), x.stride()
    y = torch.empty_like(x) if needs_y else None
    launch(
        _activate_backward, (triton.cdiv(x.numel(), BLOCK),),
        grad, x, y, x.numel(), SLOPE=slope, HAS_Y=needs_y, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return y


# ---- products with the activation at their end ---------------------------------------------------------------------


class Tiling(NamedTuple):
    """Rows, columns and depth of a tile, pipeline stages, warps, and programs a multiprocessor.

    A tile is written in two halves, whose buffers must fit into shared memory beside the next tile's input.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    programs: int


# The fastest of nine at 98,304 x 512 x 2,048 on an H200.
UP_TILING = Tiling(128, 128, 64, 3, 4, 2)
DOWN_TILING = Tiling(128, 256, 64, 3, 8, 1)
GROUP_M = 8  # tiles of neighboring rows that share a column of weights in L2


@triton.jit
def tile_place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Return a tile's row and column number, GROUP_M rows at a time."""
    group = tile // (GROUP_M * num_n)
    first = group * GROUP_M
    height = min(num_m - first, GROUP_M)
    inside = tile % (GROUP_M * num_n)
    return first + inside % height, inside // height


@triton.jit
def multiply(x_desc, weight_desc, m, n, depth, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Return tile (m, n) of x weight^T, (M, N) float32."""
    total = tl.zeros((M, N), tl.float32)
    for k in range(tl.cdiv(depth, K)):
        x = x_desc.load([m * M, k * K])
        weight = weight_desc.load([n * N, k * K])
        total = tl.dot(x, weight.T, total)
    return total


@triton.jit
def _sign_places(rows, words, num_rows, num_columns):
    """Return where the signs of 32 columns of each row lie, and which of them exist."""
    return words * num_rows + rows, (rows < num_rows) & (words * 32 < num_columns)


@triton.jit
def _up(
    x_desc, weight_desc, y_desc, signs_ptr, num_rows, num_columns, depth,
    SLOPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_SIGNS: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(num_rows, M), tl.cdiv(num_columns, N)
    W: tl.constexpr = N // 2
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        m, n = tile_place(tile, num_m, num_n, GROUP_M)
        total = multiply(x_desc, weight_desc, m, n, depth, M, N, K)
        left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, W)), (0, 2, 1)))
        rows = m * M + tl.arange(0, M)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            column = n * N + half * W
            if HAS_SIGNS:
                bits = tl.reshape((part < 0).to(tl.int32), (M, 2, 32)) << tl.arange(0, 32)[None, None, :]
                words = tl.split(tl.sum(bits, axis=2))  # two stores: one would take shared memory that is not there
                for word in tl.static_range(2):
                    places, inside = _sign_places(rows, column // 32 + word, num_rows, num_columns)
                    tl.store(signs_ptr + places, words[word], mask=inside)
            leaky = tl.where(part >= 0, part, SLOPE * part)
            y_desc.store([m * M, column], (leaky * leaky).to(y_desc.dtype))


@triton.jit
def _down_backward(
    grad_desc, weight_desc, y_desc, signs_ptr, grad_hidden_desc, num_rows, num_columns, depth,
    SLOPE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_m, num_n = tl.cdiv(num_rows, M), tl.cdiv(num_columns, N)
    W: tl.constexpr = N // 2
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        m, n = tile_place(tile, num_m, num_n, GROUP_M)
        total = tl.zeros((M, N), tl.float32)
        for k in range(tl.cdiv(depth, K)):
            grad = grad_desc.load([m * M, k * K])
            weight = weight_desc.load([k * K, n * N])
            total = tl.dot(grad, weight, total)
        left, right = tl.split(tl.permute(tl.reshape(total, (M, 2, W)), (0, 2, 1)))
        rows = m * M + tl.arange(0, M)
        for half in tl.static_range(2):
            part = left if half == 0 else right
            column = n * N + half * W
            words = (column // 32 + tl.arange(0, W // 32))[None, :]
            places, inside = _sign_places(rows[:, None], words, num_rows, num_columns)
            signs = tl.load(signs_ptr + places, mask=inside, other=0)  # (M, W / 32)
            below = tl.reshape((signs[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1, (M, W))
            size = tl.sqrt(y_desc.load([m * M, column]).to(tl.float32))  # |leaky_relu(hidden)|
            part *= tl.where(below == 0, 2 * size, -2 * SLOPE * size)
            grad_hidden_desc.store([m * M, column], part.to(grad_hidden_desc.dtype))


@lru_cache(maxsize=8)
def has_bulk_copies(device: torch.device) -> bool:
    """Return whether the device has the tensor copy engine that the product kernels use (Hopper and later)."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def fits_products(x: Tensor, hidden_width: int) -> bool:
    """Return whether the product kernels serve rows x (N, D): bf16, rows of whole 16-byte pieces, enough of them."""
    is_aligned = x.size(1) % 8 == 0 and hidden_width % 8 == 0
    return x.dtype == torch.bfloat16 and is_aligned and x.size(0) >= UP_TILING.m and has_bulk_copies(x.device)


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Return what loads and stores tiles of x."""
    return TensorDescriptor.from_tensor(x, [rows, columns])


def grid(out: Tensor, tiling: Tiling) -> tuple[int]:
    """Return how many programs share the tiles of out (N, M)."""
    tiles = triton.cdiv(out.size(0), tiling.m) * triton.cdiv(out.size(1), tiling.n)
    return (min(tiles, tiling.programs * torch.cuda.get_device_properties(out.device).multi_processor_count),)


def up_and_activate(x: Tensor, weight: Tensor, *, needs_signs: bool, slope: float) -> tuple[Tensor | None, Tensor]:
    """Return (signs of hidden = x weight^T if needs_signs, its activation (N, M)) for x (N, D) and weight (M, D).

    Signs are bits, set below zero: bit i of signs[j, n] is that of hidden[n, 32 j + i]; int32 (ceil(M / 32), N).
    """
    x, weight, t = x.contiguous(), weight.contiguous(), UP_TILING
    y = torch.empty(x.size(0), weight.size(0), device=x.device, dtype=x.dtype)
    num_words = triton.cdiv(y.size(1), 32)
    signs = torch.empty(num_words, y.size(0), device=x.device, dtype=torch.int32) if needs_signs else None
    launch(
        _up, grid(y, t),
        descriptor(x, t.m, t.k), descriptor(weight, t.n, t.k), descriptor(y, t.m, t.n // 2), signs,
        *y.shape, x.size(1),
        SLOPE=slope, M=t.m, N=t.n, K=t.k, GROUP_M=GROUP_M, HAS_SIGNS=needs_signs,
        num_stages=t.stages, num_warps=t.warps,
    )  # fmt: skip
    return signs, y


def down_backward(grad: Tensor, weight: Tensor, signs: Tensor, y: Tensor, *, slope: float) -> Tensor:
    """Return the gradient of hidden (N, M) from grad (N, D), weight (D, M) and what up_and_activate returned.

    The activation's derivative is 2 sqrt(y), and -2 slope sqrt(y) below zero.
    """
    grad, weight, t = grad.contiguous(), weight.contiguous(), DOWN_TILING
    grad_hidden = torch.empty_like(y)
    launch(
        _down_backward, grid(y, t),
        descriptor(grad, t.m, t.k), descriptor(weight, t.k, t.n), descriptor(y, t.m, t.n // 2), signs,
        descriptor(grad_hidden, t.m, t.n // 2), *y.shape, grad.size(1),
        SLOPE=slope, M=t.m, N=t.n, K=t.k, GROUP_M=GROUP_M, num_stages=t.stages, num_warps=t.warps,
    )  # fmt: skip
    return grad_hidden
