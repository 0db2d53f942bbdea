"""The parts of a program's run by themselves: folders and inputs, the keeper, logs and results.json, environments."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.config import RunConfig
from model.data import remembered
from results.findings.program import read_figures, read_progress, without_idle_lines
from results.schema import SCORES, column_names
from runner.errors import PreflightError
from runner.folder.program_files import (
    changed_files,
    clear_folder,
    find_files,
    folder_hash,
    hash_files,
    keep_folder,
    new_files,
    unpack,
)
from runner.folder.program_inputs import combine_inputs, hash_inputs, input_problems
from runner.folder.storage import LocalStorage
from runner.gang.program import describe_end, is_finished
from runner.gang.program_place import TORCHRUN, hold_port
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.environments import MARK, environment_name, make_environment, why_not_installed
from runner.machine.kept import GANG_VARIABLE, Keeper, Output
from runner.spec.sweep import RunKey

LOG = """seed: 42
step:1/2 train_loss:3.0 train_time:10ms
step:2/2 train_loss:2.0 train_time:20ms
2/2 val_loss:2.1000 val_bpb:0.9000
Serialized model int6+lzma: 100 bytes
quantized val_loss:2.000000 val_bpb:0.850000 eval_time:10ms
quantized_ttt_lora val_loss:1.900000 val_bpb:0.800000 eval_time:20ms
"""

# the keys that docs/running.md documents; STAGE is one of SCORES
RESULT_KEYS = (
    "STAGE_bpb", "STAGE_nats", "STAGE_tokens", "STAGE_bytes", "STAGE_s", "steps", "train_s", "model_bytes",
    "code_bytes", "val_documents_hash",
)  # fmt: skip


def write(folder: Path, **files: str) -> Path:
    """Write files with the endings .py into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_folder_is_named_by_its_files_and_comes_back_read_only(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", train_gpt="x = 1\n", helper="y = 2\n")
    for left in (".git/config", "__pycache__/x.pyc", ".env"):
        (folder / left).parent.mkdir(exist_ok=True)
        (folder / left).write_text("secret")
    files = find_files(folder)
    assert list(files) == ["helper.py", "train_gpt.py"]
    name = folder_hash(hash_files(files))
    storage = LocalStorage(tmp_path / "out")
    keep_folder(storage, files, name)
    place = tmp_path / "run" / "work"
    hashes = unpack(storage.read(f"program/{name}.tar"), place)
    assert folder_hash(hashes) == name
    assert all(not path.stat().st_mode & 0o222 for path in place.iterdir())
    (place / "new.txt").write_text("written")
    (place / "helper.py").chmod(0o644)
    (place / "helper.py").write_text("y = 3\n")
    (place / "train_gpt.py").unlink()
    assert changed_files(place, hashes) == ["helper.py", "train_gpt.py"]
    assert set(new_files(place, hashes)) == {"new.txt", "helper.py"}
    place.chmod(0o500)
    clear_folder(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (folder / "helper.py").write_text("y = 4\n")
    assert folder_hash(hash_files(find_files(folder))) != name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: (folder / "data").symlink_to("/"), "is a link to a folder; name what it leads to under inputs"),
        (lambda folder: (folder / "gone").symlink_to("nowhere"), "leads nowhere; remove it"),
        (lambda folder: os.mkfifo(folder / "pipe"), "is no file; remove it"),
        (lambda folder: (folder / "train_gpt.py").unlink(), "holds no files"),
        (lambda folder: os.truncate(folder / "train_gpt.py", 1 << 30), "over 537 MB; keep data outside it"),
    ],
)
def test_a_folder_that_cannot_travel_is_refused_in_one_line(tmp_path: Path, make: Any, words: str) -> None:
    folder = write(tmp_path / "a", train_gpt="x = 1\n")
    make(folder)
    with pytest.raises(ValueError, match=words):
        find_files(folder)
    with pytest.raises(ValueError, match="is not a folder"):
        find_files(tmp_path / "none")


