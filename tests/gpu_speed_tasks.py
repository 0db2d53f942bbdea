"""What tests.gpu_speed measures, each function in a process of its own started through jobs/bench/child.py.

The file is copied beside the sources it measures and imports nothing of tests, so that another tree, of an earlier
commit say, is measured by its own `model` and `jobs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

import model
from jobs.bench import stages, train
from jobs.bench.figures import Probe
from jobs.bench.inputs import (
    Workplace,
    build_bench_model,
    byte_table,
    describe_model,
    made_up_tokens,
    note_compilation,
    open_validation,
    open_workplace,
    synchronize,
    timed_s,
)
from model.bundle.code_hash import code_hash
from model.data.shards import BOS_ID
from model.data.validation import ValidationSet
from model.files.ledger import Ledger
from model.gpt import GPT
from model.pipeline.compile_clock import COMPILE
from model.pipeline.memory import peak_memory_bytes, reset_peak_memory
from model.pipeline.rehearsal import compile_kernels
from model.ttt.documents import score_documents
from model.ttt.learning_step import LearningStep
from model.ttt.recorded_pass import RecordedStep
from model.ttt.windows import window_cost

Task = Callable[[dict[str, Any], Probe], None]
STEP_CHUNKS = {"cuda": 24, "cpu": 2}  # behind the first full window: steps of full windows that are timed, and one
# One of eight ranks' part of FineWeb's 50,000 validation documents with 40.5 M targets. Log-normal lengths of this
# spread have their 552 M window tokens in chunks of 64, too: long documents decide the time, not the number of them.
SHARE_DOCUMENTS = 6250
MEAN_LENGTH, LENGTH_SPREAD = 810.0, 1.03
WARM_DOCUMENTS = 64  # of the share, adapted before the clock starts: kernels are compiled and loaded


def checked(task: Task) -> Task:
    """Return the task, which first makes sure whose sources it measures and notes their hash."""

    def run(request: dict[str, Any], probe: Probe) -> None:
        found, wanted = Path(str(model.__file__)).resolve().parents[1], Path(request["tree"]).resolve()
        if found != wanted:
            raise ValueError(f"the package model is that of {found}, not of {wanted}; call it by another Python")
        probe.facts["code_hash"] = code_hash()
        task(request, probe)

    return run


measure_train = checked(train.measure_train)
measure_gptq = checked(stages.measure_gptq)
measure_eval = checked(stages.measure_eval)


@checked
def measure_ttt(request: dict[str, Any], probe: Probe) -> None:
    """Time steps of full windows, then the sample of documents with every kernel loaded."""
    work = open_workplace(request, probe)
    validation, table = open_validation(work), byte_table(work)
    bench_model = build_bench_model(work)
    describe_model(work, bench_model)
    time_steps(work, bench_model)
    documents = stages.sample_documents(validation, request["documents"])
    sample = stages.validation_of(validation, documents)
    stages._adapt(work, bench_model, sample, table)  # in that pass kernels are compiled and loaded
    again = Ledger("sample")
    with note_compilation(work, again):
        stages._add_pass(work, "sample", bench_model, sample, table)
    probe.add("sample: compiled while timed", "s", [again.seconds(COMPILE)], wanted="0")


def time_steps(work: Workplace, bench_model: GPT) -> None:
    """Add the milliseconds from one step of full windows to the next, and the peak of memory of all of it."""
    config, probe, table = work.config.ttt, work.probe, byte_table(work)
    documents = stages.full_documents(work, STEP_CHUNKS[work.device.type])
    reset_peak_memory(work.device)
    with marking_steps(work.device) as marks:
        stages._adapt(work, bench_model, documents, table)
    synchronize(work.device)
    count, length = config.batch_documents, config.window_tokens
    pairs = [(left, right) for left, right in pairwise(marks) if left[0][1] == right[0][1] == length]
    probe.add("step", "ms", [elapsed_ms(left[1], right[1]) * count / left[0][0] for left, right in pairs])
    probe.add("step: peak memory", "GiB", [peak_memory_bytes(work.device) / 2**30])
    rows = sorted({left[0][0] for left, _ in pairs})
    probe.note(
        f"a step: {count} windows of {length} (here in batches of {rows}), from the place of one in the device's queue "
        f"to that of the next, bookkeeping included; its peak is of a pass over {count} documents, each with adapters"
    )


@contextmanager
def marking_steps(device: torch.device) -> Iterator[list[tuple[tuple[int, int], Any]]]:
    """Give a list that grows by (rows, window tokens) and a moment, whenever a learning step is asked for."""
    marks: list[tuple[tuple[int, int], Any]] = []
    engine: Any = RecordedStep if device.type == "cuda" else LearningStep
    run = engine.run

    def marked(self: Any, table: torch.Tensor, length: int, *more: Any, **named: Any) -> Any:
        marks.append(((int(table.size(0)), length), moment(device)))
        return run(self, table, length, *more, **named)

    engine.run = marked
    try:
        yield marks
    finally:
        engine.run = run


def moment(device: torch.device) -> Any:
    """Return this place in a GPU's queue, or the time in seconds on a CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(began: Any, ended: Any) -> float:
    """Return the milliseconds between two moments; the device must have passed both."""
    return 1000 * (ended - began) if isinstance(began, float) else float(began.elapsed_time(ended))


