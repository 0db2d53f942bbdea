"""The made-up program through --local: the same rows and the same one-line faults without Ray."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from results import load
from runner.folder.storage import open_storage
from runner.gang import attempt
from runner.gang.program import end_process
from runner.machine.kept import Keeper, Output
from tests.ray_tools import wait_until
from tests.sweep_tools import state_of
from tests.test_faults_local import make_job
from tests.test_program_ray import failures_of, mischiefs, nothing_is_left, write_spec
from tests.test_runner_storage import server, uri

__all__ = ["nothing_is_left", "server", "uri"]
FAULTS = {
    1: ("kill", "python train_gpt.py killed by SIGKILL"),
    2: ("exit", "python train_gpt.py exited with code 3, last in its log: 'about to give up'"),
    3: ("unscored", "the program ended with 0, but no score"),
    4: ("vanish", "the program removed its working folder"),
    5: ("remove", 'python train_gpt.py exited with code 1, last in its log: "FileNotFoundError'),
    6: ("hang", "no progress for "),
}
HARMLESS = {11: "daemon", 12: "flood", 13: "stderr", 14: "alter", 15: "seed", 16: "mumble"}
FINDINGS = {
    11: ["rank 0 ended and left 1 process(es) behind, which were ended"],
    14: ["the program changed or removed files of its own folder: helper.py"],
    15: ["output of rank 0 names seed 7, but seed 15 was asked for"],
}


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    print("on and on " * 100)
    time.sleep(0.001)
"""


def run(spec: Path) -> int:
    """Run a sweep in this process."""
    return main(["run", str(spec), "--local", "--progress", "plain"])


def test_a_program_becomes_rows_and_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = json.dumps({"post_ttt_bpb": 1.5, "val_bytes": 1000}).join(("{", "}"))  # braces doubled
    spec = write_spec(tmp_path, seeds=[42], env={"RESULTS": results, "STEP_S": 0.001})
    assert run(spec) == 0
    (row,) = load(tmp_path / "out").to_dict("records")
    assert (row["source"], row["post_ttt_bpb"], row["val_bytes"], row["steps"]) == ("program", 1.5, 1000, 10)
    assert row["val_documents_hash"] == "ab" * 32
    assert json.loads(row["config_json"])["program"]["env"]["RESULTS"] == results
    capsys.readouterr()
    assert main(["table", str(tmp_path / "out")]) == 0
    assert "note: seed 42: post_ttt_bpb: results.json says 1.5, output of rank 0 shows 1.0" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "out"), "-o", str(tmp_path / "e"), "--author", "a", "--github-id", "b"]) == 2
    assert "figures of somebody else's program are not ours to export" in capsys.readouterr().err
    assert run(spec) == 0
    assert len(load(tmp_path / "out")) == 1
    spec.write_text(spec.read_text().replace("STEP_S: 0.001", "STEP_S: 0.002"))
    assert run(spec) == 2
    assert "program.env.STEP_S 0.001, now 0.002" in capsys.readouterr().err


def test_behind_a_uri_the_folder_comes_from_the_store_and_what_the_program_left_goes_there(
    uri: str, tmp_path: Path
) -> None:
    assert run(write_spec(tmp_path, seeds=[42], env={"STEP_S": 0.001}, out=uri)) == 0
    (row,) = load(uri).to_dict("records")
    storage = open_storage(uri)
    assert storage.names("program") == [f"{row['code_hash']}.tar"]
    folder = "seeds/seed=42-repeat=0"
    assert "final_model.int6.ptz" in storage.names(f"{folder}/program/attempt=1/work")
    assert "attempt=1-rank=0.log" in storage.names(f"{folder}/logs")
    assert (row["model_bytes"], row["post_ttt_bpb"] > 0) == (3260, True)


def test_a_program_that_prints_without_end_is_ended_and_its_file_named(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, seeds=[1], env={"MISCHIEF": "endless", "STEP_S": 0.001}, limits={"log_bytes": 200_000})
    assert run(spec) == 1
    (failure,) = failures_of(tmp_path / "out")[1]  # and no second attempt
    log = tmp_path / "out/seeds/seed=1-repeat=0/logs/attempt=1-rank=0.log"
    assert failure["message"] == (
        f"logs/attempt=1-rank=0.log has {written_bytes(failure)} bytes, more than limits.log_bytes=200000; let the "
        "program print less, or raise limits.log_bytes"
    )
    assert 200_000 < written_bytes(failure) <= log.stat().st_size  # nothing was cut


def written_bytes(failure: dict[str, Any]) -> int:
    """Return the size that a failure names."""
    return int(failure["message"].partition(" has ")[2].split()[0])


def test_a_program_that_goes_on_printing_when_it_is_stopped_is_left_no_more_time(tmp_path: Path) -> None:
    job = make_job(tmp_path, log_bytes=200_000)
    keeper, log = Keeper(), tmp_path / "log"
    keeper.start([sys.executable, "-uc", DEAF], {}, tmp_path, log)
    wait_until(lambda: log.exists() and log.stat().st_size > 0, 20, "it says nothing")
    begun = time.monotonic()
    end_process(job, keeper, Output(log), grace_s=600.0)
    keeper.close()
    assert time.monotonic() - begun < 60
    assert log.stat().st_size > 200_000


def test_a_program_whose_disk_fills_up_is_ended_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage, looks = shutil.disk_usage(tmp_path), itertools.count()

    def disk_usage(_path: str) -> Any:
        return usage._replace(free=10**12 if next(looks) < 2 else 1_000)  # enough at the start

    monkeypatch.setattr(attempt.shutil, "disk_usage", disk_usage)
    spec = write_spec(tmp_path, seeds=[1], env={"MISCHIEF": "hang", "STEP_S": 0.001}, limits={"disk_s": 0.1})
    assert run(spec) == 1
    (failure,) = failures_of(tmp_path / "out")[1]
    assert failure["kind"] == "disk"
    assert re.search(
        r"has 0\.0 GB free at .*; 1\.1 GB are needed \(waited \d+ s, limits.disk_s=0.1\)", failure["message"]
    )


@pytest.mark.slow
def test_every_fault_costs_its_seed_one_line_and_the_others_nothing(tmp_path: Path) -> None:
    cases = {**{seed: name for seed, (name, _) in FAULTS.items()}, **HARMLESS}
    spec = write_spec(
        tmp_path, seeds=list(cases), env={**mischiefs(cases), "STEP_S": 0.001}, limits={"stall_s": 5.0, "attempts": 1}
    )
    assert run(spec) == 1
    out = tmp_path / "out"
    assert state_of(out) == {seed: "FAILED" if seed in FAULTS else "DONE" for seed in cases}
    for seed, (_, words) in FAULTS.items():
        (failure,) = failures_of(out)[seed]
        assert failure["message"].startswith(words), failure["message"]
        assert "\n" not in failure["message"]
    assert "in misbehave" in (out / "seeds/seed=6-repeat=0/logs/attempt=1-rank=0.stacks.txt").read_text()
    rows = load(out).set_index("seed")
    for seed in HARMLESS:
        assert json.loads(rows.loc[seed, "provenance_json"])["findings"] == FINDINGS.get(seed, [])
        assert bool(rows.loc[seed, "code_changed"]) == (HARMLESS[seed] == "alter")
