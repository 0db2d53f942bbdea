"""Reading a submission folder: logs, submission.json and README tables, into one record and into our Parquet tables."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results.code_files import read_code
from results.disagreements import Finding, agrees, find_disagreements, review
from results.logs import Log, parse_log
from results.printed import parse_json
from results.published import Record, Run, one_run_a_seed, submitted_seeds, validation_bytes
from results.readme_tables import read_spreads, read_tables
from results.store import commit_attempt

SCORED_ORDER = ("post_ttt", "sliding", "post_quant")
OUR_NAMES = {"post_ema": "post_ema", "post_quant": "pre_ttt", "sliding": "sliding", "ttt_lr0": "ttt_lr0",
             "post_ttt": "post_ttt"}  # fmt: skip
SOURCE_SUFFIXES = (".py", ".sh", ".cpp", ".cu", ".cuh", ".h")
NOT_LOGS = ("requirements.txt", "license.txt", "readme.txt", "constraints.txt")
NAMES_DROPPED = ("author", "github_id", "name", "blurb", "authors", "co_authors")
RECORD_FILE = "record.json"


class Submission(NamedTuple):
    """A folder as a record, its logs by file name, and what could not be read or found (one line each)."""

    record: Record
    logs: dict[str, Log]
    notes: list[str]


def read_submission(folder: Path) -> Submission:
    """Return everything the known forms show in a submission folder.

    Raises FileNotFoundError for a folder that is not there, ValueError for one without any readable log or with a
    file that is not UTF-8.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    logs: dict[str, Log] = {}
    notes: list[str] = []
    for path in _log_files(folder):
        name = path.relative_to(folder).as_posix()
        log = parse_log(_read_text(path), name)
        if log.is_recognized:
            logs[name] = log
        elif path.suffix == ".log":
            notes.append(f"{name}: no line of a known form; not a training log we can read")
    if not logs:
        raise ValueError(f"{folder}: no training log with a line of a known form (*.log, *.txt, logs/*){_first(notes)}")
    for log in logs.values():
        notes += [*log.missing, *log.unknown]
        if log.run["seed"] is None:
            notes.append(f"{log.run['log_file']}: no seed in its name or its lines; not used")
    record: Record = {
        "pr": None,
        "folder": folder.resolve().name,
        "date_folder": _date(folder.resolve().name),
        "track": None,
        "submission_json": _submission_json(folder, notes),
        "readme_seed_tables": read_tables(_readme(folder)),
        "readme_spreads": read_spreads(_readme(folder)),
        "code": read_code(folder),
        "source_file_bytes_in_folder": {
            path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.suffix in SOURCE_SUFFIXES
        },
        "runs": [log.run for log in logs.values()],
    }
    _score(record, notes)
    notes += review(record).unchecked
    return Submission(record, logs, notes)


def findings_of(record: Record) -> list[Finding]:
    """Return every disagreement inside an imported record."""
    return find_disagreements(record)


def import_submission(folder: Path, out: Path) -> tuple[Submission, list[Finding]]:
    """Write a submission folder's figures into OUT/results and the record with its disagreements into OUT/record.json.

    Raises ValueError when OUT holds results that were not imported.
    """
    submission = read_submission(folder)
    if (out / "results").is_dir():
        if not (out / RECORD_FILE).is_file():
            raise ValueError(f"out={out} holds the results of runs; import into another folder")
        shutil.rmtree(out / "results")
    findings = findings_of(submission.record)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "record": submission.record,
        "disagreements": [finding._asdict() for finding in findings],
        "notes": submission.notes,
    }
    (out / RECORD_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for run in _runs_to_commit(submission.record):
        log = submission.logs[run["log_file"]]
        commit_attempt(out, run=_run_row(submission.record, run, log), steps=_step_arrays(log))
    return submission, findings


def _runs_to_commit(record: Record) -> list[Run]:
    """Return one run a seed: the scored ones, and for seeds without a score the first log."""
    chosen = {run["seed"]: run for run in one_run_a_seed(record)}
    for run in record["runs"]:
        if run["seed"] is not None:
            chosen.setdefault(run["seed"], run)
    return list(chosen.values())


def _log_files(folder: Path) -> list[Path]:
    paths = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)) if path.is_file()]
    return [path for path in paths if path.suffix in (".log", ".txt") and path.name.lower() not in NOT_LOGS]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path}: not UTF-8 text (byte 0x{byte:02x} at {error.start}); convert it first, such as: iconv -t utf-8"
        ) from error


def _submission_json(folder: Path, notes: list[str]) -> dict[str, Any] | None:
    """Return submission.json without names; None, said, when it is not there."""
    path = next((path for path in sorted(folder.glob("submission*.json"))), None)
    if path is None:
        notes.append("submission.json not found")
        return None
    try:
        content = parse_json(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg} in line {error.lineno})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return {key: value for key, value in content.items() if key not in NAMES_DROPPED}


