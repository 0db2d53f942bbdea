"""Reading a submission folder: logs, submission.json and README tables, into one record and into our Parquet tables."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results.findings.code_files import read_code
from results.findings.findings import Finding
from results.findings.readme_tables import read_spreads, read_tables, read_values
from results.findings.review import find_disagreements, review
from results.published.joins import join_logs, leave_aside, promote_variants, settle_seeds
from results.published.layout import Layout, lay_out
from results.published.log import Log, parse_runs
from results.published.records import RECORD_FILE, Record, Run, one_run_a_seed, submitted_seeds, text_bytes
from results.published.scoring import reported_scores, score_record
from results.published.submission_json import read_submission_json
from results.published.text_files import read_text
from results.published.track import SIZE_LIMIT_BYTES
from results.store.writer import commit_attempt

OUR_NAMES = {"post_ema": "post_ema", "post_quant": "pre_ttt", "sliding": "sliding", "ttt_lr0": "ttt_lr0",
             "post_ttt": "post_ttt"}  # fmt: skip
NOT_STAGES = ("steps", "model_bytes", "total_bytes")  # what every log should show
SOURCE_SUFFIXES = (".py", ".sh", ".cpp", ".cu", ".cuh", ".h")
UNKNOWN_SEED = -1  # in the tables, whose key is a number; shown as "?"


class Submission(NamedTuple):
    """A folder as a record, its logs by file name, and what could not be read or found (one line each)."""

    record: Record
    logs: dict[str, Log]
    notes: list[str]


def read_submission(folder: Path) -> Submission:
    """Return everything the known forms show in a submission folder.

    Files that cannot be read are left out with a note. Raises FileNotFoundError for a folder that is not there,
    ValueError for one without any readable log or with several submissions in it.
    """
    layout = lay_out(folder)
    notes = list(layout.notes)
    logs = _read_logs(layout, notes)
    submission = read_submission_json(layout.submission, notes)
    readme = _readme_text(layout.root, notes)
    tables = read_tables(readme)
    known = _known_seeds(submission, tables)
    reported = partial(reported_scores, submission, num_seeds=len(known))
    settle_seeds(logs, known, reported, notes)
    logs = join_logs(leave_aside(logs, known, reported, notes), reported, notes)
    promote_variants(logs)
    for log in logs:
        notes += log.unknown
    record: Record = {
        "pr": None,
        "folder": layout.root.resolve().name,
        "date_folder": _date(layout.root.resolve().name),
        "track": None,
        "submission_json": submission,
        "readme_seed_tables": tables,
        "readme_spreads": read_spreads(readme),
        "readme_values": read_values(readme),
        "code": read_code(layout.root),
        "source_file_bytes_in_folder": _source_sizes(layout.root),
        "runs": [log.run for log in logs],
    }
    score_record(record, notes, re.findall(r"(?<![\d.])\d\.\d{3,10}(?!\d)", readme))
    used = [run["log_file"] for run in _runs_to_commit(record)]
    notes += _notes_on([log for log in logs if log.run["log_file"] in used])
    notes += review(record).unchecked
    return Submission(record, {log.run["log_file"]: log for log in logs}, list(dict.fromkeys(notes)))


def import_submission(folder: Path, out: Path) -> tuple[Submission, list[Finding]]:
    """Write a submission folder's figures into OUT/results and the record with its disagreements into OUT/record.json.

    Raises ValueError when OUT holds results that were not imported.
    """
    submission = read_submission(folder)
    if (out / "results").is_dir():
        if not (out / RECORD_FILE).is_file():
            raise ValueError(f"out={out} holds the results of runs; import into another folder")
        shutil.rmtree(out / "results")
    findings = find_disagreements(submission.record)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "record": submission.record,
        "disagreements": [finding._asdict() for finding in findings],
        "notes": submission.notes,
    }
    (out / RECORD_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for run in _runs_to_commit(submission.record):
        log = submission.logs[run["log_file"]]
        commit_attempt(out, run=run_row(submission.record, run, log), steps=step_arrays(log))
    return submission, findings


def _runs_to_commit(record: Record) -> list[Run]:
    """Return one run a seed: the scored ones, and for seeds without a score the first log."""
    chosen = {run["seed"]: run for run in one_run_a_seed(record)}
    is_known = any(run["seed"] is not None for run in record["runs"])
    for run in record["runs"]:
        if run.get("is_chosen") is not False and (run["seed"] is not None or not is_known):
            chosen.setdefault(run["seed"], run)
    return list(chosen.values())


def unscored_seeds(record: Record) -> list[int | None]:
    """Return the seeds of which no log shows the final score; None stands for logs that name no seed."""
    seeds = {run["seed"] for run in record["runs"] if run["seed"] is not None} or {None}
    return [
        seed
        for seed in seeds
        if not any(run["seed"] == seed and run["final_bpb"] is not None for run in record["runs"])
    ]


def _read_logs(layout: Layout, notes: list[str]) -> list[Log]:
    """Return the runs that the folder's logs show, in the order of their files."""
    logs: list[Log] = []
    quoted: list[str] = []
    for path in layout.logs:
        found = _read_log(path, layout.root, notes, quoted)
        logs += found
        if len(found) > 1:
            notes.append(
                f"{found[0].run['log_file'].partition(' (run')[0]}: holds {len(found)} runs, one after the other"
            )
    if not any(log.has_scores for log in logs):
        for path in layout.results:
            logs += [log for log in _read_log(path, layout.root, notes, []) if log.has_scores]
    if not logs:
        said = [*quoted, *notes]
        detail = f"; {said[0]}" if said else ""
        raise ValueError(f"{layout.root}: no training log with a line of a known form (*.log, *.txt, logs/*){detail}")
    notes += quoted
    return logs


