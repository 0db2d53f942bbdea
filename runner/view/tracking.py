"""Telling other people's trackers of a sweep without waiting for one: each has its own thread and a bounded queue.

The scheduler only appends to the queue. A tracker that raises, hangs or is too slow costs points and one warning, never
a seed; it is tried again now and then, and gets the ends of runs that it missed. Needs none of the trackers' packages.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from runner.errors import first_line
from runner.life.states import FINAL, WORKING, Run
from runner.spec.sweep import RunKey

logger = logging.getLogger(__name__)

MAX_POINTS = 2000  # that wait for one tracker; the oldest go first
WRITE_EVERY_S = 1.0
RETRY_S = 60.0
CLOSE_S = 10.0  # for what is left when the sweep is over
LEFT_OUT = ("eta_s", "output_bytes")  # of reports: one is about the future, the other only says that something lives


class Point(NamedTuple):
    """One report of a run, its numbers only."""

    key: RunKey
    phase: str
    step: int
    at: float  # seconds since 1970
    metrics: Mapping[str, float]


class Tracker(Protocol):
    """Where points go. Any method may take long and raise anything; one thread calls them all."""

    def write(self, points: list[Point]) -> None:
        """Write points of any runs, in their order."""

    def end(self, run: Run) -> None:
        """Write that a run is over, with its state and scores."""

    def close(self) -> None:
        """Write whatever is kept back."""


class Feed:
    """The queue and the thread of one tracker."""

    def __init__(
        self, name: str, open_tracker: Callable[[], Tracker], *, write_every_s: float = WRITE_EVERY_S,
        retry_s: float = RETRY_S, max_points: int = MAX_POINTS,
    ) -> None:  # fmt: skip
        self.name, self.open_tracker = name, open_tracker
        self.tracker: Tracker | None = None
        self.write_every_s, self.retry_s = write_every_s, retry_s
        self.points: deque[Point] = deque(maxlen=max_points)
        self.ends: dict[RunKey, Run] = {}
        self.num_dropped = 0
        self.has_warned = self.is_closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self.work, name=f"seedsweep-track-{name}", daemon=True)
        self.thread.start()

    def put(self, points: list[Point], ends: list[Run]) -> None:
        """Take points and the ends of runs; returns at once."""
        with self.changed:
            for point in points:
                self.num_dropped += len(self.points) == self.points.maxlen
                self.points.append(point)
            self.ends |= {run.key: run for run in ends}
            self.changed.notify()

    def work(self) -> None:
        """Write what comes until closed: all that has gathered at once, and after a failure not before retry_s."""
        pause_s = 0.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.is_closing, timeout=pause_s)
                self.changed.wait_for(lambda: self.is_closing or self.points or self.ends)
                points, ends, is_last = list(self.points), dict(self.ends), self.is_closing
                self.points.clear()
                self.ends.clear()
            pause_s = self.write_every_s if self.try_write(points, ends) else self.retry_s
            if is_last:
                return

    def try_write(self, points: list[Point], ends: dict[RunKey, Run]) -> bool:
        """Hand everything to the tracker; return whether it took it. Ends that it did not take are kept."""
        try:
            if self.tracker is None and (points or ends):
                self.tracker = self.open_tracker()
            if self.tracker is not None:
                self.tracker.write(points)
                for key in list(ends):
                    self.tracker.end(ends[key])
                    del ends[key]
                if self.is_closing:
                    self.tracker.close()
        except (Exception, SystemExit) as error:  # another's client raises what it likes; no seed may fail for it
            with self.changed:
                self.num_dropped += len(points)
                self.ends = {**ends, **self.ends}
            self.warn(first_line(str(error)) or type(error).__name__)
            return False
        return True

    def warn(self, why: str) -> None:
        """Say what is wrong with the tracker, once in a sweep."""
        if not self.has_warned:
            self.has_warned = True
            logger.warning("track.%s: %s; the sweep goes on without it", self.name, why)

    def close(self, within_s: float = CLOSE_S) -> None:
        """Let the thread write what is left, and leave it behind if that takes longer than within_s."""
        with self.changed:
            self.is_closing = True
            self.changed.notify()
        self.thread.join(within_s)
        if self.thread.is_alive():
            self.warn(f"does not answer, {len(self.points) + len(self.ends)} entries are not written")
        elif self.num_dropped:
            self.warn(f"too slow, {self.num_dropped} points were dropped")


class Tracking:
    """A view of a sweep that tells its trackers of every report, and of the end of every run."""

    def __init__(self, feeds: list[Feed], wall: Callable[[], float] = time.time) -> None:
        self.feeds, self.wall = feeds, wall
        self.told: dict[RunKey, tuple[Any, ...]] = {}

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Put what is new into every queue."""
        if not self.feeds:
            return
        points = [point for run in runs.values() if run.state in WORKING and (point := self.point_of(run)) is not None]
        ends = [run for run in changed if run.state in FINAL and run.attempt]
        if points or ends:
            for feed in self.feeds:
                feed.put(points, ends)

    def point_of(self, run: Run) -> Point | None:
        """Return a run's newest report, None if it was told already or holds no number."""
        metrics = {
            name: float(value)
            for name, value in run.metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in LEFT_OUT
        }
        place = (run.attempt, run.phase, run.step, repr(metrics))  # a program may have several scores at one step
        if not metrics or self.told.get(run.key) == place:
            return None
        self.told[run.key] = place
        return Point(run.key, run.phase, run.step, self.wall(), metrics)

    def close(self) -> None:
        """Let every tracker write what is left, all at the same time."""
        deadline = time.monotonic() + CLOSE_S
        for feed in self.feeds:
            with feed.changed:
                feed.is_closing = True
                feed.changed.notify()
        for feed in self.feeds:
            feed.close(max(0.0, deadline - time.monotonic()))
