"""Training speed with and without loops, and the way from a new process to its first optimizer step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from jobs.bench.figures import Probe
from jobs.bench.inputs import Workplace, build_bench_model, note_compilation, open_workplace, synchronize
from model.banks import visit_plan
from model.data.loader import SpanLoader
from model.files.ledger import Ledger
from model.gpt import GPT, build_model
from model.pipeline.compile_clock import COMPILE
from model.pipeline.inputs import attention_backend_name, open_training
from model.pipeline.memory import peak_memory_bytes
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.warm_up import choose_attention, warm_up
from model.train.trainer import Trainer, TrainResult

WARM_MICRO_STEPS = {"cuda": 20, "cpu": 4}
TIMED_MICRO_STEPS = {"cuda": 50, "cpu": 12}
LOOPED_FROM = {False: 1.0, True: 0.0}  # loop_start_frac that keeps looping off or on in a schedule by steps
PUBLISHED_LOOP_SHARE = 0.65  # of a run's wall clock with looping on
AGREEMENT_TOKENS = 24_576  # of one row in bf16 and in float32


def measure_train(request: dict[str, Any], probe: Probe) -> None:
    """Time whole optimizer steps of the real training loop, looping off, then on; each from the seed's weights."""
    work = open_workplace(request, probe)
    loader = open_training(work.run, work.ledger)
    backend = prepare_kernels(work)
    rates = {}
    for is_looped in (False, True):
        rates[is_looped] = _measure_steps(work, loader, backend, is_looped=is_looped)
    average = (1 - PUBLISHED_LOOP_SHARE) * rates[False] + PUBLISHED_LOOP_SHARE * rates[True]
    probe.add("run average, 35 % of the time without loops", "tokens/s", [average])
    probe.note("a sample is one optimizer step: loader, forward, backward, clip, update, average; warm-up left out")
    if work.device.type == "cuda" and work.run.dist.world_size == 1 and request["process"] == 0:
        _compare_with_float32(work, loader, backend)
    work.run.dist.close()


def prepare_kernels(work: Workplace) -> str:
    """Choose the attention backend and run every kernel once, as training does; return the backend's name."""
    compile_kernels(work.run, work.ledger)
    choice = choose_attention(work.config, work.run.dist)
    model = _initial_model(work, choice.name if choice is not None else work.config.runtime.attention)
    warm_up(model, work.config, work.run.report)
    work.probe.facts["attention_backend"] = attention_backend_name(work.run, model)
    if choice is not None:
        work.probe.facts["attention_probe"] = choice._asdict()
    return model.attention_backend


def _initial_model(work: Workplace, attention: str) -> GPT:
    """Return the model as training starts it."""
    run = work.run
    model = build_model(
        run.config.model, run.dist.device, embedding_dtype=run.config.train.embedding_dtype, attention=attention
    )
    model.init_weights(run.config.seed)
    return model


def _train(work: Workplace, model: GPT, loader: SpanLoader, *, num_steps: int, is_looped: bool) -> TrainResult:
    """Run the training loop for num_steps in one loop state."""
    config = replace(work.config.train, max_steps=num_steps, budget_s=None, loop_start_frac=LOOPED_FROM[is_looped])
    return Trainer(model, loader, config, work.run.dist, work.run.report).run()


def _measure_steps(work: Workplace, loader: SpanLoader, backend: str, *, is_looped: bool) -> float:
    """Add the figures of one loop state and return its median tokens/s."""
    config, device, probe = work.config.train, work.device, work.probe
    label = visits_label(work, is_looped=is_looped)
    per_step = config.micro_batches_per_step // work.run.dist.world_size
    num_warm, num_timed = (-(-n[device.type] // per_step) for n in (WARM_MICRO_STEPS, TIMED_MICRO_STEPS))
    model = _initial_model(work, backend)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    ledger = Ledger("steps")
    with note_compilation(work, ledger):
        started = time.monotonic() - ledger.origin
        result = _train(work, model, loader, num_steps=num_warm + num_timed + 1, is_looped=is_looped)
    elapsed = result.steps["elapsed_s"]  # at the start of each step, at most RUN_AHEAD steps before the device
    step_s = np.diff(elapsed)[num_warm:]
    timed_from = started + float(elapsed[num_warm])
    late = [span for span in ledger.spans if span["name"] == COMPILE and span["end_s"] > timed_from]
    compiled = sum(span["end_s"] - span["start_s"] for span in late)
    if late:
        probe.note(f"{label}: compiled while timed: {', '.join(sorted(span['kernel'] for span in late))}")
    rates = config.batch_tokens / step_s
    probe.add(f"{label}: rate", "tokens/s", rates)
    probe.add(f"{label}: micro-batch", "ms", 1000 * step_s / per_step)
    probe.add(f"{label}: compiled while timed", "s", [compiled], wanted="0")
    probe.add(f"{label}: loss of the first step", "nats", result.steps["loss"][:1])
    probe.add(f"{label}: gradient norm of the first step", "", result.steps["grad_norm"][:1])
    probe.add(f"{label}: loss of the last step", "nats", result.steps["loss"][-1:])
    probe.add(f"{label}: peak memory", "GiB", [peak_memory_bytes(work.device) / 2**30])
    return float(np.median(rates))


def visits_label(work: Workplace, *, is_looped: bool) -> str:
    """Return "11 layers" with looping off, "17 visits" with looping on."""
    count = visit_plan(work.config.model, is_looped=is_looped).num_visits
    return f"{count} visits" if is_looped else f"{count} layers"


def _compare_with_float32(work: Workplace, loader: SpanLoader, backend: str) -> None:
    """Add how far bf16 is from float32 in the loss and gradient norm of one row, same weights."""
    from model.data.packing import pack_row

    inputs, targets = (x[:, :AGREEMENT_TOKENS].to(work.device) for x in loader.span(0))
    seq_len = work.config.train.seq_len
    packing = pack_row(inputs.cpu(), max_segment=seq_len, max_seqlen=seq_len).to(work.device)
    narrow = build_bench_model(work)
    narrow.attention_backend = backend
    wide = GPT(work.config.model, compute_dtype=torch.float32).to(work.device)
    wide.load_state_dict(narrow.state_dict())
    for is_looped in (False, True):
        found = []
        for model in (wide, narrow):
            model.zero_grad(set_to_none=True)
            loss = model(inputs, targets, is_looped=is_looped, packing=packing)
            loss.backward()
            norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
            found.append((float(loss.detach()), float(torch.stack(norms).norm())))
        label = visits_label(work, is_looped=is_looped)
        for what, wide_value, narrow_value in zip(("loss", "gradient norm"), *found, strict=True):
            error = 100 * (narrow_value / wide_value - 1)
            work.probe.add(f"{label}: {what}, bf16 beside float32", "%", [error], wanted="within 1")


def measure_cold(request: dict[str, Any], probe: Probe) -> None:
    """Note when a new process has reached each point on the way to its first step, counted from its start."""
    reached = {"imports": time.time()}
    work = open_workplace(request, probe)
    loader = open_training(work.run, work.ledger)
    reached["data open"] = time.time()
    with note_compilation(work, work.ledger):
        backend = prepare_kernels(work)
        synchronize(work.device)
        reached["attention chosen, kernels warm"] = time.time()
        model = _initial_model(work, backend)
        reached["initial weights"] = time.time()
        _train(work, model, loader, num_steps=1, is_looped=False)
        reached["first step"] = time.time()
    for name, at in reached.items():
        probe.add(f"{name} at", "s", [at - request["spawned_at"]])
    probe.add("compilation in it", "s", [work.ledger.seconds(COMPILE)])
