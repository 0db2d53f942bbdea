"""The scheduler's backend without Ray: one run at a time, in a thread of this process.

A thread cannot be killed. A run that is to end is asked to stop, and its place is free when it has ended.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from model.report import Interrupted
from runner.errors import Kind
from runner.gang.inquest import write_stacks
from runner.gang.rank import Rank
from runner.life import states
from runner.life.capacity import Node
from runner.life.decisions import Release, Start, Stop, Submit
from runner.life.job import Job, Outcome
from runner.machine.gpus import VISIBLE, query_gpus
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey

NODE_ID = "local"
POLL_EVERY_S = 0.05
BEAT_EVERY_S = 1.0
CLOSE_S = 5.0  # for a run to end with its driver
THREAD_NAME = "seedsweep-"  # of threads that cannot be ended; jobs.cli ends the process under them


class LocalRank(Rank):
    """A rank in a thread, which nobody can kill: outside training it ends at the next report once it was stopped."""

    def report(self, phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        """Note progress. Raises Interrupted where a gang would be killed."""
        super().report(phase, step, total, metrics)
        if self.should_stop() and phase != "train":
            raise Interrupted(f"stopped at {phase} step {step}")


def device_of(job: Job) -> str:
    """Return what a run of this process computes on: the model of the first GPU that it sees, "" where nobody knows."""
    if not job.uses_gpus:
        return states.CPU
    visible = [name for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return next((gpu.model for gpu in query_gpus(visible[:1])), "")


class LocalRun:
    """One attempt in its thread."""

    def __init__(self, command: Start, job: Job) -> None:
        self.key, self.serial = command.key, command.group
        self.rank = LocalRank(job, 0)
        self.outcome: Outcome | None = None
        self.serial_seen = 0
        self.next_told = 0.0
        self.is_told = False
        self.thread = threading.Thread(target=self.work, name=f"{THREAD_NAME}{job.key.name}", daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Run the rank with its logging in a file of its own."""
        path = self.rank.job.own_log_path(0)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(path)
        except OSError as error:
            self.outcome = Outcome(kind="failed", at=time.time(), failure=self.rank.failure_of(error))
            return
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        ours = [logging.getLogger(name) for name in ("model", "runner")]
        for logger in ours:
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
        try:
            outcome = self.rank.run()
        finally:
            for logger in ours:
                logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # what a full disk did not take of the log
                handler.close()
        self.outcome = outcome  # not before the log is closed: the driver goes on at once, and would write to it

    def leave_stacks(self) -> None:
        """Let the processes of a program write down where they stand; they are about to be ended."""
        keeper = self.rank.keeper
        if keeper is not None:
            write_stacks(self.rank.job, [{**self.rank.hello(), "keeper": keeper.pid}])

    def poll(self) -> list[states.Event]:
        """Return the newest progress, and how the run ended."""
        events: list[states.Event] = []
        outcome, beat, now = self.outcome, self.rank.beat(), time.monotonic()
        is_news = beat.serial != self.serial_seen
        if is_news or (self.rank.job.program is not None and now >= self.next_told):  # its limits hold here, too
            self.serial_seen, self.next_told = beat.serial, now + BEAT_EVERY_S
            idle = states.Idle(rank=None, where=beat.where, since=now - beat.idle_s)
            events.append(
                states.Progress(
                    key=self.key, group=self.serial, phase=beat.phase, step=beat.step, total=beat.total,
                    metrics=beat.metrics, is_news=is_news, idle=idle,
                )
            )  # fmt: skip
        if outcome is not None and not self.is_told:
            self.is_told = True
            if outcome.failure is not None:
                events.append(states.Failed(key=self.key, group=self.serial, failure=outcome.failure))
            elif outcome.kind == "interrupted":
                events.append(states.Interrupted(key=self.key, group=self.serial))
            else:
                events.append(states.Finished(key=self.key, group=self.serial))
        return events


class LocalBackend:
    """One place, this process."""

    def __init__(self, shape: Gang) -> None:
        self.node = Node(node_id=NODE_ID, name=socket.gethostname(), resources=shape.share)
        self.waiting: list[tuple[RunKey, int]] = []
        self.placed: tuple[RunKey, int] | None = None
        self.running: LocalRun | None = None
        self.is_releasing = False
        self.news: list[states.Event] = []

    def nodes(self) -> tuple[Node, ...]:
        """Return this machine as a node that holds exactly one run."""
        return (self.node,)

    def submit(self, command: Submit) -> None:
        """Queue a run."""
        self.waiting.append((command.key, command.group))

    def start(self, command: Start, job: Job) -> None:
        """Begin the work."""
        self.running = LocalRun(command, job)
        facts = {"host": self.node.name, "device": device_of(job)}
        self.news.append(states.Started(key=command.key, group=command.group, facts=facts))

    def expect(self, num_runs: int) -> None:
        """Have nothing ready: all runs share this process."""

    def stop(self, command: Stop) -> None:
        """Ask the run to stop."""
        if self.running is not None:
            self.running.rank.stop()

    def release(self, command: Release) -> None:
        """Give the place back as soon as the thread has ended."""
        place = (command.key, command.group)
        if place in self.waiting:
            self.waiting.remove(place)
            self.news.append(states.Gone(key=command.key, group=command.group))
        else:
            self.is_releasing = True
            if self.running is not None:
                if command.failure is not None and command.failure.kind is Kind.STALLED:
                    self.running.leave_stacks()
                self.running.rank.stop()

    def close(self) -> None:
        """Ask a run that is still at work to stop, and give it a moment: a driver leaves before its time."""
        if self.running is not None and self.running.thread.is_alive():
            self.running.rank.stop()
            self.running.thread.join(CLOSE_S)

    def poll(self, timeout_s: float) -> list[states.Event]:
        """Return what happened, waiting up to timeout_s where nothing has."""
        deadline = time.monotonic() + timeout_s
        while True:
            events = self.look()
            if events or time.monotonic() >= deadline:
                return events
            time.sleep(POLL_EVERY_S)

    def look(self) -> list[states.Event]:
        """Return what happened since the last look."""
        events, self.news = self.news, []
        if self.running is not None:
            events += self.running.poll()
        if self.is_releasing and (self.running is None or not self.running.thread.is_alive()) and self.placed:
            key, serial = self.placed
            events.append(states.Gone(key=key, group=serial))
            self.placed = self.running = None
            self.is_releasing = False
        if self.placed is None and self.waiting:
            self.placed = self.waiting.pop(0)
            key, serial = self.placed
            events.append(states.Placed(key=key, group=serial, node=self.node.name, node_id=NODE_ID))
        return events
