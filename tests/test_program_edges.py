"""Programs at the edges: behind a store that was emptied, beside files that move, with words that do not fit."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runner.gang.program as gang_program
from jobs.cli import main
from jobs.sweeps.ray_job import make_submission
from results import load
from results.findings.program import read_progress
from runner.folder.commit import commit_run
from runner.folder.mirror import Mirror
from runner.folder.program_end import is_named
from runner.folder.program_files import find_files, folder_hash, hash_files, keep_folder
from runner.folder.storage import LocalStorage
from runner.gang.program_place import Place, make_folders
from runner.life.job import Job
from runner.life.states import Run, State
from runner.machine.kept import Output
from runner.provenance import Git
from runner.spec.program import fill_pattern
from runner.spec.read import load_spec, parse_spec
from runner.spec.sweep import RunKey, SweepSpec
from runner.sweep import announced_spec
from runner.view.trackers import Labels
from runner.view.tracking import Tracking
from tests.ray_tools import wait_until


def program_spec(out: Path | str, folder: Path | str, **section: Any) -> SweepSpec:
    """Return the spec of a program with one seed."""
    return parse_spec(
        {"name": "edge", "program": {"folder": str(folder), **section}, "seeds": [1], "out": str(out)}
    )  # fmt: skip


def test_what_a_node_kept_of_an_emptied_store_is_not_taken_for_a_finished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Prepared(Exception):
        """The program is about to be run."""

    def prepare(*_: Any) -> None:
        raise Prepared

    rank = gang_program.Rank(make_job(tmp_path), 0)
    (tmp_path / "scratch" / "stages").mkdir(parents=True)
    (tmp_path / "scratch" / "stages" / "program.json").write_text("{}")
    assert gang_program.is_finished(rank)
    store: Any = SimpleNamespace(names=lambda _: [])
    rank.mirror = Mirror(store, "seeds/x", tmp_path / "scratch")
    monkeypatch.setattr(gang_program, "prepare", prepare)
    with pytest.raises(Prepared):
        gang_program.run_program(rank)


def make_job(tmp_path: Path, **changes: Any) -> Job:
    """Return the job of two ranks for the first attempt of a program; each call is another gang's."""
    spec = program_spec(tmp_path / "out", tmp_path / "p")
    plain: dict[str, Any] = {
        "key": RunKey(seed=1), "attempt": 1, "config": spec.config, "world_size": 2, "threads": 1, "uses_gpus": False,
        "workdir": str(tmp_path / "scratch"), "out": spec.out, "program": spec.program, "record": {},
    }  # fmt: skip
    return Job(**{**plain, **changes})


def test_a_rank_begins_when_its_own_gang_is_prepared_whatever_an_emptied_sweep_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier, job = make_job(tmp_path), make_job(tmp_path)
    old, new = (Place(work=tmp_path, out=tmp_path, python="p", port=port) for port in (1, 2))
    gang_program.announce(gang_program.Rank(earlier, 0), old)
    begun: list[Place] = []
    monkeypatch.setattr(gang_program, "run_process", lambda _rank, _program, place: begun.append(place))
    rank = gang_program.Rank(job, 1)
    work = threading.Thread(target=gang_program.run_program, args=(rank,), daemon=True)
    work.start()
    wait_until(lambda: rank.waits or bool(begun), 20, "the rank neither waits nor works")
    assert not begun  # of the same number, that attempt is of another sweep at the same place
    gang_program.announce(gang_program.Rank(job, 0), new)
    work.join(20)
    assert begun == [new]


def test_what_an_emptied_sweep_printed_is_not_read_as_this_ones(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train_gpt.py").write_text("print(1)")
    files = find_files(tmp_path / "p")
    name = folder_hash(hash_files(files))
    keep_folder(LocalStorage(tmp_path / "out"), files, name)
    job = make_job(tmp_path, record={"code_hash": name})
    assert job.program is not None
    kept = [job.own_log_path(0), replace(job, attempt=2).log_path(0)]
    for path in (*kept, job.log_path(0), job.log_path(1), job.log_path(7)):
        LocalStorage(path.parent).write(path.name, b"val_bpb:0.5")
    make_folders(job, job.program)
    assert sorted(job.log_path(0).parent.iterdir()) == sorted(kept)


def test_a_program_without_its_record_is_never_committed_as_done(tmp_path: Path) -> None:
    run = Run(key=RunKey(seed=1), state=State.COMMITTING, attempt=1)
    with pytest.raises(ValueError, match=r"stages/program.json is not there; nothing to commit"):
        commit_run(program_spec(tmp_path / "out", tmp_path / "p"), tmp_path / "run", run, record={})


@pytest.mark.parametrize("out", ["p", "p/runs/x", "link/x", "p/../p/x"])
def test_results_never_go_into_the_folder_of_the_program(tmp_path: Path, out: str) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "p")
    with pytest.raises(ValueError, match=r"out=.* is in program.folder=.*; name a folder outside it"):
        program_spec(tmp_path / out, tmp_path / "p")
    assert program_spec(tmp_path / "p2", tmp_path / "p").program is not None
    assert program_spec("s3://p/x", tmp_path / "p").program is not None


