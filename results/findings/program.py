"""What a program that was run here says of itself: its newest lines while it runs, its logs and results at its end.

The forms are those of `import-logs`. results.json holds figures by the names of the runs table; it wins over what was
parsed, and where the two contradict each other that is a finding.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results.findings.importer import OUR_NAMES, run_row, step_arrays
from results.published.labels import is_progress
from results.published.lines import RATE, TRAIN_LOSS, flatten_json, read_score, step_of
from results.published.log import SINGLE_FIGURES, Log, parse_runs
from results.published.scoring import OTHER, entry_of, score_record
from results.published.stages import STAGES
from results.published.text_files import clean_lines, read_text
from results.schema import RUN_COLUMNS, SCORES
from results.stats import bits_per_byte

RESULTS_FILE = "results.json"
MAX_RESULTS_BYTES = 1 << 20
SCORE_FORM = "quantized val_loss:1.2 val_bpb:0.5"
# what the runner knows better than any program
NOT_FIGURES = frozenset({
    "schema_version", "run_id", "variant", "seed", "repeat", "attempt", "config_hash", "state", "error", "error_rank",
    "sweep", "source", "config_json", "data_hash", "code_hash", "code_changed", "git_commit", "git_dirty",
    "versions_json", "python_version", "torch_version", "ray_version", "node_label", "gpu_model", "driver_version",
    "cuda_version", "num_cpus", "num_gpus", "world_size", "started_at", "ended_at", "attempts", "preemptions",
    "num_resumes", "reused_stages", "resumed_at_steps", "lost_steps", "is_slow", "provenance_json",
    "size_limit_bytes", "within_limit", "code_bytes_convention",
})  # fmt: skip
FIGURES = {column.name: column.type for column in RUN_COLUMNS if column.name not in NOT_FIGURES}
# figures that a reader of such a row looks for
EXPECTED = ("steps", "train_s", "model_bytes", "code_bytes", "artifact_bytes")
LONG_LINES = 50_000  # no log of a training has so many that tell something
TELLING = re.compile(r"[:={/]|seed|bpb|step|time|warmup|hessian|peak", re.IGNORECASE)
SECONDS_TOLERANCE = 0.02  # logs round times
FILLED = (
    "steps", "train_ms", "stop_reason", "train_seconds", "live_weights_bpb_at_stop", "live_weights_nats_at_stop",
    "model_bytes", "total_bytes", "code_bytes_implied", *SINGLE_FIGURES, *STAGES,
)  # fmt: skip


class Progress(NamedTuple):
    """How far a program says it is; step is None where its newest lines show only a score."""

    step: int | None
    total: int | None
    metrics: dict[str, float]
    is_score: bool


class Figures(NamedTuple):
    """What a finished program said: columns of the runs table, its curve, contradictions, and what is missing."""

    columns: dict[str, Any]
    steps: dict[str, np.ndarray]
    provenance: dict[str, str]
    findings: list[str]
    notes: list[str]


def read_progress(lines: Sequence[str]) -> Progress | None:
    """Return what the last telling line among some new ones says, None where none says anything."""
    for line in map(flatten_json, reversed(clean_lines("\n".join(lines)))):
        step, score = step_of(line), read_score(line)
        metrics: dict[str, float] = {}
        if (loss := TRAIN_LOSS.search(line)) is not None:
            metrics["loss"] = float(loss.group(1))
        if (rate := RATE.search(line)) is not None:
            metrics["tokens_per_s"] = float(rate.group(1).replace(",", ""))
        if score is not None:
            metrics["bpb"] = score.bpb
        if step is not None:
            return Progress(*step, metrics, False)
        if score is not None and not is_progress(score.label):
            return Progress(None, None, {"bpb": score.bpb}, True)
    return None


def read_figures(logs: Mapping[str, Path], results: Path | None, *, seed: int) -> Figures:
    """Return the figures of a finished program.

    logs: what it printed and wrote, by name, what counts most first. results: its results.json, if it left one.
    Raises ValueError, one line, where neither has a score, or results.json is not as documented.
    """
    notes: list[str] = []
    findings: list[str] = []
    log = choose_log(read_logs(logs, notes))
    columns: dict[str, Any] = {}
    decimals: dict[str, int] = {}
    if log is not None:
        columns = columns_of(log, notes)
        decimals = log.run.get("score_decimals", {})
        inside = log.run["seed_in_log"]
        if inside is not None and inside != seed:
            findings.append(f"{log.run['log_file']} names seed {inside}, but seed {seed} was asked for")
    if results is None:
        notes += log.unknown if log is not None else []
    else:
        said = read_results(results, notes)
        findings += contradictions(said, columns, decimals, log.run["log_file"] if log is not None else "the log")
        columns |= said
    if not any(columns.get(f"{stage}_bpb") is not None for stage in SCORES):
        raise ValueError(no_score(logs, log))
    provenance = dict.fromkeys(columns, RESULTS_FILE) if log is None else dict(log.provenance)
    return Figures(columns, {} if log is None else step_arrays(log), provenance, findings, notes)


def read_logs(paths: Mapping[str, Path], notes: list[str]) -> list[Log]:
    """Return every run that the logs show, those that cannot be read left out with a note."""
    found: list[Log] = []
    for name, path in paths.items():
        try:
            decoded = read_text(path)
        except ValueError as error:
            notes.append(f"{name}: left out ({str(error).removeprefix(f'{path}: ')})")
            continue
        runs = [log for log in parse_runs(without_idle_lines(decoded.text), name) if log.is_recognized]
        if len(runs) > 1:
            notes.append(f"{name}: holds {len(runs)} runs, one after the other; the last one with a score counts")
        found += reversed(runs)
    return found


def without_idle_lines(text: str) -> str:
    """Return a very long log without the lines that can say nothing: each costs dozens of tries of a form."""
    if text.count("\n") <= LONG_LINES:
        return text
    return "\n".join(line for line in text.splitlines() if TELLING.search(line))


def choose_log(logs: Sequence[Log]) -> Log | None:
    """Return the first log with a score, with what it lacks filled in from the others of the same run."""
    scored = [log for log in logs if log.has_scores] or [
        log for log in logs if log.run["live_weights_bpb_at_stop"] is not None
    ]
    chosen = next(iter(scored or logs), None)
    for log in logs:
        if chosen is None or log is chosen:
            continue
        for name in FILLED:
            if chosen.run.get(name) is None and log.run.get(name) is not None:
                chosen.run[name] = log.run[name]
                if name in log.provenance:
                    chosen.provenance[name] = log.provenance[name]
        if not chosen.steps:
            chosen.steps.extend(log.steps)
    return chosen


def columns_of(log: Log, notes: list[str]) -> dict[str, Any]:
    """Return the columns of the runs table that a log shows; a score under a label of no stage is none."""
    run = log.run
    record = {"folder": "program", "submission_json": None, "readme_seed_tables": [], "runs": [run]}
    score_record(record, notes, [])
    row = run_row(record, run, log)
    columns = {name: value for name, value in row.items() if name in FIGURES and value is not None}
    stage = run["scored_stage"]
    entry = entry_of(run, stage)
    if stage and stage.startswith(OTHER) and entry is not None and entry.get("stage") in OUR_NAMES:
        ours = OUR_NAMES[entry["stage"]]
        for figure, name in (("bpb", "val_bpb"), ("nats_per_token", "val_loss_nats"), ("s", "seconds")):
            if columns.get(f"{ours}_{figure}") is None and entry[name] is not None:
                columns[f"{ours}_{figure}"] = entry[name]
        log.provenance[ours] = f"{run['log_file']}: {entry['label']}"
    if run["total_bytes"] is not None:
        columns["artifact_bytes"] = run["total_bytes"]
    return columns


def read_results(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the figures in a results.json. Raises ValueError, one line naming the key, for what is no such figure."""
    if path.stat().st_size > MAX_RESULTS_BYTES:
        raise ValueError(
            f"{RESULTS_FILE} has {path.stat().st_size} bytes; it holds figures, at most {MAX_RESULTS_BYTES}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{RESULTS_FILE} is not JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{RESULTS_FILE} must be a mapping of names to figures")
    found = {
        name: check_figure(name, value) for name, value in content.items() if name in FIGURES and value is not None
    }
    left = [str(name) for name in content if name not in FIGURES and name not in NOT_FIGURES]
    if left:
        notes.append(
            f"{RESULTS_FILE}: not figures of the runs table, left out: {', '.join(left[:6])}" + " ..." * (len(left) > 6)
        )
    for stage in SCORES:
        nats, tokens, num_bytes = (found.get(f"{stage}_{name}") for name in ("nats", "tokens", "bytes"))
        if nats is not None and num_bytes and f"{stage}_bpb" not in found:
            found[f"{stage}_bpb"] = bits_per_byte(nats, num_bytes)
        if nats is not None and tokens:
            found[f"{stage}_nats_per_token"] = nats / tokens
    return found


