# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The lanes of model.quant.rans on a GPU: the same words and states as numpy's, bit for bit.

Lanes never mix while coding: a word is left where its symbol stands, and those that are there are drawn together
afterwards. While decoding a lane must know how many words the lanes before it take, so that one program has them all.
"""

# N arrays, T tables, A = 256 symbols, M lanes, S slots of a table

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.launch import launch
from model.quant import rans
from model.quant.rans import ALPHABET, LEAST_STATE, MAX_LANES, SHARE, TOTAL, Codes, Symbols, Table, Words

LANES = 32  # of a program that codes
FIELDS: tl.constexpr = tl.constexpr(3)  # of an array: its first symbol, how many it has, its table


@triton.jit(do_not_specialize=["num_arrays", "num_lanes"])
def _encode(
    symbols_ptr, arrays_ptr, tables_ptr, words_ptr, states_ptr, num_arrays, num_lanes,
    A: tl.constexpr, SHARE: tl.constexpr, LEAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x = tl.full((LANES,), LEAST, tl.int64)
    for back in range(num_arrays):
        at_array = arrays_ptr + FIELDS * (num_arrays - 1 - back)
        first = tl.load(at_array)
        size = tl.load(at_array + 1)
        table = tables_ptr + tl.load(at_array + 2) * (2 * A)
        num_steps = (size + num_lanes - 1) // num_lanes
        for step in range(num_steps):
            place = (num_steps - 1 - step) * num_lanes + lane
            exists = (lane < num_lanes) & (place < size)
            symbol = tl.load(symbols_ptr + first + place, mask=exists, other=0).to(tl.int64)
            frequency = tl.load(table + symbol, mask=exists, other=1)
            start = tl.load(table + A + symbol, mask=exists, other=0)
            is_full = exists & ((x >> (32 - SHARE)) >= frequency)  # the new state would not fit 32 bits
            tl.store(words_ptr + first + place, tl.where(is_full, x & 0xFFFF, -1).to(tl.int32), mask=exists)
            x = tl.where(is_full, x >> 16, x)
            quotient = x // frequency
            x = tl.where(exists, x + quotient * ((1 << SHARE) - frequency) + start, x)
    tl.store(states_ptr + lane, x, mask=lane < num_lanes)


@triton.jit(do_not_specialize=["num_arrays", "num_lanes", "num_words"])
def _decode(
    words_ptr, arrays_ptr, slots_ptr, symbols_ptr, states_ptr, taken_ptr, num_arrays, num_lanes, num_words,
    SHARE: tl.constexpr, LEAST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)
    x = tl.load(states_ptr + lane, mask=lane < num_lanes, other=LEAST)
    taken = tl.full((), 0, tl.int64)
    for array in range(num_arrays):
        first = tl.load(arrays_ptr + FIELDS * array)
        size = tl.load(arrays_ptr + FIELDS * array + 1)
        slots = slots_ptr + (tl.load(arrays_ptr + FIELDS * array + 2) << SHARE)
        for offset in range(0, size, num_lanes):
            exists = (lane < num_lanes) & (offset + lane < size)
            slot = tl.load(slots + (x & ((1 << SHARE) - 1)))  # symbol, its frequency, the slot counted from its start
            tl.store(symbols_ptr + first + offset + lane, (slot & 255).to(tl.uint8), mask=exists)
            x = tl.where(exists, (x >> SHARE) * ((slot >> 8) & 0xFFFF) + (slot >> 24), x)
            is_low = exists & (x < LEAST)
            place = taken + tl.cumsum(is_low.to(tl.int32), 0) - 1
            word = tl.load(words_ptr + place, mask=is_low & (place < num_words), other=0).to(tl.int64)
            x = tl.where(is_low, (x << 16) | word, x)
            taken += tl.sum(is_low.to(tl.int64), 0)
    tl.store(states_ptr + lane, x, mask=lane < num_lanes)
    tl.store(taken_ptr, taken)


def launch_encode(symbols: Tensor, arrays: Tensor, tables: Tensor, num_lanes: int) -> tuple[Tensor, Tensor]:
    """Return each lane's state (M,) int64 and, for each symbol, the word that it put out, int32, -1 for none.

    symbols uint8, all arrays end to end; arrays (N, 3) int64, see FIELDS; tables (T, 2, A) int64: frequencies, starts.
    """
    words = torch.empty(symbols.numel(), dtype=torch.int32, device=symbols.device)
    states = torch.empty(num_lanes, dtype=torch.int64, device=symbols.device)
    launch(
        _encode, (triton.cdiv(num_lanes, LANES),), symbols, arrays, tables, words, states, arrays.size(0), num_lanes,
        A=ALPHABET, SHARE=int(SHARE), LEAST=LEAST_STATE, LANES=LANES, num_warps=1,
    )  # fmt: skip
    return states, words


def launch_decode(
    words: Tensor, arrays: Tensor, slots: Tensor, states: Tensor, num_symbols: int
) -> tuple[Tensor, Tensor]:
    """Return the symbols, uint8, and how many words they took (a scalar); states (M,) int64 become those at the end.

    words int32; arrays (N, 3) int64; slots (T, S) int64. Words beyond the last one are read as zeros.
    """
    symbols = torch.empty(num_symbols, dtype=torch.uint8, device=words.device)
    taken = torch.empty((), dtype=torch.int64, device=words.device)
    launch(
        _decode, (1,), words, arrays, slots, symbols, states, taken, arrays.size(0), states.numel(), words.numel(),
        SHARE=int(SHARE), LEAST=LEAST_STATE, LANES=MAX_LANES, num_warps=16,
    )  # fmt: skip
    return symbols, taken


def _arrays(sizes: Sequence[int], table_of: Sequence[int]) -> NDArray[np.int64]:
    """Return each array's first symbol, its size and its table, (N, 3)."""
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.stack([ends - sizes, np.asarray(sizes, np.int64), np.asarray(table_of, np.int64)], axis=1)


