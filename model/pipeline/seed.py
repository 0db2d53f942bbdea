"""One seed from data to scores: train, quantize, evaluate, ttt, each stage leaving a record with checksums.

A run directory is the unit of resume. Called again on it, run_seed computes what is not finished, and goes on inside
training from the newest checkpoint. Works without Ray; with several ranks, rank 0 decides and writes.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from model.bundle.code_hash import code_hash
from model.config import RunConfig, config_hash
from model.data.manifest import hash_data
from model.data.text_check import check_text
from model.distributed import Dist
from model.fields import plain_settings
from model.files.checkpoint import CheckpointStore, write_json
from model.files.ledger import Ledger, join_ledgers
from model.pipeline import inputs, stage_evaluate, stage_quantize, stage_train, stage_ttt
from model.pipeline.attempts import RUN_FILE, changes_since, latest_attempt, list_attempt, write_run
from model.pipeline.compile_clock import COMPILE, noting_compilation
from model.pipeline.differences import DATA_LIMITS, data_words, settings_words
from model.pipeline.finished import find_finished, forget_finished, hash_inputs, take_stage, write_record
from model.pipeline.memory import peak_memory_bytes, reset_peak_memory
from model.pipeline.records import FORMAT, StageRecord
from model.pipeline.run import NO_ORDERS, Orders, Run
from model.report import STAGES, Report

RUN_STAGE = {
    "train": stage_train.run_train,
    "quantize": stage_quantize.run_quantize,
    "evaluate": stage_evaluate.run_evaluate,
    "ttt": stage_ttt.run_ttt,
}
assert tuple(RUN_STAGE) == STAGES
PACKAGES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors", "triton", "flash-attn")


HASHED = {"config_hash": "another configuration", "data_hash": "other data", "code_hash": "other code"}


class RunMismatch(ValueError):
    """A run directory was made for another seed, or under another configuration, other data or other code."""


class OtherHashes(RunMismatch):
    """A rank has another configuration, other data or other code than the driver that sent it."""


class SeedResult(NamedTuple):
    """What a finished seed leaves: its directory and every metric of its stages by name."""

    workdir: Path
    metrics: dict[str, Any]


def run_seed(
    config: RunConfig,
    dist: Dist,
    workdir: Path,
    report: Report,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_write: Callable[[Path], None] = lambda _path: None,
    restart: str = "checkpoint",
    allow_code_change: bool = False,
    tick: Callable[[], None] = lambda: None,
    orders: Orders = NO_ORDERS,
) -> SeedResult:
    """Run every stage of one seed that workdir does not hold yet, and return all metrics.

    report(phase, step, total, metrics) hears of this rank's own progress, and tick() of a second more of a long call:
    whoever watches over the rank needs both, whoever shows progress takes rank 0's. should_stop is asked between
    training steps; when it says yes a checkpoint is written and Interrupted raised. on_write(path) hears of
    each finished file, a stage's record last. restart "scratch" neither writes nor reads checkpoints inside training.
    orders: what a driver adds; a stage that another run has finished is taken over from it where it is the same.
    Raises RunMismatch if workdir was made for another seed, configuration or data (or by other code, unless
    allow_code_change), OtherHashes if this rank's are not the driver's, ValueError or FileNotFoundError for data that
    cannot be used.
    """
    run = Run(config, dist, workdir, report, should_stop, on_write, restart == "checkpoint", tick, orders)
    _claim_directory(run, allow_code_change=allow_code_change)
    for stage in STAGES:
        is_done = dist.is_main and (find_finished(run, stage) or take_stage(run, stage))
        if not dist.broadcast_floats([float(is_done)])[0]:
            _run_stage(run, stage)
    dist.barrier()
    return SeedResult(workdir, join_metrics(run.records) if dist.is_main else {})


def join_metrics(records: Mapping[str, StageRecord]) -> dict[str, Any]:
    """Return the metrics of all stages by name; the peak of memory is the largest of any stage."""
    metrics = {name: value for record in records.values() for name, value in record.metrics.items()}
    peaks = [record.metrics.get("peak_memory_bytes", 0) for record in records.values()]
    return metrics | {"peak_memory_bytes": max(peaks, default=0)}


def _claim_directory(run: Run, *, allow_code_change: bool) -> None:
    """Write run.json, or check that the one there was made under the same hashes."""
    run.report("prepare", 0, None, {})
    run.hashes = {
        "config_hash": config_hash(run.config, world_size=run.dist.world_size),
        "code_hash": code_hash(),
    }
    _check_hashes(run)
    if run.dist.is_main:
        ledger = Ledger("prepare")
        with ledger.listening(), ledger.span("hash"), run.long_call():
            data = hash_data(run.config.data, vocab_size=run.config.model.vocab_size, report=run.report)
            check_text(run.config.data, data, vocab_size=run.config.model.vocab_size)
        named = {**data.train, **data.val, run.config.data.tokenizer: data.tokenizer}
        run.file_hashes = {os.path.abspath(path): sha256 for path, sha256 in named.items()}
        run.hashes["data_hash"] = data.data_hash
        _check_hashes(run)
        run.surroundings = surroundings(run.dist.device)
        path = run.workdir / RUN_FILE
        before = _check_same(path, run, allow_code_change=allow_code_change) if path.is_file() else None
        run.is_listed = before is None
        if before is None:  # made once: what later attempts find different is listed beside it
            before = {
                "format": FORMAT,
                "seed": run.config.seed,
                **run.hashes,
                **run.surroundings,
                "code_changed": False,
            }
        run.is_mixed = before.get("code_changed", False) or run.is_changed
        content = {
            **before,
            "config": plain_settings(run.config),  # settings that are not hashed, and places of data, may move
            "code_changed": run.is_mixed,
            "world_size": run.dist.world_size,
            "data": {"train": data.train, "val": data.val, "tokenizer": data.tokenizer},
        }
        write_run(run, content)
        run.write(inputs.TRAIN_COUNTS, {"count": data.train_counts})
        run.on_write(run.workdir / inputs.TRAIN_COUNTS)
        if run.is_changed:
            list_attempt(run)
        _write_ledger(run, ledger.as_json())
    run.dist.barrier()


def _check_hashes(run: Run) -> None:
    """Raise OtherHashes, naming what differs, unless this rank's hashes are those that the driver computed."""
    for name, ours in run.hashes.items():
        theirs = run.orders.hashes.get(name)
        if theirs is not None and theirs != ours:
            raise OtherHashes(
                f"rank {run.dist.rank} has {HASHED[name]} ({name} {ours[:12]}, the driver's is {theirs[:12]}); "
                "driver and nodes need the same installation and the same shards"
            )


