"""A low-rank correction of a matrix's rounding error: E = W - What is nearly A B, and A and B take few bits.

A pair of singular vectors may change sign together, and the levels of A are not symmetric, so the signs are fixed by a
rule of our own: otherwise the artifact would depend on the routine that found the vectors. Source: LQER,
arXiv:2402.02446, with the levels of parameter-golf PR #1797.
"""

# R rows (out), C columns (in), K rank, N runs of entries that share a scale

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

A_LEVELS = (-2, 1)  # 2 bits
B_LEVELS = (-8, 7)  # 4 bits
A_REACH, B_REACH = 1.5, 7.5  # the largest magnitude in steps: half a step beyond the positive level, rounded into it
SMALLEST_HALF = 2.0**-24  # the least positive float16; smaller scales would round to 0


class LowRank(NamedTuple):
    """A correction in integers: (a_codes * a_scale) (b_codes * their scales), added to the rounded matrix."""

    a_codes: Tensor  # (R, K) int8 in A_LEVELS
    a_scale: Tensor  # (1,) float16
    b_codes: Tensor  # (K, C) int8 in B_LEVELS
    b_scales: Tensor  # (N,) float16, of K * C / N consecutive entries each, row by row

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.b_codes.shape[0]

    @property
    def group(self) -> int:
        """Entries of B that share a scale."""
        return self.b_codes.numel() // self.b_scales.numel()

    def product(self) -> Tensor:
        """Return A B (R, C) in float32, equal bits on every device: one product and one sum at a time."""
        a = self.a_codes.float() * self.a_scale.float()
        b = (self.b_codes.float().view(-1, self.group) * self.b_scales.float()[:, None]).view(self.b_codes.shape)
        total = a[:, 0, None] * b[0]
        for k in range(1, self.rank):
            total = total + a[:, k, None] * b[k]
        return total


def factor_error(error: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """Return A (R, K) and B (K, C) float32, whose product is the best approximation of error (R, C) of that rank.

    B holds the leading right singular vectors, found as eigenvectors of error^T error (C, C) in float64, A the left
    ones times the singular values. Of the entries of a column of A, that of largest magnitude is negative.
    """
    assert 1 <= rank <= min(error.shape), (rank, error.shape)
    exact = error.double()
    vectors = torch.linalg.eigh(exact.T @ exact).eigenvectors.flip(1)[:, :rank]  # (C, K), largest first
    a = exact @ vectors
    peaks = a.gather(0, a.abs().argmax(dim=0, keepdim=True))  # (1, K)
    signs = torch.where(peaks > 0, -1.0, 1.0)  # A's levels reach twice as far down as up
    return (a * signs).float(), (vectors * signs).T.float()


def pack_factors(a: Tensor, b: Tensor, *, group: int) -> LowRank:
    """Round factors A (R, K) and B (K, C) float32 to their levels; K * C must be a multiple of group.

    Ties go to the even level. The float16 scales are used as rounded, and none of them is 0.
    """
    assert b.numel() % group == 0, (b.shape, group)
    a_scale = _scales(a.reshape(1, -1), A_REACH)
    runs = b.reshape(-1, group)
    b_scales = _scales(runs, B_REACH)
    a_codes = (a / a_scale.float()).round().clamp(*A_LEVELS).to(torch.int8)
    b_codes = (runs / b_scales.float()[:, None]).round().clamp(*B_LEVELS).to(torch.int8)
    return LowRank(a_codes, a_scale, b_codes.view(b.shape), b_scales)


def _scales(runs: Tensor, reach: float) -> Tensor:
    """Return the float16 step of each row, with which its largest magnitude is reach steps."""
    return (runs.abs().amax(dim=1) / reach).half().clamp_min(SMALLEST_HALF)
