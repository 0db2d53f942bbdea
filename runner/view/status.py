"""Looking at a sweep from outside: from its files alone, while a driver is at work and after it died. Needs no Ray."""

from __future__ import annotations

import errno
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from model.fields import nearest
from results.render import mixed_devices
from results.schema import BASE
from runner.folder.directory import SweepDirectory, run_from_json, run_to_json, utc
from runner.folder.lease import BEAT_EVERY_S, LEASE_TTL_S, Owner
from runner.folder.storage import open_storage
from runner.life.states import FINAL, WORKING, Run, State
from runner.spec.sweep import RunKey
from runner.view.progress import Paces, Row, duration, row_of

GIVEN_UP = FINAL - {State.DONE}
FOLLOW_EVERY_S = 0.5
LOOK_S = 2 * BEAT_EVERY_S + 1.0  # for a heartbeat to move


class Age(NamedTuple):
    """How long ago a run entered its state, and how long ago it last got further; None where it is over."""

    state_s: float
    progress_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A sweep as its files show it at one moment."""

    sweep: str
    driver: str  # who drives it, or that nobody does
    is_driven: bool
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    ages: tuple[Age, ...]
    eta_s: float | None  # of the whole sweep
    gpu_hours: tuple[float, ...] = ()  # of each run, all its attempts; () in a sweep without GPUs
    price: float | None = None  # of a GPU for an hour
    devices: str = ""  # which runs are on what, where they are on different models of GPU, or on GPUs and CPUs

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are in each state, in order of first appearance."""
        return dict(Counter(str(run.state) for run in self.runs))


def look(out: str) -> Picture:
    """Return the newest picture of a sweep. Runs whose driver died are settled: CANCELLED, and resumable.

    Nothing is written while the driver's heartbeat is fresh, or where the folder cannot be written.
    Raises FileNotFoundError where no sweep was ever run.
    """
    directory = SweepDirectory(open_storage(out))
    state = directory.read_state()
    if not state:
        raise FileNotFoundError(describe_folder(directory))
    now = time.time()
    owner = directory.read_owner()
    runs = [run_from_json(plain) for plain in state["runs"]]
    is_driven = owner is not None and (owner.is_alive(now) or is_moving(directory, owner, runs))
    if is_driven and owner is not None:
        driver = f"driven by {owner.describe(now)}"
        if owner.process_lives() is False:
            driver += f", though there is no such process; taken for dead after {LEASE_TTL_S:.0f} s"
    elif owner is not None:
        runs, problem = settle(directory, state, runs, now)
        driver = f"the driver died ({owner.describe(now)})" + (f"; {problem}" if problem else "")
    else:
        driver = f"no driver; last change {duration(now - state['updated'])} ago"
    paces = Paces()
    spec = (directory.read_json("sweep.json") or {}).get("spec") or {}
    gpus = int((spec.get("gang") or {}).get("gpus", 0))
    return Picture(
        sweep=str(state["sweep"]),
        driver=driver,
        is_driven=is_driven,
        runs=tuple(runs),
        rows=tuple(row_of(run, paces, now) for run in runs),
        ages=tuple(age_of(run, now) for run in runs),
        eta_s=sweep_eta_s(runs, int(state.get("slots", 1)), now) if is_driven else None,
        gpu_hours=tuple(run.gang_s(now) * gpus / 3600 for run in runs) if gpus else (),
        price=spec.get("price_per_gpu_hour"),
        devices=mixed_devices({run.key.words: run.device for run in runs if run.state not in GIVEN_UP}),
    )


def describe_folder(directory: SweepDirectory) -> str:
    """Return why there is no picture of a sweep, in one line."""
    shown, record = directory.storage.shown, directory.read_json("sweep.json")
    if not record:
        return f"{shown}: no sweep here (no sweep.json, no state.json); give the run directory of a sweep"
    seeds = ", ".join(map(str, record.get("spec", {}).get("seeds", ())))
    variants = f"; variants {', '.join(record['variants'])}" if record.get("variants") else ""
    return (
        f"{shown}: sweep {record.get('sweep')} was announced here (seeds {seeds}{variants}) and ended before any run "
        f"was placed; run the same command again"
    )


def is_moving(directory: SweepDirectory, owner: Owner, runs: list[Run]) -> bool:
    """Return whether a driver that seems dead by the clock alone lives after all: hosts' clocks differ."""
    is_seen_dead = owner.process_lives() is False
    if is_seen_dead or not owner.is_heard or all(run.is_final for run in runs):
        return False
    return directory.lease.moves(owner, LOOK_S)


