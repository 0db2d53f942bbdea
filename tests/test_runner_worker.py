"""What a rank checks before it works: data on its node, package versions, and a rendezvous that stays on the host."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from model.distributed import Dist
from runner.errors import PreflightError
from runner.gang import rank as rank_module
from runner.gang import worker
from runner.gang.rank import Rank
from runner.gang.worker import all_reduce_bytes_per_s, check_node_data, open_store, preflight
from runner.life.job import Job
from runner.provenance import package_versions
from runner.spec import RunKey
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


@pytest.mark.parametrize(("number", "target", "puts"), [(0, "", 1), (1, "", 0), (1, "no.such:target", 1)])
def test_the_rank_that_fails_leaves_its_log_on_the_object_store(
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
    job = make_rank(tmp_path, **({"target": target} if target else {})).job
    outcome = Rank(job, number).run()
    assert (outcome.kind, mirror.count) == ("failed" if target else "finished", puts)


@pytest.fixture
def listeners() -> set[tuple[str, int]]:
    """Return the addresses that this process listened on before."""
    return {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}


def test_the_rendezvous_listens_on_loopback_only(listeners: set[tuple[str, int]]) -> None:
    store = open_store(2)
    found = {(c.laddr.ip, c.laddr.port) for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
    assert found - listeners == {("127.0.0.1", store.port)}
