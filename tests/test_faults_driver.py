"""Drivers that are killed, stopped, or two at once: nothing is held, nothing is done twice, nothing is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.data.cpus import usable_cpus
from runner.folder import lease
from runner.folder.directory import SweepDirectory
from runner.folder.storage import open_storage
from runner.view.status import look
from tests.ray_tools import (
    ROOT,
    assert_nothing_is_left,
    cluster,
    end,
    end_drivers,
    is_zombie,
    ranks_below,
    start_driver,
    wait_until,
)
from tests.sweep_tools import grow_old, scores_of, state_of, write_faults

pytestmark = pytest.mark.slow
__all__ = ["cluster"]
SMALL = {"gpus": 1, "cpus": 1}
WAIT = {"do": "wait", "seconds": 600}


@pytest.fixture(autouse=True)
def no_driver_is_left() -> Iterator[None]:
    """End drivers that a failed test left behind."""
    yield
    end_drivers()


def is_at(out: Path, seed: int, stage: str) -> bool:
    """Return whether state.json shows a seed in a stage."""
    if not (out / "state.json").exists():
        return False
    return state_of(out).get(seed) == stage


def attempts_of(out: Path) -> dict[int, int]:
    """Return seed -> number of its newest attempt."""
    return {run["seed"]: run["attempt"] for run in json.loads((out / "state.json").read_text())["runs"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Return the scores that nobody disturbed, from one process without Ray."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert start_driver(out, None, is_local=True).wait(timeout=120) == 0
    return scores_of(out)


@pytest.mark.parametrize("stage", ["TRAIN", "TTT"])
def test_a_killed_driver_leaks_nothing_and_the_same_command_goes_on(
    stage: str, cluster: Any, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    write_faults(tmp_path, {"seed": 0, "attempt": 1, "stage": stage.lower(), "step": 2, **WAIT})
    driver = start_driver(tmp_path, cluster.address, gang=SMALL)
    wait_until(
        lambda: is_at(tmp_path, 0, stage) and state_of(tmp_path)[42] == "DONE", 90, f"seed 0 never reached {stage}"
    )
    end(driver)
    assert_nothing_is_left(cluster.address)
    done = {seed for seed, state in state_of(tmp_path).items() if state == "DONE"}
    if stage == "TTT":  # once is enough to wait for a heartbeat that no longer moves
        grow_old(tmp_path)
    assert start_driver(tmp_path, cluster.address, gang=SMALL).wait(timeout=120) == 0
    assert scores_of(tmp_path) == undisturbed  # which also holds every seed once
    assert {attempts_of(tmp_path)[seed] for seed in done} == {1}
    assert attempts_of(tmp_path)[0] == 2


def test_a_stopped_driver_releases_everything_in_time_and_says_cancelled(
    cluster: Any, undisturbed: dict[int, float], tmp_path: Path
) -> None:
    write_faults(tmp_path, {"seed": 42, "attempt": 1, "stage": "train", "step": 9, "do": "wait for a stop"})
    driver = start_driver(tmp_path, cluster.address, gang=SMALL)
    wait_until(lambda: is_at(tmp_path, 42, "TRAIN"), 90, "seed 42 never trained")
    begun = time.monotonic()
    assert end(driver, signal.SIGTERM) == 3
    assert_nothing_is_left(cluster.address)
    assert time.monotonic() - begun < 15  # of which a second or two are the look at the cluster
    assert state_of(tmp_path)[42] == "CANCELLED"
    assert start_driver(tmp_path, cluster.address, gang=SMALL).wait(timeout=120) == 0
    assert scores_of(tmp_path) == undisturbed


def test_what_a_killed_driver_left_is_settled_by_the_next_status(cluster: Any, tmp_path: Path) -> None:
    write_faults(tmp_path, {"seed": 42, "attempt": 1, "stage": "train", "step": 2, **WAIT})
    driver = start_driver(tmp_path, cluster.address, gang=SMALL, limits={"stop_grace_s": 60.0})
    wait_until(lambda: is_at(tmp_path, 42, "TRAIN"), 90, "seed 42 never trained")
    driver.send_signal(signal.SIGTERM)
    time.sleep(3.0)  # as `ray job stop` does
    end(driver)
    assert look(str(tmp_path)).is_driven  # as its heartbeat says for a minute
    assert state_of(tmp_path)[42] == "TRAIN"
    grow_old(tmp_path)
    picture = look(str(tmp_path))
    assert not picture.is_driven
    assert state_of(tmp_path)[42] == "CANCELLED"
    assert_nothing_is_left(cluster.address)


def test_a_second_driver_refuses_and_names_the_first(cluster: Any, tmp_path: Path) -> None:
    write_faults(tmp_path, {"stage": "train", "step": 2, **WAIT})
    first = start_driver(tmp_path, cluster.address, gang=SMALL, limits={"stop_grace_s": 1.0})
    wait_until(lambda: is_at(tmp_path, 42, "TRAIN"), 90, "seed 42 never trained")
    code = "from runner.folder.directory import *; from runner.folder.storage import *; import sys\n" \
           "SweepDirectory(open_storage(sys.argv[1])).acquire()"  # fmt: skip
    second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"driven by pid {first.pid}" in second.stderr
    assert "last heard" in second.stderr
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "cancel", str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert first.wait(timeout=60) == 3
    assert_nothing_is_left(cluster.address)


def test_the_ranks_of_a_suspended_driver_end_once_another_one_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = list(range(usable_cpus() + 1))  # all at work but one, for which a process waits
    write_faults(tmp_path, {"attempt": 1, "stage": "train", "step": 2, **WAIT})
    driver = start_driver(tmp_path, None, gang={"cpus": 1}, seeds=seeds)
    family = psutil.Process(driver.pid)
    wait_until(lambda: len(ranks_below(family)) >= len(seeds), 120, "no process waits beside those at work")
    ranks = ranks_below(family)
    driver.send_signal(signal.SIGSTOP)
    wait_until(lambda: family.status() == psutil.STATUS_STOPPED, 30, "the driver is not suspended")
    before = (tmp_path / "state.json").read_bytes()
    grow_old(tmp_path)
    # however short the watch: a driver woken before its next sign of life is due finds its folder taken away
    monkeypatch.setattr(lease, "WATCH_S", 1.0)
    successor = SweepDirectory(open_storage(str(tmp_path)))
    assert successor.acquire()  # gangs may be at work
    later = (tmp_path / "lease.json").read_text()
    assert running(psutil.wait_procs(ranks, timeout=30)[1]) == []
    driver.send_signal(signal.SIGCONT)
    assert driver.wait(timeout=60) != 0
    assert (tmp_path / "state.json").read_bytes() == before
    assert (tmp_path / "lease.json").read_text() == later


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Return those that have not ended."""
    return [process for process in processes if process.is_running() and not is_zombie(process)]
