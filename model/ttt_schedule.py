"""Which documents' chunks form the next batch: continuous batching of adapter slots, a finished one refilled at once.

Plain bookkeeping without tensors. Documents enter the slots in the order given and only there does order matter: a
score depends on its own document alone.
"""

# S slots

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model.config import TTTConfig
from model.ttt_windows import Window, chunk_window


class Limits(NamedTuple):
    """How large a batch may be; rows must be whole numbers of round_rows where more than that many are there."""

    rows: int
    tokens: int  # of all windows, padding included
    last_step: int  # windows that learn nothing are padded to multiples of this many tokens
    round_rows: int = 1

    def max_rows(self, length: int) -> int:
        """Return how many windows of this length fit."""
        count = max(1, min(self.rows, self.tokens // length))
        return count if count < self.round_rows else count // self.round_rows * self.round_rows


class Task(NamedTuple):
    """The next chunk of the document that holds a slot."""

    slot: int
    window: Window


class Batch(NamedTuple):
    """Windows that run together: all of this length, or no longer where is_last (the documents' last chunks)."""

    length: int
    is_last: bool
    tasks: list[Task]


class Schedule:
    """Documents waiting, at work and done; next_batch and complete take turns."""

    def __init__(
        self,
        documents: Sequence[int],
        num_predictions: Callable[[int], int],
        config: TTTConfig,
        num_slots: int,
        limits: Limits,
    ) -> None:
        self.num_predictions, self.config, self.limits = num_predictions, config, limits
        self.waiting = deque(documents)
        self.free = list(range(num_slots))[::-1]
        self.ready: dict[tuple[int, bool], deque[Task]] = {}  # by length and is_last

    def next_batch(self, reset: Callable[[int, int], None]) -> Batch | None:
        """Fill free slots (reset(slot, document) for each) and return the next batch, None when all is done."""
        while self.waiting and self.free:
            slot, document = self.free.pop(), self.waiting.popleft()
            reset(slot, document)
            self._queue(slot, document, 0)
        if not self.ready:
            return None
        key = self._choose()
        queue = self.ready[key]
        tasks = [queue.popleft() for _ in range(min(len(queue), self.limits.max_rows(key[0])))]
        if not queue:
            del self.ready[key]
        return Batch(*key, tasks)

    def complete(self, batch: Batch) -> None:
        """Queue the next chunk of each document of a batch that ran, or free its slot."""
        for slot, window in batch.tasks:
            if window.is_last:
                self.free.append(slot)
            else:
                self._queue(slot, window.document, window.end // self.config.chunk_tokens)

    def _queue(self, slot: int, document: int, chunk: int) -> None:
        window = chunk_window(document, self.num_predictions(document), chunk, self.config)
        length = window.end - window.start
        if window.is_last:
            length = -(-length // self.limits.last_step) * self.limits.last_step
        self.ready.setdefault((length, window.is_last), deque()).append(Task(slot, window))

    def _choose(self) -> tuple[int, bool]:
        """Return the queue to serve: a full one, the shortest windows first, so that documents behind catch up.

        If none is full and documents wait for slots, the fullest; if none waits, again the shortest, last chunks last.
        """
        shares = {key: len(queue) / self.limits.max_rows(key[0]) for key, queue in self.ready.items()}
        full = [key for key, share in shares.items() if share >= 1]
        if full:
            return min(full)
        if self.waiting:
            return max(shares, key=lambda key: (shares[key], key))
        return min(self.ready, key=lambda key: (key[1], key[0]))
