"""The score ledger of test-time training: what was scored and learned from, in which order, as a chain of hashes.

One chain a rank. Its first link is sha256(b"seedsweep score ledger 1" + rank as 8 bytes); each event then gives
link = sha256(link before + 56 bytes): rank, kind, document, first_prediction, end_prediction, num_updates_before as
little-endian int64, loss_sum as little-endian float64. Kind 0 is a score, kind 1 the update that learned from it;
(document, num_updates_before) names the adapter state that a score read and that an update left behind it. Only the
last link is stored: changing, dropping or reordering any event gives another one.
"""

# E events, W ranks

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

SCORE, UPDATE = 0, 1  # part of the hashed record: other numbers are another format
EVENT_COLUMNS = ("rank", "kind", "document", "first_prediction", "end_prediction", "num_updates_before")
RECORD = struct.Struct("<6qd")  # no padding: 6 * 8 + 8 bytes on every machine
GENESIS = b"seedsweep score ledger 1"


class Events(NamedTuple):
    """Events of all ranks, rank after rank: rows (E, 6) int64 of EVENT_COLUMNS, loss_sum (E,) float64 (0 for updates),
    and each rank's last link (W, 32) uint8."""

    rows: np.ndarray
    loss_sum: np.ndarray
    heads: np.ndarray

    def column(self, name: str) -> np.ndarray:
        """Return one column (E,) int64."""
        return np.asarray(self.rows[:, EVENT_COLUMNS.index(name)])

    def of_kind(self, kind: int) -> Events:
        """Return the events of one kind; the heads stay."""
        chosen = self.column("kind") == kind
        return Events(self.rows[chosen], self.loss_sum[chosen], self.heads)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the columns by name, as the score log stores them."""
        columns = {name: self.column(name) for name in EVENT_COLUMNS}
        return {**columns, "loss_sum": self.loss_sum, "chain_heads": self.heads}

    @property
    def chain(self) -> str:
        """One sha256 (hex) over the last links of all ranks."""
        return hashlib.sha256(np.ascontiguousarray(self.heads).tobytes()).hexdigest()


@dataclass(slots=True)
class ScoreChain:
    """The growing ledger of one rank."""

    rank: int = 0
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    loss_sums: list[float] = field(default_factory=list)
    head: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.head = first_link(self.rank)

    def add(self, kind: int, document: int, first: int, end: int, num_updates: int, loss_sum: float) -> None:
        """Append one event: about two microseconds."""
        row = (self.rank, kind, document, first, end, num_updates)
        self.head = hashlib.sha256(self.head + RECORD.pack(*row, loss_sum)).digest()
        self.rows.append(row)
        self.loss_sums.append(loss_sum)

    def events(self) -> Events:
        """Return what was noted so far."""
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, len(EVENT_COLUMNS))
        return Events(rows, np.array(self.loss_sums, dtype=np.float64), np.frombuffer(self.head, np.uint8)[None].copy())


def first_link(rank: int) -> bytes:
    """Return the link before a rank's first event."""
    return hashlib.sha256(GENESIS + rank.to_bytes(8, "little")).digest()


def read_events(arrays: dict[str, np.ndarray]) -> Events:
    """Return the events of a score log's arrays. Raises ValueError naming what is missing or misshapen."""
    missing = [name for name in (*EVENT_COLUMNS, "loss_sum", "chain_heads") if name not in arrays]
    if missing:
        raise ValueError(f"score ledger has no {', '.join(missing)}; run the ttt stage again with this version")
    columns = [np.asarray(arrays[name], dtype=np.int64) for name in EVENT_COLUMNS]
    loss_sum, heads = np.asarray(arrays["loss_sum"], dtype=np.float64), np.asarray(arrays["chain_heads"])
    is_sound = all(column.shape == loss_sum.shape for column in columns) and loss_sum.ndim == 1
    if not is_sound or heads.dtype != np.uint8 or heads.ndim != 2 or heads.shape[1] != 32:
        raise ValueError("score ledger is damaged: its columns differ in length, or its links are not 32 bytes")
    return Events(np.stack(columns, axis=1), loss_sum, heads)


def broken_chains(events: Events) -> list[int]:
    """Return the ranks whose events do not lead to their stored last link."""
    # the ranks' events may lie mixed; each is hashed onto its own rank's chain
    heads = [first_link(rank) for rank in range(len(events.heads))]
    known = set(range(len(heads)))
    strangers: set[int] = set()
    for row, loss_sum in zip(events.rows.tolist(), events.loss_sum.tolist(), strict=True):
        if row[0] not in known:
            strangers.add(row[0])
            continue
        heads[row[0]] = hashlib.sha256(heads[row[0]] + RECORD.pack(*row, loss_sum)).digest()
    wrong = {rank for rank, head in enumerate(heads) if head != events.heads[rank].tobytes()}
    return sorted(wrong | strangers)


def times_scored(events: Events, document_starts: Iterable[int], num_targets: int) -> np.ndarray:
    """Return how often each target of the stream was scored, (num_targets,) int64.

    Prediction p of the document that starts at token s is target s + p of the stream. Raises ValueError if an event
    names a document or a range that the stream does not have.
    """
    starts = np.asarray(list(document_starts), dtype=np.int64)
    scores = events.of_kind(SCORE)
    documents, first, end = (scores.column(n) for n in ("document", "first_prediction", "end_prediction"))
    if documents.size and not (documents.min() >= 0 and documents.max() < starts.size):
        raise ValueError(f"score ledger names document {documents.max()}, the stream has {starts.size}")
    begin, stop = starts[documents] + first, starts[documents] + end
    if begin.size and not (first.min() >= 0 and (begin <= stop).all() and stop.max() <= num_targets):
        raise ValueError("score ledger names targets outside the validation stream")
    # +1 where a range begins and -1 behind its end: the running sum counts the ranges over each target
    steps = np.zeros(num_targets + 1, dtype=np.int64)
    np.add.at(steps, begin, 1)  # not steps[begin] += 1, which counts a place once however often it occurs
    np.add.at(steps, stop, -1)
    return np.asarray(np.cumsum(steps)[:num_targets])
