"""The training stage: from initial weights, or the newest checkpoint, to live and averaged weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from model.attention.probe import Choice
from model.config import ATTENTION_BACKENDS
from model.files.atomic import replace_file
from model.files.checkpoint import CheckpointStore
from model.files.ledger import Ledger
from model.files.tensors import save_tensors
from model.gpt import GPT, build_model
from model.pipeline.attempts import note_attention
from model.pipeline.inputs import STEPS, WEIGHTS, Outcome, attention_backend_name, open_training
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.run import Run
from model.pipeline.warm_up import choose_attention, warm_up
from model.report import Report
from model.train.resumable import NOTHING_REACHED, Reached, ResumableTrainer

PROGRESS = "train_progress.json"


def run_train(run: Run, ledger: Ledger) -> Outcome:
    """Train from the seed's initial weights, or from the newest checkpoint."""
    config = run.config
    with ledger.span("load"), run.long_call():
        loader = open_training(run, ledger)
        model = build_model(
            config.model,
            run.dist.device,
            embedding_dtype=config.train.embedding_dtype,
            attention=config.runtime.attention,
        )
        model.init_weights(config.seed)
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger)
        choice = settle_attention(run, model)
        warm_up(model, config, run.report)
    store = CheckpointStore(run.checkpoints, run.on_write) if run.uses_checkpoints else None
    trainer = ResumableTrainer(
        model,
        loader,
        config.train,
        run.dist,
        remember_progress(run),
        # "auto" goes on with the checkpoint's kernel, unless the change of kernels was allowed
        runtime=replace(config.runtime, attention=model.attention_backend) if run.is_changed else config.runtime,
        checkpoints=store,
        ledger=ledger,
        reached=read_progress(run),
        should_stop=run.should_stop,
        long_call=run.long_call,
        bring=lambda files: run.bring({path.relative_to(run.workdir).as_posix(): files[path] for path in files}),
    )
    with ledger.span("steps"):
        result = trainer.run()
    if run.dist.is_main:
        live = {f"live/{name}": p.detach() for name, p in model.named_parameters()}
        with run.long_call():
            ema = {f"ema/{name}": value for name, value in result.ema.items()}
            run.written[WEIGHTS] = save_tensors(run.workdir / WEIGHTS, live | ema)
            run.write(STEPS, result.steps)
    result.metrics["warmup_s"] = ledger.seconds("warm_up")
    result.metrics["num_params"] = sum(p.numel() for p in model.parameters())
    result.metrics["attention_backend"] = attention_backend_name(run, model)
    if choice is not None:
        result.metrics["attention_probe"] = choice._asdict()
    return result.metrics, [WEIGHTS, STEPS]


def settle_attention(run: Run, model: GPT) -> Choice | None:
    """Let model attend with the kernel of an earlier attempt, else the one configured or timed; note it in run.json.

    Returns how it was timed, None where it was not.
    """
    known = ATTENTION_BACKENDS.index(run.attention) if run.attention is not None else -1
    known = int(run.dist.broadcast_floats([float(known)])[0])
    choice = choose_attention(run.config, run.dist) if known < 0 else None
    if known >= 0:
        model.attention_backend = ATTENTION_BACKENDS[known]
    elif choice is not None:
        model.attention_backend = choice.name
    if run.dist.is_main:
        note_attention(run, attention_backend_name(run, model))
    return choice


def remember_progress(run: Run) -> Report:
    """Return run.report, which also notes the step reached, so that a later attempt knows what a fault cost."""

    def report(phase: str, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        if run.dist.is_main:
            note = {"step": step, "lost_steps": metrics["lost_steps"]}
            with replace_file(run.workdir / PROGRESS, is_synced=False) as file:
                file.write(json.dumps(note).encode())
        run.report(phase, step, total, metrics)

    return report


def read_progress(run: Run) -> Reached:
    """Return how far an earlier attempt said that it came."""
    try:
        note = json.loads((run.workdir / PROGRESS).read_text())
        return Reached(int(note["step"]), int(note["lost_steps"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a torn progress note only loses a statistic
        return NOTHING_REACHED