@pytest.mark.parametrize(("folder", "out"), [(".", "../runs/theirs"), ("..", "../../runs/records"), ("a", "runs/a")])
def test_a_first_spec_has_its_results_outside_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, out: str
) -> None:
    here = tmp_path / "records" / "theirs"
    (here / "a").mkdir(parents=True)
    monkeypatch.chdir(here)
    (Path(folder) / "train_gpt.py").write_text("import os\nos.environ['SEED']\n")
    (Path(folder) / "README.md").write_text("Run `SEED=1 python train_gpt.py`.\n")
    assert main(["program", "init", folder, "-o", str(tmp_path / "x.yaml")]) == 0
    assert load_spec(tmp_path / "x.yaml").out == str(Path(out).resolve())


def test_trackers_are_told_every_score_of_a_program_and_its_last_ones(tmp_path: Path) -> None:
    spec = program_spec(tmp_path / "out", tmp_path / "p")
    record = tmp_path / "out" / "seeds" / spec.keys[0].name / "stages" / "program.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"metrics": {"post_ttt_bpb": 0.9, "provenance_json": {}, "unknown": 1}}))
    assert Labels(spec=spec, record={}).scores(spec.keys[0]) == {"post_ttt_bpb": 0.9}
    tracking = Tracking([])
    reports: list[dict[str, Any]] = [
        {"bpb": 1.0}, {"bpb": 1.0, "output_bytes": 7}, {"bpb": 0.9}, {"bpb": 0.9}, {"output_bytes": 9},
    ]  # fmt: skip
    points = [
        tracking.point_of(Run(key=spec.keys[0], attempt=1, phase="evaluate", step=5, metrics=metrics))
        for metrics in reports
    ]
    assert [point.metrics if point else None for point in points] == [{"bpb": 1.0}, None, {"bpb": 0.9}, None, None]


def submit_program(place: Path, folder: str) -> str:
    """Return the refusal of a job whose program is in a folder, "" where it may travel."""
    (place / "spec.yaml").write_text(f"{{name: x, seeds: [1], out: /shared/x, program: {{folder: {folder}}}}}")
    spec = load_spec(place / "spec.yaml")
    try:
        make_submission(spec, place / "spec.yaml", working_dir=place, git=Git("abc", None))
    except ValueError as error:
        return str(error)
    return ""


def test_a_program_that_would_not_travel_whole_is_not_submitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("*.txt\n")
    for name in ("prog/sub", "data/prog"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name.split("/sub")[0] / "train_gpt.py").write_text("x = 1")
    (tmp_path / "link").symlink_to(tmp_path / "prog")
    assert submit_program(tmp_path, "prog") == ""
    assert "/nowhere is not inside the working directory" in submit_program(tmp_path, "/nowhere")
    assert "is a place of this machine; write it from" in submit_program(tmp_path, str(tmp_path / "prog"))
    assert "data/prog/train_gpt.py would not travel" in submit_program(tmp_path, "data/prog")
    assert "link/train_gpt.py would not travel" in submit_program(tmp_path, "link")
    for name in ("sub/w.bin", "notes.txt", "a.npz", "x.safetensors", "y.parquet"):
        path = tmp_path / "prog" / name
        path.write_text("1")
        assert f"program.folder: prog/{name} would not travel" in submit_program(tmp_path, "prog")
        path.unlink()
    assert submit_program(tmp_path, "prog") == ""


LOGS = ("{out}/train.log", "{workdir}/logs/*.txt", "logs/{run_id}.txt", "**/{run_id}.txt")


@pytest.mark.parametrize("pattern", LOGS)
@pytest.mark.parametrize("name", ["plain", "odd[1]*"])
def test_a_log_may_be_named_by_its_whole_path(tmp_path: Path, pattern: str, name: str) -> None:
    spec = program_spec(tmp_path / "elsewhere", tmp_path / "p", log=pattern)
    assert spec.program is not None
    work, out = tmp_path / name / "work", tmp_path / name / "out"
    values = {"out": str(out), "workdir": str(work), "run_id": "r"}
    path = out / "train.log" if "{out}" in pattern else work / "logs" / "r.txt"
    path.parent.mkdir(parents=True)
    path.write_text("hello\n")
    assert gang_program.find_named(spec.program.log, values, work) == [path]
    written = {"out/train.log" if "{out}" in pattern else "logs/r.txt": path}
    assert is_named(next(iter(written)), path, fill_pattern(pattern, values))


