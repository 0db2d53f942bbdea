"""Trackers are told everything and can break nothing: dead, slow, hanging or missing ones cost one warning."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner.errors import Failure, Kind, SweepError
from runner.life.states import Run, State
from runner.machine import packages
from runner.plan import make_plan
from runner.spec.sweep import RunKey
from runner.sweep import run_sweep
from runner.view import trackers
from runner.view.trackers import Labels, MlflowTracker, TensorBoardTracker, WandbTracker
from runner.view.tracking import Feed, Point, Tracking
from runner.work import Options
from tests.stub_work import TARGET
from tests.sweep_tools import make_spec, no_data, state_of

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
LOCAL = Options(is_local=True, target=TARGET, progress="json")
KEY = RunKey(seed=42)
RECORD = {"data_hash": "d" * 64, "code_hash": "c" * 64, "git_commit": "abc123", "git_dirty": False}
TRAINING = Run(
    key=KEY, state=State.TRAIN, attempt=1, phase="train", step=3, metrics={"loss": 3.5, "eta_s": 9.0, "note": "x"}
)


class Recorder:
    """A tracker that keeps what it is told, and misbehaves on demand."""

    def __init__(self, fault: str = "") -> None:
        self.points: list[Point] = []
        self.ends: list[Run] = []
        self.fault, self.is_closed, self.num_calls = fault, False, 0
        self.go_on = threading.Event()

    def write(self, points: list[Point]) -> None:
        """Keep points."""
        self.num_calls += 1
        if self.fault == "raise":
            raise ConnectionError("connection refused\nand much more")
        if self.fault == "hang":
            self.go_on.wait(60)
        self.points += points

    def end(self, run: Run) -> None:
        """Keep the end of a run."""
        self.ends.append(run)

    def close(self) -> None:
        """Note it."""
        self.is_closed = True


def point(step: int) -> Point:
    """Return a point of training."""
    return Point(KEY, "train", step, 0.0, {"loss": 1.0})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the warnings about trackers."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_report_is_told_once_with_its_numbers_only() -> None:
    recorder = Recorder()
    tracking = Tracking([Feed("mlflow", lambda: recorder, write_every_s=0.0)], wall=lambda: 7.0)
    for run in (TRAINING, TRAINING, replace(TRAINING, step=4), replace(TRAINING, step=4, attempt=2)):
        tracking.update({KEY: run}, [], 0.0)
    done = replace(TRAINING, state=State.DONE)
    tracking.update({KEY: done}, [done], 0.0)
    tracking.close()
    assert [(told.step, told.metrics, told.at) for told in recorder.points] == [
        (step, {"loss": 3.5}, 7.0) for step in (3, 4, 4)
    ]
    assert (recorder.ends, recorder.is_closed) == ([done], True)


def test_a_run_that_never_had_a_place_has_no_end() -> None:
    recorder = Recorder()
    tracking = Tracking([Feed("mlflow", lambda: recorder)])
    cancelled = Run(key=KEY, state=State.CANCELLED)
    tracking.update({KEY: cancelled}, [cancelled], 0.0)
    tracking.close()
    assert recorder.ends == []


def test_a_dead_tracker_is_one_warning_and_gets_the_ends_of_runs_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorder = Recorder("raise")
    feed = Feed("mlflow", lambda: recorder, write_every_s=0.0, retry_s=0.01)
    done = replace(TRAINING, state=State.DONE)
    feed.put([point(1)], [done])
    deadline = time.monotonic() + 20
    while recorder.num_calls < 3:  # the end is tried again and again
        assert time.monotonic() < deadline
        time.sleep(0.01)
    recorder.fault = ""
    feed.close()
    assert recorder.ends == [done]
    assert warnings_of(caplog) == ["track.mlflow: connection refused; the sweep goes on without it"]


def test_a_tracker_that_cannot_be_opened_is_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Recorder:
        raise SystemExit("no such project")

    feed = Feed("wandb", fail, write_every_s=0.0, retry_s=0.01)
    for step in range(3):
        feed.put([point(step)], [])
        time.sleep(0.05)
    feed.close()
    assert warnings_of(caplog) == ["track.wandb: no such project; the sweep goes on without it"]


def test_a_tracker_that_hangs_holds_nobody_up_and_its_queue_stays_small(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder("hang")
    feed = Feed("mlflow", lambda: recorder, write_every_s=0.0, max_points=100)
    begun = time.monotonic()
    for step in range(10_000):
        feed.put([point(step)], [])
    assert time.monotonic() - begun < 5
    assert len(feed.points) <= 100
    feed.close(within_s=0.05)
    assert len(warnings_of(caplog)) == 1
    assert "track.mlflow: does not answer, " in warnings_of(caplog)[0]
    recorder.go_on.set()
    feed.thread.join(20)
    assert not feed.thread.is_alive()


def test_points_that_a_slow_tracker_missed_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder("hang")
    feed = Feed("mlflow", lambda: recorder, write_every_s=0.0, max_points=10)
    feed.put([point(0)], [])
    deadline = time.monotonic() + 20
    while not recorder.num_calls:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for step in range(1, 26):
        feed.put([point(step)], [])
    recorder.go_on.set()
    feed.close()
    assert [told.step for told in recorder.points] == [0, *range(16, 26)]
    assert warnings_of(caplog) == ["track.mlflow: too slow, 15 points were dropped; the sweep goes on without it"]


def test_a_sweep_is_done_whatever_its_trackers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, dead = Recorder(), Recorder("raise")
    monkeypatch.setattr(packages, "is_found", lambda _name: True)
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", lambda _place, _labels: recorder)
    monkeypatch.setitem(trackers.CLIENTS, "wandb", lambda _place, _labels: dead)
    spec = make_spec(tmp_path, seeds=[1, 2], track={"mlflow": "http://127.0.0.1:9", "wandb": "p"})
    assert run_sweep(spec, LOCAL) == 0
    assert state_of(tmp_path) == {1: "DONE", 2: "DONE"}
    assert {told.key.seed for told in recorder.points} == {1, 2}
    assert {told.phase for told in recorder.points} >= {"train", "ttt"}
    assert [run.state for run in recorder.ends] == [State.DONE, State.DONE]
    assert warnings_of(caplog) == ["track.wandb: connection refused; the sweep goes on without it"]
    before = len(recorder.points)
    assert run_sweep(spec, LOCAL) == 0
    assert len(recorder.points) == before, "a finished sweep has nothing to tell"


def test_the_directory_is_given_up_before_a_slow_tracker_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(packages, "is_found", lambda _name: True)
    monkeypatch.setitem(trackers.CLIENTS, "mlflow", lambda _place, _labels: Recorder())
    monkeypatch.setattr(Tracking, "close", lambda _self: seen.append((tmp_path / "lease.json").exists()))
    assert run_sweep(make_spec(tmp_path, seeds=[1], track={"mlflow": "x"}), LOCAL) == 0
    assert seen == [False]


def test_a_missing_client_is_said_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "is_found", lambda name: name != "mlflow")
    spec = make_spec(tmp_path / "out", track={"mlflow": "http://127.0.0.1:5000"})
    line = r"track.mlflow asks for the package mlflow, which is not installed here; .*'seedsweep\[mlflow\]'"
    with pytest.raises(SweepError, match=line):
        run_sweep(spec, LOCAL)
    assert not (tmp_path / "out").exists()
    assert any("track.mlflow asks" in problem for problem in make_plan(spec, []).problems)


@pytest.mark.parametrize(
    ("track", "words"),
    [
        ({"mlfow": "x"}, "track: unknown key 'mlfow'; did you mean 'mlflow'"),
        ({"mlflow": 5}, "track.mlflow must be text that names a place, not a whole number"),
        ({"wandb": " "}, "track.wandb must be text"),
        ("mlflow", "track must be a mapping"),
        ([], "track must be a mapping"),
        ({"mlflow": "https://me:secret@host/x"}, "track.mlflow holds a password"),
    ],
)
def test_what_is_no_tracker_is_refused(tmp_path: Path, track: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_spec(tmp_path, track=track)


def test_a_relative_folder_is_taken_from_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = make_spec(tmp_path, track={"tensorboard": "boards", "mlflow": "sqlite:///m.db"})
    assert spec.track == {"tensorboard": str(tmp_path / "boards"), "mlflow": "sqlite:///m.db"}
    assert spec.config_hash == make_spec(tmp_path).config_hash
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec


def labels(out: Path) -> Labels:
    """Return the labels of a sweep with the records of one finished run."""
    folder = out / "seeds" / KEY.name / "stages"
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps({"metrics": {"steps": 12, "unknown": 5.0, "resumed_at_steps": []}}))
    (folder / "ttt.json").write_text(json.dumps({"metrics": {"post_ttt_bpb": 1.25}}))
    return Labels(spec=make_spec(out, name="tracked", seeds=[42]), record=RECORD)


def test_tags_carry_the_hashes_and_a_run_keeps_its_name(tmp_path: Path) -> None:
    known = labels(tmp_path)
    tags = known.tags(KEY)
    assert {name: tags[name] for name in ("data_hash", "code_hash", "git_commit", "git_dirty")} == {
        **RECORD, "git_dirty": "False",
    }  # fmt: skip
    assert tags["config_hash"] == known.spec.config_hash
    assert (tags["sweep"], tags["variant"], tags["seed"], tags["repeat"]) == ("tracked", "base", "42", "0")
    assert known.run_id(KEY) == Labels(spec=known.spec, record={}).run_id(KEY)
    assert known.run_id(KEY) != known.run_id(RunKey(seed=42, repeat=1))
    failure = Failure(kind=Kind.DIED, message="process died", rank=0)
    endings = known.endings(replace(TRAINING, state=State.FAILED, failure=failure))
    assert (endings["state"], endings["attempts"]) == ("FAILED", "1")
    assert "process died" in endings["error"]
    assert known.scores(KEY) == {"steps": 12.0, "post_ttt_bpb": 1.25}


def tell(tracker: Any, *, state: State = State.DONE) -> None:
    """Tell a tracker of two steps of a run and of its end."""
    tracker.write([Point(KEY, "train", step, 100.0 + step, {"loss": 4.0 - step}) for step in (1, 2)])
    tracker.end(replace(TRAINING, state=state))
    tracker.close()


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoardTracker(str(tmp_path / "boards"), labels(tmp_path)))
    events = EventAccumulator(str(tmp_path / "boards" / "tracked" / KEY.name))
    events.Reload()
    values = {tag: [event.value for event in events.Scalars(tag)] for tag in ("train/loss", "scores/post_ttt_bpb")}
    assert values == {"train/loss": [3.0, 2.0], "scores/post_ttt_bpb": [1.25]}
    assert b"c" * 64 in events.Tensors("end")[0].tensor_proto.string_val[0]


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Yield the URI of a real server on loopback that keeps its runs in folder."""
    pytest.importorskip("sqlalchemy", reason="sqlalchemy and alembic, which a server needs, are not installed")
    pytest.importorskip("alembic", reason="alembic, which a server needs, is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--default-artifact-root", str(folder)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, *store], stdout=log, stderr=log, cwd=folder, start_new_session=True,
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for_answer(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when a server answers; fail if it ends, or after two minutes."""
    deadline = time.monotonic() + 120
    while True:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", ["folder", "server"])
def test_mlflow_keeps_runs_metrics_and_tags_and_goes_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    with nullcontext(str(tmp_path / "mlruns")) if kind == "folder" else mlflow_server(tmp_path) as place:
        check_mlflow(place, labels(tmp_path))
    assert capsys.readouterr().out == "", "others read the sweep's own lines there"


def check_mlflow(place: str, known: Labels) -> None:
    """Tell MLflow of a run that is cancelled and goes on, and fail unless it is one run with everything in it."""
    from mlflow.tracking import MlflowClient

    tell(MlflowTracker(place, known), state=State.CANCELLED)
    client = MlflowClient(tracking_uri=place)
    experiment = client.get_experiment_by_name("tracked")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("KILLED", "seed=42")
    tell(MlflowTracker(place, known))
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 3.0), (2, 2.0)}  # told twice, and kept
    assert run.data.metrics["post_ttt_bpb"] == 1.25
    assert {**run.data.tags, **known.tags(KEY)} == run.data.tags
    assert run.data.tags["state"] == "DONE"


class FakeWandbRun:
    """A run of a made-up wandb that keeps the calls."""

    def __init__(self, **given: Any) -> None:
        self.given, self.logged, self.summary, self.ended = given, [], {}, []
        self.axes: set[tuple[str, str]] = set()
        self.settings: dict[str, str] = {}
        self.config = SimpleNamespace(update=lambda values, allow_val_change: self.settings.update(values))

    def define_metric(self, name: str, step_metric: str) -> None:
        """Keep the axis."""
        self.axes.add((name, step_metric))

    def log(self, values: dict[str, float]) -> None:
        """Keep the values."""
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        """Keep the end."""
        self.ended.append(exit_code)


def test_wandb_gets_a_run_with_an_axis_for_each_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[FakeWandbRun] = []

    def init(**given: Any) -> FakeWandbRun:
        runs.append(FakeWandbRun(**given))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **values: values))
    known = labels(tmp_path)
    tell(WandbTracker("team/project", known), state=State.FAILED)
    (run,) = runs
    assert {name: run.given[name] for name in ("entity", "project", "group", "name", "id", "resume")} == {
        "entity": "team", "project": "project", "group": "tracked", "name": "seed=42", "id": known.run_id(KEY),
        "resume": "allow",
    }  # fmt: skip
    assert run.given["config"] == known.tags(KEY)
    assert run.axes == {("train/*", "train/step")}
    assert run.logged == [{"train/step": 1, "train/loss": 3.0}, {"train/step": 2, "train/loss": 2.0}]
    assert (run.summary["post_ttt_bpb"], run.settings["state"], run.ended) == (1.25, "FAILED", [1])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_itself_takes_it_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    known = labels(tmp_path / "out")
    tell(WandbTracker("project", known))
    (file,) = tmp_path.rglob("run-*.wandb")
    assert known.run_id(KEY) in file.name
    deadline = time.monotonic() + 30
    while b"train/loss" not in file.read_bytes():  # its own process writes the file
        assert time.monotonic() < deadline
        time.sleep(0.1)