def check_figure(name: str, value: Any) -> Any:
    """Return a figure as its column has it. Raises ValueError naming it."""
    kind = FIGURES[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind == "string" and isinstance(value, str):
        return value
    if kind == "float64" and is_number:
        return float(value)
    if kind in ("int32", "int64") and is_number and float(value).is_integer():
        return int(value)
    words = {"string": "text", "float64": "a finite number"}.get(kind, "a whole number")
    raise ValueError(f"{RESULTS_FILE}: {name}={value!r} must be {words}")


def contradictions(
    said: Mapping[str, Any], parsed: Mapping[str, Any], decimals: Mapping[str, int], log_file: str
) -> list[str]:
    """Return where results.json says something else than the log, by more than the log's digits."""
    names = {ours: theirs for theirs, ours in OUR_NAMES.items()}
    lines = []
    for name, value in said.items():
        shown = parsed.get(name)
        if shown is None:
            continue
        stage = name.removesuffix("_nats_per_token").removesuffix("_bpb")
        if stage != name:
            digits = decimals.get(names.get(stage, stage), 4)
            is_same = abs(value - shown) <= 0.5 * 10.0**-digits * (1 + 1e-6)
        elif name.endswith("_s") or name in ("tokens_per_s", "peak_memory_bytes"):
            is_same = math.isclose(value, shown, rel_tol=SECONDS_TOLERANCE, abs_tol=0.1)
        elif isinstance(value, float):
            is_same = math.isclose(value, shown, rel_tol=1e-5)
        else:
            is_same = value == shown
        if not is_same:
            lines.append(f"{name}: {RESULTS_FILE} says {value}, {log_file} shows {shown}")
    return lines


def no_score(logs: Mapping[str, Path], log: Log | None) -> str:
    """Return one line on logs without a score, with the last line that speaks of one."""
    labels = [entry["label"] for entry in log.run["other_scores"]] if log is not None else []
    if labels:
        shown = f"{log.run['log_file'] if log else ''} shows one under {labels[-1]!r}, which names no stage"
        return f"no score: {shown}; print {SCORE_FORM!r}, or write {RESULTS_FILE}"
    where = ", ".join(list(logs)[:3]) or "nothing that it printed or wrote"
    return f"no score: no line of {where} has a known form ({SCORE_FORM!r}), and there is no {RESULTS_FILE}"
