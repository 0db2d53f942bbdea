"""The test-time training stage: every document scored on its own, without and with adaptation."""

from __future__ import annotations

from typing import Any

import numpy as np

from model.distributed import Dist
from model.files.ledger import Ledger
from model.pipeline.inputs import (
    ADAPTED,
    SCORE_LOG,
    SET_UP_S,
    Outcome,
    attention_backend_name,
    document_arrays,
    load_model,
    load_quantized,
    open_validation,
)
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.run import Run
from model.ttt.documents import score_documents
from model.ttt.ledger_reading import times_scored
from model.ttt.score_ledger import Events


def run_ttt(run: Run, ledger: Ledger) -> Outcome:
    """Score every document on its own, first with the base weights, then adapting as it goes."""
    config, dist = run.config, run.dist
    with ledger.span("load"), run.long_call():
        tokenizer, validation = open_validation(run, ledger)
        model = load_model(run, load_quantized(run, ledger))
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger, "ttt")
    results = {}
    for prefix in ("ttt_lr0", "post_ttt"):
        with ledger.span(prefix), run.long_call(SET_UP_S):
            results[prefix] = score_documents(
                model,
                validation,
                tokenizer.byte_table,
                config.ttt,
                dist,
                run.report,
                seed=config.seed,
                is_adapting=prefix == "post_ttt",
            )
        run.report("ttt", 0, None, {f"{prefix}_bpb": results[prefix].scores.bpb})
    plain, adapted = results["ttt_lr0"], results["post_ttt"]
    metrics: dict[str, Any] = plain.scores.metrics("ttt_lr0") | adapted.scores.metrics("post_ttt")
    metrics["ttt_s"] = sum(ledger.seconds(name) for name in ("load", "warm_up", "ttt_lr0", "post_ttt"))
    metrics["ttt_attention_backend"] = attention_backend_name(run, model)
    with run.long_call():
        events = gather_events(adapted.events, dist)
        if dist.is_main:
            counts = times_scored(events, validation.document_starts, validation.num_targets)
            metrics |= {
                "score_chain": events.chain,
                "num_targets": validation.num_targets,
                "targets_scored_once": int((counts == 1).sum()),
            }
            run.write(ADAPTED, document_arrays(plain.scores, nats_lr0=plain.scores.nats, nats_ttt=adapted.scores.nats))
            run.write(SCORE_LOG, {**events.arrays(), "nll": adapted.nll.astype(np.float32)})
    return metrics, [ADAPTED, SCORE_LOG]


def gather_events(events: Events, dist: Dist) -> Events:
    """Return the ledgers of all ranks, joined in rank order."""
    heads = dist.gather_rows(np.ascontiguousarray(events.heads).view(np.int64))
    loss_sum = dist.gather_rows(events.loss_sum.view(np.int64)[:, None])[:, 0]
    return Events(dist.gather_rows(events.rows), loss_sum.view(np.float64), heads.view(np.uint8))
