"""Several sweeps on one cluster: who goes first, who makes way, and whose claim still counts. No Ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life import states
from runner.life.capacity import Node
from runner.life.claims import PATIENCE_S, SILENT_S, Board, Claim, Held, choose_leavers, reserve
from runner.life.decisions import Situation, Submit, Wait, decide
from runner.life.states import Run, State, apply_event, judge_attempt
from runner.scheduler import Scheduler
from runner.spec.gang import Gang, Limits
from runner.spec.read import parse_spec
from runner.spec.sweep import RunKey, SweepSpec
from tests.simulate import Clock, NoView, SimulatedCluster, make_nodes, simulated_job
from tests.sweep_tools import make_spec

GANG = Gang(gpus=8, cpus=4)
LIMITS = Limits(stall_s=10_000.0, backoff_s=5.0)
RUN_S = 40.0  # of simulated time that an attempt takes
WORDS = "waits: sweep high with priority 5 waits for a place"


class Shelf:
    """A store of claims that is a mapping, and the cluster's free room."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.free_gangs: dict[str, int] = {}

    def put(self, name: str, content: bytes) -> None:
        """Leave content under name."""
        self.content[name] = content

    def read(self) -> dict[str, bytes]:
        """Return everything that was left."""
        return dict(self.content)

    def remove(self, name: str) -> None:
        """Take away what was left under name."""
        self.content.pop(name, None)

    def free(self) -> dict[str, dict[str, float]]:
        """Return what nobody holds."""
        return {name: {"CPU": 32.0 * count, "GPU": 8.0 * count} for name, count in self.free_gangs.items()}


@dataclass
class Shared:
    """A cluster that several sweeps work on, each with a driver of its own."""

    num_nodes: int = 1
    clock: Clock = field(default_factory=Clock)
    shelf: Shelf = field(default_factory=Shelf)
    drivers: list[Scheduler] = field(default_factory=list)
    dead: list[Scheduler] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = make_nodes(self.num_nodes, cpus=32, gpus=8)
        self.shelf.free_gangs = {node.node_id: 1 for node in self.nodes}

    def add(self, out: Path, name: str, *, seeds: list[int], **changes: Any) -> Scheduler:
        """Start the driver of one more sweep."""
        spec: SweepSpec = make_spec(out, gang=GANG, limits=LIMITS, name=name, seeds=seeds, **changes)
        cluster = SimulatedCluster(
            self.clock, GANG, self.nodes, seconds=lambda _key, _attempt: RUN_S, start_s=1.0, stride_s=0.5
        )
        cluster.free = self.shelf.free_gangs  # one cluster for all
        driver = Scheduler(
            spec, [Run(key=key) for key in spec.keys], cluster, SweepDirectory(LocalStorage(out)), NoView(),
            make_job=lambda run: simulated_job(spec, run), commit=lambda _run: None, limits=LIMITS, clock=self.clock,
            board=Board(self.shelf, clock=self.clock),
        )  # fmt: skip
        self.drivers.append(driver)
        return driver

    def until(self, is_reached: Callable[[], bool], *, seconds: float = 5000.0) -> None:
        """Let all drivers work until something is so."""
        begun = self.clock.now
        while not is_reached():
            assert self.clock.now - begun < seconds, "it never came to that"
            for driver in self.drivers:
                if driver not in self.dead:
                    driver.backend.place_waiting()  # type: ignore[attr-defined]
                    driver.tick()

    def finish(self) -> None:
        """Let all living drivers finish."""
        self.until(lambda: all(is_over(driver) for driver in self.drivers if driver not in self.dead))


def is_over(driver: Scheduler) -> bool:
    """Return whether every run of a driver's sweep is final."""
    return all(run.is_final for run in driver.runs.values())


def run_of(driver: Scheduler, seed: int) -> Run:
    """Return the run of a seed."""
    return driver.runs[RunKey(seed=seed)]


