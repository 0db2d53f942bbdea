"""Probe of one configuration over all seeds (R9): equal fingerprints, and every announced seed accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.audit_results import Result, judged, not_run
from model.audit_run import read_json
from model.config import canonical_json

SAME = ("config_hash", "data_hash", "code_hash", "versions", "world_size", "device", "num_threads")
PROBE, RULE = "one_configuration", "R9"


def probe_configuration(out: Path, runs: Sequence[Path]) -> Result:
    """Compare the fingerprints of every run of a sweep, and its runs with the seeds that were announced."""
    described = {path.name: read_json(path / "run.json") for path in runs}
    faults = differing(described)
    sweep_path = out / "sweep.json"
    if not sweep_path.is_file():
        if faults:
            return _judge(faults, described)
        return not_run(PROBE, RULE, f"{sweep_path} is not there: nobody announced the seeds", sample_size=len(runs),
                       sample_of="runs", measured=0)  # fmt: skip
    sweep = read_json(sweep_path)
    faults += [
        f"{name}: {field} is not that of sweep.json"
        for name, run in described.items()
        for field in ("config_hash", "data_hash")
        if sweep.get(field) and run.get(field) != sweep[field]
    ]
    faults += unannounced(sweep, described, first_events(out / "events.jsonl"))
    return _judge(faults, described)


def _judge(faults: list[str], described: Mapping[str, Any]) -> Result:
    return judged(
        PROBE, RULE, measured=len(faults), limit=0, unit="differences", sample_size=len(described), sample_of="runs",
        detail=faults[0] if faults else f"equal in {', '.join(SAME)}; every announced seed is there",
        not_checked="runs started outside this folder; whether the versions named are those that were loaded",
    )  # fmt: skip


def differing(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each fingerprint in which runs differ, and for each run that mixes code."""
    faults = []
    for field in SAME:
        values = {name: canonical_json(run.get(field)) for name, run in described.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value[:14]}" for name, value in values.items())
            faults.append(f"{field} differs ({shown})")
    faults += [f"{name} was continued under other code" for name, run in described.items() if run.get("code_changed")]
    return faults


def unannounced(
    sweep: Mapping[str, Any], described: Mapping[str, Mapping[str, Any]], started: Mapping[int, float]
) -> list[str]:
    """Return a line for each announced seed without a run, and each run announced late or not at all."""
    announced: dict[int, float] = {}
    for entry in sweep.get("announcements", []):
        moment = datetime.fromisoformat(entry["time"]).timestamp()
        for seed in entry["seeds"]:
            announced.setdefault(int(seed), moment)
    present = {int(run["seed"]) for run in described.values()}
    faults = [f"seed {seed} was announced, but has no run here" for seed in sorted(set(announced) - present)]
    faults += [f"seed {seed} was never announced" for seed in sorted(present - set(announced))]
    faults += [
        f"seed {seed} was announced after it had started"
        for seed in sorted(present & set(announced))
        if seed in started and started[seed] < announced[seed]
    ]
    return faults


def first_events(path: Path) -> dict[int, float]:
    """Return when each seed's first event was logged, in seconds since 1970."""
    first: dict[int, float] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
            moment, seed = event.get("time", event.get("at")), event.get("seed")
        except (ValueError, AttributeError):
            raise ValueError(f"{path} is damaged: a line of it is not an event") from None
        if seed is not None and moment is not None:
            seconds = moment if isinstance(moment, int | float) else datetime.fromisoformat(moment).timestamp()
            first.setdefault(int(seed), float(seconds))
    return first
