"""Small work in place of the pipeline: four stages with records, a checkpoint, and faults on demand.

A rank runs `work`; OUT/faults.json lists what goes wrong where. The figures depend on seed and steps only, so that an
interrupted run must end in the same ones as an undisturbed run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from model.config import RunConfig
from model.report import Interrupted
from runner.folder.storage import LocalStorage
from runner.gang.rank import Rank

STAGES = ("train", "quantize", "evaluate", "ttt")
ARRAYS = {"train": "steps", "evaluate": "evaluate", "ttt": "ttt"}  # what a stage leaves besides its record
NUM_STEPS = {"train": 12, "quantize": 2, "evaluate": 2, "ttt": 4}
STEP_S = 0.02
TARGET = "tests.stub_work:work"
GANG_TARGET = "tests.stub_work:gang_work"
PRIORITY_TARGET = "tests.stub_work:priority_work"
CUT_SHORT_STEP = 5


def work(rank: Rank) -> None:
    """Run the stages that are not finished; every rank computes the same, rank 0 writes."""
    take_stages(rank)
    for stage in STAGES:
        if not (Path(rank.job.workdir) / "stages" / f"{stage}.json").exists():
            run_stage(rank, stage)


def priority_work(rank: Rank) -> None:
    """Note the priority of this process (nice), then work."""
    Path(rank.job.workdir, "priority").write_text(str(os.nice(0)))
    work(rank)


def take_stages(rank: Rank) -> None:
    """Copy the stages that other runs have finished for this one, as the pipeline does."""
    workdir = Path(rank.job.workdir)
    for stage, name in rank.job.donors.items():
        donor, record = workdir.parent / name, workdir / "stages" / f"{stage}.json"
        if not record.exists() and (donor / "stages" / record.name).exists():
            for path in donor.glob(f"{ARRAYS.get(stage, '-')}.npz"):
                LocalStorage(workdir).write(path.name, path.read_bytes())
            taken = {**json.loads((donor / "stages" / record.name).read_text()), "reused_from": name}
            LocalStorage(workdir).write(f"stages/{record.name}", json.dumps(taken).encode())


def gang_work(rank: Rank) -> None:
    """Run the stages in a real process group: ranks meet at every step, as in training."""
    from runner.gang.worker import join_gang

    rank.report("start", 0, None, {})
    dist = join_gang(rank)
    rank.report("start", 1, None, {})
    if rank.rank == 0:
        take_stages(rank)
    try:
        for stage in STAGES:
            dist.barrier()
            if not (Path(rank.job.workdir) / "stages" / f"{stage}.json").exists():
                run_stage(rank, stage, barrier=dist.barrier)
    finally:
        dist.close()


def run_stage(rank: Rank, stage: str, barrier: Any = lambda: None) -> None:
    """Take the steps of one stage, resuming training from its checkpoint, and leave its record."""
    storage = LocalStorage(Path(rank.job.workdir))
    step, value, resumed = 0, rank.job.config.seed + decided_by(rank.job.config, stage), []
    checkpoint = Path(rank.job.workdir) / "checkpoints" / "step.json"
    if stage == "train" and rank.job.restart == "checkpoint" and checkpoint.exists():
        step, value = json.loads(checkpoint.read_text())
        resumed = [step]
    barrier()
    while step < NUM_STEPS[stage]:
        misbehave(rank, stage, step)
        if stage == "train" and rank.should_stop():
            raise Interrupted(f"stopped at step {step}")
        time.sleep(STEP_S)
        barrier()
        step, value = step + 1, value * 0.75 + 1.0 / (step + 2)
        if rank.rank == 0:
            rank.report(stage, step, NUM_STEPS[stage], {"loss": value, "tokens_per_s": 1000.0})
            if stage == "train" and step % 4 == 0:
                storage.write("checkpoints/step.json", json.dumps([step, value]).encode())
    barrier()
    if rank.rank == 0:
        leave_record(rank, stage, value, resumed, storage)


def decided_by(config: RunConfig, stage: str) -> float:
    """Return a number of the settings that decide a stage, so that variants differ where they should."""
    trained = 100 * config.train.matrix_lr
    quantized = trained + config.quant.matrix_bits
    return {"train": trained, "ttt": quantized + config.ttt.lr}.get(stage, quantized)


def leave_record(rank: Rank, stage: str, value: float, resumed: list[int], storage: LocalStorage) -> None:
    """Write a stage's record and the arrays that the commit reads."""
    metrics: dict[str, Any] = {f"{stage}_s": 1.0}
    if stage == "train":
        metrics |= {"steps": NUM_STEPS["train"], "num_resumes": len(resumed), "resumed_at_steps": resumed}
        save(rank, "steps.npz", step=np.arange(1, NUM_STEPS["train"] + 1), loss=np.full(NUM_STEPS["train"], value))
    if stage == "evaluate":
        metrics |= score("pre_ttt", value)
        save(rank, "evaluate.npz", **documents(), nats_plain=np.full(3, value))
    if stage == "ttt":
        metrics |= score("ttt_lr0", value) | score("post_ttt", value - 0.01)
        save(rank, "ttt.npz", **documents(), nats_lr0=np.full(3, value), nats_ttt=np.full(3, value - 0.01))
    record = {"format": 1, "stage": stage, "seconds": 1.0, "metrics": metrics, "outputs": {}, **hashes(rank)}
    storage.write(f"stages/{stage}.json", json.dumps(record).encode())