class DeviceCoder:
    """What rans does step by step in numpy, on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def encode(self, symbols: list[Symbols], tables: Table) -> tuple[Table, Words]:
        """Do what rans codes all arrays with; tables (N, A)."""
        num_lanes = rans.num_lanes(sum(symbol.size for symbol in symbols))
        frequencies = tables.astype(np.int64)
        starts = np.cumsum(frequencies, axis=1) - frequencies
        with torch.cuda.device(self.device):
            states, words = launch_encode(
                self._upload(np.concatenate(symbols)),
                self._upload(_arrays([symbol.size for symbol in symbols], range(len(symbols)))),
                self._upload(np.stack([frequencies, starts], axis=1)),
                num_lanes,
            )
            kept = words[words >= 0].cpu().numpy()
        return states.cpu().numpy().astype(np.uint32), kept.astype("<u2")

    def decode(
        self, states: Table, words: Table, sizes: Sequence[int], tables: Table, table_of: NDArray[np.uint16]
    ) -> list[Codes]:
        """Undo encode; tables (T, A). Raises ValueError for what encode would not have written."""
        frequencies = tables.astype(np.int64)
        starts = np.cumsum(frequencies, axis=1) - frequencies
        symbol = np.stack([np.repeat(np.arange(ALPHABET), row) for row in frequencies])  # (T, S)
        of_slot = np.take_along_axis(frequencies, symbol, 1), np.take_along_axis(starts, symbol, 1)
        slots = symbol | (of_slot[0] << 8) | ((np.arange(TOTAL) - of_slot[1]) << 24)
        with torch.cuda.device(self.device):
            lanes = self._upload(states.astype(np.int64))
            symbols, taken = launch_decode(
                self._upload(words.astype(np.int32)), self._upload(_arrays(sizes, table_of.tolist())),
                self._upload(slots), lanes, sum(sizes),
            )  # fmt: skip
            codes = (symbols ^ 128).view(torch.int8).cpu().numpy()
        rans.check_end(int(taken), words.size, lanes.cpu().numpy())
        return np.split(codes, np.cumsum(sizes)[:-1])

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


@contextmanager
def coding_on(device: torch.device) -> Iterator[None]:
    """Code on this GPU inside the block."""
    coder = DeviceCoder(device)
    rans.coders.append((coder.encode, coder.decode))
    try:
        yield
    finally:
        rans.coders.pop()


def rehearse(device: torch.device) -> None:
    """Make the launches of both directions, for whoever listens; what they would give is not looked at."""
    sizes = torch.zeros(1, int(FIELDS.value), dtype=torch.int64, device=device)
    symbols, tables = (
        torch.zeros(1, dtype=torch.uint8, device=device),
        torch.zeros(512, dtype=torch.int64, device=device),
    )
    states, words = launch_encode(symbols, sizes, tables, LANES)
    launch_decode(words, sizes, tables, states, 1)
