# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernel of the joined queries, keys and values: a product and, at its end, norm, rotary and gain.

What model.attention.heads_triton does in a pass of its own is done here to a tile before it leaves. A tile's columns
are whole heads, and both numbers of a rotated pair lie in one thread's registers, so that no shared memory is needed
beside the tiles that come and go.
"""

# N tokens, D inputs, H query heads, K kv heads, E head_dim, W = (H + 2 K) E columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch
from model.kernels.mlp_triton import GROUP_M, Tiling, descriptor, fits_products, grid, multiply, tile_place

EPS: tl.constexpr = tl.constexpr(2.0**-23)
TILING = Tiling(128, 128, 64, 3, 4, 2)
THREAD_COLUMNS = 8  # neighbors that a thread shares with three others; half of the rotated dims must be whole eights


@triton.jit(do_not_specialize=["num_rows", "table_rows"])
def _project_and_rotate(
    x_desc, weight_desc, y_desc, cos_ptr, sin_ptr, gain_ptr, inverse_ptr, num_rows, table_rows,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    W: tl.constexpr = TILE_N // 2  # a tile is stored in two halves, of HEADS heads and PAIRS groups of 2 HALF columns
    HEADS: tl.constexpr = W // E
    PAIRS: tl.constexpr = E // (2 * HALF)
    num_m, num_n = tl.cdiv(num_rows, TILE_M), tl.cdiv((H + 2 * K) * E, TILE_N)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        m, n = tile_place(tile, num_m, num_n, GROUP_M)
        total = multiply(x_desc, weight_desc, m, n, D, TILE_M, TILE_N, TILE_K)
        rows = (m * TILE_M + tl.arange(0, TILE_M))[:, None]
        angle = (rows % table_rows) * HALF + tl.arange(0, HALF)[None, :]
        cos = tl.load(cos_ptr + angle)[:, None, :]
        sin = tl.load(sin_ptr + angle)[:, None, :]
        parts = tl.split(tl.permute(tl.reshape(total, (TILE_M, 2, W)), (0, 2, 1)))
        for half in tl.static_range(2):
            part = parts[half]
            first = (n * 2 + half) * HEADS
            head = first + tl.arange(0, HEADS)[None, :]
            inverse = tl.rsqrt(tl.sum(tl.reshape(part * part, (TILE_M, HEADS, E)), axis=2) / E + EPS)  # (M, HEADS)
            gain = tl.load(gain_ptr + head, mask=head < H, other=1.0).to(tl.float32)
            factor = tl.where(head < H + K, gain * inverse, 1.0)
            low, high = tl.split(tl.permute(tl.reshape(part, (TILE_M, HEADS * PAIRS, 2, HALF)), (0, 1, 3, 2)))
            pair = tl.arange(0, HEADS * PAIRS)[None, :, None]
            turns = (pair % PAIRS == 0) & (first + pair // PAIRS < H + K)
            turned = tl.join(
                tl.where(turns, low * cos + high * sin, low), tl.where(turns, high * cos - low * sin, high)
            )  # (M, HEADS PAIRS, HALF, 2)
            y = tl.reshape(tl.permute(turned, (0, 1, 3, 2)), (TILE_M, HEADS, E)) * factor[:, :, None]
            y_desc.store([m * TILE_M, n * TILE_N + half * W], tl.reshape(y, (TILE_M, W)).to(y_desc.dtype))
            tl.store(inverse_ptr + rows * (H + K) + head, inverse, mask=(rows < num_rows) & (head < H + K))


def fits_heads(x: Tensor, head_dim: int, half: int) -> bool:
    """Return whether project_and_rotate serves rows x (N, D) and heads that turn by half angles each."""
    are_whole = TILING.n % (2 * head_dim) == 0 and head_dim % (2 * half) == 0 and half % THREAD_COLUMNS == 0
    return are_whole and fits_products(x, head_dim)


def project_and_rotate(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Return (y (N, H + 2 K, E), inverse (N, H + K) float32) of x weight^T, as rotate does with one copy.

    x (N, D), weight (W, D); the rest as for rotate. The product is rounded once, after all of it.
    """
    x, weight, t = x.contiguous(), weight.contiguous(), TILING
    num_heads = gain.numel()
    head_dim = weight.size(0) // (num_heads + 2 * num_kv_heads)
    y = torch.empty(x.size(0), weight.size(0), device=x.device, dtype=x.dtype)
    inverse = torch.empty(x.size(0), num_heads + num_kv_heads, device=x.device, dtype=torch.float32)
    launch(
        _project_and_rotate, grid(y, t),
        descriptor(x, t.m, t.k), descriptor(weight, t.n, t.k), descriptor(y, t.m, t.n // 2), cos, sin, gain, inverse,
        x.size(0), cos.size(0), D=x.size(1), H=num_heads, K=num_kv_heads, E=head_dim, HALF=cos.size(1),
        TILE_M=t.m, TILE_N=t.n, TILE_K=t.k, GROUP_M=GROUP_M, num_stages=t.stages, num_warps=t.warps,
    )  # fmt: skip
    return y.view(x.size(0), -1, head_dim), inverse
