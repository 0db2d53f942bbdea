"""Plain evaluation, bytes by document (of the tokenizer's table) and nats to bits per byte, which live here only."""

# N targets, D documents, T tokens of a row

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import EvalConfig
from model.data.loader import Batch, inputs_and_targets, prefetch_batches
from model.data.packing import Packing, pack_row
from model.data.shards import BOS_ID
from model.data.tokenizer import ByteTable, target_bytes
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT
from model.graphs import Recorder, fits_row_graphs
from model.pace import Pace

ROW_ENTRIES = 128  # segment bounds of a row are padded to multiples of this: few sizes, each recorded once
Report = Callable[[str, int, int | None, dict[str, Any]], None]


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return nats summed over some targets as bits per byte of those targets' text."""
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need at least one byte of text, got {num_bytes}")
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """Sums per validation document: targets and bytes int64, nats float64, each (D,); and the seconds they took."""

    tokens: np.ndarray
    bytes: np.ndarray
    nats: np.ndarray
    seconds: float

    @property
    def bpb(self) -> float:
        """Bits per byte over all documents."""
        return bits_per_byte(float(self.nats.sum()), int(self.bytes.sum()))

    def metrics(self, prefix: str) -> dict[str, float | int]:
        """Return the totals as flat metrics prefix_nats, _tokens, _bytes, _bpb and _s."""
        return {
            f"{prefix}_nats": float(self.nats.sum()),
            f"{prefix}_tokens": int(self.tokens.sum()),
            f"{prefix}_bytes": int(self.bytes.sum()),
            f"{prefix}_bpb": self.bpb,
            f"{prefix}_s": self.seconds,
        }


