"""Ranks and nodes that die, raise or hang on a real Ray cluster: retried, named, and the figures stay the same."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner import sweep as sweep_module
from runner.spec.gang import Gang
from runner.sweep import run_sweep
from runner.work import Options
from tests.ray_tools import NODE, assert_nothing_is_left, cluster, start_driver, sweep, wait_until
from tests.stub_work import GANG_TARGET, TARGET
from tests.sweep_tools import QUICK, make_spec, scores_of, state_of, write_faults

pytestmark = pytest.mark.slow
__all__ = ["cluster"]
PAIR = Gang(cpus=4, ranks=2)  # a node holds one: starting more at once is slow on few cores


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stub work reads no data."""
    monkeypatch.setattr(sweep_module, "data_hash", lambda _data, **_more: "d" * 64)
    monkeypatch.setattr(sweep_module, "data_problems", lambda _data: [])


FAULTS = {"kill": "died", "raise": "raised", "hang": "stalled"}  # what a rank does, what it is called
STAGES = {"train": 6, "quantize": 1, "ttt": 2}  # where, at which step
# one seed each, by its place in this list; those that are waited for come first, so that the others work meanwhile
CASES = [
    ("hang", "train"),
    ("hang", "ttt"),
    ("kill", "train"),
    ("kill", "quantize"),
    ("raise", "train"),
    ("raise", "ttt"),
]


