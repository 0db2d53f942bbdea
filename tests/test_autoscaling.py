"""How many gangs are asked for, on clusters whose nodes come when somebody asks and go when nobody does."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.sweeps.plan import print_plan
from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life import states
from runner.life.capacity import Node, gangs_on
from runner.life.decisions import most_groups
from runner.life.states import Run, State
from runner.plan import make_plan
from runner.scheduler import Scheduler, exit_code
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey
from tests.simulate import Clock, NoView, SimulatedCluster, ablate, make_nodes, simulated_job, simulated_sharing
from tests.sweep_tools import make_spec

GANG = Gang(gpus=8, cpus=4)
LAUNCH_S = 60.0
Fate = Callable[[RunKey, int], tuple[float, Failure] | None]


@dataclass
class Autoscaled(SimulatedCluster):
    """Nodes for one gang each come a while after a group has no place, and go when they have been idle."""

    max_nodes: int = 0  # that come, besides those that are there
    idle_s: float = math.inf
    launched: int = 0
    coming: list[float] = field(default_factory=list)  # when nodes will be there
    idle_since: dict[str, float] = field(default_factory=dict)
    most_pending: int = 0

    def pending(self) -> list[Any]:
        """Return the groups that have no place."""
        return [gang for gang in self.gangs.values() if not gang.node and not gang.is_gone]

    def poll(self, timeout_s: float) -> list[states.Event]:
        """Let nodes come and go, then time pass."""
        self.let_nodes_come()
        self.let_nodes_go()
        return SimulatedCluster.poll(self, timeout_s)

    def let_nodes_come(self) -> None:
        """Launch what is missing, and open what has been launched."""
        now = self.clock.now
        missing = len(self.pending()) - len(self.coming)
        self.most_pending = max(self.most_pending, len(self.pending()))
        allowed = self.max_nodes - len(self.all_nodes) - len(self.coming)
        self.coming += [now + LAUNCH_S] * max(0, min(missing, allowed))
        for _ in [at for at in self.coming if at <= now]:
            (node,) = make_nodes(1, cpus=32, gpus=8)
            node = replace(node, node_id=f"launched-{self.launched}")
            self.launched += 1
            self.all_nodes.append(node)
            self.free[node.node_id] = gangs_on(node, self.gang)
        self.coming = [at for at in self.coming if at > now]
        self.place_waiting()

    def let_nodes_go(self) -> None:
        """Remove nodes that have been idle."""
        now = self.clock.now
        idle = {node.node_id for node in self.all_nodes if self.free[node.node_id] == gangs_on(node, self.gang)}
        self.idle_since = {name: self.idle_since.get(name, now) for name in idle}
        gone = {name for name, since in self.idle_since.items() if now - since >= self.idle_s}
        self.all_nodes = [node for node in self.all_nodes if node.node_id not in gone]
        self.free = {name: count for name, count in self.free.items() if name not in gone}


class Simulation:
    """A sweep on a cluster that grows and shrinks."""

    def __init__(
        self, out: Path, limits: Limits, *, num_nodes: int = 0, max_nodes: int = 0, idle_s: float = math.inf,
        num_variants: int = 0, fate: Fate = lambda _key, _attempt: None, **changes: Any,
    ) -> None:  # fmt: skip
        self.out, self.clock = out, Clock()
        limits = replace(limits, stall_s=10_000.0)
        spec = make_spec(out, gang=GANG, limits=limits, **changes)
        self.spec = ablate(spec, num_variants) if num_variants else spec
        self.cluster = Autoscaled(
            self.clock, GANG, make_nodes(num_nodes, cpus=32, gpus=8), fate=fate, max_nodes=max_nodes, idle_s=idle_s
        )
        self.scheduler = Scheduler(
            self.spec, [Run(key=key) for key in self.spec.keys], self.cluster, SweepDirectory(LocalStorage(out)),
            NoView(), make_job=lambda run: simulated_job(self.spec, run), commit=lambda run: None, clock=self.clock,
            sharing=simulated_sharing(self.spec), recorded_stages=self.cluster.recorded_stages,
        )  # fmt: skip

    def run(self) -> dict[int, str]:
        """Run to the end; return seed -> state."""
        self.until(lambda: all(run.is_final for run in self.scheduler.runs.values()))
        self.scheduler.persist(force=True)
        return {key.seed: str(run.state) for key, run in self.scheduler.runs.items()}

    def until(self, is_reached: Callable[[], bool]) -> None:
        """Run until something is so."""
        for _ in range(1000):
            if is_reached():
                return
            self.scheduler.tick()
        raise AssertionError("never so")

    def all_pending(self, count: int) -> bool:
        """Return whether so many groups wait, and nothing has a place."""
        return len(self.cluster.gangs) == len(self.cluster.pending()) == count

    def events(self) -> list[dict[str, Any]]:
        """Return events.jsonl."""
        return [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]


def most_at_work(busy: list[tuple[float, int]]) -> int:
    """Return how many gangs had a place at the same time."""
    taken, most = 0, 0
    for _, change in busy:
        taken += change
        most = max(most, taken)
    return most


@pytest.mark.parametrize(
    ("slots", "max_gangs", "wait_s", "most"),
    [
        (4, None, 0.0, 5),
        (0, None, 600.0, 1),
        (4, 2, 0.0, 2),
        (4, 2, 600.0, 2),
        (2, 8, 0.0, 3),  # no node is to come
        (2, 8, 600.0, 8),
        (0, 3, 600.0, 3),
        (0, 1, 600.0, 1),
    ],
)
def test_so_many_gangs_are_placed_or_asked_for(slots: int, max_gangs: int | None, wait_s: float, most: int) -> None:
    assert most_groups(slots, Limits(max_gangs=max_gangs, wait_s=wait_s)) == most


def test_max_gangs_leaves_room_for_others(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=2), num_nodes=4, seeds=list(range(7)))
    assert set(simulation.run().values()) == {"DONE"}
    assert simulation.cluster.most_groups == 2


@pytest.mark.parametrize("num_variants", [0, 6])
def test_as_many_nodes_as_max_gangs_are_asked_for_at_once_and_used(tmp_path: Path, num_variants: int) -> None:
    limits = Limits(max_gangs=3, wait_s=600.0)
    simulation = Simulation(tmp_path, limits, max_nodes=8, num_variants=num_variants, seeds=[1, 2, 3, 4, 5])
    assert set(simulation.run().values()) == {"DONE"}
    cluster = simulation.cluster
    assert (cluster.most_pending, cluster.launched, most_at_work(cluster.busy)) == (3, 3, 3)
    assert {run.node_id for run in simulation.scheduler.runs.values()} == {f"launched-{i}" for i in range(3)}


def test_without_max_gangs_one_more_node_is_asked_for_at_a_time(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(wait_s=600.0), max_nodes=3, seeds=list(range(6)))
    assert set(simulation.run().values()) == {"DONE"}
    assert (simulation.cluster.most_pending, simulation.cluster.launched) == (1, 3)


def test_no_node_is_asked_for_once_every_seed_has_a_place(tmp_path: Path) -> None:
    limits = Limits(max_gangs=8, wait_s=600.0)
    simulation = Simulation(tmp_path, limits, num_nodes=1, max_nodes=8, seeds=[1, 2, 3])
    assert set(simulation.run().values()) == {"DONE"}
    assert simulation.cluster.launched == 2


def test_a_gang_that_is_asked_for_costs_nothing_and_is_withdrawn_when_its_seed_is_cancelled(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=3, wait_s=9000.0))
    simulation.until(lambda: simulation.all_pending(3) and simulation.clock.now > 100)
    runs = simulation.scheduler.runs
    assert {(str(run.state), run.attempt, run.gang_s(simulation.clock.now)) for run in runs.values()} == {
        ("QUEUED", 0, 0.0)
    }
    simulation.scheduler.directory.ask_cancel(0)
    simulation.until(lambda: runs[RunKey(seed=0)].is_final)
    assert sorted(gang.key.seed for gang in simulation.cluster.gangs.values()) == [42, 1337]
    simulation.cluster.max_nodes = 2
    assert simulation.run() == {42: "DONE", 0: "CANCELLED", 1337: "DONE"}


def test_a_stop_withdraws_everything_that_was_asked_for(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=3, wait_s=9000.0))
    simulation.until(lambda: simulation.all_pending(3))
    simulation.scheduler.interrupt()
    simulation.cluster.stride_s, begun = 1.0, simulation.clock.now
    assert set(simulation.run().values()) == {"CANCELLED"}
    assert simulation.clock.now - begun < 10
    assert simulation.cluster.gangs == {}
    assert exit_code(simulation.scheduler.runs, is_interrupted=True) == 3


def test_when_no_node_comes_in_time_everything_is_withdrawn_in_one_line(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=3, wait_s=600.0))
    simulation.cluster.all_nodes = [Node(node_id="head", name="10.0.0.9", resources={"CPU": 4.0})]
    simulation.cluster.free = {"head": 0}
    assert set(simulation.run().values()) == {"INFEASIBLE"}
    assert 600 <= simulation.clock.now < 650
    assert simulation.cluster.gangs == {}
    line = simulation.scheduler.infeasible
    for words in (
        "asked for 8 rank(s) on one node, 1 GPU, 4 CPU each", "nodes have 10.0.0.9: 4 CPU, 0 GPU",
        "none came in 600 s: raise wait_s", "nodes of at least {'CPU': 32.0, 'GPU': 8.0}",
    ):  # fmt: skip
        assert words in line
    assert "\n" not in line
    assert [event["why"] for event in simulation.events() if event["to"] == "INFEASIBLE"] == [line] * 3


def test_a_fixed_cluster_without_wait_s_is_refused_at_once_however_many_gangs_are_allowed(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=4))
    assert set(simulation.run().values()) == {"INFEASIBLE"}
    assert simulation.clock.now < 30
    assert simulation.cluster.most_groups == 0
    assert "none came" not in simulation.scheduler.infeasible


def test_idle_nodes_that_go_are_nobodys_failure(tmp_path: Path) -> None:
    limits = Limits(max_gangs=2, wait_s=600.0)
    simulation = Simulation(tmp_path, limits, max_nodes=2, idle_s=100.0, seeds=[1, 2, 3])
    assert set(simulation.run().values()) == {"DONE"}
    assert len(simulation.cluster.all_nodes) == 1  # the other one went while the third seed was at work
    runs = simulation.scheduler.runs.values()
    assert {(run.attempt, run.failures, run.preemptions) for run in runs} == {(1, 0, 0)}


def test_a_node_that_goes_under_a_gang_is_a_preemption_and_another_one_is_asked_for(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, Limits(max_gangs=2, wait_s=600.0), max_nodes=2, seeds=[1])
    simulation.until(lambda: simulation.scheduler.runs[RunKey(seed=1)].state is State.TRAIN)
    simulation.cluster.lose_node("launched-0")
    assert simulation.run() == {1: "DONE"}
    run = simulation.scheduler.runs[RunKey(seed=1)]
    assert (run.attempt, run.failures, run.preemptions, run.node_id) == (2, 0, 1, "launched-1")


def test_time_in_which_no_node_was_asked_for_is_not_waited(tmp_path: Path) -> None:
    """A seed that fails waits before its next attempt; its node goes meanwhile, because nobody asks for it."""

    def fate(_key: RunKey, attempt: int) -> tuple[float, Failure] | None:
        return (30.0, Failure(kind=Kind.DIED, message="died", rank=0)) if attempt == 1 else None

    limits = Limits(max_gangs=2, wait_s=200.0, backoff_s=900.0, backoff_max_s=900.0)
    simulation = Simulation(tmp_path, limits, max_nodes=1, idle_s=50.0, fate=fate, seeds=[1])
    assert simulation.run() == {1: "DONE"}
    assert simulation.cluster.launched == 2


def test_a_group_does_not_wait_for_nodes_that_are_gone_beside_one_that_failed_its_seed(tmp_path: Path) -> None:
    def fate(key: RunKey, attempt: int) -> tuple[float, Failure] | None:
        return (30.0, Failure(kind=Kind.DIED, message="died", rank=0)) if (key.seed, attempt) == (1, 1) else None

    simulation = Simulation(tmp_path, Limits(backoff_s=5.0), num_nodes=2, fate=fate, seeds=[1, 2])
    run = RunKey(seed=1)
    runs = simulation.scheduler.runs
    simulation.until(lambda: runs[run].failures == 1 and runs[run].has_group)
    assert runs[run].state is State.QUEUED  # it waits for the other node, though the one where it failed is free
    simulation.cluster.lose_node("node-1")
    assert simulation.run() == {1: "DONE", 2: "DONE"}


def test_plan_says_how_many_gangs_there_will_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(limits: Limits, num_nodes: int, seeds: int = 4) -> str:
        spec = make_spec(tmp_path, gang=GANG, limits=limits, seeds=list(range(seeds)))
        spec = replace(spec, config=replace(spec.config, train=replace(spec.config.train, budget_s=400.0)))
        plan = make_plan(spec, make_nodes(num_nodes))
        print_plan(plan)
        return capsys.readouterr().out + "\n".join(plan.problems)

    text = shown(Limits(max_gangs=1), 2)
    assert "slots: 2 gang(s) at once (max_gangs: 1)" in text
    assert "asked for:" not in text
    assert "1h06m in all" in text  # one after the other: 4 times 400 + 600 s
    text = shown(Limits(max_gangs=3, wait_s=60.0), 1)
    assert "asked for: 3 gang(s) at once" in text
    text = shown(Limits(max_gangs=9, wait_s=60.0), 1)
    assert "asked for: 4 gang(s) at once" in text  # there are no more seeds
    text = shown(Limits(max_gangs=2, wait_s=60.0), 0)
    assert "no place yet: no node can hold one gang: asked for 8 rank(s)" in text
    assert "waits 60 s" in text
    assert text.count("no node can hold") == 1  # said, and no problem
    assert shown(Limits(), 0).count("no node can hold") == 1
