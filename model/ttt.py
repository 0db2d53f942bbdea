"""Test-time training: every validation document adapts its own LoRA set while it is scored, chunk by chunk.

A chunk is scored first and only then learned from. Documents share nothing but the frozen base weights, so any number
of them can be computed together: slots hold the documents at work, a finished one's slot is refilled at once, and
windows of equal length run as one batch. Source: parameter-golf PR #1536 (doc-independent LoRA TTT).
"""

# S slots, B windows of a batch, T tokens of a window, C chunk_tokens, N targets

from __future__ import annotations

import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import TTTConfig
from model.data.tokenizer import ByteTable
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.evaluate import DocumentScores, document_sums
from model.gpt import GPT, visit_plan
from model.lora import Adapters, initial_a
from model.score_ledger import SCORE, UPDATE, Events, ScoreChain

logger = logging.getLogger(__name__)
Report = Callable[[str, int, int | None, dict[str, Any]], None]


class Window(NamedTuple):
    """Inputs [start, end) of a document, of whose predictions the last num_scored are scored."""

    document: int
    start: int
    end: int
    num_scored: int
    num_updates: int  # adapter updates made before this score
    is_last: bool


class TTTResult(NamedTuple):
    """Scores per document, the nll (N,) of every target, and this rank's ledger of scores and updates."""

    scores: DocumentScores
    nll: np.ndarray
    events: Events


LEDGER_LAG = 64  # batches of a GPU whose loss sums may wait there, so that the ledger never stalls it


def chunk_window(document: int, num_predictions: int, chunk: int, config: TTTConfig) -> Window:
    """Return the window that scores one chunk of a document with num_predictions predictions."""
    first = chunk * config.chunk_tokens
    end = min(first + config.chunk_tokens, num_predictions)
    return Window(
        document,
        max(0, end - config.window_tokens),
        end,
        end - first,
        chunk * config.updates_per_chunk,
        end == num_predictions,
    )


