"""Gangs on real Ray that live long, hang or die: who is left alone, who is named, and what is left to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from results.store.reader import read_runs
from runner import sweep as sweep_module
from runner.spec.gang import Gang, Limits
from runner.view.status import look
from tests.ray_tools import cluster, sweep
from tests.sweep_tools import QUICK, state_of, write_faults

pytestmark = pytest.mark.slow
__all__ = ["cluster"]
TARGET = "tests.stub_work:patient_gang_work"
STALL_S = 2.0


@pytest.fixture(scope="module", autouse=True)
def no_data() -> Iterator[None]:
    """Stub work reads no data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "data_hash", lambda _data, **_more: "d" * 64)
        patch.setattr(sweep_module, "data_problems", lambda _data: [])
        yield


def run(
    out: Path, address: str, *faults: dict[str, Any], patience: tuple[float, float, int], limits: Limits,
    seeds: list[int], at_once: int = 4,
) -> int:  # fmt: skip
    """Run gangs of two; patience: seconds that both work together, seconds on rank 0 alone, rounds of the two.

    at_once: gangs on the four nodes, a few only: a starved process is no healthy one.
    """
    write_faults(out, *faults)
    (out / "patience.json").write_text(json.dumps(patience))
    gang = Gang(cpus=16 // at_once, ranks=2)
    return sweep(out, address, gang=gang, target=TARGET, limits=limits, seeds=seeds)


def failures(out: Path, seed: int) -> list[dict[str, Any]]:
    """Return what ended the attempts of a seed."""
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [event["failure"] for event in events if event["seed"] == seed and event.get("failure")]


def logs(out: Path, seed: int) -> Path:
    """Return the folder of a seed's logs."""
    return out / "seeds" / f"seed={seed}-repeat=0" / "logs"


@pytest.mark.alone
def test_eight_gangs_that_outlive_the_limit_ten_times_are_left_alone(cluster: Any, tmp_path: Path) -> None:
    """Rank 1 waits longer than the limit four times over: a gang goes wrong where its ranks meet again, if at all."""
    seeds, rounds = list(range(8)), 4
    limits = replace(QUICK, attempts=1, stall_s=STALL_S)
    patience = (0.5 * STALL_S, 2 * STALL_S, rounds)
    assert rounds * sum(patience[:2]) == 10 * STALL_S
    assert run(tmp_path, cluster.address, patience=patience, limits=limits, seeds=seeds, at_once=8) == 0
    runs = json.loads((tmp_path / "state.json").read_text())["runs"]
    assert [(run["state"], run["attempt"]) for run in runs] == [("DONE", 1)] * len(seeds)
    assert list(tmp_path.rglob("*.stacks.txt")) == []
    assert list(tmp_path.rglob("*.end.json")) == []


HANGS = {
    "together": {"stage": "train", "step": 20, "do": "hang"},
    "alone": {"stage": "share", "do": "hang"},  # rank 0 reports all the while
    "frozen": {"stage": "train", "step": 20, "do": "freeze"},
    "stopped": {"stage": "train", "step": 20, "do": "kill", "signal": "SIGSTOP"},
}


@pytest.fixture(scope="module")
def hung(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep where rank 1 of every seed hung, each in its own way."""
    out, seeds = tmp_path_factory.mktemp("hung"), list(range(len(HANGS)))
    faults = [{"seed": seed, "attempt": 1, "rank": 1, **fault} for seed, fault in enumerate(HANGS.values())]
    limits = replace(QUICK, attempts=2, stall_s=10.0, heartbeat_s=20.0)
    assert run(out, cluster.address, *faults, patience=(8.0, 15.0, 1), limits=limits, seeds=seeds) == 0
    return out


@pytest.mark.parametrize("how", HANGS)
def test_a_rank_that_hangs_is_named_leaves_every_ranks_stacks_and_is_tried_again(how: str, hung: Path) -> None:
    seed = list(HANGS).index(how)
    assert state_of(hung)[seed] == "DONE"
    (failure,) = failures(hung, seed)
    assert (failure["kind"], failure["rank"]) == ("stalled", 1)
    assert ("limits.heartbeat_s=20" if how in ("frozen", "stopped") else "limits.stall_s=10") in failure["message"]
    assert failure["at"].startswith("train step")
    own, other = (logs(hung, seed) / f"attempt=1-rank={rank}.stacks.txt" for rank in (1, 0))
    assert "patient_gang_work" in other.read_text()
    assert "commit_fault" in own.read_text()
    assert f"seeds/seed={seed}-repeat=0/logs/attempt=1-rank=1.log" in failure["files"]


DEATHS = {
    "killed by SIGKILL": {"do": "kill"},
    "killed by SIGSEGV": {"do": "kill", "signal": "SIGSEGV"},
    "killed by SIGABRT": {"do": "kill", "signal": "SIGABRT"},
    "exited with code 3": {"do": "exit", "code": 3},
}


@pytest.fixture(scope="module")
def died(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep where rank 1 of every seed died, each in its own way."""
    out, seeds = tmp_path_factory.mktemp("died"), list(range(len(DEATHS)))
    faults = [
        {"seed": seed, "rank": 1, "stage": "train", "step": 20, **how} for seed, how in enumerate(DEATHS.values())
    ]
    limits = replace(QUICK, attempts=1)
    assert run(out, cluster.address, *faults, patience=(8.0, 0.0, 1), limits=limits, seeds=seeds) == 1
    return out


@pytest.mark.parametrize("how", DEATHS)
def test_a_rank_that_dies_is_reported_with_how_where_and_what_to_read(how: str, died: Path) -> None:
    seed = list(DEATHS).index(how)
    (failure,) = failures(died, seed)
    assert (failure["kind"], failure["rank"]) == ("died", 1)
    assert how in failure["message"]
    assert failure["at"].startswith("train step")
    assert failure["advice"]
    assert "train step=" in failure["log_tail"]
    assert failure["files"] == [f"seeds/seed={seed}-repeat=0/logs/attempt=1-rank=1.log"]
    assert (died / failure["files"][0]).is_file()


def test_status_table_and_events_tell_a_death_in_the_same_line(died: Path) -> None:
    from tests.fake_runs import seed_table

    frame = read_runs(died).frame.set_index("seed")
    events = [json.loads(line) for line in (died / "events.jsonl").read_text().splitlines()]
    for row in look(str(died)).rows:
        line = frame.loc[row.seed, "error"]
        assert row.note == line
        assert line in str(seed_table(died))
        assert [event["why"] for event in events if event["seed"] == row.seed and event["to"] == "FAILED"] == [line]
