"""What the driver commits: samples beside steps, marks for slow seeds, and refusal of rows that do not fit together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import results
from model.presets import tiny
from results.tables import seed_table
from runner.folder.commit import commit_run, document_rows, read_json, step_rows
from runner.life.states import Run, State
from runner.machine import gpus
from runner.spec import RunKey, SweepSpec
from tests.fake_runs import commit_attempt, fake_run


def test_each_step_has_the_newest_sample_taken_by_then(tmp_path: Path) -> None:
    np.savez(tmp_path / "steps.npz", step=np.arange(1, 7), loss=np.ones(6))
    np.savez(tmp_path / "gpu.npz", step=[2, 5], gpu_clock_mhz=[1980.0, 1200.0], gpu_power_w=[700.0, 300.0],
             gpu_throttle_bits=[0, 8])  # fmt: skip
    rows = step_rows(tmp_path)
    assert list(rows["gpu_clock_mhz"]) == [1980.0] * 4 + [1200.0] * 2
    assert list(rows["gpu_throttle_bits"]) == [0, 0, 0, 0, 8, 8]


def test_steps_without_samples_stay_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "steps.npz", step=np.arange(1, 4), loss=np.ones(3))
    assert set(step_rows(tmp_path)) == {"step", "loss"}


def test_scores_of_different_documents_are_not_joined(tmp_path: Path) -> None:
    np.savez(tmp_path / "evaluate.npz", index=[0, 1], tokens=[5, 5], bytes=[9, 9], nats_plain=[1.0, 1.0])
    np.savez(tmp_path / "ttt.npz", index=[0, 2], tokens=[5, 5], bytes=[9, 9], nats_ttt=[1.0, 1.0])
    with pytest.raises(ValueError, match="differ in index"):
        document_rows(tmp_path)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"stage": ')
    with pytest.raises(ValueError, match=r"train\.json is damaged"):
        read_json(tmp_path / "train.json")


def test_a_seed_with_other_steps_than_the_median_is_marked(tmp_path: Path) -> None:
    for seed, steps in ((1, 4820), (2, 4830), (3, 4700)):
        commit_attempt(tmp_path, run=fake_run(seed, steps=steps))
    marks = {row["seed"]: row["marks"] for row in seed_table(tmp_path).seeds}
    assert (marks[1], marks[2], marks[3]) == ([], [], ["steps -2.5 % off the median"])


@pytest.mark.parametrize("is_changed", [False, True])
def test_a_run_continued_in_other_surroundings_is_marked(tmp_path: Path, is_changed: bool) -> None:
    spec = SweepSpec(name="toy", preset="tiny", config=replace(tiny(), seed=0), seeds=(7,), out=str(tmp_path))
    workdir = tmp_path / "seeds" / "seed=7-repeat=0"
    workdir.mkdir(parents=True)
    (workdir / "run.json").write_text(json.dumps({"code_changed": is_changed}))
    run = replace(Run(key=RunKey(seed=7)), state=State.COMMITTING, attempt=2)
    record = {"config_hash": "c" * 64, "code_hash": "e" * 64, "config": {}, "world_size": 1}
    commit_run(spec, workdir, run, record=record)
    assert bool(results.load(tmp_path).iloc[0]["code_changed"]) is is_changed


SMI = """#!/bin/sh
case "$*" in
  *throttle*) echo "1980, 650.5, 0x0000000000000000"; echo "1755, 690.0, 0x0000000000000004" ;;
  *name*) echo "0, NVIDIA H100, 570.1, 4"; echo "1, NVIDIA H100, 570.1, [N/A]" ;;
  *) echo 0; echo 1 ;;
esac
"""


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give this machine a driver's tool that knows two GPUs, all visible."""
    path = tmp_path / "nvidia-smi"
    path.write_text(SMI)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv(gpus.VISIBLE, raising=False)


@pytest.mark.usefixtures("tool")
def test_gpus_are_described_by_the_drivers_tool() -> None:
    assert gpus.count_gpus() == 2
    assert gpus.query_gpus(["0", "1"])[0] == gpus.Gpu("0", "NVIDIA H100", "570.1", 4 << 20)
    assert gpus.sample_gpus(["0", "1"]) == gpus.Sample(1755.0, 1340.5, 4)


@pytest.mark.usefixtures("tool")
@pytest.mark.parametrize(("visible", "count"), [("1", 1), ("", 0), ("0,1", 2), ("0,1,2", 2)])
def test_hidden_gpus_are_not_counted(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, visible)
    assert gpus.count_gpus() == count


def test_a_machine_without_the_tool_has_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.count_gpus() == 0
    assert gpus.sample_gpus([]) is None


def test_samples_are_kept_with_the_step_they_fell_on(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = gpus.GpuWatch([], lambda: 7, every_s=0.01)

    def sample(_ids: object) -> gpus.Sample:
        if len(watch.rows) == 2:
            watch.is_over.set()
        return gpus.Sample(1000.0, 10.0, 0)

    monkeypatch.setattr(gpus, "sample_gpus", sample)
    watch.watch()
    assert watch.arrays()["step"] == [7, 7, 7]
    assert json.dumps(watch.arrays())
