"""Probe of one configuration over all seeds (R9): equal fingerprints, and every announced seed accounted for.

Device, versions, threads and attention kernel are compared stage by stage: a stage may be the work of a later attempt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.audit.verdicts import Result, judge, not_run
from model.config import canonical_json
from model.files.plain import read_json

SAME = ("config_hash", "data_hash", "code_hash", "versions", "world_size", "device", "num_threads", "attention")
SURROUNDINGS = ("device", "num_threads", "versions", "attention")
STAGES = ("train", "quantize", "evaluate", "ttt")
PROBE, RULE = "one_configuration", "R9"
UNSCORED = ("FAILED", "CANCELLED", "INFEASIBLE")
Pair = tuple[int, int]  # seed, repeat


def pair_of(workdir: Path) -> Pair:
    """Return the seed and repeat that a run directory is named after. Raises ValueError for another name."""
    found = re.fullmatch(r"seed=(-?\d+)-repeat=(\d+)", workdir.name)
    if found is None:
        raise ValueError(f"{workdir} is not named seed=S-repeat=R")
    return int(found[1]), int(found[2])


def probe_configuration(out: Path, runs: Sequence[Path]) -> Result:
    """Compare the fingerprints of every run of a sweep, and its runs with the seeds that were announced."""
    described = {path.name: {**read_json(path / "run.json"), **read_surroundings(path)} for path in runs}
    faults = find_differing(described)
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
    present = {pair_of(path) for path in runs}
    faults += find_unannounced(sweep, present, list_failed_runs(out / "state.json"), first_events(out / "events.jsonl"))
    return _judge(faults, described)


def _judge(faults: list[str], described: Mapping[str, Any]) -> Result:
    return judge(
        PROBE, RULE, measured=len(faults), limit=0, unit="differences", sample_size=len(described), sample_of="runs",
        detail=faults[0] if faults else f"equal in {', '.join(SAME)}; every announced seed is there",
        not_checked="runs started outside this folder; whether the versions named are those that were loaded",
    )  # fmt: skip


def read_surroundings(workdir: Path) -> dict[str, Any]:
    """Return what the records of a run's stages say of their surroundings, "ttt device" and so on.

    Empty where no stage is finished, or where an earlier version wrote the records.
    """
    found: dict[str, Any] = {}
    for stage in STAGES:
        path = workdir / "stages" / f"{stage}.json"
        surroundings = read_json(path).get("surroundings", {}) if path.is_file() else {}
        if not isinstance(surroundings, dict):
            raise ValueError(f"{path} is damaged: its surroundings are no table")
        found |= {f"{stage} {name}": surroundings[name] for name in SURROUNDINGS if name in surroundings}
    return found


def find_differing(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each fingerprint in which runs differ, and for each run that mixes code."""
    faults = []
    for field in (*SAME, *(f"{stage} {name}" for stage in STAGES for name in SURROUNDINGS)):
        is_of_a_stage = " " in field  # absent from an unfinished run: nothing to compare
        values = {
            name: canonical_json(run.get(field)) for name, run in described.items() if field in run or not is_of_a_stage
        }
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value[:14]}" for name, value in values.items())
            faults.append(f"{field} differs ({shown})")
    faults += [
        f"{name} was continued under other code or surroundings"
        for name, run in described.items()
        if run.get("code_changed")
    ]
    return faults


def find_unannounced(
    sweep: Mapping[str, Any], present: set[Pair], failed: set[Pair], started: Mapping[Pair, float]
) -> list[str]:
    """Return a line for each announced run that is nowhere, and each run announced late or not at all.

    A run that failed has no directory of its own, perhaps, but the sweep's state lists it.
    """
    announced: dict[Pair, float] = {}
    for entry in sweep.get("announcements", []):
        moment = datetime.fromisoformat(entry["time"]).timestamp()
        for seed in entry["seeds"]:
            for repeat in range(int(entry.get("repeats", 1))):
                announced.setdefault((int(seed), repeat), moment)
    missing, strange = set(announced) - present - failed, present - set(announced)
    faults = [f"{shown(pair)} was announced, but is neither here nor listed as failed" for pair in sorted(missing)]
    faults += [f"{shown(pair)} was never announced" for pair in sorted(strange)]
    faults += [
        f"{shown(pair)} was announced after it had started"
        for pair in sorted(present & set(announced))
        if pair in started and started[pair] < announced[pair]
    ]
    return faults


def shown(pair: Pair) -> str:
    """Return a run in words."""
    return f"seed {pair[0]}" + (f" repeat {pair[1]}" if pair[1] else "")


def list_failed_runs(path: Path) -> set[Pair]:
    """Return the runs that the sweep's state lists as ended without a score, none where there is no state."""
    runs = read_json(path).get("runs", []) if path.is_file() else []
    return {(int(run["seed"]), int(run["repeat"])) for run in runs if run.get("state") in UNSCORED}


def first_events(path: Path) -> dict[Pair, float]:
    """Return when each run's first event was logged, in seconds since 1970. Raises ValueError on a damaged line."""
    first: dict[Pair, float] = {}
    try:
        for line in path.read_text().splitlines() if path.is_file() else ():
            event = json.loads(line)
            pair = (int(event["seed"]), int(event["repeat"]))
            first.setdefault(pair, datetime.fromisoformat(event["time"]).timestamp())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None
    return first
