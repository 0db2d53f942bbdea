"""Showing a sweep while it runs: a live table on a terminal, plain lines in a log, JSON lines for programs.

All three are made from the same Row, and `seedsweep status` makes its table from them too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import IO, Any, NamedTuple

from runner.life.states import WORKING, Run, State, newest
from runner.spec.sweep import RunKey

PLAIN_EVERY_S = 30.0
HEADER = ("seed", "state", "step", "loss / bpb", "tokens/s", "ETA", "attempt", "node", "note")
SCORE_WORDS = ("loss", "bpb")


class Row(NamedTuple):
    """One run as people want to see it."""

    seed: int
    repeat: int
    state: str
    phase: str
    step: int
    total: int | None
    score: str  # 'loss 3.1416', 'bpb 1.0767' or nothing
    tokens_per_s: float | None
    eta_s: float | None
    attempt: int
    node: str
    note: str
    variant: str = ""  # nothing in a sweep that names none

    @property
    def name(self) -> str:
        """Return the seed, and which repeat where there are several."""
        return f"{self.seed}" if self.repeat == 0 else f"{self.seed} (repeat {self.repeat})"


class Pace(NamedTuple):
    """Where a phase began; progress since then gives the rate."""

    attempt: int
    phase: str
    step: int
    at: float


class Paces:
    """Remembers when each run's phase began, for rates and the time that is left in the phase."""

    def __init__(self) -> None:
        self.seen: dict[RunKey, Pace] = {}

    def eta_s(self, run: Run, now: float) -> float | None:
        """Return the seconds left in the run's present phase, None where nothing can be said."""
        told = run.metrics.get("eta_s")
        if isinstance(told, int | float):
            return max(0.0, float(told) - (now - run.progress_at))
        pace = self.seen.get(run.key)
        if pace is None or (pace.attempt, pace.phase) != (run.attempt, run.phase) or run.step < pace.step:
            pace = self.seen[run.key] = Pace(run.attempt, run.phase, 0, run.since)
        if run.total is None or run.step <= pace.step:
            return None
        if run.progress_at <= pace.at:
            return None
        per_step = (run.progress_at - pace.at) / (run.step - pace.step)
        return max(0.0, per_step * (run.total - run.step) - (now - run.progress_at))


def row_of(run: Run, paces: Paces, now: float) -> Row:
    """Return a run as a row."""
    is_working = run.state in WORKING
    rate = run.metrics.get("tokens_per_s")
    return Row(
        seed=run.key.seed,
        repeat=run.key.repeat,
        state=str(run.state),
        phase=run.phase,
        step=run.step,
        total=run.total,
        score=score_of(run.metrics) if is_working else "",
        tokens_per_s=float(rate) if is_working and isinstance(rate, int | float) else None,
        eta_s=paces.eta_s(run, now) if is_working else None,
        attempt=run.attempt,
        node=run.node,
        note=note_of(run, now),
        variant=run.key.variant,
    )


class Views:
    """Several views of one sweep, told of it one after the other; whoever opened them closes them."""

    def __init__(self, views: list[Any]) -> None:
        self.views = views

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Show the newest picture in each."""
        for view in self.views:
            view.update(runs, changed, now)

    def close(self) -> None:
        """Nothing of its own is open."""


def score_of(metrics: Mapping[str, Any]) -> str:
    """Return the newest loss or bits per byte in a report, with its name."""
    for word in SCORE_WORDS:
        found = newest(metrics, word)
        if found is not None:
            return f"{found[0]} {found[1]:.4f}"
    return ""


def note_of(run: Run, now: float) -> str:
    """Return what else there is to say: why it failed, when it is tried again, what it waits for."""
    if run.state is State.RETRY_WAIT and run.failure is not None:
        return f"again in {duration(max(0.0, run.not_before - now))}: {run.failure.one_line}"
    if run.state in (State.FAILED, State.TEARDOWN) and run.failure is not None:
        return run.failure.one_line
    if run.state is State.QUEUED:
        return run.waits_for or "waits for a free place"
    if run.is_stopping:
        return "stopping"
    if run.state is State.STARTING and isinstance(run.metrics.get("note"), str):
        return str(run.metrics["note"])
    if run.attempt > 1 and run.previous is not None and run.state in WORKING:
        return f"after {run.previous.kind}"
    return ""


def waiting_for(run: Run) -> str:
    """Return what a run waits for besides a place: a stage that another one computes, or something on its node."""
    if run.state is State.QUEUED:
        return run.waits_for
    return "a node" if run.state is State.STARTING and run.metrics.get("note") else ""


def make_cells(row: Row) -> tuple[str, ...]:
    """Return a row as text, one cell for each name in HEADER."""
    is_working = row.state in {str(state) for state in WORKING}
    steps = "" if not is_working else f"{row.step}" if row.total is None else f"{row.step}/{row.total}"
    state = row.state if not is_working or row.phase.upper() in ("", row.state) else f"{row.state} {row.phase}"
    rate = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}"
    attempt = str(row.attempt) if row.attempt else ""
    return (row.name, state, steps, row.score, rate, duration(row.eta_s), attempt, row.node, row.note)


def tabulate(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the cells of rows; the variant stands first where the sweep names any."""
    shown = list(rows)
    if not any(row.variant for row in shown):
        return HEADER, [make_cells(row) for row in shown]
    return ("variant", *HEADER), [(row.variant, *make_cells(row)) for row in shown]