def settle(directory: SweepDirectory, state: dict[str, Any], runs: list[Run], now: float) -> tuple[list[Run], str]:
    """Write down that nobody works on the unfinished runs of a dead driver any more.

    Returns all runs, and why that could not be written, or nothing.
    """
    last = float(state.get("updated", 0.0))  # what its gangs held after that nobody wrote down
    settled = [
        run
        if run.is_final
        else replace(run, state=State.CANCELLED, since=now, held_s=run.gang_s(last), has_group=False)
        for run in runs
    ]
    lines = [
        {"time": utc(now), "variant": run.key.variant_name, "seed": run.key.seed, "repeat": run.key.repeat,
         "attempt": run.attempt, "from": str(run.state), "to": str(State.CANCELLED), "node": run.node,
         "why": "the driver died"}
        for run in runs if not run.is_final
    ]  # fmt: skip
    if not lines:
        return settled, ""
    try:
        directory.write_json(
            "state.json", {**state, "updated": now, "runs": [run_to_json(run, 0.0) for run in settled]}
        )
        directory.log_events(lines)
    except OSError as error:
        return settled, f"not settled: {why_not_written(error)}"
    return settled, ""


def why_not_written(error: OSError) -> str:
    """Return an error of the folder as a few words."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "read-only"
    return error.strerror or str(error)


def age_of(run: Run, now: float) -> Age:
    """Return how old a run's state and its last progress are."""
    progress_s = now - run.progress_at if run.state in WORKING and run.progress_at else None
    return Age(state_s=now - run.since if run.since else 0.0, progress_s=progress_s)


def sweep_eta_s(runs: list[Run], slots: int, now: float) -> float | None:
    """Return the seconds until all runs are over, from how long finished ones took; None before the first."""
    took = [run.since - run.placed_at for run in runs if run.state is State.DONE and run.placed_at]
    left = [run for run in runs if run.state not in FINAL]
    if not took or not left:
        return 0.0 if not left else None
    mean_s = sum(took) / len(took)
    working = [run for run in left if run.has_group and run.placed_at and run.state is not State.QUEUED]
    waves = -(-(len(left) - len(working)) // max(1, slots))
    longest_s = max((max(0.0, mean_s - (now - run.placed_at)) for run in working), default=0.0)
    return waves * mean_s + longest_s


def log_name(names: list[str], *, attempt: int | None, rank: int) -> str | None:
    """Return the log of one rank: of the given attempt, or of the newest that has one."""
    found = {}
    for name in names:
        stem, _, suffix = name.partition(".")
        parts = dict(part.split("=", 1) for part in stem.split("-") if "=" in part)
        if suffix == "log" and parts.get("rank") == str(rank) and parts.get("attempt", "").isdigit():
            found[int(parts["attempt"])] = name
    if attempt is not None:
        return found.get(attempt)
    return found[max(found)] if found else None


def find_run(runs: Iterable[RunKey], *, variant: str | None, seed: int, repeat: int, shown: str) -> RunKey:
    """Return the run that somebody means. Raises ValueError, naming what there is, if that is not clear."""
    known = list(runs)
    variants = list(dict.fromkeys(key.variant_name for key in known))
    if variant is None and len(variants) > 1:
        raise ValueError(f"{shown} has {len(variants)} variants; say which with --variant ({', '.join(variants)})")
    check_variant(variant, variants, shown)
    name = variant or (variants[0] if variants else BASE)
    for key in known:
        if (key.variant_name, key.seed, key.repeat) == (name, seed, repeat):
            return key
    return RunKey(
        variant=next((key.variant for key in known if key.variant_name == name), ""), seed=seed, repeat=repeat
    )


def check_variant(variant: str | None, variants: Collection[str], shown: str) -> None:
    """Raise ValueError, naming the nearest, for a variant that a sweep does not have."""
    if variant is not None and variant not in variants:
        raise ValueError(f"--variant {variant} is not a variant of {shown}; {nearest(variant, variants)}")


def read_log(
    out: str, *, seed: int, repeat: int, rank: int, attempt: int | None, follow: bool, variant: str | None = None
) -> Iterator[str]:
    """Yield a rank's log as it stands; with follow go on, into later attempts too, while the sweep is driven.

    Raises FileNotFoundError, naming what there is, if the run has no such log, ValueError where it is not clear which
    variant is meant.
    """
    directory = SweepDirectory(open_storage(out))
    known = [run_from_json(plain).key for plain in directory.read_state().get("runs", [])]
    key = find_run(known, variant=variant, seed=seed, repeat=repeat, shown=out)
    folder = f"seeds/{key.name}/logs"
    name = log_name(directory.storage.names(folder), attempt=attempt, rank=rank)
    if name is None and not (follow and directory.driver_is_alive()):
        names = ", ".join(directory.storage.names(folder)) or "no logs"
        raise FileNotFoundError(f"{out}: {key.name} has no log of rank {rank}; there is {names}")
    shown = 0
    while True:
        is_driven = follow and directory.driver_is_alive()
        if name is not None:
            content = directory.storage.read(f"{folder}/{name}")
            yield content[shown:].decode(errors="replace")
            shown = len(content)
        if not is_driven:
            return
        time.sleep(FOLLOW_EVERY_S)
        newest = log_name(directory.storage.names(folder), attempt=attempt, rank=rank)
        if newest != name:
            name, shown = newest, 0