def unadapted_windows(document: int, num_predictions: int, config: TTTConfig) -> Iterator[Window]:
    """Yield the windows that score a document without adaptation.

    All chunks that end inside the first window_tokens see the document from its start, so one pass scores them all.
    """
    whole_chunks = config.window_tokens // config.chunk_tokens * config.chunk_tokens
    covered = min(num_predictions, whole_chunks)
    if covered:
        yield Window(document, 0, covered, covered, 0, covered == num_predictions)
    for chunk in range(covered // config.chunk_tokens, -(-num_predictions // config.chunk_tokens)):
        if chunk * config.chunk_tokens >= covered:
            yield chunk_window(document, num_predictions, chunk, config)._replace(num_updates=0)


def window_cost(num_predictions: int, config: TTTConfig) -> int:
    """Return the window tokens that a document's chunks read: what adapting it costs."""
    ends = np.minimum(
        np.arange(config.chunk_tokens, num_predictions + config.chunk_tokens, config.chunk_tokens), num_predictions
    )
    return int(np.minimum(ends, config.window_tokens).sum())


def share_documents(validation: ValidationSet, config: TTTConfig, dist: Dist) -> list[int]:
    """Return this rank's documents in working order: each goes to the rank with the least work so far."""
    lengths = np.diff(validation.document_ranges, axis=1)[:, 0] - 1  # predictions
    order = np.arange(lengths.size)
    if config.order == "sorted":
        order = np.argsort(-lengths, kind="stable")
    load = [0] * dist.world_size
    mine = []
    for document in order:
        if lengths[document] < 1:
            continue
        rank = load.index(min(load))
        load[rank] += window_cost(int(lengths[document]), config)
        if rank == dist.rank:
            mine.append(int(document))
    return mine


@dataclass(slots=True)
class Slots:
    """Adapters and their optimizer state for S documents at once; weights float32, or float64 in a float64 model."""

    model: GPT
    config: TTTConfig
    seed: int
    num_slots: int
    initial: Mapping[str, Tensor] | None = None  # A by kind (N, R, D), instead of the drawn one
    is_looped: bool = True
    adapters: Adapters = field(init=False)
    second_moments: Adapters = field(init=False)
    num_updates: Tensor = field(init=False)

    def __post_init__(self) -> None:
        device, dtype = self.model.qo_bank.device, self.dtype
        num_visits = visit_plan(self.model.config, is_looped=self.is_looped).num_visits
        self.adapters, self.second_moments = (
            Adapters.zeros(
                self.model.config,
                num_slots=self.num_slots,
                num_visits=num_visits,
                lora_rank=self.config.lora_rank,
                kinds=self.config.adapter_kinds,
                dtype=dtype,
                device=device,
            )
            for _ in range(2)
        )
        self.num_updates = torch.zeros(self.num_slots, dtype=torch.int64, device=device)
        if self.initial is None and self.config.adapter_key == "seed":
            self.initial = self._draw(None)
        if self.initial is not None:
            self.initial = {kind: value.to(device, dtype) for kind, value in self.initial.items()}

    @property
    def dtype(self) -> torch.dtype:
        """Type of the adapters."""
        return torch.float64 if self.model.compute_dtype == torch.float64 else torch.float32

    def _draw(self, document: int | None) -> dict[str, Tensor]:
        num_visits = visit_plan(self.model.config, is_looped=self.is_looped).num_visits
        return initial_a(
            self.model.config,
            num_visits=num_visits,
            lora_rank=self.config.lora_rank,
            kinds=self.config.adapter_kinds,
            seed=self.seed,
            document=document,
        )

    def reset(self, slot: int, document: int) -> None:
        """Give a slot to a document: A at its start, B and the optimizer state at zero."""
        start = self.initial if self.initial is not None else self._draw(document)
        for kind, value in self.adapters.a.items():
            value[slot].copy_(start[kind])
        for tensor in (*self.adapters.b.values(), *self.second_moments.tensors()):
            tensor[slot].zero_()
        self.num_updates[slot] = 0

    @torch.no_grad()
    def update(self, slots: Tensor, selected: Adapters, gradients: Sequence[Tensor]) -> None:
        """Apply one AdamW step (beta1 0, decoupled decay) to the selected copies and store them in their slots.

        TRAP: A's first gradient is exactly zero, yet its decay and its step count run from the first update.
        """
        config = self.config
        self.num_updates[slots] += 1
        # in float64: 1 - 0.999 in float32 is off by 1e-5 of itself, which shows in the scores
        correction = (1 - config.beta2 ** self.num_updates[slots].double()).to(self.dtype)  # (B,)
        for store, moments, value, gradient in zip(
            self.adapters.tensors(), self.second_moments.tensors(), selected.tensors(), gradients, strict=True
        ):
            moment = moments[slots].mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
            moments[slots] = moment
            root = (moment / correction.view(-1, 1, 1, 1)).sqrt_().add_(config.eps)
            store[slots] = (
                value.detach().mul(1 - config.lr * config.weight_decay).addcdiv_(gradient, root, value=-config.lr)
            )


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
                    key = (self._padded(window.end - window.start), self._padded(window.num_scored))
                    groups[key].append(window)
                    if len(groups[key]) * key[0] >= budget:
                        self._forward(groups.pop(key), None)
            for key in sorted(groups):
                self._forward(groups[key], None)

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt documents, up to slots.num_slots of them at once."""
        self.num_total = sum(self.num_predictions(document) for document in documents)
        waiting = deque(documents)
        chunk_of: dict[int, tuple[int, int]] = {}  # slot -> (document, next chunk)
        free = list(range(slots.num_slots))[::-1]
        while waiting or chunk_of:
            while waiting and free:
                slot, document = free.pop(), waiting.popleft()
                slots.reset(slot, document)
                chunk_of[slot] = (document, 0)
            groups: dict[tuple[int, bool], list[tuple[int, Window]]] = defaultdict(list)
            for slot, (document, chunk) in chunk_of.items():
                window = chunk_window(document, self.num_predictions(document), chunk, self.config)
                groups[self._padded(window.end - window.start), window.is_last].append((slot, window))
            for key in sorted(groups):
                self._advance(slots, groups[key], is_last=key[1])
            for slot, (document, chunk) in list(chunk_of.items()):
                if (chunk + 1) * self.config.chunk_tokens >= self.num_predictions(document):
                    del chunk_of[slot]
                    free.append(slot)
                else:
                    chunk_of[slot] = (document, chunk + 1)

    def _advance(self, slots: Slots, members: list[tuple[int, Window]], *, is_last: bool) -> None:
        """Score one chunk of each member, then, unless it is the document's last, learn from it."""
        index = torch.tensor([slot for slot, _ in members], device=self.device)
        windows = [window for _, window in members]
        for repeat in range(1 if is_last else self.config.updates_per_chunk):
            selected = slots.adapters.select(index)
            with torch.no_grad() if is_last else nullcontext():
                if not is_last:
                    selected.requires_grad_()
                losses = self._forward(windows, selected, is_scored=repeat == 0)  # (B, C)
            if not is_last:
                loss = losses.mean(dim=1).sum()  # every such chunk is whole: C losses each
                slots.update(index, selected, torch.autograd.grad(loss, selected.tensors()))
                self._log(UPDATE, [w._replace(num_updates=w.num_updates + repeat) for w in windows], None)

    def _forward(self, windows: list[Window], adapters: Adapters | None, *, is_scored: bool = True) -> Tensor:
        """Run windows of one padded length as a batch and return the last columns' losses, noting the scores."""
        length = self._padded(max(window.end - window.start for window in windows))
        columns = self._padded(max(window.num_scored for window in windows))
        tokens, targets = np.zeros((len(windows), length), np.int64), np.zeros((len(windows), columns), np.int64)
        for row, window in enumerate(windows):
            document = self.validation.tokens[slice(*self.ranges[window.document])]
            tokens[row, length - (window.end - window.start) :] = document[window.start : window.end]
            targets[row, columns - window.num_scored :] = document[window.end - window.num_scored + 1 : window.end + 1]
        padding = np.array([length - (window.end - window.start) for window in windows])
        left_padding = torch.from_numpy(padding).to(self.device) if padding.any() else None
        losses = self.model(
            torch.from_numpy(tokens).to(self.device),
            torch.from_numpy(targets).to(self.device),
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
        for row, window in enumerate(windows):
            at = int(self.ranges[window.document][0]) + window.end
            self.nll[at - window.num_scored : at] = losses[row, losses.size(1) - window.num_scored :]
            self.num_scored += window.num_scored
        self._log(SCORE, windows, loss_sums(losses, [window.num_scored for window in windows]))
        elapsed = time.monotonic() - self.started
        rate = self.num_scored / elapsed if elapsed > 0 else 0.0
        left = (self.num_total - self.num_scored) / rate if rate > 0 else 0.0
        self.report(self.label, self.num_scored, self.num_total, {"tokens_per_s": rate, "eta_s": left})

    def _log(self, kind: int, windows: list[Window], loss_sums: Tensor | None) -> None:
        """Put events into the ledger: at once on a CPU, a little later on a GPU, where the sums are fixed by now."""
        self.unlogged.append((kind, windows, loss_sums))
        if self.device.type == "cpu" or len(self.unlogged) >= 2 * LEDGER_LAG:
            self.close_ledger()

    def close_ledger(self) -> Events:
        """Bring the ledger up to date and return it."""
        waiting = [sums for _, _, sums in self.unlogged if sums is not None]
        values = iter(torch.cat(waiting).tolist() if waiting else [])
        for kind, windows, sums in self.unlogged:
            for window in windows:
                first = window.end - window.num_scored
                loss_sum = 0.0 if sums is None else next(values)
                self.chain.add(kind, window.document, first, window.end, window.num_updates, loss_sum)
        self.unlogged.clear()
        return self.chain.events()

    def _padded(self, length: int) -> int:
        """Return length rounded up to whole chunks."""
        return -(-length // self.config.chunk_tokens) * self.config.chunk_tokens


def loss_sums(losses: Tensor, num_scored: Sequence[int]) -> Tensor:
    """Return the sum (B,) float64 of the last num_scored losses of each row of losses (B, C)."""
    columns = losses.size(1)
    if all(count == columns for count in num_scored):
        return losses.sum(dim=1, dtype=torch.float64)
    is_counted = torch.arange(columns) >= columns - torch.tensor(num_scored).unsqueeze(1)  # (B, C)
    return (losses * is_counted.to(losses.device)).sum(dim=1, dtype=torch.float64)


def score_documents(
    model: GPT,
    validation: ValidationSet,
    table: ByteTable,
    config: TTTConfig,
    dist: Dist,
    report: Report,
    *,
    seed: int,
    is_adapting: bool = True,
    is_looped: bool = True,
    initial: Mapping[str, Tensor] | None = None,
) -> TTTResult:
    """Score every target of the stream, each document on its own, adapting as it goes unless is_adapting is False.

    Without adaptation this is the learning-rate-0 figure: the same windows, the base weights. The base weights are
    frozen either way. Scores do not depend on order, batch or number of ranks beyond float rounding.
    initial: A by kind (N, R, D) in place of the one drawn from seed.
    """
    model.requires_grad_(False)
    started = time.monotonic()
    documents = share_documents(validation, config, dist)
    if not documents:
        logger.warning("rank=%d has no document: %d for %d ranks", dist.rank, validation.num_documents, dist.world_size)
    label = "ttt" if is_adapting else "ttt_lr0"
    work = Adapter(model, validation, config, report, label=label, is_looped=is_looped, rank=dist.rank)
    if is_adapting:
        num_slots = max(1, min(config.batch_documents, len(documents)))
        work.run_adapted(documents, Slots(model, config, seed, num_slots, initial, is_looped))
    else:
        work.run_unadapted(documents)
    nll = dist.all_reduce_(work.nll).cpu().numpy()
    scores = document_sums(
        validation, table, nll, num_scored=validation.num_targets, seconds=time.monotonic() - started
    )
    return TTTResult(scores, nll, work.close_ledger())
