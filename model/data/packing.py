"""Document boundaries inside a packed row, in the form that variable-length attention takes.

A row holds several documents end to end. Attention and rotary positions see it as segments: one starts at the row's
start and at every BOS, and a segment longer than the model's window is cut every `max_segment` tokens counted from
its own start.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.data.shards import BOS_ID

# T tokens of a row, S entries of cu_seqlens
ENTRY_BUCKET = 64  # the published code pads the list of starts to a multiple of this


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the segments of one packed row lie.

    cu_seqlens (S,) int32: the start of each segment, then the row's length, repeated up to S entries (the repeats are
    empty segments). max_seqlen: no segment is longer than this many tokens.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packing:
        """Return the same packing with cu_seqlens on device."""
        return Packing(self.cu_seqlens.to(device, non_blocking=non_blocking), self.max_seqlen)

    def pin_memory(self) -> Packing:
        """Return the same packing with cu_seqlens in page-locked memory."""
        return Packing(self.cu_seqlens.pin_memory(), self.max_seqlen)


def cu_seqlens_from_bos(
    bos_positions: np.ndarray, total_len: int, *, max_segment: int, bucket: int = ENTRY_BUCKET
) -> Packing:
    """Return the packing of a row of total_len tokens whose documents start at bos_positions.

    bos_positions: ascending integers in [0, total_len); a first segment from 0 is implied. max_segment 0 cuts nothing.
    The entries are padded to a multiple of bucket; max_seqlen is the longest segment that occurs.
    Raises ValueError on positions outside the row or out of order.
    Source: golden set 6; train_gpt.py of parameter-golf PR #1536.
    """
    if total_len < 1:
        raise ValueError(f"total_len={total_len} must be at least 1 token")
    starts = np.asarray(bos_positions, dtype=np.int64).reshape(-1)
    if starts.size and (starts[0] < 0 or starts[-1] >= total_len or np.any(np.diff(starts) <= 0)):
        raise ValueError(f"bos_positions must be ascending and inside a row of total_len={total_len} tokens")
    if starts.size == 0 or starts[0] != 0:
        starts = np.concatenate([np.zeros(1, dtype=np.int64), starts])
    lengths = np.diff(starts, append=total_len)
    if max_segment > 0:
        num_pieces = -(-lengths // max_segment)
        first_piece = np.cumsum(num_pieces) - num_pieces
        piece = np.arange(int(num_pieces.sum()), dtype=np.int64) - np.repeat(first_piece, num_pieces)
        starts = np.repeat(starts, num_pieces) + piece * max_segment
        lengths = np.minimum(lengths, max_segment)
    num_entries = -(-(starts.size + 1) // bucket) * bucket
    return Packing(_padded_entries(starts, total_len, num_entries), int(lengths.max()))


def pack_row(
    tokens: np.ndarray | Tensor,
    *,
    max_segment: int,
    bucket: int = ENTRY_BUCKET,
    max_seqlen: int | None = None,
) -> Packing:
    """Return the packing of a row of input tokens, a segment at every BOS.

    tokens (T,) or (1, T), any integer type. max_seqlen replaces the longest segment that occurs (training passes
    seq_len, as published: one number for every row). Raises ValueError if a segment is longer than it.
    """
    row = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    row = row.reshape(-1)
    packing = cu_seqlens_from_bos(np.flatnonzero(row == BOS_ID), row.size, max_segment=max_segment, bucket=bucket)
    cu_seqlens, longest = packing.cu_seqlens, packing.max_seqlen
    if max_seqlen is not None:
        if longest > max_seqlen:
            raise ValueError(f"max_seqlen={max_seqlen} is below a segment of {longest} tokens; lower max_segment")
        longest = max_seqlen
    return Packing(cu_seqlens, longest)


def _padded_entries(starts: np.ndarray, total_len: int, num_entries: int) -> Tensor:
    entries = np.full(num_entries, total_len, dtype=np.int32)
    entries[: starts.size] = starts
    return torch.from_numpy(entries)  # (S,)


def segment_positions(packing: Packing, total_len: int) -> Tensor:
    """Return each token's index inside its own segment, (T,) int64 on the device of packing, T = total_len."""
    starts = packing.cu_seqlens.long()
    index = torch.arange(total_len, device=starts.device)  # (T,)
    # the last entry not above the index is its segment's start: padding entries equal total_len, above every index
    return index - starts[torch.searchsorted(starts, index, right=True) - 1]
