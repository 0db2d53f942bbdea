"""Two gangs at once, one of which loses a rank: python -m tests.gpu_eight_gangs SPEC.yaml, for tests.gpu_eight.

The folder of the sweep holds kill.json: which rank of which seed is killed, once, when the training clocks of both
gangs have come so far. Rank 0 of each gang notes when it reported what (notes-SEED.jsonl), so that the steps of one
can be laid beside the death of the other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runner.gang.rank import Rank
from runner.spec.read import load_spec
from runner.sweep import run_sweep
from runner.work import Options
from tests.gpu_eight_rows import slower_percent
from tests.gpu_kit import describe_samples

ORDER, KILLED = "kill.json", "killed.json"


class Note(NamedTuple):
    """What rank 0 of a gang said when: seconds since 1970, and the seconds of its training clock."""

    time: float
    attempt: int
    phase: str
    step: int
    elapsed_s: float


class Order(NamedTuple):
    """Who is to die: rank `rank` of `seed`, when it and the gang of `other` have trained for at_s seconds."""

    seed: int
    rank: int
    other: int
    at_s: float


def work(rank: Rank) -> None:
    """Run the pipeline as ever, but note what rank 0 reports, and die where that was ordered."""
    from runner.gang.worker import run_pipeline

    out, report = Path(rank.job.out), rank.report
    order = Order(**json.loads((out / ORDER).read_text()))
    is_doomed = (rank.job.key.seed, rank.rank, rank.job.attempt) == (order.seed, order.rank, 1)

    def note(phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        report(phase, step, total, metrics)
        elapsed_s = float(metrics.get("elapsed_s", 0.0))
        if rank.rank == 0:
            line = json.dumps(Note(time.time(), rank.job.attempt, phase, step, elapsed_s))
            with (out / f"notes-{rank.job.key.seed}.jsonl").open("a") as file:
                file.write(f"{line}\n")
        if is_doomed and phase == "train" and elapsed_s >= order.at_s and has_come(out, order):
            aside = out / f"{KILLED}.aside"
            aside.write_text(json.dumps({"time": time.time(), "step": step, **order._asdict()}))
            aside.replace(out / KILLED)
            os.kill(os.getpid(), signal.SIGKILL)

    rank.report = note  # type: ignore[method-assign]
    run_pipeline(rank)


def has_come(out: Path, order: Order) -> bool:
    """Return whether the gang that is to live has trained for long enough, too."""
    return any(note.elapsed_s >= order.at_s for note in train_notes(out, order.other))


def train_notes(out: Path, seed: int, attempt: int | None = None) -> Iterator[Note]:
    """Yield what rank 0 of a seed said while it trained, in any attempt or in one."""
    path = out / f"notes-{seed}.jsonl"
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        note = Note(*json.loads(line)) if line.endswith("\n") else None
        if note is not None and note.phase == "train" and note.step and attempt in (None, note.attempt):
            yield note


def began_at(out: Path, seed: int, attempt: int) -> float | None:
    """Return when the training clock of an attempt began, None where it did not.

    A step is reported at its end or some steps later, so that the earliest answer is the nearest one.
    """
    return min((note.time - note.elapsed_s for note in train_notes(out, seed, attempt)), default=None)


def read_killed(out: Path) -> dict[str, Any] | None:
    """Return when which rank was killed at which step, None where none was."""
    return json.loads((out / KILLED).read_text()) if (out / KILLED).exists() else None


def measure_speed(out: Path, *, warm_s: float) -> dict[str, Any] | None:
    """Return the living gang's tokens/s before the kill, while the other was gone and once both trained again.

    And those of the gang that trained again, once the living one was past training: "alone". None as long as no rank
    was killed or the living gang still trains. warm_s: of its training clock, left out.
    """
    killed = read_killed(out)
    steps = read_steps(out, killed["other"]) if killed else None
    if killed is None or steps is None:
        return None
    begun, again = began_at(out, killed["other"], 1), began_at(out, killed["seed"], 2)
    assert begun is not None, out
    at, rates = begun + steps["elapsed_s"], steps["tokens_per_s"]
    is_before = (steps["elapsed_s"] >= warm_s) & (at < killed["time"])
    is_both = np.zeros(len(at), bool) if again is None else at >= again
    windows = {"before": is_before, "gone": (at >= killed["time"]) & ~is_both, "both": is_both}
    found = {name: describe_samples(rates[window]) for name, window in windows.items()}
    found["alone"] = measure_alone(out, killed["seed"], again, ended=float(at[-1]), warm_s=warm_s)
    return {
        **found,
        "again_after_s": None if again is None else again - killed["time"],
        "gone_slower_percent": slower_percent(found["before"], found["gone"]),
        "both_slower_percent": slower_percent(found["before"], found["both"]),
        "together_slower_percent": slower_percent(found["alone"], found["before"]),
    }


def measure_alone(
    out: Path, seed: int, begun: float | None, *, ended: float, warm_s: float
) -> dict[str, Any] | None:  # fmt: skip
    """Return the tokens/s of the gang that trained again, from when the other's last step began."""
    steps = read_steps(out, seed)
    if steps is None or begun is None:
        return None
    return describe_samples(
        steps["tokens_per_s"][(begun + steps["elapsed_s"] > ended) & (steps["elapsed_s"] >= warm_s)]
    )


def read_steps(out: Path, seed: int) -> dict[str, np.ndarray] | None:
    """Return the step table of a seed, None as long as its training is not recorded."""
    folder = out / "seeds" / f"seed={seed}-repeat=0"
    if not (folder / "stages" / "train.json").exists():
        return None
    with np.load(folder / "steps.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def main() -> int:
    """Run the sweep of a spec with this module's work."""
    return run_sweep(load_spec(sys.argv[1]), Options(progress="plain", target="tests.gpu_eight_gangs:work"))


if __name__ == "__main__":
    sys.exit(main())
