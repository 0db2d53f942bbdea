"""Random orders of everything that can happen, against the promises that must hold in every one of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from model.report import STAGES
from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.folder.takeover import take_over_run
from runner.life import states
from runner.life.capacity import Node
from runner.life.decisions import Release, Start, Stop, Submit
from runner.life.job import Job
from runner.life.states import Run, State
from runner.scheduler import NODES_EVERY_S, Scheduler
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey
from tests.simulate import Clock, NoView, make_nodes, simulated_job, simulated_sharing
from tests.sweep_tools import make_spec

GANG = Gang(gpus=8, cpus=4)
LIMITS = Limits(attempts=2, preemptions=2, backoff_s=1.0, stall_s=500.0, start_s=300.0, heartbeat_s=100.0)
PLACES = 2
FOLDER = Path("/nonexistent/never-written")


@dataclass
class HandDriven:
    """A backend where nothing happens unless the test says so."""

    alive: list[tuple[RunKey, int]] = field(default_factory=list)  # groups submitted and not gone
    placed: list[tuple[RunKey, int]] = field(default_factory=list)
    started: list[tuple[RunKey, int]] = field(default_factory=list)
    dying: list[tuple[RunKey, int]] = field(default_factory=list)
    past: list[tuple[RunKey, int]] = field(default_factory=list)
    jobs: dict[tuple[RunKey, int], Job] = field(default_factory=dict)
    news: list[states.Event] = field(default_factory=list)
    num_nodes: int = PLACES

    def nodes(self) -> tuple[Node, ...]:
        """Return as many nodes as there are places."""
        return tuple(make_nodes(self.num_nodes, cpus=32, gpus=8))

    def submit(self, command: Submit) -> None:
        """Note the group; a second one for a living run breaks the first promise."""
        assert command.key not in [key for key, _ in self.alive], "two living gangs for one run"
        self.alive.append((command.key, command.group))

    def start(self, command: Start, job: Job) -> None:
        """Note the start."""
        assert (command.key, command.group) in self.placed
        self.started.append((command.key, command.group))
        self.jobs[command.key, command.group] = job

    def expect(self, num_runs: int) -> None:
        """Have nothing ready."""

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

    spec_changes: ClassVar[dict[str, Any]] = {}
    limits: ClassVar[Limits] = LIMITS

    @initialize()
    def begin(self) -> None:
        """Start a sweep."""
        self.clock, self.backend = Clock(), HandDriven()
        self.files: set[RunKey] = set()
        self.records: dict[RunKey, set[str]] = {}
        self.disk_is_full = False
        self.spec = make_spec(FOLDER, gang=GANG, limits=self.limits, **self.spec_changes)
        self.drive([Run(key=key) for key in self.spec.keys])

    def drive(self, runs: list[Run]) -> None:
        """Begin as the driver of runs that an earlier one may have left."""
        sharing = simulated_sharing(self.spec)
        for key, stages in self.records.items():
            sharing.finish(key, stages)
        self.scheduler = Scheduler(
            self.spec, runs, self.backend, SweepDirectory(LocalStorage(FOLDER)), NoView(),
            make_job=lambda run: simulated_job(self.spec, run), commit=self.commit, clock=self.clock, grace_s=5.0,
            sharing=sharing, recorded_stages=lambda key: self.records.get(key, set()),
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
        if place and len(self.backend.placed) < self.backend.num_nodes:
            self.backend.placed.append(place)
            self.backend.news.append(states.Placed(key=place[0], group=place[1], node="n", node_id="node-0"))

    @rule(data=st.data(), phase=st.sampled_from(["train", "quantize", "evaluate", "ttt"]))
    def a_gang_reports(self, data: st.DataObject, phase: str) -> None:
        """A started gang says how far it is."""
        if place := self.pick(data, self.backend.started):
            self.records.setdefault(place[0], set()).update(STAGES[: STAGES.index(phase)])
            self.backend.news.append(states.Started(key=place[0], group=place[1], facts={"ranks": []}))
            self.backend.news.append(states.Progress(key=place[0], group=place[1], phase=phase, step=1))

    @rule(data=st.data())
    def a_gang_finishes(self, data: st.DataObject) -> None:
        """A started gang ends well."""
        if place := self.pick(data, self.backend.started):
            self.records[place[0]] = set(STAGES)
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
        self.scheduler.cancelled |= {key for key in self.spec.keys if key.seed == seed}

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

    most_groups = PLACES + 1

    @invariant()
    def at_most_one_group_more_than_places(self) -> None:
        """The cluster is not flooded."""
        if hasattr(self, "backend"):
            assert len(self.backend.alive) <= self.most_groups

    def teardown(self) -> None:
        """From wherever chance left it, a sweep whose gangs now work comes to an end."""
        if not hasattr(self, "scheduler"):
            return
        self.disk_is_full = False
        for _ in range(400 * len(self.spec.variants)):
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
                self.records[key] = set(STAGES)
                self.backend.news.append(states.Finished(key=key, group=group))
            elif (key, group) not in self.backend.placed and len(self.backend.placed) < self.backend.num_nodes:
                self.backend.placed.append((key, group))
                self.backend.news.append(states.Placed(key=key, group=group, node="n", node_id="node-0"))
        self.clock.now += 3.0
        self.scheduler.tick()


class GrowingOrders(Orders):
    """The same on a cluster whose nodes come and go, with as many gangs asked for as max_gangs says."""

    spec_changes: ClassVar[dict[str, Any]] = {"seeds": [42, 0, 1337, 7, 8]}
    limits: ClassVar[Limits] = replace(LIMITS, max_gangs=4, wait_s=300.0)
    most_groups = 4

    @rule(num_nodes=st.sampled_from([0, 1, 2, 6]))
    def nodes_come_or_go(self, num_nodes: int) -> None:
        """Nodes come, or go; a gang on one that went fails by a rule of its own."""
        self.backend.num_nodes = num_nodes
        self.clock.now += NODES_EVERY_S
        self.scheduler.tick()

    def teardown(self) -> None:
        """Every group is withdrawn, or comes to its end."""
        if hasattr(self, "backend"):
            self.backend.num_nodes = PLACES
        super().teardown()


class SharedOrders(Orders):
    """The same with three seeds of five variants, which share stages, and drivers that are killed."""

    spec_changes: ClassVar[dict[str, Any]] = {
        "variants": {
            "base": {},
            "wide": {"train": {"matrix_lr": 0.1}},
            "coarse": {"quant": {"matrix_bits": 4}},
            "fast": {"ttt": {"lr": 0.1}},
            "faster": {"ttt": {"lr": 0.2}},
        }
    }

    redone: set[int]  # stages that were there once, and had to be computed again

    @rule(data=st.data(), num_done=st.integers(0, 2))
    def a_gang_reports(self, data: st.DataObject, num_done: int) -> None:
        """A started gang is at one of the stages that it can neither find nor take."""
        place = self.pick(data, self.backend.started)
        todo = self.left_to_compute(place) if place else []
        if place and todo:
            phase = todo[min(num_done, len(todo) - 1)]
            self.computes(place[0], phase)
            self.records.setdefault(place[0], set()).update(STAGES[: STAGES.index(phase)])
            self.backend.news.append(states.Started(key=place[0], group=place[1], facts={"ranks": []}))
            self.backend.news.append(states.Progress(key=place[0], group=place[1], phase=phase, step=1))

    def left_to_compute(self, place: tuple[RunKey, int]) -> list[str]:
        """Return the stages that a gang neither has nor can take from a donor."""
        names = {key.name: stages for key, stages in self.records.items()}
        donors = self.backend.jobs[place].donors
        own = self.records.get(place[0], set())
        return [stage for stage in STAGES if stage not in own and stage not in names.get(donors.get(stage, ""), ())]

    def computes(self, key: RunKey, stage: str) -> None:
        """Note it if everybody thinks that this stage is there already."""
        number = self.scheduler.sharing.shared[key].get(stage)
        if number in self.scheduler.sharing.made_by:
            self.redone.add(number)

    @rule(data=st.data())
    def outputs_are_deleted(self, data: st.DataObject) -> None:
        """Somebody removes what a run that is over has left."""
        idle = sorted(set(self.records) - {key for key, _ in self.backend.alive})
        if idle:
            self.records.pop(data.draw(st.sampled_from(idle)))

    @rule()
    def the_driver_is_killed(self) -> None:
        """Its gangs end with it; the next one takes up what is on disk."""
        earlier, self.backend = self.scheduler.runs, HandDriven()
        self.drive([
            take_over_run(key, earlier[key], earlier[key].attempt if key in self.files else None, is_wanted=True)
            for key in self.spec.keys
        ])  # fmt: skip

    def drive(self, runs: list[Run]) -> None:
        """Begin as a driver; what earlier ones believed of stages is forgotten."""
        self.redone = set()
        super().drive(runs)

    @rule()
    def the_driver_looks(self) -> None:
        """After one pass of the loop whoever waits for a stage waits for a gang that is not gone."""
        self.scheduler.tick()
        at_work = {run.key.words for run in self.scheduler.runs.values() if run.has_group}
        for run in self.scheduler.runs.values():
            if run.state is State.QUEUED and run.waits_for:
                assert not run.has_group
                assert run.waits_for.partition(" of ")[2] in at_work

    @invariant()
    def nobody_computes_what_another_computes(self) -> None:
        """Each stage is at most one living gang's to compute, those apart that had to be computed again."""
        if hasattr(self, "scheduler"):
            missing = self.scheduler.sharing.missing
            claimed = [number for key, _ in self.backend.alive for number in missing[key] if number not in self.redone]
            assert len(claimed) == len(set(claimed))


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestGrowingOrders = GrowingOrders.TestCase
TestGrowingOrders.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestSharedOrders = SharedOrders.TestCase
TestSharedOrders.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