def document_bounds(validation: ValidationSet, num_scored: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first target of each document and one past its last, (D,) int64 each, of the first num_scored targets.

    A target belongs to the document of its input.
    """
    ranges = validation.document_ranges  # (D, 2)
    return np.minimum(ranges[:, 0], num_scored), np.minimum(ranges[:, 1] - 1, num_scored)


def document_bytes(validation: ValidationSet, table: ByteTable, *, num_scored: int) -> np.ndarray:
    """Return the bytes (D,) int64 of each document's targets among the first num_scored."""
    starts, ends = document_bounds(validation, num_scored)
    total = np.concatenate(([0], np.cumsum(target_bytes(table, validation.tokens)[:num_scored], dtype=np.int64)))
    return np.subtract(total[ends], total[starts])


def document_sums(
    validation: ValidationSet, table: ByteTable, nll: np.ndarray, *, num_scored: int, seconds: float
) -> DocumentScores:
    """Return targets, bytes and nats by document of per-target nll (N,); only the first num_scored targets count."""
    num_bytes = document_bytes(validation, table, num_scored=num_scored)
    return sums_beside(num_bytes, validation, nll, num_scored=num_scored, seconds=seconds)


def sums_beside(
    num_bytes: np.ndarray, validation: ValidationSet, nll: np.ndarray, *, num_scored: int, seconds: float
) -> DocumentScores:
    """Return what document_sums returns, from the document_bytes (D,).

    Nats are summed in stream order, so that they do not depend on how the targets were spread over rows or ranks.
    """
    starts, ends = document_bounds(validation, num_scored)
    nats = np.array([nll[a:b].sum(dtype=np.float64) for a, b in zip(starts, ends)])
    return DocumentScores(ends - starts, num_bytes, nats, seconds)


def row_bounds(num_targets: int, config: EvalConfig) -> list[tuple[int, int]]:
    """Return (first input, one past the last) of every packed row; tail "dropped" leaves out an incomplete last row."""
    bounds = [(a, min(a + config.row_tokens, num_targets)) for a in range(0, num_targets, config.row_tokens)]
    return [(a, b) for a, b in bounds if config.tail == "scored" or b - a == config.row_tokens]


class RowScorer:
    """The forward pass over packed rows; on CUDA the second row of a size is recorded as a graph, later ones replay it.

    A scorer may serve several passes as long as the model's weights stay in the same memory.
    """

    def __init__(self, model: GPT, *, is_looped: bool = True, recorder: Recorder | None = None) -> None:
        self.model, self.is_looped = model, is_looped
        self.seen: set[tuple[int, int, int]] = set()
        self.is_recording = recorder is not None  # else where the device can
        self.recorder = recorder if recorder is not None else Recorder()
        self.recorded = self.recorder.recorded

    @torch.no_grad()
    def score(self, row: Batch, device: torch.device) -> Tensor:
        """Return the nll (T,) float32 of a row's targets, valid until the next call."""
        longest = row.packing.max_seqlen
        key = (row.inputs.size(1), row.packing.cu_seqlens.numel(), longest)

        def forward(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
            packing = Packing(cu_seqlens, longest)
            nll = self.model(inputs, targets, is_looped=self.is_looped, packing=packing, reduction="none")
            return nll.squeeze(0)

        tensors = (row.inputs, row.targets, row.packing.cu_seqlens)
        if key in self.seen and (self.is_recording or (device.type == "cuda" and fits_row_graphs(self.model))):
            return self.recorder.run(key, forward, *tensors, device=device)
        self.seen.add(key)
        return forward(*(x.to(device, non_blocking=True) for x in tensors))


def score_rows(
    model: GPT,
    validation: ValidationSet,
    config: EvalConfig,
    dist: Dist,
    report: Report,
    *,
    is_looped: bool = True,
    bos_id: int = BOS_ID,
    label: str = "evaluate",
    scorer: RowScorer | None = None,
) -> np.ndarray:
    """Return the nll (N,) float32 of every target, NaN where the tail is dropped; rows are shared over the ranks.

    A document that crosses a row's edge starts afresh there; one longer than seq_len is cut every seq_len tokens
    from its own start. scorer: one of this model and loop state, to use again what it has recorded.
    """
    scorer = scorer if scorer is not None else RowScorer(model, is_looped=is_looped)
    assert scorer.model is model, "the scorer is another model's"
    assert scorer.is_looped == is_looped, scorer.is_looped
    bounds = row_bounds(validation.num_targets, config)
    nll = torch.zeros(validation.num_targets, dtype=torch.float32, device=dist.device)

    def make_row(number: int) -> Batch:
        start, end = bounds[number]
        inputs, targets = inputs_and_targets(validation.tokens[start : end + 1])
        packing = pack_row(
            inputs, bos_id=bos_id, max_segment=config.seq_len, max_seqlen=config.seq_len, bucket=ROW_ENTRIES
        )
        return Batch(inputs, targets, packing)

    mine, pace = range(dist.rank, len(bounds), dist.world_size), Pace(dist.device)
    rows = prefetch_batches(make_row, mine, pin_memory=dist.device.type == "cuda")
    with contextlib.closing(rows):
        for number, row in zip(mine, rows, strict=True):
            nll[slice(*bounds[number])] = scorer.score(row, dist.device)
            pace.step()
            report(label, number + 1, len(bounds), {})
    dist.meet()
    scored = dist.all_reduce_(nll).cpu().numpy()
    if not bounds or bounds[-1][1] < validation.num_targets:
        scored[bounds[-1][1] if bounds else 0 :] = np.nan
    return scored


def evaluate_plain(
    model: GPT,
    validation: ValidationSet,
    table: ByteTable,
    config: EvalConfig,
    dist: Dist,
    report: Report,
    *,
    is_looped: bool = True,
    label: str = "evaluate",
    scorer: RowScorer | None = None,
) -> DocumentScores:
    """Score the validation stream once and return the sums per document."""
    bounds = row_bounds(validation.num_targets, config)
    if not bounds:
        raise ValueError(
            f"evaluation.tail='dropped' scores nothing: {validation.num_targets} targets are fewer than one row of "
            f"evaluation.row_tokens={config.row_tokens}"
        )
    num_scored = bounds[-1][1]
    with ThreadPoolExecutor(max_workers=1) as pool:  # bytes are counted while the device scores
        counting = pool.submit(document_bytes, validation, table, num_scored=num_scored)
        started = time.monotonic()
        nll = score_rows(model, validation, config, dist, report, is_looped=is_looped, label=label, scorer=scorer)
        seconds = time.monotonic() - started
        return sums_beside(counting.result(), validation, nll, num_scored=num_scored, seconds=seconds)


def order0_bpb(counts: np.ndarray, validation: ValidationSet, table: ByteTable) -> float:
    """Return the bits per byte of the validation targets under the token frequencies counts (V,) of the training part.

    Every token gets one count more than it has, so that an unseen one is possible.
    """
    log_probs = np.log(counts + 1.0) - math.log(float((counts + 1.0).sum()))
    nats = -float(log_probs[validation.tokens[1:]].sum())
    return bits_per_byte(nats, int(target_bytes(table, validation.tokens).sum(dtype=np.int64)))
