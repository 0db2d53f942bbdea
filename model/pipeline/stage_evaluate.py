"""The evaluation stage: live, averaged and quantized weights on the same rows of the validation stream."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from model.data.tokenizer import ByteTable, target_bytes
from model.data.validation import ValidationSet
from model.files.ledger import Ledger
from model.pipeline.inputs import (
    EVALUATED,
    SET_UP_S,
    TRAIN_COUNTS,
    Outcome,
    attention_backend_name,
    document_arrays,
    load_model,
    load_quantized,
    load_weights,
    open_validation,
)
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.run import Run
from model.score.bpb import DocumentScores, bits_per_byte
from model.score.identity import describe_validation
from model.score.plain import RowScorer, evaluate_plain


def run_evaluate(run: Run, ledger: Ledger) -> Outcome:
    """Score live, averaged and quantized weights on the same rows of the validation stream."""
    config, dist = run.config, run.dist
    with ledger.span("load"), run.long_call():
        tokenizer, validation = open_validation(run, ledger)
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger, "evaluate")
    metrics: dict[str, Any] = {}
    scores: DocumentScores | None = None
    scorer: RowScorer | None = None  # one for all three: what it records reads the weights where they are
    for prefix in ("live", "post_ema", "pre_ttt"):
        with ledger.span("load"), run.long_call():
            if prefix == "pre_ttt":
                weights = load_quantized(run, ledger)
            else:
                weights = load_weights(run, ledger, "live" if prefix == "live" else "ema")
            if scorer is None:
                scorer = RowScorer(load_model(run, weights))
            else:
                scorer.model.load_state_dict(weights)
        with ledger.span(prefix), run.long_call(SET_UP_S):
            scores = evaluate_plain(
                scorer.model, validation, tokenizer.byte_table, config.evaluation, dist, run.report, scorer=scorer
            )
        metrics |= scores.metrics(prefix)
        run.report("evaluate", 0, None, {f"{prefix}_bpb": scores.bpb})
    assert scores is not None
    assert scorer is not None
    metrics["evaluate_attention_backend"] = attention_backend_name(run, scorer.model)
    metrics["evaluate_s"] = sum(ledger.seconds(name) for name in ("load", "warm_up", "live", "post_ema", "pre_ttt"))
    with ledger.span("identify"), run.long_call():
        metrics |= describe_validation(tokenizer, validation, dist)
        if dist.is_main:
            metrics["order0_bpb"] = order0_bpb(read_counts(run, ledger), validation, tokenizer.byte_table)
    if dist.is_main:
        run.write(EVALUATED, document_arrays(scores, nats_plain=scores.nats))
    return metrics, [EVALUATED]


def read_counts(run: Run, ledger: Ledger) -> np.ndarray:
    """Return how often each token occurs in the training shards, (V,) int64, as counted when they were hashed."""
    ledger.opened(run.workdir / TRAIN_COUNTS)
    with np.load(run.workdir / TRAIN_COUNTS, allow_pickle=False) as arrays:
        return arrays["count"]


def order0_bpb(counts: np.ndarray, validation: ValidationSet, table: ByteTable) -> float:
    """Return the bits per byte of the validation targets under the token frequencies counts (V,) of the training part.

    Every token gets one count more than it has, so that an unseen one is possible.
    """
    log_probs = np.log(counts + 1.0) - math.log(float((counts + 1.0).sum()))
    nats = -float(log_probs[validation.tokens[1:]].sum())
    return bits_per_byte(nats, int(target_bytes(table, validation.tokens).sum(dtype=np.int64)))
