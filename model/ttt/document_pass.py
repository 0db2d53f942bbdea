"""One pass over documents: batches of windows scored and, when adapting, learned from; scores and ledger kept."""

# B windows of a batch, T tokens of a window, C chunk_tokens, N targets

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import TTTConfig
from model.data.validation import ValidationSet
from model.gpt import GPT
from model.kernels.pace import Pace, queue_to_host
from model.lora import Adapters
from model.report import Report
from model.ttt.batches import Batch, Limits, Schedule
from model.ttt.learning_step import LearningStep
from model.ttt.score_ledger import SCORE, UPDATE, Events, ScoreChain
from model.ttt.slots import Slots
from model.ttt.windows import Window, chunk_length, longest_chunk, round_up, unadapted_windows

LEDGER_LAG = 64  # entries, two a step that learns, that a GPU's loss sums wait: four times what Pace allows


class DocumentPass:
    """Scores a list of documents with or without adaptation; one instance a pass."""

    learning: LearningStep | None = None  # made with the slots of the first adapted pass

    def __init__(
        self,
        model: GPT,
        validation: ValidationSet,
        config: TTTConfig,
        report: Report,
        *,
        label: str,
        is_looped: bool = True,
        rank: int = 0,
    ) -> None:
        self.model, self.validation, self.config, self.report = model, validation, config, report
        self.label, self.is_looped = label, is_looped
        self.device = model.qo_bank.device
        self.ranges = validation.document_ranges
        dtype = torch.float64 if model.compute_dtype == torch.float64 else torch.float32
        self.nll = torch.zeros(validation.num_targets, dtype=dtype, device=self.device)
        self.chain = ScoreChain(rank)
        self.unlogged: deque[tuple[int, list[Window], Tensor | None, torch.cuda.Event | None]] = deque()
        self.ledger_lag = LEDGER_LAG if self.device.type == "cuda" else 0
        self.num_scored = self.num_total = 0
        self.started = time.monotonic()
        self.pace = Pace(self.device)

    def num_predictions(self, document: int) -> int:
        """Return how many targets a document has."""
        start, end = self.ranges[document]
        return int(end - start) - 1

    def run_unadapted(self, documents: Sequence[int]) -> None:
        """Score documents with the base weights, windows as in adaptation."""
        self.num_total = sum(self.num_predictions(document) for document in documents)
        groups: dict[tuple[int, int], list[Window]] = defaultdict(list)
        budget = self.config.batch_documents * self.config.window_tokens
        for document in documents:
            for window in unadapted_windows(document, self.num_predictions(document), self.config):
                length = window.end - window.start
                # a window that is scored whole may have any length; the others differ in their last chunk only
                chunk = chunk_length(self.num_predictions(document), self.config)
                step = self.limits.last_step if window.num_scored == length else chunk
                key = (round_up(length, step), round_up(window.num_scored, step))
                groups[key].append(window)
                if len(groups[key]) * key[0] >= budget:
                    self._score(groups.pop(key), None)
        for key in sorted(groups):
            self._score(groups[key], None)

    @property
    def limits(self) -> Limits:
        """How large a batch may be: no larger than what one batch of full windows reads."""
        config = self.config
        tokens = config.batch_documents * config.window_tokens
        learn_step = longest_chunk(config) if config.chunk_by_length else None
        return Limits(rows=config.batch_documents, tokens=tokens, last_step=config.chunk_tokens, learn_step=learn_step)

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt documents, up to slots.num_slots of them at once."""
        self.num_total = sum(self.num_predictions(document) for document in documents)
        if self.learning is None or self.learning.slots is not slots:
            self.learning = self._make_step(documents, slots)
        schedule = Schedule(documents, self.num_predictions, self.config, slots.num_slots, self.limits)
        while (batch := schedule.next_batch(slots.reset)) is not None:
            self._advance(slots, batch)
            schedule.complete(batch)

    def _make_step(self, _documents: Sequence[int], slots: Slots) -> LearningStep:
        """Return what scores and learns from whole chunks in these slots."""
        is_padded = self.limits.learn_step is not None
        return LearningStep(
            self.model, self.validation.tokens, self.config, slots, is_looped=self.is_looped, is_padded=is_padded
        )

    def _advance(self, slots: Slots, batch: Batch) -> None:
        """Score one chunk of each document, then, unless it is the last, learn from it."""
        windows = [task.window for task in batch.tasks]
        if batch.is_last:  # nothing of these documents is left to score, so there is nothing to learn for
            self._score(windows, slots.gather(self._upload(np.array([task.slot for task in batch.tasks]))))
            return
        assert self.learning is not None
        table = self._make_table(self.learning, batch)
        for repeat in range(self.config.updates_per_chunk):
            losses = self.learning.run(table, batch.length)
            if repeat == 0:  # later ones come from adapters that know the chunk
                self._note(windows, losses[: len(windows)])
            self._log_updates(windows, repeat)

    def _make_table(self, learning: LearningStep, batch: Batch) -> Tensor:
        """Return what a learning step reads (B, 4) int64; pinned where a GPU will copy it. Rows too many are spare."""
        table = learning.fill_table(self.limits.pad_rows(len(batch.tasks), batch.length), batch.length)
        for row, (slot, window) in enumerate(batch.tasks):
            end = int(self.ranges[window.document][0]) + window.end
            table[row] = end, slot, window.end - window.start, window.num_scored
        tensor = torch.from_numpy(table)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _score(self, windows: list[Window], adapters: Adapters | None) -> None:
        """Score windows that nothing is learned from."""
        self._note(windows, self.forward(windows, adapters))

    @torch.no_grad()
    def forward(self, windows: list[Window], adapters: Adapters | None) -> Tensor:
        """Return the losses (B, C) of windows of any lengths as one batch, padded on the left.

        C is the most predictions that one of them scores, in whole chunks where those fit; each row's own are its last.
        """
        length = max(window.end - window.start for window in windows)
        if any(window.is_last for window in windows):  # the others' lengths are few
            length = round_up(length, self.config.chunk_tokens)
        columns = min(length, round_up(max(window.num_scored for window in windows), self.config.chunk_tokens))
        # Padding on the left: the predictions that count then lie in the last columns of every row.
        tokens, targets = np.zeros((len(windows), length), np.int64), np.zeros((len(windows), columns), np.int64)
        for row, window in enumerate(windows):
            document = self.validation.tokens[slice(*self.ranges[window.document])]
            tokens[row, length - (window.end - window.start) :] = document[window.start : window.end]
            targets[row, columns - window.num_scored :] = document[window.end - window.num_scored + 1 : window.end + 1]
        padding = np.array([length - (window.end - window.start) for window in windows])
        left_padding = self._upload(padding) if padding.any() else None
        losses: Tensor = self.model(
            self._upload(tokens),
            self._upload(targets),
            is_looped=self.is_looped,
            left_padding=left_padding,
            adapters=adapters,
            num_scored=columns,
            reduction="none",
        )
        return losses

    def _note(self, windows: list[Window], losses: Tensor) -> None:
        """Store the scores; from here on nothing changes them."""
        columns, counts = losses.size(1), np.array([window.num_scored for window in windows])
        is_scored = np.arange(columns) >= columns - counts[:, None]  # (B, C)
        row, column = np.nonzero(is_scored)
        ends = np.array([int(self.ranges[window.document][0]) + window.end for window in windows])
        if is_scored.all():
            scores, sums = losses.flatten(), losses.sum(dim=1, dtype=torch.float64)
        else:
            scores = losses.flatten()[self._upload(row * columns + column)]
            sums = (losses * self._upload(is_scored)).sum(dim=1, dtype=torch.float64)
        self.nll[self._upload(ends[row] - columns + column)] = scores.to(self.nll.dtype)
        self.pace.step()
        self.num_scored += int(counts.sum())
        # in float64, as the ledger stores them: the audit compares them with sums over the stored nll
        self._log(SCORE, windows, sums)
        elapsed = time.monotonic() - self.started
        rate = self.num_scored / elapsed if elapsed > 0 else 0.0
        left = (self.num_total - self.num_scored) / rate if rate > 0 else 0.0
        self.report(self.label, self.num_scored, self.num_total, {"tokens_per_s": rate, "eta_s": left})

    def _log_updates(self, windows: list[Window], repeat: int) -> None:
        """Note that each window's document learned from it, for the repeat-th time."""
        self._log(UPDATE, [w._replace(num_updates=w.num_updates + repeat) for w in windows], None)

    def _log(self, kind: int, windows: list[Window], loss_sums: Tensor | None) -> None:
        """Put events into the ledger: at once on a CPU, later on a GPU, whose sums (B,) are fixed by now."""
        copied = None
        if loss_sums is not None and loss_sums.is_cuda:
            loss_sums, copied = queue_to_host(loss_sums), torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        self.unlogged.append((kind, windows, loss_sums, copied))
        self._catch_up(self.ledger_lag)

    def _catch_up(self, num_left: int = 0) -> None:
        """Append all that is waiting but the newest num_left entries to the ledger, in order."""
        while len(self.unlogged) > num_left:
            kind, windows, sums, copied = self.unlogged.popleft()
            if copied is not None:
                copied.synchronize()
            for window, loss_sum in zip(windows, [0.0] * len(windows) if sums is None else sums.tolist(), strict=True):
                first = window.end - window.num_scored
                self.chain.add(kind, window.document, first, window.end, window.num_updates, loss_sum)

    def close_ledger(self) -> Events:
        """Bring the ledger up to date and return it."""
        self._catch_up()
        return self.chain.events()

    def _upload(self, array: np.ndarray) -> Tensor:
        """Return an array on the device, without waiting for the work before it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor
