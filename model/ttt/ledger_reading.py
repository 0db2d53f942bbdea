"""The score ledger read back: its events, whether the chain of hashes holds, how often each target was scored.

Apart from the writing of it, for the generated program only scores.
"""

# E events, W ranks

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from model.ttt.score_ledger import EVENT_COLUMNS, RECORD, SCORE, Events, first_link


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


def choose_events(events: Events, kind: int) -> Events:
    """Return the events of one kind, SCORE or UPDATE; the heads stay."""
    chosen = events.column("kind") == kind
    return Events(events.rows[chosen], events.loss_sum[chosen], events.heads)


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
    scores = choose_events(events, SCORE)
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