@checked
def measure_share(request: dict[str, Any], probe: Probe) -> None:
    """Time both passes over one rank's part of a validation set like FineWeb's, or over a sub-sample of it."""
    work = open_workplace(request, probe)
    bench_model, table = build_bench_model(work), byte_table(work)
    describe_model(work, bench_model)
    compile_kernels(work.run, work.ledger, "ttt")
    config, count = work.config.ttt, int(request["share_documents"] or SHARE_DOCUMENTS)
    costs = [sum(window_cost(int(n), config) for n in share_lengths(k)) for k in (count, SHARE_DOCUMENTS)]
    few, documents = (
        documents_of(share_lengths(k), work.config.model.vocab_size) for k in (min(count, WARM_DOCUMENTS), count)
    )
    seconds = {}
    for validation in (few, documents):
        for label, is_adapting in (("without adaptation", False), ("adapting", True)):
            score = partial(
                score_documents, bench_model, validation, table, config, work.run.dist, probe.report,
                seed=work.config.seed, is_adapting=is_adapting,
            )  # fmt: skip
            seconds[label], _ = timed_s(work.device, score)
    for label, taken in seconds.items():
        probe.add(label, "s", [taken])
    both, scale = sum(seconds.values()), costs[1] / costs[0]
    probe.add("window tokens", "tokens", [costs[0]])
    probe.add("window tokens a second, both passes", "tokens/s", [costs[0] / both])
    probe.add("documents", "", [count])
    probe.add("targets", "tokens", [documents.num_targets])
    probe.add("scale", "", [scale])
    probe.add("both passes", "s", [both * scale])
    if count != SHARE_DOCUMENTS:
        probe.note(
            f"a rank's share: {count} of {SHARE_DOCUMENTS} documents were measured, both passes took {both:.1f} s; the "
            f"row is that times {scale:.2f}, the ratio of window tokens, so that the recording of graphs, which comes "
            "once in a pass, is counted too often"
        )


def share_lengths(count: int) -> np.ndarray:
    """Return predictions (count,) of documents as long as FineWeb's, in a mixed order: even quantiles, no chance."""
    normal = NormalDist(np.log(MEAN_LENGTH) - LENGTH_SPREAD**2 / 2, LENGTH_SPREAD)
    quantiles = [normal.inv_cdf((index + 0.5) / count) for index in range(count)]
    lengths = np.maximum(2, np.exp(quantiles)).astype(np.int64)
    return np.random.Generator(np.random.PCG64(5)).permutation(lengths)


def documents_of(lengths: np.ndarray, vocab_size: int) -> ValidationSet:
    """Return a stream of made-up documents with so many predictions each."""
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens = made_up_tokens(int(starts[-1]) + 1, vocab_size, seed=6)
    tokens[tokens == BOS_ID] = BOS_ID + 1
    tokens[starts] = BOS_ID
    return ValidationSet(tokens, starts)
