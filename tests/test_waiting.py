"""Processes that wait for the next gang: what they have imported, what they leave alone, and when they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError

from model.files.plain import read_arrays
from runner.gang import ray_gang, ray_rank, worker
from runner.gang.ray_gang import RayGang
from runner.gang.ray_rank import RankActor, WaitingRanks
from runner.life import states
from runner.life.job import Phase
from runner.scheduler import transition
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey
from tests.house import ROOT
from tests.small_run import SEEDS, SPEC, seed_directory, small_sweep
from tests.test_gang_polls import FakeRay, Ref
from tests.test_runner_worker import make_rank


class FakeActor:
    """A process that begins when asked, or has an answer that a test gave it."""

    def __init__(self, node_id: str, target: str) -> None:
        self.node_id, self.target = node_id, target
        self.answer: object = {}
        self.is_killed = False
        self.begin = self.open_store = self.run = self

    def remote(self, *_arguments: object, **_named: object) -> Ref:
        """Begin."""
        return Ref(self.answer, is_ready=True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeActor]:
    """Return the list of all actors that are made, in place of Ray's."""
    actors: list[FakeActor] = []

    def make(node_id: str, _shape: Gang, _job: object, *, target: str = "") -> FakeActor:
        actors.append(FakeActor(node_id, target))
        return actors[-1]

    monkeypatch.setattr(ray_rank, "make_actor", make)
    monkeypatch.setattr(ray_rank, "ray", FakeRay())
    return actors


def alive(made: list[FakeActor]) -> list[str]:
    """Return the nodes of the actors that were not killed."""
    return [actor.node_id for actor in made if not actor.is_killed]


def test_as_many_wait_as_are_at_work_and_no_more_than_are_needed(made: list[FakeActor], tmp_path: Path) -> None:
    job, waiting = make_rank(tmp_path).job, WaitingRanks(Gang(ranks=2))
    waiting.keep({"a": 2, "b": 4}, job, num_needed=100)
    assert alive(made) == ["a"] * 2 + ["b"] * 4
    assert {actor.target for actor in made} == {job.target}
    waiting.keep({"a": 2, "b": 4}, job, num_needed=100)
    assert len(made) == 6
    waiting.keep({"a": 2, "b": 4}, job, num_needed=4)
    assert alive(made) == ["a"] * 2 + ["b"] * 2
    waiting.keep({"a": 2, "b": 4}, job, num_needed=0)
    assert alive(made) == []


def test_each_process_becomes_one_rank_and_a_node_without_any_gets_a_fresh_one(
    made: list[FakeActor], tmp_path: Path
) -> None:
    job, waiting = make_rank(tmp_path).job, WaitingRanks(Gang())
    waiting.keep({"a": 1}, job, num_needed=9)
    taken = [waiting.take(node_id, job) for node_id in ("a", "a", "b")]
    assert [is_ahead for _, is_ahead in taken] == [True, False, False]
    assert len({id(actor) for actor, _ in taken}) == 3
    assert [actor.target for actor in made] == [job.target, "", ""]


