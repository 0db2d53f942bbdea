"""Plain evaluation: the whole validation stream in packed rows, scored once without adaptation."""

# N targets, D documents, T tokens of a row

from __future__ import annotations

import contextlib
import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from model.banks import LayerWeights, layer_weights
from model.config import EvalConfig
from model.data.loader import Batch, inputs_and_targets, prefetch_batches
from model.data.packing import Packing, pack_row
from model.data.tokenizer import ByteTable
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT, fits_row_graphs
from model.kernels.graphs import Recorder
from model.kernels.pace import Pace
from model.report import Report
from model.score.bpb import DocumentScores, add_nats, document_bytes

ROW_ENTRIES = 128  # segment bounds of a row are padded to multiples of this: few sizes, each recorded once


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
        self.weights: list[LayerWeights] | None = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights as they are now, for the rows from here on; recordings read them where they stay."""
        weights = layer_weights(self.model)
        if self.weights is None or not self.recorded:
            self.weights = weights
            return
        for kept, new in zip(itertools.chain(*self.weights), itertools.chain(*weights), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)

    @torch.no_grad()
    def score(self, row: Batch, device: torch.device) -> Tensor:
        """Return the nll (T,) float32 of a row's targets, valid until the next call."""
        longest = row.packing.max_seqlen
        key = (row.inputs.size(1), row.packing.cu_seqlens.numel(), longest)

        def forward(inputs: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Tensor:
            packing = Packing(cu_seqlens, longest)
            nll = self.model(
                inputs, targets, is_looped=self.is_looped, packing=packing, reduction="none", weights=self.weights
            )
            return nll.squeeze(0)

        tensors = (row.inputs, row.targets, row.packing.cu_seqlens)
        # the first row of a size runs as it is: kernels must be compiled and loaded before they can be recorded
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
    scorer: RowScorer | None = None,
) -> np.ndarray:
    """Return the nll (N,) float32 of every target, NaN where the tail is dropped; rows are shared over the ranks.

    A document that crosses a row's edge starts afresh there; one longer than seq_len is cut every seq_len tokens
    from its own start. scorer: one of this model and loop state, to use again what it has recorded.
    """
    scorer = scorer if scorer is not None else RowScorer(model, is_looped=is_looped)
    assert scorer.model is model, "the scorer is another model's"
    assert scorer.is_looped == is_looped, scorer.is_looped
    scorer.refresh()
    bounds = row_bounds(validation.num_targets, config)
    # zeros where other ranks score: the sum over ranks then puts the stream together
    nll = torch.zeros(validation.num_targets, dtype=torch.float32, device=dist.device)

    def make_row(number: int) -> Batch:
        start, end = bounds[number]
        inputs, targets = inputs_and_targets(validation.tokens[start : end + 1])
        packing = pack_row(inputs, max_segment=config.seq_len, max_seqlen=config.seq_len, bucket=ROW_ENTRIES)
        return Batch(inputs, targets, packing)

    mine, pace = range(dist.rank, len(bounds), dist.world_size), Pace(dist.device)
    rows = prefetch_batches(make_row, mine, pin_memory=dist.device.type == "cuda")
    with contextlib.closing(rows):
        for number, row in zip(mine, rows, strict=True):
            nll[slice(*bounds[number])] = scorer.score(row, dist.device)
            pace.step()
            report("evaluate", number + 1, len(bounds), {})
    dist.meet()
    scored = dist.all_reduce_(nll).cpu().numpy()
    # NaN, so that a target nobody scored cannot pass for one of loss 0
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
        nll = score_rows(model, validation, config, dist, report, scorer=scorer)
        seconds = time.monotonic() - started
        return add_nats(counting.result(), validation, nll, num_scored=num_scored, seconds=seconds)