def hashes(rank: Rank) -> dict[str, Any]:
    """Return the hashes of the sweep that this rank works for."""
    return {name: rank.job.record.get(name) for name in ("config_hash", "data_hash", "code_hash")}


def score(name: str, value: float) -> dict[str, float]:
    """Return the metrics of one scoring pass."""
    return {f"{name}_nats": value * 30, f"{name}_tokens": 30, f"{name}_bytes": 90, f"{name}_bpb": value}


def documents() -> dict[str, np.ndarray]:
    """Return three validation documents."""
    return {"index": np.arange(3), "tokens": np.full(3, 10), "bytes": np.full(3, 30)}


def save(rank: Rank, name: str, **arrays: np.ndarray) -> None:
    """Write arrays into the run directory."""
    np.savez(Path(rank.job.workdir) / name, **arrays)


def misbehave(rank: Rank, stage: str, step: int) -> None:
    """Do what OUT/faults.json wants of this rank at this place, once for each attempt that it names."""
    path = Path(rank.job.out) / "faults.json"
    if not path.exists():
        return
    for fault in json.loads(path.read_text()):
        wanted = {
            "variant": rank.job.key.variant_name,
            "seed": rank.job.key.seed,
            "attempt": rank.job.attempt,
            "rank": rank.rank,
            "stage": stage,
            "step": step,
        }
        if all(fault.get(name, value) == value for name, value in wanted.items()):
            commit_fault(fault, rank)


def commit_fault(fault: dict[str, Any], rank: Rank) -> None:
    """Raise, die, hang, take long, or as long as it takes to be told to stop."""
    match fault["do"]:
        case "raise":
            raise RuntimeError(fault.get("message", "a stub failed"))
        case "refuse":
            raise ValueError(fault.get("message", "train.max_steps=0 must be at least 1"))
        case "kill":
            os.kill(os.getpid(), signal.Signals[fault.get("signal", "SIGKILL")])
            time.sleep(3600)  # a signal to a process may be taken by another thread
        case "exit":
            os._exit(fault["code"])
        case "hang":
            time.sleep(3600)
        case "freeze":  # stuck in compiled code that keeps the interpreter's lock: no Python code runs any more
            lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
            lock(mutex), lock(mutex)
        case "wait":
            time.sleep(fault["seconds"])
        case "wait for a stop":
            assert rank.stop_event.wait(120)
        case "await":  # a file of the test's, or the wish that it stops
            while not Path(fault["file"]).exists() and not rank.should_stop():
                time.sleep(STEP_S)
        case other:
            raise AssertionError(other)


def mirrored_work(rank: Rank) -> None:
    """Run the stages, then mirror everything as the pipeline does file by file."""
    assert rank.mirror is not None
    rank.mirror.fetch_all()
    work(rank)
    workdir = Path(rank.job.workdir)
    for path in [*workdir.glob("*.npz"), *(workdir / "stages").glob("*.json")]:
        rank.mirror.put(path)


def patient_gang_work(rank: Rank) -> None:
    """Work in a real process group, round after round: some seconds together, and some more on rank 0 alone.

    OUT/patience.json holds the seconds together, those alone, and the rounds. A second attempt takes one round of a
    second each.
    """
    from runner.gang.worker import join_gang

    rank.report("start", 0, None, {})
    dist = join_gang(rank)
    patience = json.loads((Path(rank.job.out) / "patience.json").read_text())
    together, alone, rounds = patience if rank.job.attempt == 1 else (1.0, 1.0, 1)
    step = 0
    for _ in range(rounds):
        begun = time.monotonic()
        while dist.broadcast_floats([time.monotonic() - begun])[0] < together:
            misbehave(rank, "train", step)
            time.sleep(0.1)
            step += 1
            rank.report("train", step, None, {"loss": 1.0})
        misbehave(rank, "share", 0)
        begun = time.monotonic()
        while rank.rank == 0 and time.monotonic() - begun < alone:
            time.sleep(0.1)  # the rest is rank 0's share; the others have done theirs and wait
            step += 1
            rank.report("ttt", step, None, {"loss": 1.0})
    storage = LocalStorage(Path(rank.job.workdir))
    for stage in STAGES:
        dist.barrier()
        if rank.rank == 0:
            leave_record(rank, stage, 1.0, [], storage)
    dist.barrier()
    dist.close()


def cut_short_pipeline(rank: Rank) -> None:
    """Run the real pipeline, but in the first attempt the last rank is killed in the middle of training."""
    from runner.gang.worker import run_pipeline

    heard = rank.report

    def report(phase: str, step: int, total: int | None, metrics: Any) -> None:
        heard(phase, step, total, metrics)
        if (rank.job.attempt, rank.rank, phase) == (1, rank.job.world_size - 1, "train") and step >= CUT_SHORT_STEP:
            commit_fault({"do": "kill"}, rank)

    rank.report = report  # type: ignore[method-assign]
    run_pipeline(rank)
