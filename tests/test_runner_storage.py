"""Sweeps on an object store, played by moto on loopback: state, stages, checkpoints and results all behind a URI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.controls.self_test import make_corpus, micro_config
from model.distributed import Dist
from model.files.atomic import file_sha256
from model.pipeline import seed as pipeline
from model.pipeline.run import Orders
from model.pipeline.seed import run_seed
from model.report import STAGES
from runner import sweep as sweep_module
from runner import work as work_module
from runner.folder.directory import SweepDirectory
from runner.folder.mirror import Mirror
from runner.folder.storage import ObjectStorage, local_root, open_storage
from runner.gang.worker import open_donors
from runner.life.job import Job
from runner.spec.sweep import RunKey
from runner.sweep import run_sweep
from runner.view.status import look
from runner.work import Options
from tests.micro_model import ignore
from tests.sweep_tools import make_spec, no_data, scores_of

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
TARGET = "tests.stub_work:mirrored_work"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of an S3 server on loopback, with one bucket."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="sweeps")
        yield f"{host}:{port}"
    server.stop()


@pytest.fixture
def uri(server: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a fresh place on the server; scratch work goes to the test's folder."""
    monkeypatch.setattr(work_module, "scratch_root", lambda out: tmp_path / "scratch")
    return f"s3://sweeps/{request.node.name}?endpoint_override={server}&scheme=http&region=us-east-1"


def test_another_host_has_the_bytes_that_rank_0_names_or_fails(uri: str, tmp_path: Path) -> None:
    storage = open_storage(uri)
    assert isinstance(storage, ObjectStorage)
    first, other = (Mirror(storage, "seeds/x", tmp_path / name) for name in ("first", "other"))
    for mirror, content in ((first, b"new"), (other, b"left by another attempt")):
        mirror.keep("checkpoints/step-1.json", content)
    first.put(first.workdir / "checkpoints" / "step-1.json")
    sha256 = file_sha256(first.workdir / "checkpoints" / "step-1.json")
    other.fetch_same("checkpoints/step-1.json", sha256)
    assert (other.workdir / "checkpoints" / "step-1.json").read_bytes() == b"new"
    storage.remove("seeds/x/checkpoints/step-1.json")
    other.fetch_same("checkpoints/step-1.json", sha256)  # it is here
    with pytest.raises(FileNotFoundError):
        other.fetch_same("checkpoints/step-1.json", "0" * 64)
    storage.write("seeds/x/checkpoints/step-1.json", b"of a gang that was given up")
    with pytest.raises(ValueError, match="does not have the sha256 of its record"):
        other.fetch_same("checkpoints/step-1.json", "0" * 64)
    assert (other.workdir / "checkpoints" / "step-1.json").read_bytes() == b"new"


@pytest.mark.slow
def test_a_sweep_behind_a_uri_leaves_everything_there(uri: str, tmp_path: Path) -> None:
    options = Options(is_local=True, target=TARGET, progress="plain")
    spec = make_spec(tmp_path, seeds=[1, 2])
    assert run_sweep(replace(spec, out=uri), options) == 0
    assert set(scores_of(uri)) == {1, 2}  # type: ignore[arg-type]
    assert look(uri).counts == {"DONE": 2}
    storage = open_storage(uri)
    assert storage.names("seeds/seed=1-repeat=0/stages") == [
        f"{s}.json" for s in ("evaluate", "quantize", "train", "ttt")
    ]
    assert storage.names("seeds/seed=1-repeat=0/logs") == ["attempt=1-rank=0.log"]
    assert storage.names("results/runs") == [f"seed={seed}-repeat=0-attempt=1.parquet" for seed in (1, 2)]
    assert {json.loads(line)["to"] for line in storage.read("events.jsonl").splitlines()} >= {"TRAIN", "DONE"}
    assert storage.names("") and "lease.json" not in storage.names("")  # noqa: PT018