def test_what_failed_runs_again_from_the_copy_once_the_folder_has_moved(tmp_path: Path) -> None:
    folder, out, mark = tmp_path / "p", tmp_path / "out", tmp_path / "mark"
    folder.mkdir()
    (folder / "train_gpt.py").write_text(
        f"import pathlib\nassert pathlib.Path({str(mark)!r}).exists()\nprint('pre_ttt val_loss:2.0 val_bpb:0.8')\n"
        "print('quantized val_loss:2.00000000 val_bpb:0.80000000 eval_time:20ms')\n"
    )
    (tmp_path / "spec.yaml").write_text(
        f"{{name: x, seeds: [1], out: {out}, program: {{folder: {folder}}}, limits: {{attempts: 1}}}}"
    )
    assert main(["run", str(tmp_path / "spec.yaml"), "--local", "--progress", "plain"]) == 1
    folder.rename(tmp_path / "moved")
    mark.touch()
    assert main(["rerun", str(out), "--failed", "--local", "--progress", "plain"]) == 0
    row = load(out).to_dict("records")[-1]
    assert (row["state"], row["pre_ttt_bpb"], row["code_changed"]) == ("DONE", 0.8, False)
    (copy,) = (out / "program").glob("*.tar")
    program = announced_spec(str(out)).program
    assert program is not None
    assert program.folder == str(copy)  # as sweep.json says now
    assert main(["run", str(tmp_path / "spec.yaml"), "--local"]) == 2  # what a person names must be there
    copy.unlink()
    with pytest.raises(ValueError, match=r"has no copy of it; give `seedsweep run SPEC` again with its new place"):
        announced_spec(str(out))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["audit", "OUT"], "seedsweep table lists what was found"),
        (["reproduce", "OUT", "--seed", "1"], "run it with another --out, then: seedsweep compare NEW OLD"),
        (["bundle", "OUT", "-o", "x"], "its artifact and its code are what it left"),
        (["audit", "OUT/seeds/seed=1-repeat=0"], "seedsweep table lists what was found"),
        (["bundle", "OUT/seeds/seed=1-repeat=0", "-o", "x"], "its artifact and its code are what it left"),
    ],
)
def test_what_needs_our_own_stages_says_so_of_a_program(
    tmp_path: Path, command: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = program_spec(tmp_path, "/p")
    run = tmp_path / "seeds" / "seed=1-repeat=0"
    (run / "stages").mkdir(parents=True)
    (tmp_path / "sweep.json").write_text(json.dumps({"spec": spec.to_json()}))
    for name in ("run.json", "attempt.json", "stages/program.json"):
        (run / name).write_text("{}")
    assert main([word.replace("OUT", str(tmp_path)) for word in command]) == 2
    shown = capsys.readouterr().err
    assert f"somebody else's program has none of our stages; {words}" in shown
    assert len(shown.splitlines()) == 1


def test_how_far_a_program_is_may_stand_in_its_log_alone(tmp_path: Path) -> None:
    own, log = tmp_path / "printed", tmp_path / "logs" / "r.txt"
    log.parent.mkdir()
    own.write_text("hello\nstep:1/9 train_loss:3.0\n")
    log.write_text("step:2/9 train_loss:2.5\nstep:3/")
    theirs = tmp_path / "logs" / "author.txt"
    theirs.write_text("step:9/9 train_loss:1.0\n")
    output = Output(own)
    output.skip([theirs])
    assert output.has_grown([log, theirs])
    assert read_progress(output.new_lines()) == (2, 9, {"loss": 2.5}, False)
    with log.open("a") as file:
        file.write("9 train_loss:2.0\n")
    assert output.has_grown([log, theirs])
    assert output.new_lines() == ["step:3/9 train_loss:2.0"]
    assert not output.has_grown([log, theirs])
    assert output.new_lines() == []
    theirs.write_text("begun anew\n")
    assert output.has_grown([log, theirs])
    assert output.new_lines() == ["begun anew"]


OF_TORCHRUN = """
import os
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
print(f"rank {dist.get_rank()} of {os.environ['LOCAL_WORLD_SIZE']}: {total.item()}", flush=True)
if dist.get_rank() == 0:
    print(f"quantized val_loss:2.00000000 val_bpb:{total.item() / 10:.8f} eval_time:20ms", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun_starts_both_ranks_of_a_gang_and_they_meet(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "train_gpt.py").write_text(OF_TORCHRUN)
    spec = program_spec(tmp_path / "out", tmp_path / "p", launcher="torchrun")
    files = find_files(tmp_path / "p")
    name = folder_hash(hash_files(files))
    keep_folder(LocalStorage(tmp_path / "out"), files, name)
    job = Job(
        key=RunKey(seed=1), attempt=1, config=spec.config, world_size=2, threads=1, uses_gpus=False,
        workdir=str(tmp_path / "out" / "run"), out=spec.out, program=spec.program,
        record={"sweep": "x", "code_hash": name},
    )  # fmt: skip
    gang_program.run_program(gang_program.Rank(job, 0))
    gang_program.run_program(gang_program.Rank(job, 1))  # has nothing to start
    record = json.loads((tmp_path / "out" / "run" / "stages" / "program.json").read_text())
    assert record["metrics"]["pre_ttt_bpb"] == 0.3
    printed = job.log_path(0).read_text()
    assert "rank 0 of 2: 3.0" in printed
    assert "rank 1 of 2: 3.0" in printed
