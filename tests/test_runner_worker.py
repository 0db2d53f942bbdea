"""What a rank checks before it works: data on its node, package versions, and a rendezvous that stays on the host."""

from __future__ import annotations

import functools
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from model.distributed import Dist
from model.report import Interrupted
from runner.errors import Kind, PreflightError
from runner.gang import rank as rank_module
from runner.gang import worker
from runner.gang.rank import Rank
from runner.gang.worker import all_reduce_bytes_per_s, check_node_data, open_donors, open_store, preflight
from runner.life.job import Job
from runner.machine import gpus
from runner.provenance import package_versions
from runner.spec.sweep import RunKey
from tests.fake_hub import FakeHub
from tests.sweep_tools import make_spec
from tests.test_data_fineweb import hub, options

__all__ = ["hub"]


def make_rank(tmp_path: Path, **changes: Any) -> Rank:
    """Return rank 0 of a job on this node."""
    spec = make_spec(tmp_path)
    job = Job(
        key=RunKey(seed=1), attempt=1, config=spec.config, world_size=1, threads=1, uses_gpus=False,
        workdir=str(tmp_path / "run"), out=str(tmp_path),
    )  # fmt: skip
    return Rank(replace(job, **changes), 0)


def test_a_node_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=rf"node {socket.gethostname()} lacks data: data.train="):
        check_node_data(make_rank(tmp_path))


def test_a_node_without_data_fetches_it_where_the_spec_says_how(hub: FakeHub, tmp_path: Path) -> None:
    wanted = options(hub)
    out = tmp_path / "shards"
    data = replace(
        make_spec(tmp_path).config.data, train=str(out / "*_train_*.bin"), val=str(out / "*_val_*.bin"),
        tokenizer=str(out / "fineweb_8192_bpe.model"),
    )  # fmt: skip
    rank = make_rank(
        tmp_path, config=replace(make_spec(tmp_path).config, data=data),
        fetch={"repo": wanted.repo, "variant": wanted.variant, "shards": 1, "endpoint": hub.endpoint},
    )  # fmt: skip
    check_node_data(rank)
    assert len(list(out.glob("*_train_*.bin"))) == 1
    assert rank.newest.phase == "fetch"


def test_a_node_with_other_versions_is_refused(tmp_path: Path) -> None:
    versions = {**package_versions(), "torch": "1.0.0"}
    with pytest.raises(PreflightError, match=r"other package versions: torch 1\.0\.0 at the driver"):
        preflight(make_rank(tmp_path, record={"versions": versions}))


def test_a_fit_node_describes_itself(tmp_path: Path) -> None:
    facts = preflight(make_rank(tmp_path))
    assert {"host", "cpu_model", "num_cpus", "memory_bytes", "free_disk_bytes"} <= set(facts["hardware"])


def test_one_rank_has_no_bandwidth_to_measure() -> None:
    assert all_reduce_bytes_per_s(Dist.single()) is None


class NotedDist(Dist):
    """A gang of one that notes whether it was left."""

    def close(self) -> None:
        """Note it."""
        CLOSED.append(self.rank)


