"""What a new driver finds of the drivers before it: which runs are done, and what the others have cost so far."""

from __future__ import annotations

import logging
from dataclasses import replace

from runner.folder.directory import SweepDirectory, run_from_json
from runner.life.states import Run, State
from runner.spec.sweep import RunKey, SweepSpec

logger = logging.getLogger(__name__)


def take_over(spec: SweepSpec, directory: SweepDirectory, only: frozenset[RunKey] | None) -> list[Run]:
    """Return the runs of the sweep as earlier drivers left them: done, or to be done."""
    finished = finished_attempts(spec)
    earlier: dict[RunKey, Run] = {}
    state = directory.read_state()
    for plain in state.get("runs", []):
        run = run_from_json(plain)
        earlier[run.key] = replace(run, held_s=run.gang_s(state.get("updated", 0.0)))
    return [take_over_run(key, earlier.get(key), finished.get(key), is_wanted=only is None or key in only)
            for key in spec.keys]  # fmt: skip


def take_over_run(key: RunKey, earlier: Run | None, finished: int | None, *, is_wanted: bool) -> Run:
    """Return one run for a new driver: its counts are kept, whatever lived in the old driver is not."""
    run = Run(key=key)
    if earlier is not None:
        kept = ("attempt", "preemptions", "asides", "node", "accelerator", "device", "held_s")
        run = replace(run, **{name: getattr(earlier, name) for name in kept})
    if finished is not None:
        return replace(run, state=State.DONE, attempt=max(run.attempt, finished))
    if is_wanted:
        return run
    state = earlier.state if earlier is not None and earlier.is_final else State.CANCELLED
    return replace(run, state=state, failure=earlier.failure if earlier is not None else None)


def finished_attempts(spec: SweepSpec) -> dict[RunKey, int]:
    """Return the number of the newest finished attempt of every run that has one; damaged files are named."""
    from results.schema import FINISHED
    from results.store.reader import read_run_table

    try:
        table, problems = read_run_table(spec.out, columns=["attempt"])
    except FileNotFoundError:
        return {}
    for problem in problems:
        logger.warning("%s (counts as not done)", problem)
    keys = {(key.variant_name, key.seed, key.repeat): key for key in spec.keys}
    found: dict[RunKey, int] = {}
    for row in table.to_pylist():
        key = keys.get((str(row["variant"]), int(row["seed"]), int(row["repeat"])))
        if key is not None and row["state"] == FINISHED:
            found[key] = max(found.get(key, 0), int(row["attempt"]))
    return found
