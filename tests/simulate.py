"""A cluster that exists only in numbers: the scheduler's loop runs on it with its own clock, faster than time.

Tests use it to break things on purpose; `measure_decisions` prints how the loop scales without any GPU.
"""

from __future__ import annotations

import heapq
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life import states
from runner.life.capacity import Node, gangs_on
from runner.life.decisions import Release, Start, Stop, Submit
from runner.life.job import Job
from runner.life.sharing import Sharing
from runner.life.states import Run
from runner.scheduler import Scheduler
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey, SweepSpec, Variant
from runner.work import Options, SweepWork

PLACE_S = 0.01  # from free room to a placed group
GONE_S = 0.04  # from a kill to free GPUs, as seen on H200s
STAGES = (("train", 0.6), ("quantize", 0.05), ("evaluate", 0.05), ("ttt", 0.3))  # share of a run's time


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@dataclass(slots=True)
class SimulatedGang:
    """A gang's place and what is still to happen to it."""

    key: RunKey
    group: int
    avoid: tuple[str, ...] = ()
    prefer: str = ""
    node: str = ""
    placed_at: float = 0.0
    is_gone: bool = False


@dataclass(slots=True)
class SimulatedCluster:
    """A backend whose gangs are entries in a calendar."""

    clock: Clock
    gang: Gang
    all_nodes: list[Node]
    seconds: Callable[[RunKey, int], float] = lambda _key, _attempt: 600.0  # of one attempt
    obeys_stop: bool = True  # ranks end when they are asked to
    fate: Callable[[RunKey, int], tuple[float, Failure] | None] = lambda _key, _attempt: None  # (after_s, why) or None
    start_s: float = 9.0
    stride_s: float = 20.0  # most time that passes between two looks
    calendar: list[tuple[float, int, states.Event]] = field(default_factory=list)
    gangs: dict[tuple[RunKey, int], SimulatedGang] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    busy: list[tuple[float, int]] = field(default_factory=list)  # when a slot was taken (1) or given back (-1)
    records: dict[RunKey, dict[str, float]] = field(default_factory=dict)  # stage -> when its record is there
    computed: Counter[str] = field(default_factory=Counter)  # stages begun, by name
    most_groups: int = 0
    counter: int = 0

    def __post_init__(self) -> None:
        self.free = {node.node_id: gangs_on(node, self.gang) for node in self.all_nodes}

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that are left."""
        return tuple(self.all_nodes)

    def after(self, seconds: float, event: states.Event) -> None:
        """Put an event into the calendar."""
        self.counter += 1
        heapq.heappush(self.calendar, (self.clock.now + seconds, self.counter, event))

    def submit(self, command: Submit) -> None:
        """Queue a gang. Two living gangs for one run are an error of the scheduler."""
        living = [gang for gang in self.gangs.values() if gang.key == command.key and not gang.is_gone]
        assert not living, f"{command.key} has two gangs"
        self.gangs[command.key, command.group] = SimulatedGang(
            command.key, command.group, avoid=command.avoid, prefer=command.prefer
        )
        self.most_groups = max(self.most_groups, sum(not gang.is_gone for gang in self.gangs.values()))
        self.place_waiting()

    def place_waiting(self) -> None:
        """Give free room to whoever waits longest."""
        for gang in self.gangs.values():
            if gang.node or gang.is_gone:
                continue
            able = [name for name, count in self.free.items() if count > 0 and name not in gang.avoid]
            if able:
                gang.node = gang.prefer if gang.prefer in able else able[0]
                gang.placed_at = self.clock.now
                self.free[gang.node] -= 1
                self.busy.append((self.clock.now, 1))
                (kind,) = {node.accelerator for node in self.all_nodes if node.node_id == gang.node}
                placed = states.Placed(
                    key=gang.key, group=gang.group, node=gang.node, node_id=gang.node, accelerator=kind
                )
                self.after(PLACE_S, placed)

    def start(self, command: Start, job: Job) -> None:
        """Write the whole attempt into the calendar; stages that it, or a donor, has finished take no time."""
        self.after(self.start_s, states.Started(key=command.key, group=command.group, facts={"ranks": []}))
        whole, begun = self.seconds(command.key, command.attempt), self.start_s
        fate = self.fate(command.key, command.attempt)
        records = self.records.setdefault(command.key, {})
        for stage, share in STAGES:
            if stage not in records and stage not in job.donors and (fate is None or begun <= fate[0]):
                self.computed[stage] += 1
                self.after(begun, states.Progress(key=command.key, group=command.group, phase=stage, step=0, total=1))
                begun += whole * share
            if fate is None or begun < fate[0]:
                records.setdefault(stage, self.clock.now + begun)
        if fate is None:
            self.after(begun, states.Finished(key=command.key, group=command.group))
        else:
            self.after(fate[0], states.Failed(key=command.key, group=command.group, failure=fate[1]))

    def recorded_stages(self, key: RunKey) -> list[str]:
        """Return the stages that a run has finished by now."""
        return [stage for stage, at in self.records.get(key, {}).items() if at <= self.clock.now + 1e-6]

    def expect(self, num_runs: int) -> None:
        """Have nothing ready."""

    def stop(self, command: Stop) -> None:
        """Let the ranks stop at once, if they listen."""
        if self.obeys_stop:
            self.after(0.5, states.Interrupted(key=command.key, group=command.group))

    def release(self, command: Release) -> None:
        """Free the gang's place."""
        gang = self.gangs[command.key, command.group]
        if gang.is_gone:
            return
        gang.is_gone = True
        finished = self.recorded_stages(gang.key)  # what it would have finished later it never will
        self.records[gang.key] = {stage: self.records[gang.key][stage] for stage in finished}
        if gang.node:
            self.busy.append((self.clock.now, -1))
            if gang.node in self.free:
                self.free[gang.node] += 1
        self.after(GONE_S, states.Gone(key=command.key, group=command.group))
        del self.gangs[command.key, command.group]
        self.place_waiting()

    def poll(self, timeout_s: float) -> list[states.Event]:
        """Jump to the next entry of the calendar, at most a stride ahead, and return what is due."""
        horizon = self.clock.now + max(timeout_s, self.stride_s)
        self.clock.now = min(horizon, self.calendar[0][0]) if self.calendar else horizon
        due = []
        while self.calendar and self.calendar[0][0] <= self.clock.now:
            due.append(heapq.heappop(self.calendar)[2])
        return due

    def lose_node(self, node_id: str) -> None:
        """Take a node away with everything on it."""
        self.all_nodes = [node for node in self.all_nodes if node.node_id != node_id]
        self.free.pop(node_id, None)
        for gang in self.gangs.values():
            if gang.node == node_id:
                failure = Failure(kind=Kind.NODE_LOST, message="the node went away", node=node_id)
                self.after(0.0, states.Failed(key=gang.key, group=gang.group, failure=failure))