CLOSED: list[int] = []


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_a_rank_that_fails_does_not_wait_for_the_others(
    error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_seed(*_arguments: Any, **_options: Any) -> None:
        if error is not None:
            raise error

    CLOSED.clear()
    monkeypatch.setattr(worker, "join_gang", lambda _rank: NotedDist())
    monkeypatch.setattr(worker, "check_node_data", lambda _rank: None)
    monkeypatch.setattr("model.pipeline.seed.run_seed", run_seed)
    outcome = make_rank(tmp_path).run()
    assert (outcome.kind, CLOSED) == (("finished", [0]) if error is None else ("failed", []))


@pytest.mark.parametrize(("number", "target", "puts"), [(0, "", 1), (1, "", 0), (2, "", 1), (1, "no.such:target", 1)])
def test_the_first_rank_of_a_host_and_one_that_fails_leave_logs_on_the_object_store(
    number: int, target: str, puts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FakeMirror:
        """Counts what it is asked to put."""

        count = 0

        def put_logs(self) -> None:
            """Count it."""
            self.count += 1

    mirror = FakeMirror()
    monkeypatch.setattr(rank_module, "open_mirror", lambda *_arguments, **_options: mirror)
    monkeypatch.setattr(worker, "run_pipeline", lambda _rank: None)
    job = make_rank(tmp_path, world_size=4, hosts=2, **({"target": target} if target else {})).job
    outcome = Rank(job, number).run()
    assert (outcome.kind, mirror.count) == ("failed" if target else "finished", puts)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_donors_of_a_folder_are_linked_from(tmp_path: Path, scheme: str) -> None:
    (tmp_path / "seeds" / "base" / "stages").mkdir(parents=True)
    (tmp_path / "seeds" / "base" / "stages" / "train.json").write_text("{}")
    job = make_rank(tmp_path, out=f"{scheme}{tmp_path}", donors={"train": "base", "ttt": "other"}).job
    found = open_donors(job)
    assert {stage: donor.name for stage, donor in found.items()} == {"train": "base", "ttt": "other"}
    assert found["train"].folder == tmp_path / "seeds" / "base"
    assert found["train"].read("stages/train.json") == b"{}"
    with pytest.raises(FileNotFoundError):
        found["ttt"].read("stages/train.json")


def test_the_pipeline_is_told_what_the_driver_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(worker, "join_gang", lambda _rank: Dist.single())
    monkeypatch.setattr(worker, "check_node_data", lambda _rank: None)
    monkeypatch.setattr("model.pipeline.seed.run_seed", lambda *_a, **options: told.append(options["orders"]))
    record = {"config_hash": "a", "code_hash": "b", "data_hash": None}
    rank = make_rank(tmp_path, key=RunKey(seed=1, repeat=3), record=record, donors={"train": "base"})
    assert rank.run().kind == "finished"
    assert (told[0].repeat, told[0].hashes, list(told[0].donors)) == (3, record, ["train"])


def test_a_node_of_other_code_is_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "join_gang", lambda _rank: Dist.single())
    monkeypatch.setattr(worker, "check_node_data", lambda _rank: None)
    outcome = make_rank(tmp_path, record={"code_hash": "e" * 64}).run()
    assert outcome.failure is not None
    assert outcome.failure.kind is Kind.PREFLIGHT
    assert f"node {socket.gethostname()}: rank 0 has other code (code_hash " in outcome.failure.message


@pytest.mark.parametrize("is_stopped", [False, True])
def test_samples_of_the_gpus_become_an_output_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    is_sampled = threading.Event()

    def sample(_ids: object) -> gpus.Sample:
        is_sampled.set()
        return gpus.Sample(1980.0, 700.0, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(worker, "gpu_ids", lambda _job: ["GPU-0"])
    monkeypatch.setattr(gpus, "sample_gpus", sample)
    monkeypatch.setattr(worker, "GpuWatch", functools.partial(gpus.GpuWatch, every_s=0.01))
    told: list[Path] = []
    rank, path = make_rank(tmp_path, uses_gpus=True), tmp_path / "run" / "gpu.npz"
    with suppress(Interrupted), worker.watched_gpus(rank, told.append) as attach:
        rank.report("train", 5, 10, {})
        assert is_sampled.wait(20)
        time.sleep(0.05)  # until the sample is noted
        assert attach("evaluate") == []
        if is_stopped:
            raise Interrupted
        assert attach("train") == ["gpu.npz"]
        content = path.read_bytes()
        rank.report("quantize", 1, 10, {})
    assert told == ([path] if is_stopped else [])  # an output is told of with its stage
    assert is_stopped or path.read_bytes() == content
    with np.load(path) as arrays:
        assert set(arrays["step"]) == {5}
    with worker.watched_gpus(rank, told.append):  # of a run whose training is done
        rank.report("ttt", 1, 10, {})
    assert len(told) == is_stopped


@pytest.fixture
def listeners() -> set[tuple[str, int]]:
    """Return the addresses that this process listened on before."""
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}


def test_the_rendezvous_listens_on_loopback_only(listeners: set[tuple[str, int]]) -> None:
    store = open_store(2)
    found = {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
    assert found - listeners == {("127.0.0.1", store.port)}
