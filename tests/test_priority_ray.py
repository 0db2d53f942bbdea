"""Sweeps of different priority, and gangs that require labels, on one real cluster with drivers as processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.gang.ray_backend import disconnect, join, living_nodes
from runner.gang.ray_facts import RayStore
from runner.gang.ray_gang import RayGang
from runner.life.job import Phase
from runner.life.states import Run
from runner.spec.gang import Gang
from runner.spec.labels import ACCELERATOR_LABEL
from runner.spec.sweep import RunKey
from runner.view.status import look
from tests.ray_tools import NODE, end, end_drivers, our_processes, start_driver, wait_until
from tests.sweep_tools import scores_of, write_faults

pytestmark = pytest.mark.slow
WORDS = "waits: sweep {} with priority {} waits for a place"
GANG = {"gpus": 1, "cpus": 1, "require": {"accelerator": ["H100", "H200"], "zone": "eu"}}  # one node is left of two
SILENT_S = 6.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with room for one gang each, told apart by their labels."""
    from ray.cluster_utils import Cluster

    before = our_processes()
    small = {**NODE, "num_cpus": 1, "num_gpus": 1}
    head = {**small, "labels": {ACCELERATOR_LABEL: "H100", "zone": "eu"}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(**small, labels={ACCELERATOR_LABEL: "A100", "zone": "us"})
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()
    wait_until(lambda: our_processes() <= before, 20, "processes of the cluster are left")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the scores that nobody disturbed, from one process without Ray."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert start_driver(out, None, is_local=True, seeds=[1, 2, 7]).wait(timeout=120) == 0
    return scores_of(out)


@pytest.fixture(autouse=True)
def no_driver_is_left() -> Iterator[None]:
    """End drivers that a failed test left behind."""
    yield
    end_drivers()


def start(out: Path, name: str, address: str, **changes: Any) -> Any:
    """Start a driver whose seeds wait, in their first attempt, in the middle of training for a file named go."""
    fault = {"attempt": 1, "stage": "train", "step": 6, "do": "await", "file": str(out / "go")}
    write_faults(out, fault)
    return start_driver(out, address, name=name, gang=GANG, silent_s=SILENT_S, **changes)


def run_of(out: Path, seed: int) -> Run | None:
    """Return a run as the sweep's files show it, None before there are any."""
    if not (out / "state.json").exists():
        return None
    return next(run for run in look(str(out)).runs if run.key.seed == seed)


def is_in(out: Path, seed: int, *states: str) -> bool:
    """Return whether a run is in one of some states."""
    run = run_of(out, seed)
    return run is not None and str(run.state) in states


def steps_of(out: Path, seed: int) -> int:
    """Return how many steps a run has reported."""
    run = run_of(out, seed)
    return run.step if run is not None else 0


def waits_for(out: Path, seed: int) -> str:
    """Return what a run is said to wait for."""
    run = run_of(out, seed)
    return run.waits_for if run is not None else ""


def test_labels_and_avoided_nodes_hold_together_and_the_head_keeps_what_drivers_leave(cluster: Any) -> None:
    join(cluster.address, "the cluster of this test")
    try:
        nodes = {node.labels["zone"]: node for node in living_nodes()}
        assert {zone: node.accelerator for zone, node in nodes.items()} == {"eu": "H100", "us": "A100"}
        one, require = Gang(gpus=1), {ACCELERATOR_LABEL: ("H100", "A100"), "zone": ("eu",)}
        fits = RayGang(RunKey(seed=1), 1, one, require=require, avoid=(nodes["us"].node_id,))
        wait_until(lambda: bool(fits.poll()), 20, "the gang was never placed")
        assert fits.node_ids == (nodes["eu"].node_id,)
        never = RayGang(RunKey(seed=2), 1, one, require={"zone": ("us",)}, avoid=(nodes["us"].node_id,))
        time.sleep(1.0)
        assert never.poll() == []
        assert never.phase is Phase.WAITING
        store = RayStore()
        wait_until(lambda: store.free()[nodes["eu"].node_id].get("GPU", 0) == 0, 10, "the node's GPU seems free")
        assert store.free()[nodes["us"].node_id]["GPU"] == 1
        store.put("a", b"1")
        store.put("a", b"2")
        assert store.read() == {"a": b"2"}
        store.remove("a")
        assert store.read() == {}
        for gang in (fits, never):
            gang.kill()
    finally:
        disconnect()


def test_the_next_free_place_is_the_more_important_sweeps_and_who_may_be_preempted_goes_on_later(
    cluster: Any, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    low, middle, high = (tmp_path / name for name in ("low", "middle", "high"))
    drivers = [start(low, "low", cluster.address, seeds=[1, 2])]
    wait_until(lambda: is_in(low, 1, "STARTING", "TRAIN"), 90, "seed 1 was never placed")
    drivers.append(start(middle, "middle", cluster.address, seeds=[7], priority=2, preemptible=True))
    wait_until(lambda: waits_for(low, 2) == WORDS.format("middle", 2), 60, "the less important sweep asks for a place")
    assert is_in(low, 1, "TRAIN")  # nothing is killed
    (low / "go").touch()
    wait_until(lambda: is_in(middle, 7, "TRAIN") and steps_of(middle, 7) == 6, 60, "it did not get the next free place")
    assert is_in(low, 1, "DONE")
    assert is_in(low, 2, "QUEUED")

    top = start(high, "high", cluster.address, seeds=[3, 4], priority=5)
    wait_until(lambda: is_in(high, 3, "STARTING", "TRAIN"), 60, "nobody made way")
    wait_until(lambda: waits_for(middle, 7) == WORDS.format("high", 5), 30, "who made way asks for a place")
    assert waits_for(low, 2).startswith("waits: sweep ")
    (middle / "go").touch()
    end(top)
    assert [driver.wait(timeout=SILENT_S + 60) for driver in drivers] == [0, 0]
    assert {**scores_of(low), **scores_of(middle)} == undisturbed
    after = run_of(middle, 7)
    assert after is not None
    assert (after.attempt, after.failures, after.preemptions) == (2, 0, 1)
    record = json.loads((middle / "seeds" / "seed=7-repeat=0" / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] == [4]
    assert [why for _, why in reasons(middle)] == ["made way for sweep high with priority 5", WORDS.format("high", 5)]
    assert {seed for seed, _ in reasons(low)} == {2}


def reasons(out: Path) -> list[tuple[int, str]]:
    """Return seed and reason of the events that have one, each once."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return list(dict.fromkeys((event["seed"], event["why"]) for event in events if event["why"]))
