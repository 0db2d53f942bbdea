"""The driver's loop: events in, decisions out, everything of note on disk.

The loop itself knows neither Ray nor torch. A Backend places and runs gangs; `decisions` says what to ask of it;
`states` says what became of each run. Tests drive the same loop with a fake backend and a fake clock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

from model.report import STAGES
from runner.errors import Failure, Kind, Superseded, first_line, is_full
from runner.folder.directory import SweepDirectory, utc
from runner.life.capacity import Node, count_slots, why_infeasible
from runner.life.claims import Board, Claim, choose_leavers, claim_of, reserve
from runner.life.decisions import (
    Command,
    Commit,
    Give,
    Release,
    Situation,
    Start,
    Stop,
    Submit,
    Wait,
    apply_command,
    decide,
)
from runner.life.job import Job
from runner.life.placing import gang_now
from runner.life.sharing import STAGE_STATES, Sharing
from runner.life.states import FINAL, Committed, Event, Failed, Run, State, apply_event
from runner.spec.gang import Limits
from runner.spec.sweep import RunKey, SweepSpec

logger = logging.getLogger(__name__)

NODES_EVERY_S = 5.0
REQUESTS_EVERY_S = 1.0  # looks for `seedsweep cancel`
CLAIMS_EVERY_S = 1.0  # looks at what the other sweeps of the cluster wait for
STATE_EVERY_S = 1.0  # a picture of 1,000 runs takes tens of milliseconds; the events have every transition at once
POLL_S = 0.2
EXIT_INFEASIBLE = 2
UNPLACED = frozenset({State.PLANNED, State.QUEUED, State.RETRY_WAIT})
LOST_NODES_S = 60.0  # how long a sweep that had room waits for a node to come back, at least


class Backend(Protocol):
    """Where gangs run. Every method returns at once; what came of it arrives through poll."""

    def nodes(self) -> tuple[Node, ...]:
        """Return the living nodes with everything they have."""

    def submit(self, command: Submit) -> None:
        """Ask for a place for a gang."""

    def start(self, command: Start, job: Job) -> None:
        """Start the ranks of a placed gang."""

    def stop(self, command: Stop) -> None:
        """Ask the ranks to stop."""

    def release(self, command: Release) -> None:
        """Kill the ranks and give their place back."""

    def expect(self, num_runs: int) -> None:
        """Take note of how many runs have no place yet, so as to have things ready for their gangs."""

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened, waiting up to timeout_s where nothing has."""