def _check_same(path: Path, run: Run, *, allow_code_change: bool) -> dict[str, Any]:
    """Return run.json, having noted in run what an earlier attempt decided and whether something has changed since.

    Raises RunMismatch for another seed, configuration or data; for other code or surroundings where not allowed.
    """
    hashes = run.hashes
    try:
        before = json.loads(path.read_text())
        before_hashes, before_seed = {name: str(before[name]) for name in hashes}, before["seed"]
        newest = latest_attempt(before)
    except (ValueError, KeyError, TypeError) as error:
        raise RunMismatch(f"{path} is damaged ({error!r}); remove the run directory to start again") from error
    if before_seed != run.config.seed:
        raise RunMismatch(f"{path.parent} was made for seed {before_seed}, not {run.config.seed}; choose another out")
    for name, what in (("config_hash", "configuration"), ("data_hash", "data")):
        if before_hashes[name] != hashes[name]:
            short = f"{name} {before_hashes[name][:12]}, now {hashes[name][:12]}"
            words = _name_differences(name, before, run)
            raise RunMismatch(
                f"{path.parent} was made with another {what} ({short}{words and f': {words}'}); "
                f"choose another out, or remove it"
            )
    changes = changes_since(newest, run)
    if changes and not allow_code_change:
        raise RunMismatch(
            f"{path.parent} was made with {'; '.join(changes)}; pass --allow-code-change to go on and mark the seed, "
            "or choose another out"
        )
    run.is_changed = bool(changes)
    if not changes and run.config.runtime.attention == "auto":
        run.attention = newest.get("attention")
    return dict(before)


def _name_differences(hash_name: str, before: Mapping[str, Any], run: Run) -> str:
    """Return in words why a hash differs from that in run.json, or nothing where that was not recorded."""
    if hash_name == "config_hash":
        now = {**plain_settings(run.config), "world_size": run.dist.world_size}
        return settings_words({**(before.get("config") or {}), "world_size": before.get("world_size")}, now)
    hashed, data = hash_data(run.config.data, vocab_size=run.config.model.vocab_size), run.config.data
    files = {"train": hashed.train, "val": hashed.val, "tokenizer": hashed.tokenizer}
    limits = {name: getattr(data, name) for name in DATA_LIMITS}
    earlier = (before.get("config") or {}).get("data") or {}
    return data_words(
        {**(before.get("data") or {}), **{name: earlier.get(name) for name in limits}}, {**files, **limits}
    )


def _run_stage(run: Run, stage: str) -> None:
    """Run one stage on all ranks, then write its record on rank 0."""
    if run.dist.is_main:  # what comes after is stale from now on
        forget_finished(run, stage)
    run.report(stage, 0, None, {})
    run.bring(hash_inputs(run, stage) if run.dist.is_main else {})
    ledger = Ledger(stage, run.dist.rank)
    counted = reset_peak_memory(run.dist.device)
    with ledger.listening(), noting_compilation(ledger, run.dist.device), ledger.span(stage):
        metrics, outputs = RUN_STAGE[stage](run, ledger)
    peaks = run.dist.gather_rows(np.array([[peak_memory_bytes(run.dist.device)]]))  # (world_size, 1)
    metrics |= {"peak_memory_bytes": int(peaks.max()), "peak_memory_of": counted}
    metrics[f"{stage}_compile_s"] = ledger.seconds(COMPILE)
    parts = [json.loads(text) for text in run.dist.gather_text(json.dumps(ledger.as_json()))]
    if run.dist.is_main:
        _write_ledger(run, *parts)
        with run.long_call():  # it may go to an object store
            outputs += [f"ledger/{stage}.json", *run.orders.attach(stage)]
            write_record(run, stage, ledger.seconds(stage), metrics, outputs)
    if stage == "train" and (run.dist.is_main or run.is_fetching):
        CheckpointStore(run.checkpoints).clear()  # not before the record: a kill in between would cost them
    run.dist.barrier()


def _write_ledger(run: Run, *parts: dict[str, Any]) -> None:
    """Write one ledger from those of all ranks, with the hashes of the data and of earlier stages' outputs."""
    known, stage = dict(run.file_hashes), parts[0]["stage"]
    for record in run.records.values():
        known |= {os.path.abspath(run.workdir / name): output.sha256 for name, output in record.outputs.items()}
    write_json(run.workdir / "ledger" / f"{stage}.json", join_ledgers(list(parts), known))


def surroundings(device: torch.device) -> dict[str, Any]:
    """Return what beside code, configuration and data decides the last bits of a score."""
    found = {
        "device": device_name(device),
        "num_threads": torch.get_num_threads(),
        "versions": library_versions(),
    }
    return found if device.type == "cuda" else {**found, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def device_name(device: torch.device) -> str:
    """Return "cpu", or the model of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of every package that can move a score."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found