def _read_log(path: Path, root: Path, notes: list[str], quoted: list[str]) -> list[Log]:
    """Return the runs in one file, none where it is not a log; `quoted` takes what is said then."""
    name = path.relative_to(root).as_posix() if root in path.parents else path.name
    try:
        decoded = read_text(path)
    except ValueError as error:
        notes.append(f"{name}: left out ({str(error).removeprefix(f'{path}: ')})")
        return []
    found = [log for log in parse_runs(decoded.text, name) if log.is_recognized]
    if found and decoded.remark:
        notes.append(f"{name}: {decoded.remark}")
    last = _last_score(decoded.text)
    if not found and (last or path.suffix.lower() == ".log"):
        quoted.append(f"{name}: no line of a known form; not a training log we can read{last}")
    return found


def _last_score(text: str) -> str:
    """Return the last line that speaks of bits per byte, to show what was not understood."""
    lines = [line.strip() for line in text.splitlines() if "bpb" in line.lower()]
    return f" (the last line with bpb: {lines[-1][:160]!r})" if lines else ""


def _notes_on(logs: list[Log]) -> list[str]:
    """Return what the logs of the table's rows lack, stages apart: a log has those that its recipe has."""
    notes = []
    for log in logs:
        missing = {name: f"{log.run['log_file']}: {name} not found" for name in NOT_STAGES if log.run[name] is None}
        notes += [line for line in log.missing if line.startswith(tuple(missing.values()))]
    if any(log.run["seed"] is None for log in logs):
        notes.append("no log, name or submission.json says which seed this is: shown as seed ?")
    return notes


def _known_seeds(submission: dict[str, Any] | None, tables: list[dict[str, Any]]) -> list[int]:
    """Return the seeds that submission.json lists, else those of the README's tables."""
    submission = submission or {}
    seeds = set(submitted_seeds({"submission_json": submission}))
    listed = submission.get("seeds", submission.get("seed"))
    for text in map(str, listed if isinstance(listed, list) else [listed]):
        if re.fullmatch(r"[0-9]{1,18}", text):
            seeds.add(int(text))
    if not seeds:
        cells = [str(next(iter(row.values()), "")) for table in tables for row in table["rows"]]
        seeds = {int(match.group(1)) for cell in cells if (match := re.fullmatch(r"\W*([0-9]{1,9})\W*", cell))}
    return sorted(seeds)


def _source_sizes(root: Path) -> dict[str, int]:
    return {
        path.name: path.stat().st_size
        for path in sorted(root.iterdir())
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    }


def _readme_text(root: Path, notes: list[str]) -> str:
    """Return the README's text, empty where there is none that can be read."""
    path = next((path for path in sorted(root.iterdir()) if path.name.lower() == "readme.md" and path.is_file()), None)
    try:
        return "" if path is None else read_text(path).text
    except ValueError as error:
        notes.append(f"README.md: left out ({str(error).removeprefix(f'{path}: ')})")
        return ""


def run_row(record: Record, run: Run, log: Log) -> dict[str, Any]:
    """Return the runs row of one imported seed, with the file and label each figure was read from."""
    hparams = run["hparams"]
    row: dict[str, Any] = {
        "seed": UNKNOWN_SEED if run["seed"] is None else run["seed"], "repeat": 0, "attempt": 1,
        "config_hash": f"imported:{record['folder']}",
        "state": "DONE" if run["final_bpb"] is not None else "FAILED", "sweep": record["folder"],
        "error": None if run["final_bpb"] is not None else f"{run['log_file']} shows no final score",
        "source": f"imported from {record['folder']}", "config_json": hparams, "steps": run["steps"],
        "train_s": run.get("train_seconds"), "live_bpb": run["live_weights_bpb_at_stop"],
        "live_nats_per_token": run.get("live_weights_nats_at_stop"), "hessian_s": run["gptq_hessian_s"],
        "quantize_s": run["quantize_s"], "evaluate_s": run["evaluate_s"], "order0_bpb": run["order0_bpb"],
        "model_bytes": run["model_bytes"], "artifact_bytes": run["total_bytes"],
        "code_bytes": run.get("code_bytes_implied"), "code_bytes_convention": "as the log counted it",
        "num_params": run["model_params"], "size_limit_bytes": SIZE_LIMIT_BYTES, "attempts": 1,
        "peak_memory_bytes": None if run["peak_mem_mib"] is None else run["peak_mem_mib"] * 2**20,
        "world_size": _integer(run["settings"].get("world_size")),
        "vocab_size": _integer(run["settings"].get("vocab_size")),
        "val_documents_hash": run["val_documents_hash"], "provenance_json": log.provenance,
    }  # fmt: skip
    if run["total_bytes"] is not None:
        row["within_limit"] = run["total_bytes"] <= row["size_limit_bytes"]
    size = text_bytes(one_run_a_seed(record))  # one text for all seeds, although each log rounds it differently
    row["val_bytes"] = run["val_bytes"] if run["val_bytes"] is not None or size is None else round(size)
    for stage, ours in OUR_NAMES.items():
        if run.get(stage):
            row[f"{ours}_bpb"] = run[stage]["val_bpb"]
            row[f"{ours}_nats_per_token"] = run[stage]["val_loss_nats"]
            row[f"{ours}_s"] = run[stage]["seconds"]
    if run["ttt_s"] is not None or run.get("post_ttt"):
        row["ttt_s"] = run["ttt_s"] if run["ttt_s"] is not None else run["post_ttt"]["seconds"]
    return row


def step_arrays(log: Log) -> dict[str, np.ndarray]:
    """Return the columns of the steps table that a log's curve shows, {} without one."""
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


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[0-9]{1,12}", text) else None