def test_a_run_goes_on_from_what_the_store_has(uri: str, tmp_path: Path) -> None:
    storage = open_storage(uri)
    assert isinstance(storage, ObjectStorage)
    workdir = tmp_path / "here"
    (workdir / "checkpoints").mkdir(parents=True)
    mirror = Mirror(storage, f"seeds/{RunKey(seed=3).name}", workdir)
    for step in (1, 2, 3):
        for suffix in ("safetensors", "json"):
            path = workdir / "checkpoints" / f"step-{step}.{suffix}"
            path.write_text(str(step))
            if step == 3:
                (workdir / "checkpoints" / f"step-1.{suffix}").unlink()
            mirror.put(path)
    other = Mirror(storage, mirror.prefix, tmp_path / "there")
    (tmp_path / "there" / "stages").mkdir(parents=True)
    for name in ("stages/train.json", "run.json", "steps.npz"):
        (tmp_path / "there" / name).write_text("left by an attempt that the store never heard of")
    other.fetch_all()
    left = {path.name: path.read_text() for path in (tmp_path / "there").rglob("*") if path.is_file()}
    assert left == {f"step-{step}.{suffix}": str(step) for step in (2, 3) for suffix in ("safetensors", "json")}
    (tmp_path / "there" / "gpu.npz").write_text("left")
    other.fetch_results()
    assert not (tmp_path / "there" / "gpu.npz").exists()


def test_stages_are_taken_over_by_way_of_the_store(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_word(stage: str) -> Any:
        def run_stage(run: Any, _ledger: Any) -> tuple[dict[str, Any], list[str]]:
            computed.append((run.workdir.name, stage))
            (run.workdir / f"{stage}.word").write_text(stage)
            return {}, [f"{stage}.word"]

        return run_stage

    for stage in STAGES:
        monkeypatch.setitem(pipeline.RUN_STAGE, stage, write_word(stage))
    computed: list[tuple[str, str]] = []
    config, storage = micro_config(make_corpus(tmp_path / "corpus")), open_storage(uri)
    other = sweep_module.replace(config, ttt=sweep_module.replace(config.ttt, lr=0.5))
    job = Job(
        key=RunKey(seed=config.seed), attempt=1, config=other, world_size=1, threads=1, uses_gpus=False,
        workdir=str(tmp_path / "other"), out=uri, donors={"train": "base", "evaluate": "gone"},
    )  # fmt: skip
    for name, settings, orders in (("base", config, Orders()), ("other", other, Orders(donors=open_donors(job)))):
        mirror = Mirror(storage, f"seeds/{name}", tmp_path / name)
        run_seed(settings, Dist.single(), tmp_path / name, ignore, on_write=mirror.put, orders=orders)
    assert [stage for name, stage in computed if name == "other"] == ["quantize", "evaluate", "ttt"]
    assert storage.read("seeds/other/train.word") == b"train"
    assert json.loads(storage.read("seeds/other/stages/train.json"))["reused_from"] == "base"
    assert json.loads(storage.read("seeds/other/stages/evaluate.json"))["reused_from"] is None


def test_a_lease_on_an_object_store_keeps_a_second_driver_out(uri: str) -> None:
    first, second = SweepDirectory(open_storage(uri)), SweepDirectory(open_storage(uri))
    first.acquire()
    with pytest.raises(ValueError, match="is driven by pid"):
        second.acquire()
    first.release()
    second.acquire()


def test_a_log_grows_by_whole_puts(uri: str) -> None:
    open_storage(uri).append("events.jsonl", b"one\n")
    again = open_storage(uri)
    again.append("events.jsonl", b"two\n")
    again.append("events.jsonl", b"three\n")
    assert open_storage(uri).read("events.jsonl") == b"one\ntwo\nthree\n"


def test_a_file_uri_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_root(f"file://{tmp_path}/a%20b") == tmp_path / "a b"
    storage: Any = open_storage(f"file://{tmp_path}/x")
    storage.write("a/b", b"1")
    assert (tmp_path / "x" / "a" / "b").read_bytes() == b"1"


def test_a_uri_that_nobody_can_open_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="cannot be opened") as caught:
        open_storage("nonsense://x/y")
    assert "\n" not in str(caught.value)
