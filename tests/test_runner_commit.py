"""What the driver commits: samples beside steps, marks for slow seeds, and refusal of rows that do not fit together."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest

import results
from model.files.plain import read_json_if_any
from model.presets import tiny
from runner.folder.commit import commit_run, document_rows, step_rows
from runner.life.states import Run, State
from runner.machine import gpus, packages
from runner.spec.sweep import RunKey, SweepSpec
from tests.fake_runs import commit_attempt, fake_run, seed_table


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
        read_json_if_any(tmp_path / "train.json")


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


class FakeDriver:
    """NVML of a machine with two GPUs, of which the second does not tell its memory or its power."""

    NVML_CLOCK_SM, nvmlMemory_v2 = 1, 2
    UUIDS = ("GPU-aa", "GPU-bb")

    class NVMLError(Exception):
        """What NVML raises."""

    def _refuse(self, *_: object) -> NoReturn:
        raise self.NVMLError("Not Supported")

    def nvmlInit(self) -> None:
        """Open the driver."""

    def nvmlDeviceGetCount(self) -> int:
        return len(self.UUIDS)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index if index < len(self.UUIDS) else self._refuse()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return self.UUIDS.index(uuid) if uuid in self.UUIDS else self._refuse()

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetName(self, _handle: int) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> SimpleNamespace:
        assert version == self.nvmlMemory_v2  # of the first version, used would count what the driver reserves
        return self._refuse() if handle else SimpleNamespace(used=4 << 20)

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:
        assert kind == self.NVML_CLOCK_SM
        return (1980, 1755)[handle]

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._refuse() if handle else 650_500

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return (0x1, 0x4)[handle]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Give this machine a driver that knows two GPUs, all visible."""
    fake = FakeDriver()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    gpus.open_driver.cache_clear()
    yield fake
    gpus.open_driver.cache_clear()


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("ids", [[], ["0", "1"], ["GPU-aa", "GPU-bb"]])
def test_gpus_are_described_by_their_driver(ids: list[str]) -> None:
    assert gpus.count_gpus() == 2
    first = gpus.Gpu("0", "NVIDIA H100", "570.1", 4 << 20)
    assert gpus.query_gpus(ids) == [first, first._replace(number="1", used_bytes=0)]
    assert gpus.sample_gpus(ids) == gpus.Sample(1755.0, 650.5, 5)


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("ids", [["2"], ["GPU-cc"], ["GPU-aa", "GPU-cc"]])
def test_a_gpu_that_is_not_there_is_not_described(ids: list[str]) -> None:
    assert gpus.query_gpus(ids) == []
    assert gpus.sample_gpus(ids) is None


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    ("visible", "count"), [("1", 1), ("", 0), ("0,1", 2), ("0,1,2", 2), ("GPU-bb", 1), ("GPU-aa,GPU-bb", 2)]
)
def test_hidden_gpus_are_not_counted(visible: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpus.VISIBLE, visible)
    assert gpus.count_gpus() == count


def test_a_machine_without_a_driver_has_no_gpus(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "nvmlInit", driver._refuse)
    assert gpus.count_gpus() == 0
    assert gpus.query_gpus([]) == []
    assert gpus.sample_gpus([]) is None


def test_a_machine_without_the_package_is_told_where_gpus_are_asked_for(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus.count_gpus() == 0
    monkeypatch.setattr(packages, "is_found", lambda name: name != "pynvml")
    assert "nvidia-ml-py (not found" in packages.missing_packages(tiny(), uses_gpus=True)
    assert packages.missing_packages(tiny(), uses_gpus=False) == ""


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
