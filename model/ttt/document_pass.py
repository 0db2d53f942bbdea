"""One pass over documents: batches of windows scored and, when adapting, learned from; scores and ledger kept."""

# B windows of a batch, T tokens of a window, C chunk_tokens, N targets

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from model.config import TTTConfig
from model.data.validation import ValidationSet
from model.gpt import GPT
from model.kernels.pace import Pace
from model.lora import Adapters
from model.report import Report
from model.ttt.batches import Batch, Limits, Schedule
from model.ttt.score_ledger import SCORE, UPDATE, Events, ScoreChain
from model.ttt.slots import Slots
from model.ttt.windows import Window, unadapted_windows

LEDGER_LAG = 64  # batches of a GPU whose loss sums may wait there, so that the ledger never stalls it


class Adapter:
    """Scores a list of documents with or without adaptation; one instance a pass."""

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
        self.unlogged: list[tuple[int, list[Window], Tensor | None]] = []  # kind, windows, loss sums (B,)
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
        with torch.no_grad():
            for document in documents:
                for window in unadapted_windows(document, self.num_predictions(document), self.config):
                    length = window.end - window.start
                    step = self.limits.last_step if window.num_scored == length else self.config.chunk_tokens
                    key = (rounded_up(length, step), rounded_up(window.num_scored, step))
                    groups[key].append(window)
                    if len(groups[key]) * key[0] >= budget:
                        self._forward(groups.pop(key), None)
            for key in sorted(groups):
                self._forward(groups[key], None)

    @property
    def limits(self) -> Limits:
        """How large a batch may be: no larger than what one batch of full windows reads."""
        config = self.config
        tokens = config.batch_documents * config.window_tokens
        return Limits(rows=config.batch_documents, tokens=tokens, last_step=config.chunk_tokens)

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt documents, up to slots.num_slots of them at once."""
        self.num_total = sum(self.num_predictions(document) for document in documents)
        schedule = Schedule(documents, self.num_predictions, self.config, slots.num_slots, self.limits)
        while (batch := schedule.next_batch(slots.reset)) is not None:
            self._advance(slots, batch)
            schedule.complete(batch)

    def _advance(self, slots: Slots, batch: Batch) -> None:
        """Score one chunk of each document, then, unless it is the last, learn from it."""
        index = torch.tensor([task.slot for task in batch.tasks], device=self.device)
        windows = [task.window for task in batch.tasks]
        for repeat in range(1 if batch.is_last else self.config.updates_per_chunk):
            selected = slots.adapters.select(index)
            with torch.no_grad() if batch.is_last else nullcontext():
                if not batch.is_last:
                    selected.requires_grad_()
                losses = self._forward(windows, selected, is_scored=repeat == 0)  # (B, C)
            if not batch.is_last:
                loss = losses.mean(dim=1).sum()  # every such chunk is whole: C losses each
                slots.update(index, selected, torch.autograd.grad(loss, selected.tensors()))
                self._log_updates(windows, repeat)

    def _forward(self, windows: list[Window], adapters: Adapters | None, *, is_scored: bool = True) -> Tensor:
        """Run windows as a batch, padded on the left, and return the last columns' losses, noting the scores."""
        length = max(window.end - window.start for window in windows)
        if any(window.is_last for window in windows):  # the others' lengths are few
            length = rounded_up(length, self.config.chunk_tokens)
        columns = rounded_up(max(window.num_scored for window in windows), self.config.chunk_tokens)
        tokens, targets = np.zeros((len(windows), length), np.int64), np.zeros((len(windows), columns), np.int64)
        for row, window in enumerate(windows):
            document = self.validation.tokens[slice(*self.ranges[window.document])]
            tokens[row, length - (window.end - window.start) :] = document[window.start : window.end]
            targets[row, columns - window.num_scored :] = document[window.end - window.num_scored + 1 : window.end + 1]
        padding = np.array([length - (window.end - window.start) for window in windows])
        left_padding = self._upload(padding) if padding.any() else None
        losses = self.model(
            self._upload(tokens),
            self._upload(targets),
            is_looped=self.is_looped,
            left_padding=left_padding,
            adapters=adapters,
            num_scored=columns,
            reduction="none",
        )
        if is_scored:
            self._note(windows, losses.detach())
        return losses

    def _note(self, windows: list[Window], losses: Tensor) -> None:
        """Store the scores; from here on nothing changes them."""
        columns = losses.size(1)
        ends = [int(self.ranges[window.document][0]) + window.end for window in windows]
        if all(window.num_scored == columns for window in windows):
            self.nll[self._upload(np.add.outer(ends, np.arange(-columns, 0)))] = losses.to(self.nll.dtype)
        else:
            for row, (end, window) in enumerate(zip(ends, windows, strict=True)):
                self.nll[end - window.num_scored : end] = losses[row, columns - window.num_scored :]
        self.pace.step()
        self.num_scored += sum(window.num_scored for window in windows)
        self._log(SCORE, windows, loss_sums(losses, [window.num_scored for window in windows]))
        elapsed = time.monotonic() - self.started
        rate = self.num_scored / elapsed if elapsed > 0 else 0.0
        left = (self.num_total - self.num_scored) / rate if rate > 0 else 0.0
        self.report(self.label, self.num_scored, self.num_total, {"tokens_per_s": rate, "eta_s": left})

    def _log_updates(self, windows: list[Window], repeat: int) -> None:
        """Note that each window's document learned from it, for the repeat-th time."""
        self._log(UPDATE, [w._replace(num_updates=w.num_updates + repeat) for w in windows], None)

    def _log(self, kind: int, windows: list[Window], loss_sums: Tensor | None) -> None:
        """Put events into the ledger: at once on a CPU, a little later on a GPU, where the sums are fixed by now."""
        self.unlogged.append((kind, windows, loss_sums))
        if self.device.type == "cpu" or len(self.unlogged) >= 2 * LEDGER_LAG:
            self._catch_up()

    def _catch_up(self) -> None:
        """Append what is waiting to the ledger."""
        waiting = [sums for _, _, sums in self.unlogged if sums is not None]
        values = iter(torch.cat(waiting).tolist() if waiting else [])
        for kind, windows, sums in self.unlogged:
            for window in windows:
                first = window.end - window.num_scored
                loss_sum = 0.0 if sums is None else next(values)
                self.chain.add(kind, window.document, first, window.end, window.num_updates, loss_sum)
        self.unlogged.clear()

    def close_ledger(self) -> Events:
        """Bring the ledger up to date and return it."""
        self._catch_up()
        return self.chain.events()

    def _upload(self, array: np.ndarray) -> Tensor:
        """Return an array on the device, without waiting for the work before it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor


def rounded_up(length: int, step: int) -> int:
    """Return the smallest multiple of step that is not below length."""
    return -(-length // step) * step


def loss_sums(losses: Tensor, num_scored: Sequence[int]) -> Tensor:
    """Return the sum (B,) float64 of the last num_scored losses of each row of losses (B, C)."""
    columns = losses.size(1)
    if all(count == columns for count in num_scored):
        return losses.sum(dim=1, dtype=torch.float64)
    is_counted = torch.arange(columns) >= columns - torch.tensor(num_scored).unsqueeze(1)  # (B, C)
    return (losses * is_counted.to(losses.device)).sum(dim=1, dtype=torch.float64)