def test_inputs_are_named_by_what_is_in_them_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 1)
    folder = write(tmp_path / "data", a="1", b="2")
    inputs = {"x": str(folder), "y": str(folder / "*.py"), "z": str(folder / "a.py")}
    ticks: list[int] = []
    first = hash_inputs(inputs, lambda: ticks.append(1))
    assert ticks
    assert len(set(first.values())) == 3 - (first[inputs["x"]] == first[inputs["y"]])
    monkeypatch.setattr("runner.folder.program_inputs.hash_file", lambda *_: pytest.fail("read again"))
    assert hash_inputs(inputs) == first
    monkeypatch.undo()
    (folder / "a.py").write_text("3")
    assert combine_inputs(hash_inputs(inputs)) != combine_inputs(first)
    assert input_problems({"w": str(tmp_path / "none*")}) == [f"program.inputs: {tmp_path}/none* is not there"]
    with pytest.raises(ValueError, match="is not there"):
        hash_inputs({"w": str(tmp_path / "none")})


STUBBORN = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "deaf = 'import os, signal, time\\nsignal.signal(15, 1)\\nos.fork()\\ntime.sleep(600)'\n"
    "subprocess.Popen([sys.executable, '-c', deaf], start_new_session=True)\n"
    "print('up', flush=True)\n"
)


def start_stubborn(tmp_path: Path, token: str, then: str) -> Keeper:
    """Start a process with a child and a grandchild in a session of their own, all deaf to SIGTERM."""
    keeper = Keeper()
    env = {"PATH": os.environ["PATH"], GANG_VARIABLE: token}
    keeper.start([sys.executable, "-c", STUBBORN + then], env, tmp_path, tmp_path / "log")
    begun = time.monotonic()
    while len(marked(token)) < 3 and time.monotonic() - begun < 30:
        time.sleep(0.05)
    assert len(marked(token)) == 3
    return keeper


def marked(token: str) -> list[int]:
    """Return the living processes of a gang."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(GANG_VARIABLE) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def assert_gone(token: str, within_s: float = 15.0) -> None:
    """Assert that no process of a gang is left; what is left is ended, it would stay for minutes."""
    begun = time.monotonic()
    while left := marked(token):
        if time.monotonic() - begun >= within_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"processes are left: {left}")
        time.sleep(0.05)


@pytest.mark.parametrize("how", ["ends", "stop", "close", "killed"])
def test_nothing_of_a_program_outlives_it_however_it_ends(how: str, tmp_path: Path) -> None:
    token = f"{os.getpid()}-{how}"
    keeper = start_stubborn(tmp_path, token, "time.sleep(0.7)" if how == "ends" else "time.sleep(600)")
    if how == "stop":
        keeper.stop(0.2)
    elif how == "killed":
        os.kill(keeper.pid, signal.SIGKILL)
    is_over = how == "close" or keeper.is_over.wait(20)
    keeper.close()
    assert_gone(token)
    assert is_over
    assert keeper.is_over.wait(20)
    if how == "ends":
        assert (keeper.answer("ended"), keeper.answer("left")) == (0, 2)
    elif how == "stop":
        assert keeper.answer("status") == signal.SIGKILL


def test_a_program_that_ended_under_an_earlier_driver_is_not_run_again(tmp_path: Path) -> None:
    hashes = {"config_hash": "c", "code_hash": "f", "data_hash": None}
    job = Job(
        key=RunKey(seed=1), attempt=2, config=RunConfig(), world_size=1, threads=1, uses_gpus=False,
        workdir=str(tmp_path), out=str(tmp_path), record=hashes,
    )  # fmt: skip
    assert not is_finished(Rank(job, 0))
    record = tmp_path / "stages" / "program.json"
    record.parent.mkdir()
    record.write_text(json.dumps({**hashes, "data_hash": "d"}))  # as only the node knew the inputs
    assert is_finished(Rank(job, 0))
    record.write_text(json.dumps({**hashes, "code_hash": "other"}))
    assert not is_finished(Rank(job, 0))
    record.write_text("{")
    assert not is_finished(Rank(job, 0))


def test_a_program_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    keeper = Keeper()
    keeper.start(["/no/such"], {}, tmp_path, tmp_path / "log")
    assert keeper.has_ended.wait(20)
    assert keeper.answer("error") == "/no/such: No such file or directory"
    keeper.close()


ELASTIC = """about to give up
W1127 07:10:54.1 148 torch/distributed/elastic/multiprocessing/api.py:900] Sending process 9 closing signal SIGTERM
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 15005)
  traceback : To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html