def events_of(out: Path) -> list[dict[str, Any]]:
    """Return events.jsonl."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_a_later_more_important_sweep_gets_the_next_free_place_and_nothing_is_killed(tmp_path: Path) -> None:
    shared = Shared()
    low = shared.add(tmp_path / "low", "low", seeds=[1, 2, 3])
    shared.until(lambda: run_of(low, 1).state is State.TRAIN)
    high = shared.add(tmp_path / "high", "high", seeds=[7, 8], priority=5)
    shared.until(lambda: run_of(low, 2).waits_for == WORDS)
    assert not run_of(low, 2).has_group
    assert run_of(low, 1).state is State.TRAIN
    shared.until(lambda: run_of(high, 8).state is State.TRAIN)
    assert run_of(low, 1).state is State.DONE  # it went on to its end
    assert [run_of(low, seed).attempt for seed in (1, 2, 3)] == [1, 0, 0]
    shared.finish()
    assert [run_of(low, seed).attempt for seed in (1, 2, 3)] == [1, 1, 1]
    (held,) = [event for event in events_of(tmp_path / "low") if event["why"] == WORDS and event["seed"] == 2]
    assert (held["from"], held["to"]) == ("QUEUED", "QUEUED")


def test_who_is_held_back_still_goes_before_those_below_it(tmp_path: Path) -> None:
    shared = Shared()
    first = shared.add(tmp_path / "first", "first", seeds=[1])
    shared.until(lambda: run_of(first, 1).state is State.TRAIN)
    low = shared.add(tmp_path / "low", "low", seeds=[4])
    middle = shared.add(tmp_path / "middle", "middle", seeds=[5], priority=5)
    high = shared.add(tmp_path / "high", "high", seeds=[9], priority=9)
    shared.until(lambda: run_of(low, 4).held_back and run_of(middle, 5).held_back)
    shared.until(lambda: run_of(high, 9).state is State.TRAIN)
    shared.until(lambda: run_of(middle, 5).state is State.TRAIN)
    assert run_of(low, 4).attempt == 0
    shared.finish()


def test_sweeps_of_equal_priority_leave_each_other_alone(tmp_path: Path) -> None:
    shared = Shared()
    low = shared.add(tmp_path / "low", "low", seeds=[1, 2], priority=5, preemptible=True)
    shared.until(lambda: run_of(low, 1).state is State.TRAIN)
    shared.add(tmp_path / "high", "high", seeds=[7], priority=5)
    shared.finish()
    assert [run_of(low, seed).preemptions for seed in (1, 2)] == [0, 0]
    assert not [event for event in events_of(tmp_path / "low") if event["why"]]


def test_gangs_of_a_preemptible_sweep_make_way_newest_first_and_pay_no_attempt(tmp_path: Path) -> None:
    shared = Shared(num_nodes=3)
    low = shared.add(tmp_path / "low", "low", seeds=[1, 2, 3], preemptible=True)
    shared.until(lambda: run_of(low, 1).state is State.TRAIN)
    run_of_3 = low.runs[RunKey(seed=3)]
    low.runs[run_of_3.key] = replace(run_of_3, placed_at=run_of_3.placed_at + 0.5)  # it came last
    high = shared.add(tmp_path / "high", "high", seeds=[7], priority=5)
    shared.until(lambda: run_of(high, 7).state is State.TRAIN)
    assert [run_of(low, seed).preemptions for seed in (1, 2, 3)] == [0, 0, 1]
    assert run_of(low, 3).state is State.QUEUED
    shared.finish()
    after = run_of(low, 3)
    assert (after.state, after.attempt, after.failures, after.preemptions) == (State.DONE, 2, 0, 1)
    assert [run_of(low, seed).attempt for seed in (1, 2)] == [1, 1]
    why = [event["why"] for event in events_of(tmp_path / "low") if event["to"] == "TEARDOWN"]
    assert why == ["made way for sweep high with priority 5"]
    assert after.bad_nodes == ()


def test_who_makes_way_for_two_of_many_gives_two_places_and_no_more(tmp_path: Path) -> None:
    shared = Shared(num_nodes=4)
    low = shared.add(tmp_path / "low", "low", seeds=[1, 2, 3, 4], preemptible=True)
    shared.until(lambda: all(run.state is State.TRAIN for run in low.runs.values()))
    high = shared.add(tmp_path / "high", "high", seeds=[7, 8], priority=1)
    shared.until(lambda: all(run.state is State.TRAIN for run in high.runs.values()))
    shared.until(lambda: is_over(high))
    assert sum(run.preemptions for run in low.runs.values()) == 2
    shared.finish()


def test_free_room_is_taken_before_anybody_makes_way(tmp_path: Path) -> None:
    shared = Shared(num_nodes=2)
    low = shared.add(tmp_path / "low", "low", seeds=[1], preemptible=True)
    shared.until(lambda: run_of(low, 1).state is State.TRAIN)
    shared.add(tmp_path / "high", "high", seeds=[7], priority=1)
    shared.finish()
    assert run_of(low, 1).attempt == 1


def test_the_claim_of_a_driver_that_was_killed_ends_within_its_heartbeat(tmp_path: Path) -> None:
    shared = Shared()
    low = shared.add(tmp_path / "low", "low", seeds=[1, 2])
    shared.until(lambda: run_of(low, 1).state is State.TRAIN)
    high = shared.add(tmp_path / "high", "high", seeds=[7], priority=5)
    shared.until(lambda: run_of(low, 2).waits_for == WORDS)
    shared.dead.append(high)
    killed_at = shared.clock.now
    high.backend.gangs.clear()  # type: ignore[attr-defined]
    shared.until(lambda: run_of(low, 2).has_group)
    assert shared.clock.now - killed_at < SILENT_S + 5
    assert len(shared.shelf.content) == 1
    shared.finish()


def test_a_claim_that_is_not_of_this_version_is_nobodys(tmp_path: Path) -> None:
    shared = Shared()
    for name, content in {
        "a": b"\xff",
        "b": b"[]",
        "c": b'{"format": 99}',
        "d": b'{"format": 1, "driver": "d"}',
    }.items():
        shared.shelf.put(name, content)
    claim = claim_with("low", priority=0)
    assert Board(shared.shelf, clock=shared.clock).exchange(claim) == ()
    low = shared.add(tmp_path / "low", "low", seeds=[1])
    shared.finish()
    assert run_of(low, 1).state is State.DONE


def claim_with(name: str, *, gang: Gang = GANG, **changes: Any) -> Claim:
    """Return a claim with what a test does not care about filled in."""
    return Claim(**{"driver": name, "sweep": name, "priority": 0, "preemptible": False, "gang": gang, **changes})


def node(name: str, *, gpus: float = 8, kind: str = "H100") -> Node:
    """Return a node of one kind of GPU."""
    labels = {"ray.io/accelerator-type": kind}
    return Node(node_id=name, name=name, resources={"CPU": 64, "GPU": gpus}, labels=labels)


def test_a_claim_comes_back_from_json_as_it_was() -> None:
    gang = Gang(gpus=2, require={"ray.io/accelerator-type": ("H100",)})
    held = Held(run="seed=1-repeat=0", nodes=("a", "b"), age_s=4.0, is_leaving=True)
    claim = claim_with("x", gang=gang, priority=-3, preemptible=True, waits_s=(1.0, 2.5), held=(held,), gave_s=3.0)
    assert Claim.from_json(json.loads(json.dumps(claim.to_json()))) == claim


def test_only_nodes_that_could_serve_who_waits_are_kept_for_it() -> None:
    nodes = [node("a"), node("b", kind="A100"), node("c", gpus=4)]
    wants_h100 = Gang(gpus=8, require={"ray.io/accelerator-type": ("H100",)})
    high = claim_with("high", gang=wants_h100, priority=5, waits_s=(0.0,))
    low = claim_with("low", gang=Gang(gpus=4))
    assert set(reserve(low, [high], nodes)) == {"a"}
    assert reserve(low, [replace(high, waits_s=())], nodes) == {}
    assert reserve(replace(low, priority=5), [high], nodes) == {}
    higher = replace(high, sweep="higher", driver="z", priority=9)
    assert reserve(low, [high, higher], nodes)["a"].sweep == "higher"


def test_who_is_held_back_on_some_nodes_asks_for_a_place_on_the_others() -> None:
    nodes = (node("a"), node("b", kind="A100"))
    pending = Run(key=RunKey(seed=1), state=State.QUEUED, has_group=True, group=1)
    fresh = Run(key=RunKey(seed=2), state=State.QUEUED)
    situation = Situation(now=0.0, gang=GANG, limits=LIMITS, slots=2, nodes=nodes, reserved={"a": "sweep x"})
    withdrawn, asked = decide({run.key: run for run in (pending, fresh)}, situation)
    assert (withdrawn.key, type(withdrawn).__name__) == (pending.key, "Release")
    assert isinstance(asked, Submit)
    assert asked.avoid == ("a",)
    apart = replace(pending, avoid=("a",))
    assert decide({apart.key: apart}, situation) == []
    (anew,) = decide({apart.key: apart}, replace(situation, reserved={}))  # there may be room where it may not go
    assert type(anew).__name__ == "Release"
    lost = replace(pending, avoid=("b",), bad_nodes=("b",))
    assert decide({lost.key: lost}, replace(situation, reserved={})) == []
    everywhere = replace(situation, reserved={"a": "sweep x", "b": "sweep x"})
    (wait,) = decide({fresh.key: fresh}, everywhere)
    assert wait == Wait(key=fresh.key, group=0, words="waits: sweep x waits for a place", held_back=True)
    held = replace(fresh, waits_for=wait.words, held_back=True)
    assert decide({fresh.key: held}, everywhere) == []
    (asked,) = decide({fresh.key: held}, replace(situation, reserved={}))
    assert isinstance(asked, Submit)


def test_a_whole_node_is_cleared_where_the_fewest_must_go_and_the_least_important_first() -> None:
    nodes = [node("a"), node("b"), node("c")]
    small = Gang(gpus=2)
    low = claim_with("low", gang=small, preemptible=True, held=held_on("a", 3) + held_on("b", 2))
    firm = claim_with("firm", gang=small, held=held_on("c", 1))
    high = claim_with("high", priority=5, waits_s=(10.0,))
    free = {"a": {"CPU": 58.0, "GPU": 2.0}, "b": {"CPU": 60.0, "GPU": 4.0}, "c": {"CPU": 62.0, "GPU": 6.0}}
    found = choose_leavers([low, firm, high], nodes, free)
    assert set(found) == {("low", "b0"), ("low", "b1")}
    assert {claim.sweep for claim in found.values()} == {"high"}
    lower = claim_with("lower", gang=small, priority=-1, preemptible=True, held=held_on("a", 3))
    (low,) = [replace(low, held=held_on("b", 3))]
    free = {"a": {"CPU": 58.0, "GPU": 2.0}, "b": {"CPU": 58.0, "GPU": 2.0}}
    assert {driver for driver, _ in choose_leavers([low, lower, high], nodes[:2], free)} == {"lower"}


def held_on(name: str, count: int) -> tuple[Held, ...]:
    """Return gangs on one node, the first the newest."""
    return tuple(Held(run=f"{name}{number}", nodes=(name,), age_s=10.0 * number) for number in range(count))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"waits_s": (PATIENCE_S / 2,)}, "free room is given in less time"),
        ({"priority": 0}, "it is no more important"),
        ({"gang": Gang(gpus=16, hosts=2)}, "one node does not hold it, whoever goes"),
    ],
)
def test_nobody_makes_way_in_vain(changes: dict[str, Any], why: str) -> None:
    low = claim_with("low", preemptible=True, held=held_on("a", 1))
    high = claim_with("high", **{"priority": 5, "waits_s": (60.0,), **changes})
    nothing = {"a": {"CPU": 0.0, "GPU": 0.0}}
    assert choose_leavers([low, high], [node("a")], nothing) == {}, why
    sure = claim_with("high", priority=5, waits_s=(60.0,))
    assert set(choose_leavers([low, sure], [node("a")], nothing)) == {("low", "a0")}
    assert choose_leavers([replace(low, preemptible=False), sure], [node("a")], nothing) == {}
    assert choose_leavers([replace(low, gave_s=1.0), sure], [node("a")], nothing) == {}
    leaving = replace(low, held=(replace(low.held[0], is_leaving=True), *held_on("b", 1)))
    assert choose_leavers([leaving, sure], [node("a"), node("b")], nothing) == {}


def test_making_way_never_ends_a_run_however_often_and_does_not_use_up_its_preemptions() -> None:
    limits, run = Limits(preemptions=2, attempts=1), Run(key=RunKey(seed=1), has_group=True, group=1, attempt=1)
    for _ in range(10):
        training = replace(run, state=State.TRAIN, has_group=True, yields="sweep high with priority 5")
        stopped = apply_event(training, states.Interrupted(key=run.key, group=1), 5.0, limits)
        assert stopped.state is State.TEARDOWN
        run = apply_event(stopped, states.Gone(key=run.key, group=1), 6.0, limits)
        assert (run.state, run.not_before) == (State.RETRY_WAIT, 6.0)
    assert (run.preemptions, run.asides, run.failures) == (10, 10, 0)
    lost = replace(run, failure=Failure(kind=Kind.NODE_LOST, message="gone"))
    assert judge_attempt(lost, 7.0, limits).state is State.RETRY_WAIT


def test_priority_and_preemptible_are_checked_and_change_no_hash(tmp_path: Path) -> None:
    plain = {"name": "a", "preset": "tiny", "seeds": [1], "out": str(tmp_path),
             "data": {"train": "t*.bin", "val": "v*.bin", "tokenizer": "m"}}  # fmt: skip
    spec = parse_spec({**plain, "priority": 5, "preemptible": True, "gang": {"gpus": 1, "same_gpu": True}})
    assert (spec.priority, spec.preemptible) == (5, True)
    assert spec.config_hash == parse_spec({**plain, "gang": {"gpus": 1}}).config_hash
    assert SweepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert not {"priority", "preemptible"} & set(parse_spec(plain).to_json())
    for change, words in (
        ({"priority": "high"}, r"priority must be a whole number, not text \('high'\)"),
        ({"priority": 10**7}, "priority=10000000 must be between"),
        ({"preemptible": 1}, "preemptible must be true or false"),
        ({"priorty": 1}, "unknown key 'priorty'; did you mean 'priority'"),
        ({"gang": {"same_gpu": True}}, "gang.same_gpu=true is for gangs with gang.gpus"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_spec({**plain, **change})


def test_a_cluster_that_keeps_no_claims_leaves_the_sweep_to_itself_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ray.exceptions import RaySystemError

    from runner.gang import ray_facts

    def refuse(*_arguments: object, **_options: object) -> None:
        raise RaySystemError("permission denied")

    for name in ("put", "get", "list", "del"):
        monkeypatch.setattr(ray_facts.kv, f"_internal_kv_{name}", refuse)
    monkeypatch.setattr(ray_facts, "available_resources_per_node", refuse)
    monkeypatch.setattr(ray_facts, "REFUSALS", [])
    board = Board(ray_facts.RayStore())
    assert board.exchange(claim_with("low", waits_s=(9.0,))) == ()
    assert board.free() == {}
    board.close()
    (record,) = caplog.records
    assert "permission denied" in record.getMessage()
