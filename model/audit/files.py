"""Probe of the run directory itself: files are what the records say, and the figures follow from each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from model.audit.finished_run import RunFiles
from model.audit.verdicts import Result, judge
from model.config import config_hash
from model.files.atomic import file_sha256
from model.score.bpb import bits_per_byte

SCORES = ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt")
SUMS = {"nats_plain": "pre_ttt", "nats_lr0": "ttt_lr0", "nats_ttt": "post_ttt"}
TOLERANCE = 1e-9  # relative; float64 sums in another order


def probe_records(files: RunFiles) -> Result:
    """Hash every output and data file against the records, and recompute each score from its nats, bytes and rows."""
    outputs = list(find_changed_outputs(files))
    faults = [*outputs, *find_changed_data(files), *find_contradictions(files)]
    num_files = sum(len(record["outputs"]) for record in files.records.values())
    return judge(
        "records", "evidence", measured=len(faults), limit=0, unit="disagreements",
        sample_size=num_files + len(files.run["data"]["val"]) + len(files.run["data"]["train"]) + 1,
        sample_of="files (all)", detail=faults[0] if faults else "every file has the sha256 of its record",
        not_checked="records and files that were altered together: reload and score_ledger recompute what can be",
    )  # fmt: skip


def find_changed_outputs(files: RunFiles) -> Iterator[str]:
    """Yield a line for each output that is not what its stage left, and each record of another run."""
    for stage, record in files.records.items():
        for name, facts in record["outputs"].items():
            path = files.workdir / name
            if not path.is_file():
                yield f"{name}, an output of {stage}, is missing"
            elif path.stat().st_size != facts["bytes"] or file_sha256(path) != facts["sha256"]:
                yield f"{name} is not what stage {stage} left"
        for name in ("config_hash", "data_hash"):
            if record.get(name) != files.run.get(name):
                yield f"the record of {stage} has another {name} than run.json"
    if config_hash(files.config, world_size=int(files.run["world_size"])) != files.run["config_hash"]:
        yield "the configuration in run.json does not have its config_hash"


def find_changed_data(files: RunFiles) -> Iterator[str]:
    """Yield a line for each data file that is not the one the run was made with."""
    data = files.run["data"]
    known = {**data["train"], **data["val"], files.config.data.tokenizer: data["tokenizer"]}
    for name, sha256 in known.items():
        path = Path(name)
        if not path.is_file():
            yield f"data file {name} is missing"
        elif file_sha256(path) != sha256:
            yield f"data file {name} is not the one that the run read"


def find_contradictions(files: RunFiles) -> Iterator[str]:
    """Yield a line for each score that does not follow from its nats and bytes, or from its document rows."""
    metrics = files.metrics
    for name in SCORES:
        expected = bits_per_byte(metrics[f"{name}_nats"], metrics[f"{name}_bytes"])
        if not math.isclose(metrics[f"{name}_bpb"], expected, rel_tol=TOLERANCE):
            yield f"{name}_bpb is {metrics[f'{name}_bpb']:.8f}, its nats and bytes give {expected:.8f}"
    rows = {**files.plain, **files.adapted}
    for column, name in SUMS.items():
        total = float(rows[column].sum())
        if not math.isclose(total, metrics[f"{name}_nats"], rel_tol=TOLERANCE):
            yield f"{name}_nats is {metrics[f'{name}_nats']:.6f}, its documents add up to {total:.6f}"
    if metrics["artifact_bytes"] != metrics["model_bytes"] + metrics["code_bytes"]:
        yield f"artifact_bytes is {metrics['artifact_bytes']}, model and code have another sum"
