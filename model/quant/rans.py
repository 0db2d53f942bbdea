"""An entropy coder for integer codes: range variants of asymmetric numeral systems (rANS), vectorized over lanes.

Codes of a quantized matrix are nearly independent draws from one distribution (each row is scaled by its own standard
deviation), so an order-0 coder is within 0.1 % of what can be had and beats general compressors in size and time.
Each step codes one symbol in every lane with a handful of numpy calls; all is integer arithmetic, hence exact
everywhere. Source: rANS, arXiv:1311.2540; interleaved lanes, arXiv:1402.3392.
"""

# N arrays, T tables, A = 256 symbols (code + 128), M lanes

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from model.quant.compression import compress, decompress

Codes: TypeAlias = NDArray[np.int8]
Symbols: TypeAlias = NDArray[np.uint8]
Words: TypeAlias = NDArray[np.uint16]
Table: TypeAlias = NDArray[np.uint32]  # (T, A) or (N, A)

ALPHABET = 256
WORD = np.uint32(16)  # bits that go out of a state, or into it, at a time
SHARE = np.uint32(14)  # bits of a table's total; with more, states just above their least value code worse
TOTAL = 1 << int(SHARE)  # the frequencies of a table sum to this
LEAST_STATE = 1 << 16  # a lane's state stays in [2**16, 2**32)
MIN_LANES, MAX_LANES = 16, 2048
SYMBOLS_PER_LANE = 4096  # at least; a lane costs about 3 bytes, 0.2 % of so many symbols at 3.3 bits
PREFIX = struct.Struct("<HI")  # number of tables, bytes of the compressed head
ENTRY_BITS = 12.0  # what one used entry of a table costs in the head, roughly


