"""Where the segments of packed queries and keys lie, for every variable-length kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from model.data.packing import Packing


class Bounds(NamedTuple):
    """Where the segments of packed queries and keys lie: cu_seqlens int32 of both, and their longest segments.

    A segment with fewer queries than keys has the last ones. tables: the kernels' lists of tiles, kept as they are made
    for other visits to the same rows, as are bounds (see Rows); None: each makes its own.
    """

    queries: Tensor
    keys: Tensor
    max_queries: int
    max_keys: int
    tables: dict[tuple[int, ...], Any] | None = None


def segment_bounds(packing: Packing | None, num_rows: int, row_len: int, device: torch.device) -> Bounds:
    """Return the bounds of a pack, or of whole rows laid end to end."""
    if packing is not None:
        return Bounds(packing.cu_seqlens, packing.cu_seqlens, packing.max_seqlen, packing.max_seqlen)
    starts = torch.arange(0, (num_rows + 1) * row_len, row_len, dtype=torch.int32, device=device)
    return Bounds(starts, starts, row_len, row_len)


def window_bounds(
    left_padding: Tensor | None, num_rows: int, row_len: int, num_queries: int, device: torch.device
) -> Bounds:
    """Return the bounds of rows (num_rows, row_len) of which left_padding (num_rows,) leading keys are nobody's.

    Only the last num_queries positions of each row are queries. Padding is a segment of its own, so that every kernel
    can skip it; with fewer queries than keys it has those among the last positions, if any.
    """
    if left_padding is None:
        keys = torch.arange(0, (num_rows + 1) * row_len, row_len, dtype=torch.int32, device=device)
        queries = torch.arange(0, (num_rows + 1) * num_queries, num_queries, dtype=torch.int32, device=device)
        return Bounds(queries, keys, num_queries, row_len)
    rows = torch.arange(num_rows, device=device)
    padded_queries = (left_padding - (row_len - num_queries)).clamp_min(0)

    def entries(length: int, padding: Tensor) -> Tensor:
        starts = torch.stack((rows * length, rows * length + padding), dim=1).flatten()
        # filled on the device: a recording takes no number from the host
        end = torch.full((1,), num_rows * length, device=device)
        return torch.cat((starts, end)).to(torch.int32)

    return Bounds(entries(num_queries, padded_queries), entries(row_len, left_padding), num_queries, row_len)


TRITON_HEAD_DIMS = (16, 32, 64, 128)