class NoView:
    """Shows nothing."""

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing is open."""


def make_nodes(num_nodes: int, *, cpus: float = 64, gpus: float = 8) -> list[Node]:
    """Return equal nodes."""
    return [
        Node(node_id=f"node-{i}", name=f"10.0.0.{i}", resources={"CPU": cpus, "GPU": gpus}) for i in range(num_nodes)
    ]


def simulated_job(spec: SweepSpec, run: Run) -> Job:
    """Return a job that nobody will do."""
    return Job(
        key=run.key, attempt=run.attempt, config=spec.config, world_size=spec.gang.world_size, threads=1,
        uses_gpus=False, workdir="", out=spec.out,
    )  # fmt: skip


class DecisionFigures(NamedTuple):
    """How the loop scales."""

    runs: int
    slots: int
    decisions: int  # commands given
    decision_ms: float  # mean time of the loop for each of them, events applied and all runs looked at
    peak_bytes: int  # memory allocated by loop and simulated cluster
    makespan_s: float  # simulated
    idle_frac: float  # of the slots' time, before the last run has its place
    trainings: int  # begun


def measure_decisions(spec: SweepSpec, folder: Path, *, num_nodes: int = 64, seed_s: float = 600.0) -> DecisionFigures:
    """Run spec on simulated nodes that hold one gang each, twice: for time, and for memory."""
    spec = replace(spec, limits=Limits())
    cluster, spent_s, decisions = simulate(spec, folder, num_nodes=num_nodes, seed_s=seed_s)
    tracemalloc.start()
    simulate(spec, folder, num_nodes=num_nodes, seed_s=seed_s)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    makespan_s = cluster.clock.now
    return DecisionFigures(
        len(spec.keys), num_nodes, decisions, 1000 * spent_s / decisions, peak, makespan_s,
        idle_s(cluster.busy, num_nodes) / (makespan_s * num_nodes), cluster.computed["train"],
    )  # fmt: skip


def idle_s(busy: list[tuple[float, int]], num_slots: int) -> float:
    """Return the seconds that slots stood idle, added up, before the last run got its place."""
    last, idle, taken, since = max(at for at, change in busy if change > 0), 0.0, 0, 0.0
    for at, change in busy:
        if at > last:
            break
        idle += (num_slots - taken) * (at - since)
        taken, since = taken + change, at
    return idle


def simulate(spec: SweepSpec, folder: Path, *, num_nodes: int, seed_s: float) -> tuple[SimulatedCluster, float, int]:
    """Run spec to its end; return the cluster, the seconds that the loop took, and the number of its decisions."""
    clock, spent_s, decisions = Clock(), 0.0, 0
    nodes = make_nodes(num_nodes, cpus=spec.gang.share["CPU"], gpus=spec.gang.share.get("GPU", 0))
    cluster = SimulatedCluster(clock, spec.gang, nodes, seconds=lambda _key, _attempt: seed_s)
    scheduler = Scheduler(
        spec, [Run(key=key) for key in spec.keys], cluster, SweepDirectory(LocalStorage(folder)), NoView(),
        make_job=lambda run: simulated_job(spec, run), commit=lambda run: None, clock=clock,
        sharing=simulated_sharing(spec), recorded_stages=cluster.recorded_stages,
    )  # fmt: skip
    while not all(run.is_final for run in scheduler.runs.values()):
        events = cluster.poll(0.0)
        begun = time.process_time()  # the machine may have other work to do
        for event in events:
            scheduler.apply(event)
        decisions += scheduler.give_all()
        spent_s += time.process_time() - begun
    return cluster, spent_s, decisions


def simulated_sharing(spec: SweepSpec) -> Sharing:
    """Return what the runs of spec share, as a driver plans it."""
    record = {"data_hash": "d", "code_hash": "c"}
    work = SweepWork(spec, record, Options(), SweepDirectory(LocalStorage(Path(spec.out))))
    return work.share_stages(Run(key=key) for key in spec.keys)


def ablate(spec: SweepSpec, num_variants: int) -> SweepSpec:
    """Return spec with that many variants: of five, one changes training, two the artifact and two the adaptation."""
    base, variants = spec.config, [Variant(name="base", config=spec.config)]
    for number in range(1, num_variants):
        match number % 5:
            case 1:
                changed = replace(base, train=replace(base.train, matrix_lr=0.02 + number / 1e4))
            case 2 | 3:
                changed = replace(base, quant=replace(base.quant, damping_frac=0.01 + number / 1e4))
            case _:
                changed = replace(base, ttt=replace(base.ttt, lr=1e-3 + number / 1e5))
        variants.append(Variant(name=f"v{number}", config=changed))
    return replace(spec, ablation=tuple(variants))


def fill_directory(spec: SweepSpec, folder: Path) -> None:
    """Make the directory of a finished sweep: every run done, with a row in the results."""
    from results.store.writer import commit_attempt

    runs = [Run(key=key, state=states.State.DONE, attempt=1, placed_at=1.0, since=600.0) for key in spec.keys]
    SweepDirectory(LocalStorage(folder)).write_state(spec.name, runs, 0.0, slots=1)
    for run in runs:
        score = 1.07 + 0.001 * (run.key.seed % 7)
        scores = {f"{name}_bpb": score for name in ("pre_ttt", "ttt_lr0", "post_ttt")}
        keys = {"seed": run.key.seed, "repeat": run.key.repeat, "attempt": 1, "config_hash": spec.config_hash}
        commit_attempt(folder, run={**keys, "state": str(run.state), **scores})
