"""Drivers without Ray in trouble: ousted, hung up, looked at from elsewhere, without room, on a read-only disk."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from runner import sweep as sweep_module
from runner.errors import NO_ROOM, DirectoryInUse, Failure, Kind, NoRoomError, Refused, Superseded
from runner.folder.directory import SweepDirectory
from runner.folder.lease import Owner
from runner.folder.storage import LocalStorage
from runner.gang import attempt as attempt_module
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.life.states import Run, State, why_give_up
from runner.spec.gang import Limits
from runner.spec.sweep import RunKey
from runner.sweep import run_sweep
from runner.view.status import look
from runner.work import Options
from tests.stub_work import TARGET, work
from tests.sweep_tools import make_spec, no_data, state_of, write_faults

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
ROOT = Path(__file__).parent.parent
LOCAL = Options(is_local=True, target=TARGET, progress="plain")
DRIVER = """
import json, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs these tests may ignore it, and children would as well
from pathlib import Path
from jobs import cli
from jobs.sweeps import run
from runner import sweep
from tests.sweep_tools import make_spec
given = json.loads(sys.argv[1])
sweep.data_hash = lambda data, **more: "d" * 64
options = sweep.Options(is_local=True, target=given.get("target", "tests.stub_work:work"), progress="plain")
run.execute = lambda args: sweep.run_sweep(make_spec(Path(given["out"]), seeds=[1]), options)
sys.argv = ["seedsweep", "run", "unread"]
sys.exit(cli.main())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Return what starts a driver in a process of its own, ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(**given: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", DRIVER, json.dumps({"out": str(tmp_path), **given})]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, cwd=ROOT, **pipes))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def wait_for(is_so: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_training(out: Path) -> bool:
    """Return whether the newest state shows the seed at work."""
    return (out / "state.json").exists() and state_of(out).get(1) == "TRAIN"


def oust(out: Path) -> None:
    """Be another driver that takes the folder."""
    storage = LocalStorage(out)
    later = json.dumps(dataclasses.asdict(replace(Owner.me(), epoch=9))).encode()
    for name in ("drivers/9.json", "lease.json"):
        storage.write(name, later)


def long_step(rank: Rank) -> None:
    """Work in a library for long, one report at the start."""
    import torch

    rank.report("train", 1, None, {})
    matrix = torch.eye(1500)
    while True:
        matrix = matrix @ matrix


def finish_too_late(rank: Rank) -> None:
    """Do the work; another driver comes before it is committed, with a probe of its own."""
    work(rank)
    LocalStorage(Path(rank.job.out)).write("probes/theirs", b"")
    oust(Path(rank.job.out))


def test_an_ousted_driver_commits_nothing_and_leaves_what_is_its_successors(tmp_path: Path) -> None:
    late = replace(LOCAL, target="tests.test_faults_local:finish_too_late")
    with pytest.raises(Superseded, match="taken over by another driver"):
        run_sweep(make_spec(tmp_path, seeds=[1]), late)
    assert not list((tmp_path / "results").rglob("*.parquet"))
    assert json.loads((tmp_path / "lease.json").read_text())["epoch"] == 9
    assert [path.name for path in (tmp_path / "probes").iterdir()] == ["theirs"]


@pytest.mark.slow
def test_an_ousted_driver_ends_with_one_line_in_the_middle_of_a_step(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    driver = start(target="tests.test_faults_local:long_step")
    wait_for(lambda: is_training(tmp_path))
    oust(tmp_path)
    _, errors = driver.communicate(timeout=60)
    assert (driver.returncode, errors) == (
        3, f"seedsweep: error: {tmp_path} was taken over by another driver; this one stops\n"
    )  # fmt: skip
    assert json.loads((tmp_path / "lease.json").read_text())["epoch"] == 9


@pytest.mark.slow
def test_a_hangup_leaves_a_checkpoint(tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    write_faults(tmp_path, {"attempt": 1, "stage": "train", "step": 6, "do": "wait for a stop"})
    driver = start()
    wait_for(lambda: is_training(tmp_path))
    driver.send_signal(signal.SIGHUP)
    driver.communicate(timeout=60)
    assert driver.returncode == 3
    assert state_of(tmp_path) == {1: "CANCELLED"}
    assert not (tmp_path / "lease.json").exists()
    assert run_sweep(make_spec(tmp_path, seeds=[1]), LOCAL) == 0
    record = json.loads((tmp_path / "seeds" / "seed=1-repeat=0" / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] == [4]


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with sweep_module.signals_end(sweep_module.raise_interrupt):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def hangups_are_heard() -> Iterator[None]:
    """Take hangups as a program does by itself: whoever runs these tests may ignore them, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangups_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_stop_before_anything_runs_gives_the_folder_up_and_status_says_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    def connect_slowly(*_given: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(30)

    monkeypatch.setattr(sweep_module, "open_backend", connect_slowly)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(make_spec(tmp_path, seeds=[1, 2]), LOCAL)
    assert not (tmp_path / "lease.json").exists()
    assert main(["status", str(tmp_path)]) == 0
    assert "2 PLANNED" in capsys.readouterr().out
    (tmp_path / "state.json").unlink()
    assert main(["status", str(tmp_path)]) == 2
    assert "was announced here (seeds 1, 2) and ended before any run was placed" in capsys.readouterr().err


def leave_unfinished(out: Path, owner: Owner, *, beat: float | None) -> None:
    """Leave a sweep with one run at work, driven by owner; beat: its newest heartbeat."""
    assert run_sweep(make_spec(out, seeds=[1, 2]), LOCAL) == 0
    state = json.loads((out / "state.json").read_text())
    state["runs"][1] |= {"state": "TRAIN", "has_group": True}
    (out / "state.json").write_text(json.dumps(state))
    directory = SweepDirectory(LocalStorage(out))
    directory.write_json("lease.json", dataclasses.asdict(replace(owner, epoch=2)))
    if beat is not None:
        directory.write_json("heartbeat.json", {"token": owner.token, "beat": beat})


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"namespace": "pid:[1]"}, {"started": 1}, {"boot": "other"}])
def test_status_writes_nothing_while_the_heartbeat_is_fresh_whatever_the_pid_says(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    leave_unfinished(tmp_path, replace(Owner.me(), **changes), beat=time.time() - 20)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert look(str(tmp_path)).is_driven
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_run_from_another_container_leaves_a_living_driver_its_lease(tmp_path: Path) -> None:
    owner = replace(Owner.me(), namespace="pid:[1]", pid=2**22 + 1)
    leave_unfinished(tmp_path, owner, beat=time.time() - 20)
    with pytest.raises(DirectoryInUse, match=r"driven by pid .*, last heard 2\d s ago"):
        run_sweep(make_spec(tmp_path, seeds=[1, 2]), LOCAL)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == owner.token


def test_a_run_that_is_refused_for_its_configuration_leaves_the_lease_alone(tmp_path: Path) -> None:
    owner = replace(Owner.me(), pid=2**22 + 1)
    leave_unfinished(tmp_path, owner, beat=None)
    other = make_spec(tmp_path, seeds=[1], overrides={"train": {"max_steps": 7}})
    with pytest.raises(Refused, match="made by another configuration"):
        run_sweep(other, LOCAL)
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == owner.token


def test_status_and_cancel_of_a_dead_sweep_show_it_on_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_self: LocalStorage, path: str, _content: bytes) -> None:
        raise OSError(errno.EROFS, "Read-only file system", path)

    leave_unfinished(tmp_path, replace(Owner.me(), pid=2**22 + 1), beat=None)
    monkeypatch.setattr(LocalStorage, "write", refuse)
    monkeypatch.setattr(LocalStorage, "append", refuse)
    capsys.readouterr()
    assert main(["status", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "; not settled: read-only" in shown
    assert "1 DONE, 1 CANCELLED" in shown
    assert main(["cancel", str(tmp_path)]) == 0
    assert "not settled: read-only" in capsys.readouterr().out
    living = dataclasses.asdict(replace(Owner.me(), epoch=3))
    (tmp_path / "lease.json").write_text(json.dumps(living))
    assert main(["cancel", str(tmp_path)]) == 2
    assert (
        "no request can be left here (read-only); cancel from where the folder is writable" in capsys.readouterr().err
    )


def make_job(tmp_path: Path, **changes: Any) -> Job:
    """Return a job of one rank."""
    return Job(
        key=RunKey(seed=1), attempt=1, config=make_spec(tmp_path).config, world_size=1, threads=1, uses_gpus=False,
        workdir=str(tmp_path), out=str(tmp_path), **changes,
    )  # fmt: skip


def test_a_full_disk_is_waited_for_and_then_named_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, free = shutil.disk_usage(tmp_path), iter([0, 0, 2 << 30])
    monkeypatch.setattr(attempt_module, "ROOM_EVERY_S", 0.01)
    monkeypatch.setattr(attempt_module.shutil, "disk_usage", lambda _path: usage._replace(free=next(free)))
    rank = Rank(make_job(tmp_path, disk_s=30.0), 0)
    assert attempt_module.wait_for_room(rank) == 2 << 30
    assert f"0.0 GB free at {tmp_path}; 1.1 GB are needed" in str(rank.newest.metrics["note"])
    monkeypatch.setattr(attempt_module.shutil, "disk_usage", lambda _path: usage._replace(free=0))
    rank = Rank(make_job(tmp_path, disk_s=0.05), 0)
    with pytest.raises(NoRoomError, match=r"0\.0 GB free at .*; 1\.1 GB are needed \(waited 0 s, limits\.disk_s=0\.05"):
        attempt_module.wait_for_room(rank)
    assert NoRoomError.__name__ == NO_ROOM


def test_a_disk_that_stays_full_ends_a_run_at_once_or_after_one_retry(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "a")
    failure, other = (Rank(make_job(tmp_path), 0).failure_of(error) for error in (full, OSError(28, "full", "b")))
    assert failure.kind is Kind.DISK
    run = Run(key=RunKey(seed=1), state=State.TEARDOWN, failure=failure, failures=1)
    assert not why_give_up(run, Limits())
    assert why_give_up(replace(run, previous=other), Limits())
    waited = Failure(kind=Kind.DISK, error_type=NO_ROOM, message="0.0 GB free")
    assert why_give_up(replace(run, failure=waited), Limits())


def test_a_log_that_finds_no_room_fails_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    def refuse(*_given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "rank.log")

    monkeypatch.setattr(logging, "FileHandler", refuse)
    assert run_sweep(make_spec(tmp_path, seeds=[1]), LOCAL) == 1
    assert "No space left on device" in (tmp_path / "events.jsonl").read_text()


def test_an_append_that_does_not_fit_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.folder import storage

    def write_half(file: Any, content: bytes) -> None:
        file.write(content[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    place = LocalStorage(tmp_path)
    place.append("events.jsonl", b"first\n")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_all", write_half)
        with pytest.raises(OSError, match=r"No space left on device: .*events\.jsonl"):
            place.append("events.jsonl", b"second\n")
    place.append("events.jsonl", b"third\n")
    assert (tmp_path / "events.jsonl").read_bytes() == b"first\nthird\n"


def test_a_settings_mismatch_is_named(tmp_path: Path) -> None:
    assert run_sweep(make_spec(tmp_path, seeds=[1], overrides={"train": {"max_steps": 3}}), LOCAL) == 0
    with pytest.raises(Refused, match=r"made by another configuration \(train\.max_steps 3, now 4\); choose another"):
        run_sweep(make_spec(tmp_path, seeds=[1], overrides={"train": {"max_steps": 4}}), LOCAL)


def test_other_code_is_named_by_commit_and_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.provenance import Git

    spec = make_spec(tmp_path, seeds=[1])
    monkeypatch.setattr(sweep_module, "code_hash", lambda: "a" * 64)
    assert run_sweep(spec, replace(LOCAL, git=Git("1" * 40, False))) == 0
    monkeypatch.setattr(sweep_module, "code_hash", lambda: "b" * 64)
    words = r"code a{12} \(commit 1{10}\), now code b{12} \(commit 2{10}, with uncommitted changes\)"
    with pytest.raises(Refused, match=words):
        run_sweep(spec, replace(LOCAL, git=Git("2" * 40, True)))
