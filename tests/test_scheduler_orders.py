"""Random orders of everything that can happen, against the promises that must hold in every one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life import states
from runner.life.capacity import Node
from runner.life.decisions import Release, Start, Stop, Submit
from runner.life.job import Job
from runner.life.states import Run, State
from runner.scheduler import Scheduler
from runner.spec import Gang, Limits, RunKey
from tests.simulate import Clock, NoView, make_nodes, simulated_job
from tests.sweep_tools import make_spec

GANG = Gang(gpus=8, cpus=4)
LIMITS = Limits(attempts=2, preemptions=2, backoff_s=1.0, stall_s=500.0, start_s=300.0, heartbeat_s=100.0)
PLACES = 2


@dataclass
class HandDriven:
    """A backend where nothing happens unless the test says so."""

    alive: list[tuple[RunKey, int]] = field(default_factory=list)  # groups submitted and not gone
    placed: list[tuple[RunKey, int]] = field(default_factory=list)
    started: list[tuple[RunKey, int]] = field(default_factory=list)
    dying: list[tuple[RunKey, int]] = field(default_factory=list)
    past: list[tuple[RunKey, int]] = field(default_factory=list)
    news: list[states.Event] = field(default_factory=list)

    def nodes(self) -> tuple[Node, ...]:
        """Return as many nodes as there are places."""
        return tuple(make_nodes(PLACES, cpus=32, gpus=8))

    def submit(self, command: Submit) -> None:
        """Note the group; a second one for a living run breaks the first promise."""
        assert command.key not in [key for key, _ in self.alive], "two living gangs for one run"
        self.alive.append((command.key, command.group))

    def start(self, command: Start, job: Job) -> None:
        """Note the start."""
        assert (command.key, command.group) in self.placed
        self.started.append((command.key, command.group))

    def stop(self, command: Stop) -> None:
        """Ranks may or may not listen."""

    def release(self, command: Release) -> None:
        """The group is going to be gone."""
        assert (command.key, command.group) in self.alive
        if (command.key, command.group) not in self.dying:
            self.dying.append((command.key, command.group))

    def poll(self, timeout_s: float) -> list[states.Event]:
        """Return what the test made happen."""
        news, self.news = self.news, []
        return news

    def bury(self, place: tuple[RunKey, int]) -> None:
        """Let a released group be gone."""
        for group in (self.alive, self.placed, self.started, self.dying):
            if place in group:
                group.remove(place)
        self.past.append(place)
        self.news.append(states.Gone(key=place[0], group=place[1]))


FAILURES = st.sampled_from([Kind.RAISED, Kind.USER, Kind.DIED, Kind.NODE_LOST, Kind.PREFLIGHT])


class Orders(RuleBasedStateMachine):
    """One sweep of three seeds, two places, and whatever happens to them."""

    @initialize()
    def begin(self) -> None:
        """Start a sweep."""
        self.clock, self.backend = Clock(), HandDriven()
        self.files: set[RunKey] = set()
        self.disk_is_full = False
        folder = Path("/nonexistent/never-written")
        spec = make_spec(folder, gang=GANG, limits=LIMITS)
        self.scheduler = Scheduler(
            spec, [Run(key=key) for key in spec.keys], self.backend, SweepDirectory(LocalStorage(folder)),
            NoView(), make_job=lambda run: simulated_job(spec, run), commit=self.commit, clock=self.clock, grace_s=5.0,
        )  # fmt: skip
        self.scheduler.persist = lambda **_: None  # type: ignore[method-assign]  # disk is not what is tested here
        self.scheduler.tick()

    def commit(self, run: Run) -> None:
        """Write the row of a finished attempt, or fail to."""
        if self.disk_is_full:
            raise OSError(28, "No space left on device")
        if run.state is State.COMMITTING:
            self.files.add(run.key)

    def pick(self, data: st.DataObject, places: list[tuple[RunKey, int]]) -> tuple[RunKey, int] | None:
        """Return one of places, None where there are none."""
        return data.draw(st.sampled_from(places)) if places else None

    @rule(data=st.data())
    def a_group_is_placed(self, data: st.DataObject) -> None:
        """A waiting group gets a node."""
        waiting = [place for place in self.backend.alive if place not in self.backend.placed]
        place = self.pick(data, waiting)
        if place and len(self.backend.placed) < PLACES:
            self.backend.placed.append(place)
            self.backend.news.append(states.Placed(key=place[0], group=place[1], node="n", node_id="node-0"))

    @rule(data=st.data(), phase=st.sampled_from(["train", "quantize", "evaluate", "ttt"]))
    def a_gang_reports(self, data: st.DataObject, phase: str) -> None:
        """A started gang says how far it is."""
        if place := self.pick(data, self.backend.started):
            self.backend.news.append(states.Started(key=place[0], group=place[1], facts={"ranks": []}))
            self.backend.news.append(states.Progress(key=place[0], group=place[1], phase=phase, step=1))

    @rule(data=st.data())
    def a_gang_finishes(self, data: st.DataObject) -> None:
        """A started gang ends well."""
        if place := self.pick(data, self.backend.started):
            self.backend.news.append(states.Finished(key=place[0], group=place[1]))

    @rule(data=st.data(), kind=FAILURES, message=st.sampled_from(["a", "b"]))
    def a_gang_fails(self, data: st.DataObject, kind: Kind, message: str) -> None:
        """A group fails, started or not."""
        if place := self.pick(data, self.backend.placed):
            failure = Failure(kind=kind, message=message, error_type="E")
            self.backend.news.append(states.Failed(key=place[0], group=place[1], failure=failure))

    @rule(data=st.data())
    def a_gang_stops(self, data: st.DataObject) -> None:
        """A started gang says that it was interrupted."""
        if place := self.pick(data, self.backend.started):
            self.backend.news.append(states.Interrupted(key=place[0], group=place[1]))

    @rule(data=st.data())
    def a_group_is_gone(self, data: st.DataObject) -> None:
        """A killed group's processes have ended."""
        if place := self.pick(data, self.backend.dying):
            self.backend.bury(place)

    @rule(data=st.data())
    def a_dead_gang_speaks(self, data: st.DataObject) -> None:
        """A late word of a gang that is gone."""
        if place := self.pick(data, self.backend.past):
            self.backend.news.append(states.Finished(key=place[0], group=place[1]))
            self.backend.news.append(states.Placed(key=place[0], group=place[1], node="n", node_id="node-1"))

    @rule(seconds=st.sampled_from([0.1, 2.0, 50.0, 600.0]))
    def time_passes(self, seconds: float) -> None:
        """Long enough, limits run out."""
        self.clock.now += seconds

    @rule(is_full=st.booleans())
    def disk_fills_or_empties(self, is_full: bool) -> None:
        """Results cannot be written for a while."""
        self.disk_is_full = is_full

    @rule(seed=st.sampled_from([42, 0, 1337]))
    def somebody_cancels(self, seed: int) -> None:
        """A person ends one seed."""
        self.scheduler.cancelled |= {RunKey(seed=seed)}

    @rule()
    def the_driver_looks(self) -> None:
        """One pass of the loop."""
        self.scheduler.tick()

    @invariant()
    def no_run_is_done_without_its_file(self) -> None:
        """DONE means committed."""
        if hasattr(self, "scheduler"):
            done = {key for key, run in self.scheduler.runs.items() if run.state is State.DONE}
            assert done <= self.files

    @invariant()
    def at_most_one_group_more_than_places(self) -> None:
        """The cluster is not flooded."""
        if hasattr(self, "backend"):
            assert len(self.backend.alive) <= PLACES + 1

    def teardown(self) -> None:
        """From wherever chance left it, a sweep whose gangs now work comes to an end."""
        if not hasattr(self, "scheduler"):
            return
        self.disk_is_full = False
        for _ in range(400):
            if all(run.is_final for run in self.scheduler.runs.values()) and not self.backend.alive:
                break
            self.help_along()
        assert all(run.is_final for run in self.scheduler.runs.values())
        assert self.backend.alive == []

    def help_along(self) -> None:
        """Let everything that may happen next happen well."""
        for place in list(self.backend.dying):
            self.backend.bury(place)
        for key, group in self.backend.alive:
            if (key, group) in self.backend.started:
                self.backend.news.append(states.Finished(key=key, group=group))
            elif (key, group) not in self.backend.placed and len(self.backend.placed) < PLACES:
                self.backend.placed.append((key, group))
                self.backend.news.append(states.Placed(key=key, group=group, node="n", node_id="node-0"))
        self.clock.now += 3.0
        self.scheduler.tick()


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