def num_lanes(num_symbols: int) -> int:
    """Return the lanes that a stream of so many symbols uses; part of the format, not a choice of the encoder."""
    return min(MAX_LANES, max(MIN_LANES, 1 << (num_symbols // SYMBOLS_PER_LANE).bit_length() >> 1))


def encode(arrays: Sequence[Codes]) -> bytes:
    """Code arrays of int8 into one stream: tables and which array uses which, the lanes' states, 16-bit words."""
    symbols = [array.reshape(-1).view(np.uint8) ^ np.uint8(128) for array in arrays]
    counts = np.stack([np.bincount(symbol, minlength=ALPHABET) for symbol in symbols])  # (N, A)
    merged, table_of = _share_tables(counts)
    tables = np.stack([_normalize(row) for row in merged])  # (T, A)
    states, words = coders[-1][0](symbols, tables[table_of])
    head = compress(table_of.astype("<u2").tobytes() + tables.astype("<u2").tobytes())
    return PREFIX.pack(len(tables), len(head)) + head + states.astype("<u4").tobytes() + words.tobytes()


def decode(data: bytes, sizes: Sequence[int]) -> list[Codes]:
    """Return the arrays (flat, int8) of a stream that encode made; sizes are their lengths.

    Takes one byte a symbol and 64 KiB a table. Raises ValueError for a stream that encode would not have written.
    """
    lanes = num_lanes(sum(sizes))
    num_tables, head_bytes = PREFIX.unpack_from(data) if len(data) >= PREFIX.size else (0, 0)
    body = PREFIX.size + head_bytes
    if not 1 <= num_tables <= len(sizes) or len(data) < body + 4 * lanes or (len(data) - body) % 2:
        raise ValueError(f"rans stream of {len(data)} bytes is cut or its prefix is damaged")
    head = decompress(data[PREFIX.size : body], num_bytes=2 * len(sizes) + 2 * num_tables * ALPHABET)
    table_of = np.frombuffer(head, dtype="<u2", count=len(sizes))
    tables = np.frombuffer(head, dtype="<u2", offset=2 * len(sizes)).reshape(num_tables, ALPHABET).astype(np.uint32)
    if table_of.max() >= num_tables or (tables.sum(axis=1, dtype=np.uint64) != TOTAL).any():
        raise ValueError("rans stream has a table whose frequencies do not add up")
    states = np.frombuffer(data, dtype="<u4", count=lanes, offset=body).astype(np.uint32)
    words = np.frombuffer(data, dtype="<u2", offset=body + 4 * lanes).astype(np.uint32)
    return coders[-1][1](states, words, sizes, tables, table_of)


def _share_tables(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Merge histograms (N, A) while a shared table costs fewer bits than two; returns (T, A) and the table of each."""
    groups = list(counts)
    members = [[index] for index in range(len(counts))]
    gains = np.array([[_merge_gain(a, b) for b in groups] for a in groups])
    while len(groups) > 1:
        np.fill_diagonal(gains, -np.inf)
        first, second = sorted(int(i) for i in np.unravel_index(np.argmax(gains), gains.shape))
        if gains[first, second] <= 0:
            break
        groups[first] = groups[first] + groups.pop(second)
        members[first] += members.pop(second)
        gains = np.delete(np.delete(gains, second, axis=0), second, axis=1)
        gains[first] = gains[:, first] = [_merge_gain(groups[first], other) for other in groups]
    table_of = np.empty(len(counts), dtype=np.int64)
    for table, indices in enumerate(members):
        table_of[indices] = table
    return np.stack(groups), table_of


def _cost_bits(count: NDArray[np.int64]) -> float:
    """Return the bits of a histogram's symbols under their own distribution, its table included."""
    used = count[count > 0].astype(np.float64)
    return float(used.sum() * np.log2(used.sum() or 1.0) - (used * np.log2(used)).sum() + ENTRY_BITS * used.size)


def _merge_gain(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """Return the bits saved when two histograms share a table; negative if they are better apart."""
    return _cost_bits(first) + _cost_bits(second) - _cost_bits(first + second)


def _normalize(count: NDArray[np.int64]) -> Table:
    """Return frequencies (A,) that sum to TOTAL, at least 1 for every symbol that occurs, none of them TOTAL."""
    num_symbols = max(int(count.sum()), 1)
    frequency = np.maximum((count * TOTAL + num_symbols // 2) // num_symbols, count > 0)
    left = TOTAL - int(frequency.sum())  # what rounding left over, or spent if negative
    largest = int(frequency.argmax())
    if frequency[largest] + left >= 1:
        frequency[largest] += left
    else:  # flat: no entry can pay for all, but 256 of at least 1 are far below TOTAL, so together they can
        for _ in range(-left):
            frequency[frequency.argmax()] -= 1
    if frequency[largest] == TOTAL:  # a lone symbol: its frequency would not fit 16 bits
        frequency[largest] -= 1
        frequency[largest - 1] += 1
    return frequency.astype(np.uint32)


def _encode_words(symbols: list[Symbols], tables: Table) -> tuple[Table, Words]:
    """Code all arrays backwards, so that decoding runs forwards; tables (N, A). Returns states (M,) and words."""
    num_symbols = sum(symbol.size for symbol in symbols)
    lanes = num_lanes(num_symbols)
    starts = np.cumsum(tables, axis=1, dtype=np.uint32) - tables  # (N, A)
    states = np.full(lanes, LEAST_STATE, dtype=np.uint32)
    words = np.empty(num_symbols, dtype="<u2")  # a step puts out at most one word a lane
    position = num_symbols
    for symbol, table, start in zip(reversed(symbols), tables[::-1], starts[::-1], strict=True):
        for offset in range((symbol.size - 1) // lanes * lanes, -1, -lanes):
            step = symbol[offset : offset + lanes]
            x, frequency = states[: step.size], table.take(step)
            full = np.flatnonzero((x >> (np.uint32(32) - SHARE)) >= frequency)  # the new state would not fit 32 bits
            out = x.take(full)  # by place: a mask would be gone through at every use
            position -= out.size
            words[position : position + out.size] = out & np.uint32(0xFFFF)
            x[full] = out >> WORD
            quotient = x // frequency
            x += quotient * (np.uint32(TOTAL) - frequency) + start.take(step)  # quotient * TOTAL + remainder + start
    return states, words[position:]


def _decode_words(
    states: Table, words: Table, sizes: Sequence[int], tables: Table, table_of: NDArray[np.uint16]
) -> list[Codes]:
    """Undo _encode_words; states (M,) are used up, tables (T, A)."""
    symbol_of_slot = np.stack([np.repeat(np.arange(ALPHABET, dtype=np.uint8), table) for table in tables])  # (T, TOTAL)
    starts = np.cumsum(tables, axis=1, dtype=np.uint32) - tables  # (T, A)
    lanes, position, arrays = states.size, 0, []
    for size, table in zip(sizes, table_of, strict=True):
        lookup, frequency, start = symbol_of_slot[table], tables[table], starts[table]
        symbols = np.empty(size, dtype=np.uint8)
        for offset in range(0, size, lanes):
            x = states[: min(lanes, size - offset)]
            slot = x & np.uint32(TOTAL - 1)
            step = lookup.take(slot)
            symbols[offset : offset + x.size] = step
            x >>= SHARE
            x *= frequency.take(step)
            x += slot - start.take(step)
            is_low = np.flatnonzero(x < LEAST_STATE)
            incoming = words[position : position + is_low.size]
            if incoming.size < is_low.size:
                check_end(position + is_low.size, words.size, states)
            x[is_low] = (x[is_low] << WORD) | incoming
            position += is_low.size
        arrays.append((symbols ^ np.uint8(128)).view(np.int8))
    check_end(position, words.size, states)
    return arrays


def check_end(num_taken: int, num_words: int, states: NDArray[Any]) -> None:
    """Raise ValueError unless decoding took every word and left the lanes (M,) as coding found them."""
    if num_taken > num_words:
        raise ValueError("rans stream ends before its last symbol")
    if num_taken != num_words or (states != LEAST_STATE).any():
        raise ValueError("rans stream does not end in the state that coding starts from")


# What codes the lanes and what undoes it. The last pair runs: a stage on a GPU may put one there that gives the same.
coders: list[tuple[Callable[..., tuple[Table, Words]], Callable[..., list[Codes]]]] = [(_encode_words, _decode_words)]