============
"""


@pytest.mark.parametrize(
    ("command", "status", "tail", "words"),
    [
        (["/bin/python", "a.py", "x"], 3 << 8, "a\nb\n---\n", "python a.py exited with code 3, last in its log: 'b'"),
        (["python"], 9, "", "python killed by SIGKILL"),
        (["python"], None, "", "python was ended, because the process that keeps it was killed"),
        (
            ["python", "-m", TORCHRUN], 1 << 8, ELASTIC.format(code=3),
            "torchrun saw rank 1 exit with code 3, last in its log: 'about to give up'",
        ),
        (
            ["python", "-m", TORCHRUN], 1 << 8, ELASTIC.format(code=-9),
            "torchrun saw rank 1 killed by SIGKILL, last in its log: 'about to give up'",
        ),
    ],
)  # fmt: skip
def test_how_a_process_ended_is_one_line(command: list[str], status: int | None, tail: str, words: str) -> None:
    assert describe_end(command, status, tail) == words


def test_a_held_port_is_one_that_a_server_of_the_program_can_listen_at() -> None:
    import socket

    holder, port = hold_port()
    with holder, socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass


def test_of_a_million_new_lines_only_the_last_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    output = Output(path, [tmp_path / "other"])
    assert not output.has_grown()
    path.write_text("".join(f"step:{step}/1000000 train_loss:1.0\n" for step in range(1_000_000)) + "step:7")
    assert output.has_grown()
    assert not output.has_grown()
    lines = output.new_lines()
    assert len(lines) == 200
    progress = read_progress(lines)
    assert progress is not None
    assert (progress.step, progress.total, progress.metrics) == (999_999, 1_000_000, {"loss": 1.0})
    with path.open("a") as file:
        file.write("77/1000000 train_loss:2.0\n")
    assert output.new_lines() == ["step:777/1000000 train_loss:2.0"]
    (tmp_path / "other").write_text("rank 1 speaks")
    assert output.has_grown()


def test_progress_is_the_last_line_that_tells_something() -> None:
    assert read_progress(["hello", "step:5/10 train_loss:2.5 tok/s: 1,000", "bye"]) == (
        5, 10, {"loss": 2.5, "tokens_per_s": 1000.0}, False,
    )  # fmt: skip
    scored = read_progress(["step:5/10 train_loss:2.5", "quantized val_loss:2.0 val_bpb:0.9"])
    assert scored is not None
    assert (scored.is_score, scored.metrics) == (True, {"bpb": 0.9})
    assert read_progress(["ttt_chunk 3/90 val_loss:1.0 val_bpb:1.0"]) is None
    assert read_progress(["nothing", "at all"]) is None


def figures(tmp_path: Path, log: str = LOG, results: Any = None, seed: int = 42) -> Any:
    """Return the figures of a program that printed a log and wrote results.json."""
    (tmp_path / "log").write_text(log)
    if results is not None:
        (tmp_path / "results.json").write_text(results if isinstance(results, str) else json.dumps(results))
    place = tmp_path / "results.json" if results is not None else None
    return read_figures({"output of rank 0": tmp_path / "log"}, place, seed=seed)


def test_a_log_gives_columns_and_its_curve(tmp_path: Path) -> None:
    found = figures(tmp_path)
    columns = {
        "live_bpb": 0.9,
        "pre_ttt_bpb": 0.85,
        "post_ttt_bpb": 0.8,
        "steps": 2,
        "train_s": 0.02,
        "model_bytes": 100,
    }
    assert {name: found.columns[name] for name in columns} == columns
    assert found.steps["loss"].tolist() == [3.0, 2.0]
    assert found.findings == []
    assert set(found.columns) <= set(column_names("runs"))


def test_results_json_wins_and_is_held_against_the_log(tmp_path: Path) -> None:
    same = figures(tmp_path, results={"post_ttt_bpb": 0.80000049, "post_ttt_s": 0.0201, "steps": 2})
    assert same.columns["post_ttt_bpb"] == 0.80000049
    assert same.findings == []
    other = figures(tmp_path, results={"post_ttt_bpb": 0.79, "steps": 3, "colour": "red", "within_limit": True})
    assert other.columns["post_ttt_bpb"] == 0.79
    assert other.findings == [
        "post_ttt_bpb: results.json says 0.79, output of rank 0 shows 0.8",
        "steps: results.json says 3, output of rank 0 shows 2",
    ]
    assert other.notes == ["results.json: not figures of the runs table, left out: colour"]


def test_results_json_alone_is_enough_and_sums_give_bits_per_byte(tmp_path: Path) -> None:
    found = figures(
        tmp_path, log="hello\n", results={"pre_ttt_nats": 1000.0, "pre_ttt_bytes": 1000, "pre_ttt_tokens": 500}
    )
    assert found.columns["pre_ttt_bpb"] == pytest.approx(1.442695)
    assert found.columns["pre_ttt_nats_per_token"] == 2.0


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("{", "results.json is not JSON"), ("[1]", "must be a mapping"), ({"steps": 1.5}, "must be a whole number"),
        ({"post_ttt_bpb": "low"}, "'low' must be a finite"), ({"val_documents_hash": 7}, "must be text"),
        ('{"post_ttt_bpb": NaN}', "post_ttt_bpb=nan must be a finite number"),
        ({"steps": True}, "steps=True must be a whole number"),
    ],
)  # fmt: skip
def test_a_results_json_that_does_not_fit_is_refused_in_one_line(tmp_path: Path, results: Any, words: str) -> None:
    with pytest.raises(ValueError) as refused:
        figures(tmp_path, results=results)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "no line of output of rank 0 has a known form"),
        ("all done\n", "no line of output of rank 0 has a known form"),
        ("ngram mixture val_loss:1.0 val_bpb:0.5\n", "under 'ngram mixture', which names no stage"),
    ],
)
def test_a_program_without_a_score_is_told_what_would_be_one(tmp_path: Path, log: str, words: str) -> None:
    with pytest.raises(ValueError, match="no score") as refused:
        figures(tmp_path, log=log)
    assert words in str(refused.value)


def test_a_log_of_another_seed_is_a_finding(tmp_path: Path) -> None:
    assert figures(tmp_path, seed=7).findings == ["output of rank 0 names seed 42, but seed 7 was asked for"]


def test_the_documented_keys_are_columns_of_the_runs_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "running.md").read_text()
    for key in RESULT_KEYS:
        assert f"`{key}`" in page
        for stage in SCORES:
            assert key.replace("STAGE", stage) in column_names("runs")


def test_a_flood_is_left_out_before_it_is_parsed() -> None:
    text = "".join(f"line {number}\n" for number in range(200_000)) + LOG
    assert without_idle_lines(text).splitlines() == LOG.splitlines()
    assert without_idle_lines(LOG) == LOG


def test_an_environment_is_made_once_and_named_by_its_requirements(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("torch\n")
    place = tmp_path / "root" / environment_name(requirements)
    place.mkdir(parents=True)
    (place / MARK).touch()
    assert make_environment(requirements, lambda: None, root=tmp_path / "root") == place / "bin" / "python"
    requirements.write_text("numpy\n")
    assert environment_name(requirements) != place.name


def test_an_installation_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such\n")
    installer = tmp_path / "uv"
    installer.write_text('#!/bin/sh\n[ "$1" = venv ] && exit 0\necho "error: Failed to fetch: dns error"; exit 1\n')
    installer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(
        PreflightError, match=r"the index does not answer .*dns error.*give this node a network"
    ) as told:
        make_environment(requirements, lambda: None, root=tmp_path / "root")
    assert "\n" not in str(told.value)
    assert [path.suffix for path in (tmp_path / "root").iterdir()] == [".lock"]
    assert "cannot be installed (ERROR: No matching distribution" in why_not_installed(
        "x\nERROR: No matching distribution"
    )
