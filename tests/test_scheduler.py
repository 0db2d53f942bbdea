"""The driver's loop on a simulated cluster: order, retries, limits, infeasible gangs, cancelling, lost nodes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life.capacity import Node, count_slots, why_infeasible
from runner.life.states import Run, State
from runner.scheduler import Scheduler, exit_code
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey, SweepSpec
from tests.simulate import Clock, NoView, SimulatedCluster, ablate, make_nodes, measure_decisions, simulated_job
from tests.sweep_tools import make_spec

GANG = Gang(gpus=8, cpus=4)
LIMITS = Limits(backoff_s=5.0, attempts=3, stall_s=10_000.0)
Fate = Callable[[RunKey, int], tuple[float, Failure] | None]


@dataclass
class Simulation:
    """A sweep on simulated nodes."""

    out: Path
    num_nodes: int = 2
    spec_changes: dict[str, Any] = field(default_factory=dict)
    limits: Limits = LIMITS
    gang: Gang = GANG
    fate: Fate = lambda _key, _attempt: None
    commits: list[tuple[int, int, str]] = field(default_factory=list)
    commit_fails: int = 0

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.spec: SweepSpec = make_spec(self.out, gang=self.gang, limits=self.limits, **self.spec_changes)
        nodes = make_nodes(self.num_nodes, cpus=32, gpus=8)
        self.cluster = SimulatedCluster(self.clock, self.gang, nodes, fate=self.fate)
        self.scheduler = Scheduler(
            self.spec, [Run(key=key) for key in self.spec.keys], self.cluster, SweepDirectory(LocalStorage(self.out)),
            NoView(), make_job=lambda run: simulated_job(self.spec, run), commit=self.commit, limits=self.limits,
            clock=self.clock,
        )  # fmt: skip

    def commit(self, run: Run) -> None:
        """Note what would be written."""
        if run.state is State.COMMITTING and self.commit_fails:
            self.commit_fails -= 1
            raise OSError(28, "No space left on device")
        self.commits.append((run.key.seed, run.attempt, str(run.state)))

    def run(self) -> dict[int, str]:
        """Run to the end; return seed -> state."""
        return {key.seed: str(run.state) for key, run in self.scheduler.run().items()}

    def until(self, is_reached: Callable[[], bool]) -> None:
        """Run until something is so."""
        while not is_reached():
            self.scheduler.tick()

    def events(self) -> list[dict[str, Any]]:
        """Return events.jsonl."""
        return [json.loads(line) for line in (self.out / "events.jsonl").read_text().splitlines()]


def test_more_seeds_than_slots_run_in_the_order_of_the_spec(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, spec_changes={"seeds": [9, 1, 8, 2, 7]})
    assert set(simulation.run().values()) == {"DONE"}
    placed = [event["seed"] for event in simulation.events() if event["to"] == "PLACED"]
    assert placed == [9, 1, 8, 2, 7]


def test_at_most_one_group_waits_in_the_cluster(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, num_nodes=3, spec_changes={"seeds": list(range(20))})
    simulation.run()
    assert simulation.cluster.most_groups == 4


def test_a_failing_seed_is_retried_and_the_others_finish(tmp_path: Path) -> None:
    def fate(key: RunKey, attempt: int) -> tuple[float, Failure] | None:
        failure = Failure(kind=Kind.RAISED, error_type="RuntimeError", message=f"attempt {attempt}", rank=3)
        return (50.0, failure) if key.seed == 0 else None

    simulation = Simulation(tmp_path, fate=fate)
    assert simulation.run() == {42: "DONE", 0: "FAILED", 1337: "DONE"}
    assert Counter(seed for seed, _, state in simulation.commits if state != "COMMITTING") == {0: 3}
    assert exit_code(simulation.scheduler.runs, is_interrupted=False) == 1
    assert "rank 3" in next(event["why"] for event in simulation.events() if event["to"] == "FAILED")


def test_results_that_cannot_be_written_at_first_are_written_by_the_next_attempt(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, commit_fails=1)
    assert set(simulation.run().values()) == {"DONE"}
    assert simulation.scheduler.runs[RunKey(seed=42)].attempt == 2


def test_a_seed_on_a_lost_node_goes_elsewhere_and_pays_no_attempt(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, num_nodes=3)
    run = simulation.scheduler.runs[RunKey(seed=42)]
    simulation.until(lambda: simulation.scheduler.runs[run.key].state is State.TRAIN)
    lost = simulation.scheduler.runs[run.key].node_id
    simulation.cluster.lose_node(lost)
    assert set(simulation.run().values()) == {"DONE"}
    after = simulation.scheduler.runs[run.key]
    assert (after.failures, after.preemptions) == (0, 1)
    assert after.node_id != lost


def test_a_silent_gang_is_killed_and_retried(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, limits=Limits(stall_s=100.0, backoff_s=1.0, attempts=2))
    assert set(simulation.run().values()) == {"FAILED"}  # a simulated stage of 360 s says nothing meanwhile
    failure = simulation.scheduler.runs[RunKey(seed=42)].failure
    assert failure is not None
    assert failure.kind is Kind.STALLED
    assert "limits.stall_s=100" in failure.message


def test_a_gang_that_never_starts_is_given_up_after_its_time(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, limits=Limits(start_s=5.0, attempts=1, stall_s=10_000.0))
    simulation.cluster.stride_s = 1.0
    assert set(simulation.run().values()) == {"FAILED"}  # simulated ranks need 9 s
    failure = simulation.scheduler.runs[RunKey(seed=42)].failure
    assert failure is not None
    assert failure.kind is Kind.START


def test_an_attempt_may_not_take_longer_than_its_limit(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, limits=Limits(seed_s=60.0, attempts=1, stall_s=10_000.0))
    simulation.run()
    failure = simulation.scheduler.runs[RunKey(seed=42)].failure
    assert failure is not None
    assert failure.kind is Kind.TIMEOUT


def test_a_gang_that_fits_nowhere_is_infeasible_at_once(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, gang=Gang(gpus=8, cpus=5))
    assert set(simulation.run().values()) == {"INFEASIBLE"}
    assert simulation.clock.now < 30
    assert exit_code(simulation.scheduler.runs, is_interrupted=False) == 2
    assert "10.0.0.1: 32 CPU, 8 GPU" in simulation.events()[-1]["why"]


def test_waiting_for_nodes_ends_with_them_or_with_the_deadline(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path / "a", num_nodes=0, limits=Limits(wait_s=600.0, stall_s=10_000.0))
    simulation.until(lambda: simulation.clock.now > 300)
    assert {str(run.state) for run in simulation.scheduler.runs.values()} == {"QUEUED"}
    simulation.cluster.all_nodes = make_nodes(1, cpus=32, gpus=8)
    simulation.cluster.free = {"node-0": 1}
    simulation.cluster.place_waiting()
    assert set(simulation.run().values()) == {"DONE"}

    waiting = Simulation(tmp_path / "b", num_nodes=0, limits=Limits(wait_s=600.0))
    assert set(waiting.run().values()) == {"INFEASIBLE"}
    assert 600 <= waiting.clock.now < 650


def test_a_cancelled_seed_ends_and_the_others_finish(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    simulation.until(lambda: simulation.scheduler.runs[RunKey(seed=0)].state is State.TRAIN)
    simulation.scheduler.directory.ask_cancel(0)
    assert simulation.run() == {42: "DONE", 0: "CANCELLED", 1337: "DONE"}
    assert exit_code(simulation.scheduler.runs, is_interrupted=False) == 3


def test_an_interrupted_sweep_ends_within_its_grace(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path)
    simulation.until(lambda: simulation.scheduler.runs[RunKey(seed=42)].state is State.TRAIN)
    simulation.cluster.obeys_stop = False
    simulation.cluster.stride_s = 1.0
    simulation.scheduler.interrupt()
    begun = simulation.clock.now
    assert set(simulation.run().values()) == {"CANCELLED"}
    assert simulation.clock.now - begun < simulation.scheduler.grace_s + 5
    assert simulation.cluster.gangs == {}


def test_repeats_of_a_seed_go_to_different_nodes(tmp_path: Path) -> None:
    simulation = Simulation(tmp_path, num_nodes=4, spec_changes={"seeds": [1, 2], "repeats": 2})
    simulation.run()
    nodes = {(key.seed, key.repeat): run.node_id for key, run in simulation.scheduler.runs.items()}
    assert nodes[1, 0] != nodes[1, 1]
    assert nodes[2, 0] != nodes[2, 1]


def test_a_full_disk_does_not_end_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(tmp_path)
    write, is_full = LocalStorage.write, [True]

    def full(self: LocalStorage, path: str, content: bytes) -> None:
        if is_full[0]:
            raise OSError(28, "No space left on device")
        write(self, path, content)

    monkeypatch.setattr(LocalStorage, "write", full)
    simulation.until(lambda: simulation.clock.now > 300)
    is_full[0] = False
    assert set(simulation.run().values()) == {"DONE"}
    assert {run["state"] for run in json.loads((tmp_path / "state.json").read_text())["runs"]} == {"DONE"}


def test_every_node_is_looked_at_on_its_own() -> None:
    nodes = [Node(node_id=name, name=name, resources={"CPU": 16, "GPU": 4}) for name in "ab"]
    assert count_slots(nodes, Gang(gpus=8, cpus=1)) == 0
    assert "a: 16 CPU, 4 GPU; b: 16 CPU, 4 GPU" in why_infeasible(nodes, Gang(gpus=8, cpus=1))
    assert count_slots(nodes, Gang(gpus=2, cpus=8)) == 2


def test_slots_stay_busy_and_memory_small(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, gang=GANG, seeds=list(range(100)))
    figures = measure_decisions(spec, tmp_path, num_nodes=8)
    assert figures.idle_frac < 0.02
    assert figures.peak_bytes < 100e6


def test_slots_stay_busy_though_runs_wait_for_stages_of_others(tmp_path: Path) -> None:
    spec = ablate(make_spec(tmp_path, gang=GANG, seeds=list(range(8))), 10)
    figures = measure_decisions(spec, tmp_path, num_nodes=8)
    assert (figures.runs, figures.trainings) == (80, 24)  # base and the two that change training, for each seed
    assert figures.idle_frac < 0.03
