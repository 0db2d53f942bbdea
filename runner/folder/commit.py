"""From a run directory to its four Parquet files: the driver's side of the end of an attempt.

A finished attempt brings its stage records, step rows and document rows. A failed one is a row too: its state, its
root cause, and the records of the stages that it finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.files.plain import read_arrays_if_any, read_json_if_any
from model.report import STAGES
from runner.life.states import Run, State
from runner.spec.sweep import SweepSpec

if TYPE_CHECKING:
    import numpy as np

    from model.config import RunConfig

DOCUMENT_FILES = ("evaluate.npz", "ttt.npz")
MACHINE_COLUMNS = ("gpu_model", "driver_version", "cuda_version")
PROGRAM_STAGE = "program"  # the only stage of a run of somebody else's program


def commit_run(
    spec: SweepSpec,
    workdir: Path,
    run: Run,
    *,
    record: Mapping[str, Any],
    node_label: str = "",
    aside_folder: str = "",
) -> None:
    """Write the attempt that run stands for into the sweep's results; aside_folder: the driver's own (see fence).

    record: what attempt.json would say; used where the attempt ended before it wrote one. state TEARDOWN and the like
    count as FAILED. Raises OSError or ValueError when results cannot be written or a record is damaged.
    """
    from results.store.writer import commit_attempt

    record = {**record, **read_json_if_any(workdir / "attempt.json")}
    is_done = run.state in (State.COMMITTING, State.DONE)
    names = STAGES if spec.program is None else (PROGRAM_STAGE,) * is_done  # a program is finished or has no figures
    stages = [read_json_if_any(path) for stage in names if (path := workdir / "stages" / f"{stage}.json").exists()]
    if spec.program is not None and is_done and not stages:
        raise ValueError(f"{workdir}: the program ended, and its stages/program.json is not there; nothing to commit")
    for stage in stages:
        if record.get("data_hash") and stage.get("data_hash") not in (None, record["data_hash"]):
            raise ValueError(
                f"{workdir}: stage {stage['stage']} read other data than the sweep; the nodes' shards differ"
            )
    row = run_row(spec, run, record, stages, node_label=node_label)
    # surroundings count as code does; a run that failed may have done so over this very file
    is_changed = is_done and read_json_if_any(workdir / "run.json").get("code_changed") is True
    is_changed |= any(stage["metrics"].get("code_changed") is True for stage in stages)
    commit_attempt(
        spec.out,
        run={**row, "code_changed": row["code_changed"] or is_changed},
        stages=stages,
        steps=step_rows(workdir) if is_done else {},
        documents=document_rows(workdir) if is_done else {},
        aside_folder=aside_folder,
    )


def run_row(
    spec: SweepSpec, run: Run, record: Mapping[str, Any], stages: list[Any], *, node_label: str = ""
) -> dict[str, Any]:
    """Return the runs row of one attempt, the figures of the stages left to the store."""
    is_done = run.state in (State.COMMITTING, State.DONE)
    state = State.DONE if is_done else State.CANCELLED if run.is_cancelled else State.FAILED
    hardware = record.get("hardware", {})
    hashes = {stage.get("code_hash") for stage in stages} | {record.get("code_hash"), record.get("first_code_hash")}
    return {
        "variant": run.key.variant,
        "seed": run.key.seed,
        "repeat": run.key.repeat,
        "attempt": run.attempt,
        "attempts": run.attempt,
        "preemptions": run.preemptions,
        "state": str(state),
        "error": run.failure.one_line if run.failure is not None and not is_done else None,
        "error_rank": run.failure.rank if run.failure is not None and not is_done else None,
        "sweep": spec.name,
        "source": "run" if spec.program is None else "program",
        "config_hash": record["config_hash"],
        "config_json": record["config"],
        "data_hash": next((stage["data_hash"] for stage in stages if stage.get("data_hash")), record.get("data_hash")),
        "code_hash": record.get("code_hash"),
        "code_changed": len(hashes - {None}) > 1,
        "git_commit": record.get("git_commit"),
        "git_dirty": record.get("git_dirty"),
        "versions_json": record.get("versions", {}),
        "node_label": node_label or None,
        **{name: hardware.get(name) for name in MACHINE_COLUMNS},
        "num_cpus": spec.gang.cpus * spec.gang.world_size,
        "num_gpus": spec.gang.gpus,
        "world_size": record["world_size"],
        "started_at": record.get("started_at"),
        "ended_at": time.time(),
        **({} if spec.program is not None else recipe_columns(spec.config_for(run.key))),
    }


def recipe_columns(config: RunConfig) -> dict[str, Any]:
    """Return the columns that the configuration of our own pipeline decides; a program's come from what it says."""
    return {"vocab_size": config.model.vocab_size, "size_limit_bytes": config.quant.size_limit_bytes}


def step_rows(workdir: Path) -> dict[str, np.ndarray]:
    """Return the columns of the steps table; each step has the newest sample of the GPUs that was taken by then."""
    import numpy as np

    steps, samples = read_arrays_if_any(workdir / "steps.npz"), read_arrays_if_any(workdir / "gpu.npz")
    if not steps or not len(samples.get("step", ())):
        return steps
    newest = np.searchsorted(samples["step"], steps["step"], side="right") - 1
    newest = np.maximum(newest, 0)  # steps before the first sample take that one
    return {**steps, **{name: values[newest] for name, values in samples.items() if name != "step"}}


def document_rows(workdir: Path) -> dict[str, np.ndarray]:
    """Return the columns of the documents table, joined from the two scoring stages.

    Raises ValueError if they did not score the same documents.
    """
    import numpy as np

    plain, adapted = (read_arrays_if_any(workdir / name) for name in DOCUMENT_FILES)
    if plain and adapted:
        for name in ("index", "tokens", "bytes"):
            if not np.array_equal(plain[name], adapted[name]):
                raise ValueError(f"{workdir}: evaluate.npz and ttt.npz differ in {name}; remove both stages' records")
    return {**plain, **adapted}
