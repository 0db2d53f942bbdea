"""The score ledger of test-time training: what was scored and learned from, in which order, as a chain of hashes.

One chain a rank. Its first link is sha256(b"seedsweep score ledger 1" + rank as 8 bytes); each event then gives
link = sha256(link before + 56 bytes): rank, kind, document, first_prediction, end_prediction, num_updates_before as
little-endian int64, loss_sum as little-endian float64. Kind 0 is a score, kind 1 the update that learned from it;
(document, num_updates_before) names the adapter state that a score read and that an update left behind it. Only the
last link is stored: changing, dropping or reordering any event gives another one. Read by model.ttt.ledger_reading.
"""

# E events, W ranks

from __future__ import annotations

import hashlib
import struct
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
