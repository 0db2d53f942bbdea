"""On what each run of a sweep was computed, and that a sweep over several models of GPU says so where it is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from results.compare.variants import Ablation, read_table
from results.render import MIXED, mixed_devices
from results.report.data import read_system
from runner.folder.directory import SweepDirectory, run_from_json, run_to_json
from runner.folder.storage import LocalStorage
from runner.folder.takeover import take_over_run
from runner.gang import local_backend, ray_ask
from runner.life import states
from runner.life.states import Run, State, apply_event
from runner.machine.gpus import Gpu
from runner.spec.gang import Limits
from runner.spec.sweep import RunKey
from tests.fake_runs import FakeVariant, commit_fake, fake_ablation, seed_table
from tests.test_runner_worker import make_rank

KEY = RunKey(seed=1)
H100 = "NVIDIA H100 80GB HBM3"


def test_one_device_needs_no_word_and_an_unknown_one_counts_for_nothing() -> None:
    assert mixed_devices({}) == ""
    assert mixed_devices({"seed=1": H100, "seed=2": H100, "seed=3": ""}) == ""
    assert mixed_devices({"seed=1": "", "seed=2": ""}) == ""
    words = mixed_devices({"seed=1": H100, "seed=2": "CPU", "seed=3": H100})
    assert words.startswith(f"computed on different devices ({H100}: seed=1, seed=3; CPU: seed=2): ")
    many = mixed_devices({f"seed={seed}": "A100" if seed else H100 for seed in range(30)})
    assert "seed=12 and 17 more)" in many


@pytest.mark.parametrize("other", [{"gpu_model": "A100"}, {"gpu_model": None, "num_gpus": 0}])
def test_the_table_names_which_seeds_ran_on_what(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit_fake(tmp_path, 42)
    commit_fake(tmp_path, 7)
    assert not [note for note in seed_table(tmp_path).notes if MIXED in note]
    commit_fake(tmp_path, 1337, repeat=1, **other)
    words = f"{MIXED} (H100: seed=7, seed=42; {other['gpu_model'] or 'CPU'}: seed=1337-repeat=1)"
    assert main(["table", str(tmp_path)]) == 0
    assert f"note: {words}" in capsys.readouterr().out
    assert [note for note in read_system(str(tmp_path)).table.notes if note.startswith(words)]


def test_rows_that_name_no_gpu_are_not_taken_for_a_cpus(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    commit_fake(tmp_path, 7, gpu_model=None)  # as where the driver does not tell, or a log was imported
    commit_fake(tmp_path, 8, gpu_model=None, num_gpus=None)
    assert not [note for note in seed_table(tmp_path).notes if MIXED in note]


def test_variants_on_different_gpus_are_told_once(tmp_path: Path) -> None:
    fake_ablation(tmp_path, [FakeVariant("base", {42: 0.0, 7: 0.0}), FakeVariant("gate", {42: -0.001})])
    commit_fake(tmp_path, 7, variant="gate", gpu_model="A100")
    ablation = read_table(tmp_path)
    assert isinstance(ablation, Ablation)
    (note,) = [note for note in ablation.notes if MIXED in note]
    assert "H100: variant=base-seed=7, variant=base-seed=42, variant=gate-seed=42; A100: variant=gate-seed=7)" in note


def test_a_run_keeps_what_its_ranks_said_they_compute_on() -> None:
    starting = Run(key=KEY, state=State.STARTING, group=1, has_group=True, attempt=1, placed_at=5.0)
    event = states.Started(key=KEY, group=1, facts={"ranks": [], "device": H100})
    run = replace(apply_event(starting, event, 9.0, Limits()), accelerator="H100")
    assert run.device == H100
    back = run_from_json(json.loads(json.dumps(run_to_json(run, 100.0))))
    assert (back.device, back.accelerator) == (H100, "H100")
    later = take_over_run(KEY, back, 1, is_wanted=True)
    assert (later.state, later.device, later.accelerator) == (State.DONE, H100, "H100")
    plain = {
        name: value
        for name, value in run_to_json(run, 100.0).items()
        if name not in ("device", "accelerator", "asides")
    }
    assert run_from_json(plain).device == ""  # as earlier versions wrote it


def test_status_names_which_runs_are_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        Run(key=RunKey(seed=42), state=State.DONE, attempt=1, device=H100),
        Run(key=RunKey(seed=7), state=State.DONE, attempt=1, device="CPU"),
        Run(key=RunKey(seed=8), state=State.FAILED, attempt=1, device="A100"),
    ]
    directory = SweepDirectory(LocalStorage(tmp_path))
    directory.write_state("test", runs, 0.0)
    assert main(["status", str(tmp_path)]) == 0
    assert f"note: {MIXED} ({H100}: seed=42; CPU: seed=7): " in capsys.readouterr().out
    assert main(["status", str(tmp_path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"].startswith(MIXED)
    directory.write_state("test", runs[:1], 0.0)
    assert main(["status", str(tmp_path)]) == 0
    assert MIXED not in capsys.readouterr().out


def test_gangs_say_the_model_of_their_gpus_and_local_runs_that_of_the_first_they_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def query(ids: list[str]) -> list[Gpu]:
        asked.append(list(ids))
        return [Gpu("0", H100, "570", 0)]

    job = make_rank(tmp_path).job
    monkeypatch.setattr(local_backend, "query_gpus", query)
    assert local_backend.device_of(replace(job, uses_gpus=False)) == "CPU"
    assert asked == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert local_backend.device_of(replace(job, uses_gpus=True)) == H100
    assert asked == [["3"]]

    class Context:
        def get_accelerator_ids(self) -> dict[str, list[str]]:
            return {"GPU": ["5"]}

    monkeypatch.setattr(ray_ask, "query_gpus", query)
    monkeypatch.setattr(ray_ask.ray, "get_runtime_context", Context)
    assert ray_ask.gpus_here() == (("5",), H100)
    assert asked[-1] == ["5"]
