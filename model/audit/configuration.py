"""Probe of one configuration over all seeds (R9): equal fingerprints, and every announced seed accounted for.

Of a sweep of variants each is one configuration; what no variant sets must be equal in all of them. Device, versions,
threads and attention kernel are compared stage by stage: a stage may be the work of a later attempt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from model.audit.finished_run import RunName, name_run
from model.audit.verdicts import Result, judge, not_run
from model.config import canonical_json
from model.files.plain import read_json
from model.report import STAGES

SAME = ("config_hash", "data_hash", "code_hash", "versions", "world_size", "device", "num_threads", "attention")
IN_ALL_VARIANTS = ("data_hash", "code_hash", "versions", "world_size", "device", "num_threads")
SURROUNDINGS = ("device", "num_threads", "versions", "attention")
PROBE, RULE = "one_configuration", "R9"
UNSCORED = ("FAILED", "CANCELLED", "INFEASIBLE")


def probe_configuration(out: Path, runs: Sequence[Path]) -> Result:
    """Compare the fingerprints of every run of a sweep, and its runs with the seeds that were announced."""
    described = {path.name: {**read_json(path / "run.json"), **read_surroundings(path)} for path in runs}
    faults = find_differing_in_variants(described)
    sweep_path = out / "sweep.json"
    if not sweep_path.is_file():
        if faults:
            return _judge(faults, described)
        return not_run(PROBE, RULE, f"{sweep_path} is not there: nobody announced the seeds", sample_size=len(runs),
                       sample_of="runs", measured=0)  # fmt: skip
    sweep = read_json(sweep_path)
    present = {name_run(path): path.name for path in runs}
    for name, run in {key: described[folder] for key, folder in present.items()}.items():
        announced = {**sweep, "config_hash": hash_of_variant(sweep, name.variant)}
        faults += [
            f"{present[name]}: {field} is not that of sweep.json"
            for field in ("config_hash", "data_hash")
            if announced.get(field) and run.get(field) != announced[field]
        ]
    failed, started = list_failed_runs(out / "state.json"), first_events(out / "events.jsonl")
    faults += find_unannounced(sweep, set(present), failed, started)
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


def hash_of_variant(sweep: Mapping[str, Any], variant: str) -> Any:
    """Return the config_hash that sweep.json has for a variant; that of the sweep where it names none."""
    hashes = sweep.get("variants") or {}
    return hashes.get(variant) if variant and variant in hashes else sweep.get("config_hash")


def find_differing_in_variants(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each fingerprint in which runs of one variant differ, or variants in what they do not set."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, run in described.items():
        variant = name.rpartition("-seed=")[0]
        groups.setdefault(variant, {})[name] = run
    faults = [fault for group in groups.values() for fault in find_differing(group)]
    firsts = dict(next(iter(group.items())) for group in groups.values())
    return faults + (different_fields(firsts, IN_ALL_VARIANTS) if len(groups) > 1 else [])


def find_differing(described: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line for each fingerprint in which runs differ, and for each run that mixes code."""
    faults = different_fields(described, (*SAME, *(f"{stage} {name}" for stage in STAGES for name in SURROUNDINGS)))
    faults += [
        f"{name} was continued under other code or surroundings"
        for name, run in described.items()
        if run.get("code_changed")
    ]
    return faults


def different_fields(described: Mapping[str, Mapping[str, Any]], fields: Sequence[str]) -> list[str]:
    """Return a line for each field in which runs differ."""
    faults = []
    for field in fields:
        is_of_a_stage = " " in field  # absent from an unfinished run: nothing to compare
        values = {
            name: canonical_json(run.get(field)) for name, run in described.items() if field in run or not is_of_a_stage
        }
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name}: {value[:14]}" for name, value in values.items())
            faults.append(f"{field} differs ({shown})")
    return faults


def find_unannounced(
    sweep: Mapping[str, Any], present: set[RunName], failed: set[RunName], started: Mapping[RunName, float]
) -> list[str]:
    """Return a line for each announced run that is nowhere, and each run announced late or not at all.

    A run that failed has no directory of its own, perhaps, but the sweep's state lists it.
    """
    announced: dict[RunName, float] = {}
    for entry in sweep.get("announcements", []):
        moment = datetime.fromisoformat(entry["time"]).timestamp()
        variants = entry.get("variants") or list(sweep.get("variants") or [""])
        for variant, seed in itertools.product(variants, entry["seeds"]):
            for repeat in range(int(entry.get("repeats", 1))):
                announced.setdefault(RunName(str(variant), int(seed), repeat), moment)
    missing, strange = set(announced) - present - failed, present - set(announced)
    faults = [
        f"{describe_run(pair)} was announced, but is neither here nor listed as failed" for pair in sorted(missing)
    ]
    faults += [f"{describe_run(pair)} was never announced" for pair in sorted(strange)]
    faults += [
        f"{describe_run(pair)} was announced after it had started"
        for pair in sorted(present & set(announced))
        if pair in started and started[pair] < announced[pair]
    ]
    return faults


def describe_run(run: RunName) -> str:
    """Return a run in words."""
    named = f"variant {run.variant} " if run.variant else ""
    return f"{named}seed {run.seed}" + (f" repeat {run.repeat}" if run.repeat else "")


def list_failed_runs(path: Path) -> set[RunName]:
    """Return the runs that the sweep's state lists as ended without a score, none where there is no state."""
    runs = read_json(path).get("runs", []) if path.is_file() else []
    return {_name(run) for run in runs if run.get("state") in UNSCORED}


def _name(entry: Mapping[str, Any]) -> RunName:
    return RunName(str(entry.get("variant") or ""), int(entry["seed"]), int(entry["repeat"]))


def first_events(path: Path) -> dict[RunName, float]:
    """Return when each run's first event was logged, in seconds since 1970. Raises ValueError on a damaged line."""
    first: dict[RunName, float] = {}
    try:
        for line in path.read_text().splitlines() if path.is_file() else ():
            event = json.loads(line)
            first.setdefault(_name(event), datetime.fromisoformat(event["time"]).timestamp())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r})") from None
    return first