def duration(seconds: float | None) -> str:
    """Return a time span in words: '42s', '3m10s', '2h05m'; nothing for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def plain_line(row: Row) -> str:
    """Return a row as one line of key=value words."""
    variant = [f"variant={row.variant}"] if row.variant else []
    words = [*variant, f"seed={row.seed}", *([f"repeat={row.repeat}"] if row.repeat else []), row.state]
    names = ("step", "", "tokens/s", "eta", "attempt", "node", "")
    for name, cell in zip(names, make_cells(row)[2:]):
        if cell:
            words.append(f"{name}={cell}" if name else cell.replace(" ", "=") if cell == row.score else f"({cell})")
    return " ".join(words)


class PlainView:
    """Lines for a log: at once when a state changes, and every run's progress now and then."""

    def __init__(self, stream: IO[str] | None = None, every_s: float = PLAIN_EVERY_S) -> None:
        self.stream, self.every_s = stream or sys.stdout, every_s
        self.paces = Paces()
        self.next_at: float | None = None
        self.noted: dict[RunKey, str] = {}  # what each run was last said to wait for

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Print changed runs, and all that are at work where it is time."""
        if self.next_at is None:
            self.next_at = now + self.every_s
        shown = list(changed)
        if now >= self.next_at:
            self.next_at = now + self.every_s
            shown += [run for run in runs.values() if run.state in WORKING and run not in shown]
        for run in runs.values():
            reason = waiting_for(run)
            if (reason and run.key not in self.noted) or (run.waits_for and self.noted[run.key] != reason):
                self.noted[run.key] = reason  # said once
                shown.append(run)
            if run.state in WORKING:
                self.paces.eta_s(run, now)
        self.show([row_of(run, self.paces, now) for run in shown])

    def show(self, rows: Iterable[Row]) -> None:
        """Print rows."""
        for row in rows:
            print(plain_line(row), file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is left open."""


class JsonView(PlainView):
    """The same lines as JSON objects."""

    def show(self, rows: Iterable[Row]) -> None:
        """Print rows as JSON."""
        for row in rows:
            print(json.dumps(row._asdict()), file=self.stream, flush=True)


class LiveView:
    """A table that redraws itself: one row for each run, those that wait included."""

    def __init__(self, title: str) -> None:
        from rich.live import Live

        self.title = title
        self.paces = Paces()
        self.live = Live(refresh_per_second=4, transient=False)
        self.live.start()

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Draw the newest picture."""
        self.live.update(rich_table(self.title, [row_of(run, self.paces, now) for run in runs.values()]))

    def close(self) -> None:
        """Leave the last picture on the screen."""
        self.live.stop()


def rich_table(title: str, rows: Iterable[Row]) -> Any:
    """Return the rows as a table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    header, body = tabulate(rows)
    for name in header:
        table.add_column(name, justify="right" if name in ("seed", "step", "tokens/s", "ETA", "attempt") else "left")
    for line in body:
        table.add_row(*map(Text, line))
    return table


def open_view(mode: str, title: str) -> LiveView | PlainView | JsonView:
    """Return the view for --progress: auto is live on a terminal and plain elsewhere."""
    if mode == "json":
        return JsonView()
    return LiveView(title) if mode == "auto" and can_redraw(sys.stdout) else PlainView()


def can_redraw(stream: IO[str]) -> bool:
    """Return whether stream is a terminal that can draw over what it shows: not a dumb one, nor one without a name."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