@pytest.fixture(scope="module")
def disturbed(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of gangs of two where every seed met a fault of its own on rank 1."""
    out = tmp_path_factory.mktemp("disturbed")
    write_faults(out, *(
        {"seed": seed, "attempt": 1, "stage": stage, "step": STAGES[stage], "rank": 1, "do": fault}
        for seed, (fault, stage) in enumerate(CASES)
    ))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "data_hash", lambda _data, **_more: "d" * 64)
        patch.setattr(sweep_module, "data_problems", lambda _data: [])
        limits = replace(QUICK, stall_s=8.0)
        seeds = list(range(len(CASES)))
        assert sweep(out, cluster.address, gang=PAIR, target=GANG_TARGET, limits=limits, seeds=seeds) == 0
    return out


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the scores of the same seeds that nobody disturbed, from one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "data_hash", lambda _data, **_more: "d" * 64)
        spec = make_spec(out, seeds=list(range(len(CASES))))
        assert run_sweep(spec, Options(is_local=True, target=TARGET, progress="plain")) == 0
    return scores_of(out)


def events_of(out: Path) -> list[dict[str, Any]]:
    """Return events.jsonl."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def teardown_s(out: Path, seed: int) -> float:
    """Return the seconds from a failure to the next attempt's place in the queue."""
    from datetime import datetime

    times = {
        e["to"]: datetime.fromisoformat(e["time"]) for e in events_of(out) if e["seed"] == seed and e["attempt"] == 1
    }
    return (times["RETRY_WAIT"] - times["TEARDOWN"]).total_seconds()


@pytest.mark.parametrize(("fault", "stage"), CASES)
def test_a_failing_rank_costs_an_attempt_and_changes_no_figure(
    fault: str, stage: str, disturbed: Path, undisturbed: dict[int, float]
) -> None:
    seed = CASES.index((fault, stage))
    assert scores_of(disturbed)[seed] == undisturbed[seed]
    failures = [event["failure"] for event in events_of(disturbed) if event["seed"] == seed and event.get("failure")]
    assert [failure["kind"] for failure in failures] == [FAULTS[fault]]
    assert teardown_s(disturbed, seed) < 10
    run = disturbed / "seeds" / f"seed={seed}-repeat=0"
    if fault == "hang":  # the stacks of both ranks say where each of them stood
        assert "misbehave" in (run / "logs" / "attempt=1-rank=1.stacks.txt").read_text()
        assert (run / "logs" / "attempt=1-rank=0.stacks.txt").exists()
    else:
        assert failures[0]["rank"] == 1
    if fault == "raise":
        assert (failures[0]["error_type"], failures[0]["message"]) == ("RuntimeError", "a stub failed")
        assert "a stub failed" in failures[0]["log_tail"]
    record = json.loads((run / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] == ([4] if stage == "train" else [])


def test_a_seed_on_a_removed_node_goes_on_elsewhere_and_is_counted_once(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    write_faults(tmp_path, {"seed": 42, "attempt": 1, "stage": "train", "step": 6, "do": "wait", "seconds": 600})
    with occupied_head(cluster):
        driver = start_driver(tmp_path, cluster.address, gang={"gpus": 1, "cpus": 8}, limits={"stall_s": 600.0})
        try:
            wait_until(lambda: at_step(tmp_path, 42) >= 6, 60, "seed 42 never trained")
            place = next(run for run in states(tmp_path) if run["seed"] == 42)
            wait_until(lambda: state_of(tmp_path)[1337] == "DONE", 60, "the others did not go on")
            (lost,) = (node for node in cluster.list_all_nodes() if node.node_id == place["node_id"])
            cluster.remove_node(lost)
            assert driver.wait(timeout=90) == 0
        finally:
            driver.kill()
            driver.wait()
    run = next(run for run in states(tmp_path) if run["seed"] == 42)
    assert (run["state"], run["preemptions"], run["failures"]) == ("DONE", 1, 0)
    assert run["node_id"] != place["node_id"]
    assert set(scores_of(tmp_path)) == {42, 0, 1337}


@contextmanager
def occupied_head(cluster: Any) -> Iterator[None]:
    """Hold everything on the head, which cannot be removed, so that gangs go to the other nodes."""
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.CRITICAL)
    try:
        head = cluster.head_node.node_id
        group = placement_group([{"CPU": NODE["num_cpus"]}], strategy="STRICT_PACK", _soft_target_node_id=head)
        assert group.wait(30)
        assert list(placement_group_table(group)["bundles_to_node_id"].values()) == [head]
        yield
    finally:
        ray.shutdown()


def states(out: Path) -> list[dict[str, Any]]:
    """Return the runs in state.json."""
    return list(json.loads((out / "state.json").read_text())["runs"]) if (out / "state.json").exists() else []


def at_step(out: Path, seed: int) -> int:
    """Return the training step that state.json shows for a seed."""
    return next((run["step"] for run in states(out) if run["seed"] == seed and run["state"] == "TRAIN"), -1)


def test_one_seed_that_fails_for_good_does_not_stop_the_others(cluster: Any, tmp_path: Path) -> None:
    from tests.fake_runs import seed_table

    write_faults(
        tmp_path,
        {"seed": 0, "stage": "train", "step": 1, "do": "refuse", "message": "val_tokens=0"},
        {"seed": 42, "stage": "ttt", "step": 1, "do": "wait", "seconds": 4},  # still at work when seed 0 fails
        {"seed": 1337, "stage": "ttt", "step": 1, "do": "wait", "seconds": 4},
    )
    assert sweep(tmp_path, cluster.address) == 1
    assert state_of(tmp_path) == {42: "DONE", 0: "FAILED", 1337: "DONE"}
    table = seed_table(tmp_path)
    assert "FAILED" in str(table)
    assert set(scores_of(tmp_path)) == {42, 1337}
    assert next(run["attempt"] for run in states(tmp_path) if run["seed"] == 0) == 1  # a user's mistake: tried once


def test_two_sweeps_on_one_cluster_both_finish(cluster: Any, tmp_path: Path) -> None:
    drivers = [start_driver(tmp_path / name, cluster.address) for name in ("a", "b")]
    assert [driver.wait(timeout=120) for driver in drivers] == [0, 0]
    assert scores_of(tmp_path / "a") == scores_of(tmp_path / "b")


def test_more_seeds_than_slots_wait_in_the_order_of_the_spec(cluster: Any, tmp_path: Path) -> None:
    seeds = [9, 1, 8, 2, 7, 3]
    assert sweep(tmp_path, cluster.address, seeds=seeds) == 0
    placed = [event["seed"] for event in events_of(tmp_path) if event["to"] == "PLACED"]
    assert sorted(placed[:4]) == sorted(seeds[:4])
    assert set(scores_of(tmp_path)) == set(seeds)


def test_a_gang_of_eight_gets_eight_gpus_of_one_node(cluster: Any, tmp_path: Path) -> None:
    assert sweep(tmp_path, cluster.address, gang=Gang(gpus=8, cpus=1), seeds=[3]) == 0
    assert set(scores_of(tmp_path)) == {3}


def test_repeats_of_one_seed_run_on_different_nodes(cluster: Any, tmp_path: Path) -> None:
    assert sweep(tmp_path, cluster.address, seeds=[5], repeats=3) == 0
    assert len({run["node_id"] for run in states(tmp_path)}) == 3


def test_a_gang_that_fits_on_no_node_is_refused_with_what_each_node_has(cluster: Any, tmp_path: Path) -> None:
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"asked for 8 rank\(s\).*2 CPU each; nodes have .*8 CPU, 8 GPU"):
        sweep(tmp_path, cluster.address, gang=Gang(gpus=8, cpus=2))
    assert time.monotonic() - begun < 30
    assert set(state_of(tmp_path).values()) == {"INFEASIBLE"}


def test_after_all_of_this_nothing_is_held(cluster: Any) -> None:
    assert_nothing_is_left(cluster.address)
