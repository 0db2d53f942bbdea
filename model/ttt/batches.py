"""Which documents' chunks form the next batch: continuous batching of adapter slots, a finished one refilled at once.

Plain bookkeeping without tensors. Documents enter the slots in the order given and only there does order matter: a
score depends on its own document alone.
"""

# S slots

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model.config import TTTConfig
from model.ttt.windows import Window, chunk_length, chunk_window, round_up

LADDER = (1 / 16, 1 / 4, 1 / 2, 3 / 4)  # of the most rows of a length: with those, five numbers of rows a length


class Limits(NamedTuple):
    """How large a batch may be.

    The most rows of a length are whole numbers of round_rows where more than that many are there. Where padding_tokens
    is given, few sizes are wanted: a batch of learning windows has as many rows as a step of LADDER or the most, the
    missing ones made up for, unless that takes more than padding_tokens; then some windows are left for later.
    Where learn_step is given, windows that learn are padded to multiples of it, so that those of documents with other
    chunks run with them; without it only windows of one length run together, and all chunks must be equal.
    """

    rows: int
    tokens: int  # of all windows, padding included
    last_step: int  # windows that learn nothing are padded to multiples of this many tokens
    round_rows: int = 1
    padding_tokens: int | None = None
    learn_step: int | None = None

    def max_rows(self, length: int) -> int:
        """Return how many windows of this length fit."""
        count = max(1, min(self.rows, self.tokens // length))
        return count if count < self.round_rows else count // self.round_rows * self.round_rows

    def pad_length(self, length: int, window_tokens: int) -> int:
        """Return the length of the batch in which a window of this length learns."""
        return length if self.learn_step is None else min(round_up(length, self.learn_step), window_tokens)

    def pad_rows(self, count: int, length: int) -> int:
        """Return the rows of the batch that holds count windows of this length that learn."""
        return count if self.padding_tokens is None else min(n for n in self._row_counts(length) if n >= count)

    def take_rows(self, num_ready: int, length: int) -> int:
        """Return how many of the windows of this length that are ready to learn the next batch takes."""
        count = min(num_ready, self.max_rows(length))
        if self.padding_tokens is None or (self.pad_rows(count, length) - count) * length <= self.padding_tokens:
            return count
        return max((n for n in self._row_counts(length) if n <= count), default=count)

    def _row_counts(self, length: int) -> list[int]:
        most = self.max_rows(length)
        return [*(math.ceil(share * most) for share in LADDER), most]


class Task(NamedTuple):
    """The next chunk of the document that holds a slot."""

    slot: int
    window: Window


class Batch(NamedTuple):
    """Windows that run together: all of this length, or no longer where they are padded.

    is_last: the documents' last chunks.
    """

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
        length, is_last = key
        count = min(len(queue), self.limits.max_rows(length)) if is_last else self.limits.take_rows(len(queue), length)
        tasks = self._take(key, count)
        if not is_last and self.limits.learn_step is not None:
            tasks += self._take_shorter(length, self.limits.pad_rows(count, length) - count)
        return Batch(*key, tasks)

    def _take(self, key: tuple[int, bool], count: int) -> list[Task]:
        queue = self.ready[key]
        tasks = [queue.popleft() for _ in range(min(count, len(queue)))]
        if not queue:
            del self.ready[key]
        return tasks

    def _take_shorter(self, length: int, count: int) -> list[Task]:
        """Return up to count windows that learn and are shorter, the longest first: rows that would be padding else."""
        tasks: list[Task] = []
        for key in sorted((key for key in self.ready if key < (length, False) and not key[1]), reverse=True):
            if len(tasks) < count:
                tasks += self._take(key, count - len(tasks))
        return tasks

    def complete(self, batch: Batch) -> None:
        """Queue the next chunk of each document of a batch that ran, or free its slot."""
        for slot, window in batch.tasks:
            if window.is_last:
                self.free.append(slot)
            else:
                size = chunk_length(self.num_predictions(window.document), self.config)
                self._queue(slot, window.document, window.end // size)

    def _queue(self, slot: int, document: int, chunk: int) -> None:
        window = chunk_window(document, self.num_predictions(document), chunk, self.config)
        length = window.end - window.start
        if window.is_last:
            length = round_up(length, self.limits.last_step)
        else:
            length = self.limits.pad_length(length, self.config.window_tokens)
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
