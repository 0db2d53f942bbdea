"""Looking at a sweep from outside: from its files alone, while a driver is at work and after it died. Needs no Ray."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from runner.directory import SweepDirectory, run_from_json, run_to_json, utc
from runner.progress import Paces, Row, duration, row_of
from runner.states import FINAL, WORKING, Run, State
from runner.storage import open_storage

FOLLOW_EVERY_S = 0.5


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

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are in each state, in order of first appearance."""
        return dict(Counter(str(run.state) for run in self.runs))


def look(out: str) -> Picture:
    """Return the newest picture of a sweep. Runs whose driver died are settled: CANCELLED, and resumable.

    Raises FileNotFoundError where no sweep was ever run.
    """
    directory = SweepDirectory(open_storage(out))
    state = directory.read_state()
    if not state:
        raise FileNotFoundError(f"{directory.storage.shown}: no state.json here; give the run directory of a sweep")
    now = time.time()
    owner = directory.read_owner()
    is_driven = owner is not None and owner.is_alive(now)
    runs = [run_from_json(plain) for plain in state["runs"]]
    if is_driven and owner is not None:
        driver = f"driven by {owner.describe(now)}"
    elif owner is not None:
        driver = f"the driver died ({owner.describe(now)})"
        runs = settle(directory, state, runs, now)
    else:
        driver = f"no driver; last change {duration(now - state['updated'])} ago"
    paces = Paces()
    return Picture(
        sweep=str(state["sweep"]),
        driver=driver,
        is_driven=is_driven,
        runs=tuple(runs),
        rows=tuple(row_of(run, paces, now) for run in runs),
        ages=tuple(age_of(run, now) for run in runs),
        eta_s=sweep_eta_s(runs, int(state.get("slots", 1)), now) if is_driven else None,
    )


def settle(directory: SweepDirectory, state: dict[str, Any], runs: list[Run], now: float) -> list[Run]:
    """Write down that nobody works on the unfinished runs of a dead driver any more, and return all runs."""
    settled = [run if run.is_final else replace(run, state=State.CANCELLED, since=now, has_group=False) for run in runs]
    lines = [
        {"time": utc(now), "seed": run.key.seed, "repeat": run.key.repeat, "attempt": run.attempt,
         "from": str(run.state), "to": str(State.CANCELLED), "node": run.node, "why": "the driver died"}
        for run in runs if not run.is_final
    ]  # fmt: skip
    if lines:
        directory.log_events(lines)
        directory.write_json(
            "state.json", {**state, "updated": now, "runs": [run_to_json(run, 0.0) for run in settled]}
        )
    return settled


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


def read_log(out: str, *, seed: int, repeat: int, rank: int, attempt: int | None, follow: bool) -> Iterator[str]:
    """Yield a rank's log as it stands; with follow go on, into later attempts too, while the sweep is driven.

    Raises FileNotFoundError, naming what there is, if the run has no such log.
    """
    directory = SweepDirectory(open_storage(out))
    folder = f"seeds/seed={seed}-repeat={repeat}/logs"
    name = log_name(directory.storage.names(folder), attempt=attempt, rank=rank)
    if name is None and not (follow and directory.driver_is_alive()):
        names = ", ".join(directory.storage.names(folder)) or "no logs"
        raise FileNotFoundError(f"{out}: seed {seed} repeat {repeat} has no log of rank {rank}; there is {names}")
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
