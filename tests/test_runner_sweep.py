"""Sweeps in one process with stub work: what is continued, refused, shown and left on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from runner import sweep as sweep_module
from runner import work
from runner.errors import DirectoryInUse, Infeasible, Kind, Refused, SweepError
from runner.folder.directory import Owner, SweepDirectory
from runner.folder.storage import LocalStorage
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.node import this_machine
from runner.plan import Left, make_plan
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey, SweepSpec
from runner.sweep import announced_spec, run_sweep
from runner.view.status import look
from runner.work import Options
from tests.stub_work import TARGET
from tests.sweep_tools import QUICK, make_spec, no_data, scores_of, state_of, write_faults

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
LOCAL = Options(is_local=True, target=TARGET, progress="plain")
ROOT = Path(__file__).parent.parent


def run(spec: SweepSpec, **changes: Any) -> int:
    """Run a sweep in this process."""
    return run_sweep(spec, replace(LOCAL, **changes))


def test_a_finished_sweep_costs_nothing_the_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(make_spec(tmp_path)) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "seeds").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(make_spec(tmp_path)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "TRAIN" not in capsys.readouterr().out


def test_everything_about_a_sweep_is_on_disk(tmp_path: Path) -> None:
    assert run(make_spec(tmp_path, seeds=[3, 1])) == 0
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert record["announcements"][0]["seeds"] == [3, 1]
    assert {"config_hash", "data_hash", "code_hash", "git_commit", "git_dirty", "versions", "machine", "spec"} <= set(
        record
    )
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    ways = [event["to"] for event in events if event["seed"] == 3]
    assert ways[:3] == ["QUEUED", "PLACED", "STARTING"]
    assert ways[-2:] == ["COMMITTING", "DONE"]
    assert not (tmp_path / "lease.json").exists()
    assert announced_spec(str(tmp_path)).seeds == (3, 1)


def test_another_config_or_data_set_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tmp_path, seeds=[1])
    assert run(spec) == 0
    with pytest.raises(Refused, match="made by another configuration"):
        run(make_spec(tmp_path, seeds=[1], overrides={"train": {"max_steps": 7}}))
    monkeypatch.setattr(sweep_module, "data_hash", lambda _data, **_more: "e" * 64)
    with pytest.raises(Refused, match="made by another data set"):
        run(spec)


def test_other_code_is_refused_unless_allowed_and_then_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from results.store.reader import read_runs

    assert run(make_spec(tmp_path, seeds=[1])) == 0
    monkeypatch.setattr(sweep_module, "code_hash", lambda: "f" * 64)
    more = make_spec(tmp_path, seeds=[1, 2])
    with pytest.raises(Refused, match="--allow-code-change"):
        run(more)
    assert run(more, allow_code_change=True) == 0
    frame = read_runs(tmp_path).frame
    assert dict(zip(frame["seed"].astype(int), frame["code_changed"].astype(bool))) == {1: False, 2: True}


def test_a_failed_attempt_is_a_row_and_the_retry_another(tmp_path: Path) -> None:
    from results.store.reader import read_runs

    write_faults(tmp_path, {"seed": 1, "attempt": 1, "stage": "train", "step": 5, "do": "raise"})
    assert run(make_spec(tmp_path, seeds=[1])) == 0
    frame = read_runs(tmp_path).frame.sort_values("attempt")
    assert list(frame["state"]) == ["FAILED", "DONE"]
    assert "RuntimeError: a stub failed" in frame["error"].iloc[0]
    assert (tmp_path / "seeds" / "seed=1-repeat=0" / "logs" / "attempt=1-rank=0.log").read_text().count("a stub failed")


def test_a_seed_that_fails_for_good_is_run_again_by_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_faults(tmp_path, {"seed": 2, "stage": "ttt", "step": 1, "do": "refuse"})
    assert run(make_spec(tmp_path, seeds=[1, 2])) == 1
    write_faults(tmp_path)
    monkeypatch.setattr(Options, "__init__", with_target(Options.__init__))
    assert main(["rerun", str(tmp_path), "--failed", "--local", "--progress", "plain"]) == 0
    assert state_of(tmp_path) == {1: "DONE", 2: "DONE"}


def with_target(init: Any) -> Any:
    """Return Options.__init__ that runs stub work."""
    return lambda self, **given: init(self, **{**given, "target": TARGET})


def test_a_damaged_result_is_named_and_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = make_spec(tmp_path, seeds=[1, 2])
    assert run(spec) == 0
    calm = scores_of(tmp_path)
    damaged = tmp_path / "results" / "runs" / "seed=2-repeat=0-attempt=1.parquet"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert run(spec) == 0
    assert damaged.name in caplog.text
    damaged.unlink()
    assert scores_of(tmp_path) == calm


def test_a_disk_that_fills_while_results_are_written_costs_an_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from results.store import writer

    write, fails = writer.write_whole, iter([True])

    def full_once(location: Any, path: str, content: bytes) -> None:
        if "/runs/" in path and next(fails, False):
            raise OSError(28, "No space left on device")
        write(location, path, content)

    monkeypatch.setattr(writer, "write_whole", full_once)
    assert run(make_spec(tmp_path, seeds=[1])) == 0
    assert set(scores_of(tmp_path)) == {1}
    assert "No space left on device" in (tmp_path / "events.jsonl").read_text()


@pytest.mark.slow
def test_a_limit_on_file_sizes_ends_in_a_clear_error_and_a_later_run_mends_it(tmp_path: Path) -> None:
    code = (
        "import resource, sys, json\n"
        "from runner import sweep\nfrom tests.sweep_tools import make_spec\nfrom tests.stub_work import TARGET\n"
        "from pathlib import Path\n"
        "sweep.data_hash = lambda data, **more: 'd' * 64\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "spec = make_spec(Path(sys.argv[1]), seeds=[1])\n"
        "sys.exit(sweep.run_sweep(spec, sweep.Options(is_local=True, target=TARGET, progress='plain')))\n"
    )
    (tmp_path / "sweep.json").write_text("{}")
    limited = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert limited.returncode in (1, 2), limited.stderr
    assert "File too large" in limited.stdout + limited.stderr
    assert list((tmp_path / "results" / "runs").glob("*.parquet")) == []
    (tmp_path / "sweep.json").unlink()
    assert run(make_spec(tmp_path, seeds=[1])) == 0
    assert set(scores_of(tmp_path)) == {1}


def test_a_second_driver_is_refused_with_owner_and_age(tmp_path: Path) -> None:
    directory = SweepDirectory(LocalStorage(tmp_path))
    directory.acquire()
    with pytest.raises(DirectoryInUse, match=rf"driven by pid {os.getpid()} .* last heard \d+ s ago"):
        run(make_spec(tmp_path))
    directory.release()
    assert run(make_spec(tmp_path, seeds=[1])) == 0


def test_the_lease_of_a_dead_driver_is_taken_over_and_that_of_a_silent_host_waited_for(tmp_path: Path) -> None:
    directory = SweepDirectory(LocalStorage(tmp_path))
    dead = replace(Owner.me(), pid=2**22 + 1)
    directory.write_json("lease.json", dataclasses.asdict(dead))
    directory.acquire()
    directory.release()
    elsewhere = replace(Owner.me(), host="elsewhere", beat=time.time() - 20)
    directory.write_json("lease.json", dataclasses.asdict(elsewhere))
    with pytest.raises(DirectoryInUse, match="elsewhere"):
        directory.acquire()
    directory.write_json("lease.json", dataclasses.asdict(replace(elsewhere, beat=time.time() - 100)))
    directory.acquire()


def test_a_driver_that_lost_its_lease_stops(tmp_path: Path) -> None:
    directory = SweepDirectory(LocalStorage(tmp_path))
    directory.acquire()
    directory.write_json("lease.json", dataclasses.asdict(Owner.me()))
    with pytest.raises(DirectoryInUse, match="taken over"):
        directory.beat(force=True)


def test_status_settles_what_a_dead_driver_left(tmp_path: Path) -> None:
    assert run(make_spec(tmp_path, seeds=[1, 2])) == 0
    state = json.loads((tmp_path / "state.json").read_text())
    state["runs"][1] |= {"state": "TRAIN", "has_group": True}
    (tmp_path / "state.json").write_text(json.dumps(state))
    dead = replace(Owner.me(), pid=2**22 + 1)
    SweepDirectory(LocalStorage(tmp_path)).write_json("lease.json", dataclasses.asdict(dead))
    picture = look(str(tmp_path))
    assert not picture.is_driven
    assert "died" in picture.driver
    assert state_of(tmp_path) == {1: "DONE", 2: "CANCELLED"}


def test_commands_that_look_need_no_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(make_spec(tmp_path, seeds=[1])) == 0
    capsys.readouterr()
    assert main(["status", str(tmp_path), "--format", "json"]) == 0
    picture = json.loads(capsys.readouterr().out)
    assert (picture["counts"], picture["runs"][0]["seed"]) == ({"DONE": 1}, 1)
    assert main(["status", str(tmp_path)]) == 0
    assert "1 DONE" in capsys.readouterr().out
    assert main(["logs", str(tmp_path), "--seed", "1"]) == 0
    assert "train step=1 total=12" in capsys.readouterr().out
    assert main(["logs", str(tmp_path), "--seed", "1", "--rank", "5"]) == 2
    assert "attempt=1-rank=0.log" in capsys.readouterr().err
    assert main(["cancel", str(tmp_path)]) == 0
    assert "nothing runs" in capsys.readouterr().out
    assert main(["cancel", str(tmp_path), "--seed", "9"]) == 2
    assert main(["rerun", str(tmp_path), "--failed"]) == 0
    assert main(["status", str(tmp_path / "nowhere")]) == 2


def test_a_plan_names_the_gang_first_and_then_the_data(tmp_path: Path) -> None:
    plan = make_plan(make_spec(tmp_path, gang=Gang(gpus=8, cpus=4)), [this_machine()])
    assert "no node can hold one gang: asked for 8 rank(s)" in plan.problems[0]
    assert "none_train" in " ".join(plan.problems[1:])
    assert not list(tmp_path.iterdir())


def test_a_plan_knows_what_is_done_resumable_and_new(tmp_path: Path) -> None:
    write_faults(tmp_path, {"seed": 2, "stage": "ttt", "step": 1, "do": "refuse"})
    assert run(make_spec(tmp_path, seeds=[1, 2])) == 1
    plan = make_plan(make_spec(tmp_path, seeds=[1, 2, 3]), [this_machine()])
    assert [plan.runs[RunKey(seed=seed)] for seed in (1, 2, 3)] == [Left.DONE, Left.RESUMABLE, Left.NEW]
    assert plan.seed_s is not None


def test_a_place_that_takes_no_files_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out=.*file/runs is not writable \(Not a directory\)"):
        run(make_spec(tmp_path / "file" / "runs"))


def test_a_node_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    job = Job(
        key=RunKey(seed=1), attempt=1, config=spec.config, world_size=1, threads=1, uses_gpus=False,
        workdir=str(tmp_path / "w"), out=str(tmp_path / "elsewhere"), target=TARGET, probe="abc",
    )  # fmt: skip
    outcome = Rank(job, 0).run()
    assert outcome.failure is not None
    assert outcome.failure.kind is Kind.USER
    assert "out must be shared storage or a URI" in outcome.failure.message


def test_a_sweep_whose_folder_is_not_shared_ends_as_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = work.SweepWork.leave_probe

    def leave_elsewhere(self: work.SweepWork) -> None:
        leave(self)
        self.remove_probe()  # as a node sees it whose disk is its own

    monkeypatch.setattr(work.SweepWork, "leave_probe", leave_elsewhere)
    with pytest.raises(SweepError, match="out must be shared storage or a URI"):
        run(make_spec(tmp_path, seeds=[1]))


@pytest.mark.slow
def test_stop_takes_a_checkpoint_and_the_next_run_goes_on_from_it(tmp_path: Path) -> None:
    write_faults(tmp_path, {"seed": 42, "attempt": 1, "stage": "train", "step": 6, "do": "wait for a stop"})
    given = json.dumps({"out": str(tmp_path), "is_local": True})
    driver = subprocess.Popen([sys.executable, "-m", "tests.drive_sweep", given], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "state.json").exists() or state_of(tmp_path).get(42) != "TRAIN":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        driver.terminate()
        assert driver.wait(timeout=30) == 3
    finally:
        driver.kill()
        driver.wait()
    assert set(state_of(tmp_path).values()) == {"CANCELLED"}
    assert run(replace(make_spec(tmp_path), limits=QUICK)) == 0
    record = json.loads((tmp_path / "seeds" / "seed=42-repeat=0" / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] == [4]


def test_a_stop_outside_training_ends_at_the_next_report(tmp_path: Path) -> None:
    write_faults(tmp_path, {"seed": 1, "attempt": 1, "stage": "ttt", "step": 1, "do": "wait for a stop"})
    spec = make_spec(tmp_path, seeds=[1])
    stopper = threading.Thread(target=stop_at, args=(tmp_path, "TTT"))
    stopper.start()
    assert run(spec) == 3
    stopper.join()
    assert state_of(tmp_path) == {1: "CANCELLED"}
    assert run(spec) == 0
    stages = [json.loads(line)["to"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert stages.count("TRAIN") == 1  # the second run found it finished


def stop_at(out: Path, state: str) -> None:
    """Ask the sweep to end as soon as events.jsonl shows a state."""
    deadline = time.monotonic() + 60
    while f'"to": "{state}"' not in ((out / "events.jsonl").read_text() if (out / "events.jsonl").exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    SweepDirectory(LocalStorage(out)).ask_cancel(None)


def test_a_gang_too_large_for_this_machine_is_refused_before_ray_is_started(tmp_path: Path) -> None:
    with pytest.raises(Infeasible, match=r"asked for 8 rank\(s\).*; nodes have .*; data\.train=.*no such shard"):
        run_sweep(make_spec(tmp_path, gang=Gang(gpus=8, cpus=1)), Options(target=TARGET, progress="plain"))
    assert list(tmp_path.iterdir()) == []