class View(Protocol):
    """Whoever shows the sweep while it runs."""

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Show the newest picture; changed: the runs whose state is new."""

    def close(self) -> None:
        """Show nothing more."""


class Scheduler:
    """One sweep from its first decision to the last run's final state."""

    def __init__(
        self, spec: SweepSpec, runs: Iterable[Run], backend: Backend, directory: SweepDirectory, view: View, *,
        make_job: Callable[[Run], Job], commit: Callable[[Run], None], limits: Limits | None = None,
        sharing: Sharing | None = None, recorded_stages: Callable[[RunKey], Collection[str]] = lambda _key: STAGES,
        board: Board | None = None, grace_s: float = 30.0, clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self.spec, self.backend, self.directory, self.view = spec, backend, directory, view
        self.runs = {run.key: run for run in runs}
        self.make_job, self.commit = make_job, commit
        self.sharing, self.recorded_stages = sharing or Sharing(), recorded_stages
        self.board = board  # of the other sweeps on the cluster; None where there can be none
        self.reserved: dict[str, Claim] = {}  # node id -> a sweep that goes first there
        self.leavers: dict[RunKey, str] = {}  # runs that make way -> for whom
        self.sharing_seen = -1  # version of what is shared when decisions were last made
        self.limits, self.grace_s, self.clock, self.wall = limits or spec.limits, grace_s, clock, wall
        self.offset = wall() - clock()
        self.cancelled: frozenset[RunKey] = frozenset()
        self.is_interrupted = False
        self.nodes: tuple[Node, ...] = ()
        self.slots = 0
        self.gang = spec.gang  # as it is asked for now
        self.nodes_at = self.state_at = self.requests_at = self.claims_at = -float("inf")
        self.feasible_at = clock()  # when some node could last hold a gang
        self.had_room = False
        self.infeasible = ""  # why gangs were given up, once they were
        self.unsaved: list[dict[str, Any]] = []
        self.changed: list[Run] = []
        self.is_disk_failing = False

    def run(self) -> dict[RunKey, Run]:
        """Work until every run is in a final state and holds nothing; return the runs."""
        while not all(run.is_final for run in self.runs.values()):
            self.tick()
        self.persist(force=True)
        return self.runs

    def interrupt(self) -> None:
        """End every run: ranks are asked to stop, and killed when their grace is over."""
        self.is_interrupted = True

    def tick(self) -> None:
        """Apply what happened, decide, and tell disk and view."""
        events = self.backend.poll(POLL_S)
        can_write = self.beat()  # before anything is done: this process may have been suspended, another have come
        for event in events:
            self.apply(event)
        self.give_all()
        if can_write:
            self.persist()
        self.view.update(self.runs, self.changed, self.clock())
        self.changed = []

    def give_all(self) -> int:
        """Decide, hand every command to the backend, and return how many asked for more than another note."""
        situation = self.situation()
        commands = decide(self.runs, situation)
        self.sharing_seen = self.sharing.version
        for command in commands:
            self.give(command, situation)
        self.backend.expect(sum(run.state in UNPLACED for run in self.runs.values()))
        return sum(not isinstance(command, Wait) for command in commands)

    def situation(self) -> Situation:
        """Return what decisions depend on besides the runs."""
        now = self.clock()
        if now - self.nodes_at >= NODES_EVERY_S:
            self.nodes, self.nodes_at = self.backend.nodes(), now
            if not any(run.has_group for run in self.runs.values()):  # what was asked for stands until it is answered
                self.gang = gang_now(self.spec.gang, self.runs.values(), self.nodes)
            self.slots = count_slots(self.nodes, self.gang)
        if self.board is not None and now - self.claims_at >= CLAIMS_EVERY_S:
            self.claims_at = now
            self.look_at_others(self.board, now)
        if now - self.requests_at >= REQUESTS_EVERY_S:
            self.requests_at = now
            self.read_requests()
        return Situation(
            now=now, gang=self.gang, limits=self.limits, slots=self.slots, nodes=self.nodes, grace_s=self.grace_s,
            has_repeats=self.spec.repeats > 1, infeasible=self.why_give_up(now),
            cancelled=frozenset(self.runs) if self.is_interrupted else self.cancelled,
            reserved={node_id: claim.words for node_id, claim in self.reserved.items()}, leavers=self.leavers,
            sharing=self.sharing, has_news=self.sharing.version != self.sharing_seen,
        )  # fmt: skip

    def why_give_up(self, now: float) -> str:
        """Return why no place is waited for any more, "" while one may come.

        Time counts while some run is queued: a node that nobody asks for, an autoscaler takes away.
        """
        if self.slots or not any(run.state is State.QUEUED for run in self.runs.values()):
            self.feasible_at, self.had_room = now, self.had_room or self.slots > 0
        patience_s = max(self.limits.wait_s, LOST_NODES_S if self.had_room else 0.0)
        if self.slots or now - self.feasible_at < patience_s:
            return ""
        self.infeasible = why_infeasible(self.nodes, self.gang, waited_s=patience_s)
        return self.infeasible

    def look_at_others(self, board: Board, now: float) -> None:
        """Tell the other sweeps of the cluster what this one waits for and holds, and see who of them goes first."""
        own = claim_of(
            self.runs.values(), self.gang, now, driver=board.name, sweep=self.spec.name, priority=self.spec.priority,
            preemptible=self.spec.preemptible,
        )  # fmt: skip
        others = board.exchange(own)
        self.reserved, self.leavers = reserve(own, others, self.nodes), {}
        if own.preemptible and any(claim.waits_s for claim in self.reserved.values()):
            found = choose_leavers([own, *others], self.nodes, board.free())
            names = {key.name: key for key in self.runs}
            self.leavers = {names[run]: found[driver, run].words for driver, run in found if driver == own.driver}

    def read_requests(self) -> None:
        """Take in what `seedsweep cancel` asked for."""
        for request in self.directory.cancel_requests():
            if request.is_all:
                self.interrupt()
            else:
                self.cancelled |= {key for key in self.runs if request.means(key)}

    def apply(self, event: Event) -> None:
        """Let one event change its run."""
        before = self.runs[event.key]
        after = apply_event(before, event, self.clock(), self.limits)
        if self.sharing and is_news_of_stages(before, after):
            self.sharing.follow(before, after, self.recorded_stages(event.key))
        self.note(before, after)

    def give(self, command: Command, situation: Situation) -> None:
        """Hand one command to the backend and note that it was given."""
        run = self.runs[command.key]
        donors = self.sharing.donors(command.key) if isinstance(command, Start) else {}
        self.note(run, apply_command(run, command, situation), why=situation.infeasible, donors=donors)
        match command:
            case Submit():
                self.backend.submit(command)
            case Start():
                self.backend.start(command, replace(self.make_job(self.runs[command.key]), donors=donors))
            case Stop():
                self.backend.stop(command)
            case Release():
                self.backend.release(command)
            case Commit():
                self.apply(self.commit_now(run))
            case Give() | Wait():
                pass

    def commit_now(self, run: Run) -> Event:
        """Write a finished attempt's results; return how that went."""
        try:
            self.directory.beat(force=True)  # an ousted driver must not add to what its successor writes
            self.commit(run)
        except Superseded:
            raise
        except (OSError, ValueError) as error:
            failure = Failure(
                kind=Kind.DISK if is_full(error) else Kind.COMMIT,
                error_type=type(error).__name__,
                message=f"results not written: {first_line(str(error))}",
            )
            return Failed(key=run.key, group=run.group, failure=failure)
        return Committed(key=run.key, group=run.group)

    def note(self, before: Run, run: Run, *, why: str = "", donors: Mapping[str, str] | None = None) -> None:
        """Store run; a new state becomes a line of events.jsonl, and a failed attempt a row of the results."""
        self.runs[run.key] = run
        if run.held_back and run.waits_for != before.waits_for:
            self.unsaved.append(transition(before, run, self.wall(), run.waits_for))
            logger.info("%s %s", run.key.name, run.waits_for)
        if run.state is before.state:
            return
        self.changed.append(run)
        line = transition(before, run, self.wall(), why) | ({"donors": dict(donors)} if donors else {})
        self.unsaved.append(line)
        logger.info("%s %s -> %s%s", run.key.name, before.state, run.state, f": {line['why']}" if line["why"] else "")
        is_attempt_over = run.state in (State.RETRY_WAIT, State.FAILED, State.CANCELLED)
        if is_attempt_over and before.state in (State.TEARDOWN, State.COMMITTING) and run.attempt:
            self.record_failed_attempt(run)

    def record_failed_attempt(self, run: Run) -> None:
        """Write the row of an attempt that failed; the sweep goes on where that is not possible either."""
        try:
            self.directory.beat(force=True)
            self.commit(run)
        except Superseded:
            raise
        except (OSError, ValueError) as error:
            logger.warning("%s attempt %d has no row in the results: %s", run.key.name, run.attempt, error)

    def beat(self) -> bool:
        """Leave a sign of life; return whether the folder took it. Raises Superseded if another driver has come."""
        try:
            self.directory.beat()
        except OSError as error:
            self.note_disk(error)
            return False
        return True

    def note_disk(self, error: OSError) -> None:
        """Say once that the sweep's folder cannot be written."""
        if not self.is_disk_failing:
            logger.warning("state not saved to %s: %s", self.directory.storage.shown, error)
        self.is_disk_failing = True

    def persist(self, *, force: bool = False) -> None:
        """Append the new transitions, replace state.json where it is due.

        A full disk does not end the sweep: it is said once, and everything unsaved is written when space returns.
        """
        now = self.clock()
        try:
            if self.unsaved:
                self.directory.log_events(self.unsaved)
                self.unsaved = []
            slots = min(self.slots, self.limits.max_gangs or self.slots)
            if force or now - self.state_at >= STATE_EVERY_S:
                self.directory.write_state(self.spec.name, self.runs.values(), self.offset, slots=slots)
                self.state_at = now
        except OSError as error:
            self.note_disk(error)
            return
        if self.is_disk_failing:
            logger.warning("state is saved to %s again", self.directory.storage.shown)
        self.is_disk_failing = False


def is_news_of_stages(before: Run, run: Run) -> bool:
    """Return whether a run has come so far that stages of it may be finished, or begun again."""
    is_further = run.state is not before.state and run.state in (*STAGE_STATES, State.COMMITTING)
    return is_further or (before.has_group and not run.has_group)  # whatever it wrote, it writes no more


def transition(before: Run, run: Run, wall: float, why: str) -> dict[str, Any]:
    """Return the line of events.jsonl for a new state."""
    reason = why if run.state is State.INFEASIBLE or run.held_back else ""
    if before.state is State.STARTING:
        reason = str(run.facts.get("cold", ""))  # the gang works, though not as it was meant to start
    if run.failure is not None and run.state in (State.TEARDOWN, State.RETRY_WAIT, State.FAILED):
        reason = run.failure.one_line
    return {
        "time": utc(wall),
        "variant": run.key.variant_name,
        "seed": run.key.seed,
        "repeat": run.key.repeat,
        "attempt": run.attempt,
        "from": str(before.state),
        "to": str(run.state),
        "node": run.node,
        "why": reason,
        "failures": run.failures,
        "preemptions": run.preemptions,
        "failure": run.failure.to_json() if run.failure is not None and run.state is State.TEARDOWN else None,
    }


def exit_code(runs: Mapping[RunKey, Run], *, is_interrupted: bool) -> int:
    """Return 0 if all is done, 1 if some run failed, 2 if a gang fits nowhere, 3 if it was interrupted."""
    found = {run.state for run in runs.values()}
    assert found <= FINAL, found
    if State.INFEASIBLE in found:
        return EXIT_INFEASIBLE
    if State.CANCELLED in found and (is_interrupted or State.FAILED not in found):
        return 3
    return 1 if State.FAILED in found else 0