def _readme(folder: Path) -> str:
    path = folder / "README.md"
    return _read_text(path) if path.is_file() else ""


def _score(record: Record, notes: list[str]) -> None:
    """Decide the stage the record is scored on and fill in what the record form derives from the stages."""
    runs = [run for run in record["runs"] if run["seed"] is not None]
    stage = _scored_stage(record, runs)
    for run in record["runs"]:
        entry = run.get(stage) if stage else None
        run["scored_stage"] = stage
        run["final_bpb"] = entry["val_bpb"] if entry else None
        run["final_nats"] = entry["val_loss_nats"] if entry else None
        for name in ("post_quant", "sliding"):
            both = run.get(name) and run.get("post_ttt")
            gain = round(run["post_ttt"]["val_bpb"] - run[name]["val_bpb"], 8) if both else None
            run[f"ttt_gain_vs_{name}_bpb"] = gain
        if stage and entry is None:
            notes.append(f"{run['log_file']}: stage {stage}, on which the others are scored, not found: left out")


def _scored_stage(record: Record, runs: list[Run]) -> str | None:
    """Return the stage whose scores submission.json reports; else the last stage that every log has, or any has."""
    submitted = submitted_seeds(record)
    present = [stage for stage in SCORED_ORDER if any(run.get(stage) for run in runs)]
    for stage in present:
        for run in runs:
            said = submitted.get(run["seed"], {}).get("val_bpb")
            if run.get(stage) and said is not None and agrees(said, run[stage]["val_bpb"]):
                return stage
    return next((stage for stage in present if all(run.get(stage) for run in runs)), present[0] if present else None)


def _run_row(record: Record, run: Run, log: Log) -> dict[str, Any]:
    """Return the runs row of one imported seed, with the file and label each figure was read from."""
    hparams = run["hparams"]
    row: dict[str, Any] = {
        "seed": run["seed"], "repeat": 0, "attempt": 1, "config_hash": f"imported:{record['folder']}",
        "state": "DONE" if run["final_bpb"] is not None else "FAILED", "sweep": record["folder"],
        "error": None if run["final_bpb"] is not None else f"{run['log_file']} shows no final score",
        "source": f"imported from {record['folder']}", "config_json": hparams, "steps": run["steps"],
        "train_s": run.get("train_seconds"), "live_bpb": run["live_weights_bpb_at_stop"],
        "live_nats_per_token": run.get("live_weights_nats_at_stop"), "hessian_s": run["gptq_hessian_s"],
        "quantize_s": run["quantize_s"], "evaluate_s": run["evaluate_s"], "order0_bpb": run["order0_bpb"],
        "model_bytes": run["model_bytes"], "artifact_bytes": run["total_bytes"],
        "code_bytes": run.get("code_bytes_implied"), "code_bytes_convention": "as the log counted it",
        "num_params": run["model_params"], "size_limit_bytes": 16_000_000, "attempts": 1,
        "peak_memory_bytes": None if run["peak_mem_mib"] is None else run["peak_mem_mib"] * 2**20,
        "world_size": int(hparams["world_size"]) if hparams.get("world_size", "").isdigit() else None,
        "vocab_size": int(hparams["vocab_size"]) if hparams.get("vocab_size", "").isdigit() else None,
        "val_documents_hash": run["val_documents_hash"], "provenance_json": log.provenance,
    }  # fmt: skip
    if run["total_bytes"] is not None:
        row["within_limit"] = run["total_bytes"] <= row["size_limit_bytes"]
    size = validation_bytes(run)
    row["val_bytes"] = run["val_bytes"] if run["val_bytes"] is not None or size is None else round(size)
    for stage, ours in OUR_NAMES.items():
        if run.get(stage):
            row[f"{ours}_bpb"] = run[stage]["val_bpb"]
            row[f"{ours}_nats_per_token"] = run[stage]["val_loss_nats"]
            row[f"{ours}_s"] = run[stage]["seconds"]
    if run["ttt_s"] is not None or run.get("post_ttt"):
        row["ttt_s"] = run["ttt_s"] if run["ttt_s"] is not None else run["post_ttt"]["seconds"]
    return row


def _step_arrays(log: Log) -> dict[str, np.ndarray]:
    if not log.steps:
        return {}
    names = ("step", "loss", "elapsed_s", "tokens_per_s", "is_looped")
    columns = {name: [point[name] for point in log.steps] for name in names}
    return {
        name: np.array([np.nan if value is None else value for value in values], dtype=np.float64)
        if name in ("loss", "elapsed_s", "tokens_per_s")
        else np.array(values)
        for name, values in columns.items()
        if name != "is_looped" or None not in values
    }


def _date(name: str) -> str | None:
    match = re.match(r"\d{4}-\d{2}-\d{2}", name)
    return match.group() if match else None


def _first(notes: list[str]) -> str:
    return f"; {notes[0]}" if notes else ""
