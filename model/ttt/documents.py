"""Test-time training: every validation document adapts its own LoRA set while it is scored, chunk by chunk.

A chunk is scored first and only then learned from. Documents share nothing but the frozen base weights, so any number
of them can be computed together: slots hold the documents at work, a finished one's slot is refilled at once, and
windows of equal length run as one batch. Source: parameter-golf PR #1536 (doc-independent LoRA TTT).
"""

# N targets, R lora_rank, D model_dim

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from model.banks import visit_plan
from model.config import TTTConfig
from model.data.tokenizer import ByteTable
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT, fits_graphs
from model.lora import num_adapter_parameters
from model.report import Report
from model.score.bpb import DocumentScores, document_sums
from model.ttt.document_pass import DocumentPass
from model.ttt.recorded_pass import RecordedPass, memory_rows
from model.ttt.score_ledger import Events
from model.ttt.slots import Slots
from model.ttt.windows import share_documents

logger = logging.getLogger(__name__)


class TTTResult(NamedTuple):
    """Scores per document, the nll (N,) of every target, and this rank's ledger of scores and updates."""

    scores: DocumentScores
    nll: np.ndarray
    events: Events


def make_slots(
    model: GPT,
    config: TTTConfig,
    documents: Sequence[int],
    *,
    seed: int,
    initial: Mapping[str, Tensor] | None = None,
    is_looped: bool = True,
) -> Slots:
    """Return slots for these documents: batch_documents of them, on a GPU as many as its memory holds."""
    if not fits_graphs(model):
        # more would cost memory and gain no speed: a CPU is busy with few rows already
        num_slots = max(1, min(config.batch_documents, len(documents)))
        return Slots(model, config, seed, num_slots, initial, is_looped)
    num_parameters = num_adapter_parameters(
        model.config,
        num_visits=visit_plan(model.config, is_looped=is_looped).num_visits,
        lora_rank=config.lora_rank,
        kinds=config.adapter_kinds,
    )
    num_slots = memory_rows(model, config, len(documents), num_parameters)
    return Slots(model, config, seed, num_slots, initial, is_looped, num_spare=1)


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
    model.requires_grad_(False)  # no gradient of a base weight is computed, let alone applied
    started = time.monotonic()
    documents = share_documents(validation, config, dist)
    if not documents:
        logger.warning("rank=%d has no document: %d for %d ranks", dist.rank, validation.num_documents, dist.world_size)
    label = "ttt" if is_adapting else "ttt_lr0"
    pass_type = RecordedPass if fits_graphs(model) else DocumentPass
    work = pass_type(model, validation, config, report, label=label, is_looped=is_looped, rank=dist.rank)
    # Slots are made inside the stage's time: filling memory with adapters is part of what adaptation costs.
    if is_adapting:
        slots = make_slots(model, config, documents, seed=seed, initial=initial, is_looped=is_looped)
        work.run_adapted(documents, slots)
    else:
        work.run_unadapted(documents)
    dist.meet()  # ranks finish minutes apart on long documents; waiting here is told from hanging
    # every target is some rank's and 0 elsewhere, so the sum is the stream's nll
    nll = dist.all_reduce_(work.nll).cpu().numpy()
    scores = document_sums(
        validation, table, nll, num_scored=validation.num_targets, seconds=time.monotonic() - started
    )
    return TTTResult(scores, nll, work.close_ledger())