def test_a_node_that_no_gang_comes_back_to_is_given_up(
    made: list[FakeActor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, waiting = make_rank(tmp_path).job, WaitingRanks(Gang())
    waiting.keep({"a": 1}, job, num_needed=9)
    waiting.keep({}, None, num_needed=9)  # between two gangs
    assert alive(made) == ["a"]
    monkeypatch.setattr(ray_rank, "KEEP_S", -1.0)
    waiting.keep({}, None, num_needed=9)
    assert alive(made) == []
    assert waiting.actors == {}


@pytest.fixture
def gang(made: list[FakeActor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayGang:
    """Return a gang of two that has its place on node n, where one process waits that cannot begin."""
    monkeypatch.setattr(ray_gang, "ray", FakeRay())
    monkeypatch.setattr(ray_gang, "placement_group", lambda *_arguments, **_options: None)
    monkeypatch.setattr(ray_gang, "is_node_lost", lambda _node: False)
    gang = RayGang(RunKey(seed=1), 1, Gang(ranks=2))
    gang.node_ids, gang.addresses, gang.phase = ("n",), ("10.0.0.4",), Phase.PLACED
    job, waiting = replace(make_rank(tmp_path).job, world_size=2), WaitingRanks(gang.shape)
    waiting.keep({"n": 1}, job, num_needed=9)
    made[0].answer = RayActorError(error_msg="it was killed for lack of memory")
    gang.start(job, waiting)
    return gang


def test_a_process_that_cannot_begin_is_replaced_and_the_events_say_so_once(
    gang: RayGang, made: list[FakeActor]
) -> None:
    assert gang.poll() == []
    assert gang.phase is Phase.GREETING
    assert [actor.is_killed for actor in made] == [True, False, False]
    (started,) = gang.poll()
    assert isinstance(started, states.Started)
    assert "it was killed for lack of memory" in started.facts["cold"]
    run = states.Run(key=gang.key, state=states.State.STARTING, facts=started.facts)
    line = transition(run, replace(run, state=states.State.TRAIN), 0.0, "")
    assert "a process that waited could not be used" in line["why"]
    assert gang.waiting.replace(made[1], "n", gang.job, made[0].answer)[1] == ""  # type: ignore[arg-type]


def test_after_three_faults_no_more_processes_are_made_ahead(gang: RayGang, made: list[FakeActor]) -> None:
    assert gang.job is not None
    for _ in range(3):
        gang.waiting.replace(made[0], "n", gang.job, RayActorError())
    before = len(made)
    gang.waiting.keep({"n": 2}, gang.job, num_needed=9)
    assert len(made) == before


def test_a_fresh_process_that_cannot_begin_fails_the_gang(gang: RayGang, made: list[FakeActor]) -> None:
    gang.poll()
    gang.hellos[0] = Ref(RayTaskError("begin", "Traceback", OSError("no log")), is_ready=True)
    gang.poll()
    assert gang.phase is Phase.FAILING
    assert "no log" in gang.outcomes[0].failure.message  # type: ignore[union-attr]


def test_a_process_that_imported_other_sources_does_not_begin(tmp_path: Path) -> None:
    actor = RankActor(str(tmp_path), 0)
    actor.code_hash = "a" * 64
    job = replace(make_rank(tmp_path).job, record={"code_hash": "b" * 64})
    with pytest.raises(RuntimeError, match="other sources"):
        actor.begin(job, 0, "127.0.0.1")
    assert not job.own_log_path(0).exists()


def test_traces_of_more_than_imports_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GPU_FILES", (str(tmp_path),))
    seed, state = torch.initial_seed(), torch.get_rng_state()
    try:
        torch.manual_seed(5)
        assert worker.find_traces() == ""
        torch.rand(1)
        assert worker.find_traces() == "drawn random numbers"
    finally:
        torch.manual_seed(seed)
        torch.set_rng_state(state)
    torch.manual_seed(5)
    with (tmp_path / "nvidia0").open("w"):
        assert worker.find_traces() == "opened a GPU"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert worker.find_traces() == "initialized CUDA"


CLEAN = """
import json, os, random, sys, threading
import numpy
from runner.gang.ray_rank import RankActor
from runner.life.job import PIPELINE
variables, folder, drawn = dict(os.environ), os.getcwd(), [random.getstate(), str(numpy.random.get_state())]
actor = RankActor(sys.argv[1], 0, PIPELINE)
import torch
from runner.gang.worker import find_traces
print(json.dumps({
    "modules": [name in sys.modules for name in ("torch", "model.gpt", "model.train.trainer", "torch._dynamo")],
    "traces": find_traces(), "cuda": torch.cuda.is_initialized(), "grad": torch.is_grad_enabled(),
    "threads": [thread.name for thread in threading.enumerate() if thread.name != "MainThread" and thread.is_alive()],
    "changed": sorted(name for name, value in os.environ.items() if variables.get(name) != value),
    "same": [os.getcwd() == folder, [random.getstate(), str(numpy.random.get_state())] == drawn],
    "dtype": str(torch.get_default_dtype()), "deterministic": torch.are_deterministic_algorithms_enabled(),
    "code_hash": actor.code_hash,
}))
"""


@pytest.mark.slow
def test_a_process_that_waits_has_imported_torch_and_touched_nothing(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CLEAN, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modules"] == [True, True, True, False]  # nothing of a seed needs PyTorch's compiler
    assert (found["traces"], found["cuda"], found["grad"]) == ("", False, True)
    assert found["threads"] == []
    assert found["changed"] == []
    assert found["same"] == [True, True]
    assert (found["dtype"], found["deterministic"]) == ("torch.float32", False)
    assert len(found["code_hash"]) == 64


FIGURES = ("steps.npz", "evaluate.npz", "ttt.npz")
TIMES = ("steps.npz/elapsed_s", "steps.npz/tokens_per_s")


def bits_of(folder: Path) -> dict[str, Any]:
    """Return all that a seed computed, as bytes: the artifact, the losses and the scores of every document."""
    arrays = {f"{name}/{key}": value.tobytes() for name in FIGURES for key, value in read_arrays(folder / name).items()}
    artifact = {"model.ssq": (folder / "model.ssq").read_bytes()}
    return {**artifact, **{name: bits for name, bits in arrays.items() if name not in TIMES}}


ONE_CPU = """
import os, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from jobs.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_seed_in_a_process_that_waited_has_the_bits_of_a_fresh_one(tmp_path: Path) -> None:
    fresh, out = small_sweep(), tmp_path / "out"
    data = {split: f"{fresh.parent}/data/toy_{split}_*.bin" for split in ("train", "val")}
    tokenizer = str(ROOT / "tests" / "data" / "fineweb_8192_bpe.model")
    spec = tmp_path / "small.yaml"
    spec.write_text(f"{SPEC}data: {json.dumps({**data, 'tokenizer': tokenizer})}\nout: {out}\n")
    command = [sys.executable, "-c", ONE_CPU, "run", str(spec), "--progress", "plain"]  # one seed after the other
    assert subprocess.run(command, cwd=ROOT, timeout=250, check=False).returncode == 0
    waited = {seed for seed in SEEDS for log in seed_directory(out, seed).glob("logs/*.log")
              if "this process has waited" in log.read_text()}  # fmt: skip
    assert len(waited) == 1, "the second seed's process has not waited, or the first one's has"
    for seed in SEEDS:
        ours, theirs = bits_of(seed_directory(out, seed)), bits_of(seed_directory(fresh, seed))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if ours[name] != theirs[name]] == []
