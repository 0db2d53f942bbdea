"""What a run says of the attempts that made it: surroundings, kernels, seconds and memory of each stage, files read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.attention.probe import Choice
from model.audit.configuration import probe_configuration
from model.audit.finished_run import load_run
from model.audit.records import longest, probe_separation
from model.config import RunConfig, RuntimeConfig
from model.controls.self_test import make_corpus, micro_config
from model.corpus.shard_file import write_shard
from model.data.shards import list_shards, open_shard
from model.data.tokenizer import load_tokenizer
from model.distributed import Dist
from model.files.ledger import Ledger
from model.pipeline import inputs, stage_train
from model.pipeline import seed as pipeline
from model.pipeline.attempts import changes_since
from model.pipeline.memory import RESIDENT, RESIDENT_EVER
from model.pipeline.records import read_records
from model.pipeline.run import Run
from model.pipeline.seed import RunMismatch, SeedResult, run_seed
from model.pipeline.stage_evaluate import order0_bpb
from model.report import STAGES
from tests.micro_model import ignore

GPU = "NVIDIA H100 80GB HBM3"


class Killed(BaseException):
    """What a test raises in place of a signal."""


def killed_at(name: str) -> Callable[[Path], None]:
    """Return an on_write that ends the process when this file has been written."""

    def on_write(path: Path) -> None:
        if path.as_posix().endswith(f"/{name}"):
            raise Killed

    return on_write


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    base = micro_config(make_corpus(tmp_path_factory.mktemp("data") / "corpus"))
    return replace(base, runtime=RuntimeConfig(device="cpu", checkpoint_every_s=1e-9, report_every_s=0.0))


def run(config: RunConfig, workdir: Path, **options: Any) -> SeedResult:
    return run_seed(config, options.pop("dist", Dist.single()), workdir, ignore, **options)


@pytest.fixture(scope="module")
def resumed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> SeedResult:
    """Return a run whose training was killed after five of its eight steps, and finished by a second attempt."""
    workdir = tmp_path_factory.mktemp("resumed") / "seed=7-repeat=0"
    with pytest.raises(Killed):
        run(config, workdir, on_write=killed_at("step-0000005.json"))
    return run(config, workdir)


@pytest.fixture
def copy(resumed: SeedResult, tmp_path: Path) -> Path:
    return Path(shutil.copytree(resumed.workdir, tmp_path / resumed.workdir.name))


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every stage do nothing."""
    for stage in STAGES:
        monkeypatch.setitem(pipeline.RUN_STAGE, stage, lambda _run, _ledger: ({}, []))


@pytest.fixture
def one_thread_more() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


def run_json(workdir: Path) -> dict[str, Any]:
    return dict(json.loads((workdir / "run.json").read_text()))


# ---- surroundings ----------------------------------------------------------------------------------------------------


def refusal(config: RunConfig, workdir: Path) -> str:
    before = (workdir / "run.json").read_bytes()
    with pytest.raises(RunMismatch) as caught:
        run(config, workdir)
    assert (workdir / "run.json").read_bytes() == before
    assert "pass --allow-code-change" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_library_is_another_code_even_for_a_finished_run(
    config: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, before = run_json(copy), pipeline.library_versions()
    monkeypatch.setattr(pipeline, "library_versions", lambda: {**before, "torch": "9.9.9"})
    assert f"was made with another torch ({before['torch']}, now 9.9.9)" in refusal(config, copy)
    run(config, copy, allow_code_change=True)
    after = run_json(copy)
    assert after["code_changed"] is True
    assert after["versions"] == first["versions"] == before
    assert [attempt["versions"]["torch"] for attempt in after["later_attempts"]] == [before["torch"], "9.9.9"]
    run(config, copy)  # the directory belongs to the new library now, and stays marked
    assert run_json(copy) == after
    monkeypatch.setattr(pipeline, "library_versions", lambda: before)
    assert f"another torch (9.9.9, now {before['torch']})" in refusal(config, copy)


def test_another_device_and_number_of_threads_are_other_code(
    config: RunConfig, copy: Path, monkeypatch: pytest.MonkeyPatch, one_thread_more: None
) -> None:
    threads = torch.get_num_threads()
    assert f"another number of threads ({threads - 1}, now {threads})" in refusal(config, copy)
    torch.set_num_threads(threads - 1)
    monkeypatch.setattr(pipeline, "device_name", lambda _device: GPU)
    assert f"another device (cpu, now {GPU})" in refusal(config, copy)


def test_a_kernel_named_now_is_other_code_than_the_one_trained_with(config: RunConfig, copy: Path) -> None:
    named = replace(config, runtime=replace(config.runtime, attention="varlen"))
    assert "another attention kernel (sdpa, now varlen)" in refusal(named, copy)


def test_another_node_of_the_same_kind_is_no_change(config: RunConfig) -> None:
    facts: dict[str, Any] = {"device": GPU, "num_threads": 8, "versions": {"torch": "2.13.0"}}
    now = Run(config, Dist.single(), Path(), ignore, hashes={"code_hash": "c"}, surroundings=facts)
    before = {**facts, "code_hash": "c", "attention": "triton"}
    assert changes_since(before, now) == []
    assert changes_since({**before, "num_threads": 16}, now) == []  # of a CPU's figures only
    assert changes_since({**before, "device": "NVIDIA H200"}, now) == [f"another device (NVIDIA H200, now {GPU})"]
    assert changes_since({"code_hash": "c"}, now) == []  # what an earlier version did not note


def test_run_json_keeps_the_first_attempt_and_stages_say_what_they_ran_on(
    config: RunConfig, stubs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pipeline.library_versions()
    with pytest.raises(Killed):
        run(config, tmp_path, on_write=killed_at("stages/quantize.json"))
    monkeypatch.setattr(pipeline, "library_versions", lambda: {**before, "numpy": "9.0"})
    run(config, tmp_path, allow_code_change=True)
    assert run_json(tmp_path)["versions"] == before
    assert [attempt["versions"]["numpy"] for attempt in run_json(tmp_path)["later_attempts"]] == ["9.0"]
    versions = {stage: record.surroundings["versions"] for stage, record in read_records(tmp_path).items()}
    assert versions["train"] == versions["quantize"] == before
    assert versions["evaluate"]["numpy"] == versions["ttt"]["numpy"] == "9.0"


def test_a_call_that_runs_nothing_is_no_attempt(config: RunConfig, copy: Path) -> None:
    before = (copy / "run.json").read_bytes()
    assert len(run_json(copy)["later_attempts"]) == 1  # the one that finished it
    run(config, copy)
    assert (copy / "run.json").read_bytes() == before


def test_a_run_of_the_version_before_is_gone_on_with(config: RunConfig, stubs: None, copy: Path) -> None:
    old = {name: value for name, value in run_json(copy).items()
           if name not in ("later_attempts", "attention", "cpu_capability")}  # fmt: skip
    (copy / "run.json").write_text(json.dumps(old))
    for stage in ("train", "quantize"):
        path = copy / "stages" / f"{stage}.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({name: value for name, value in record.items() if name != "surroundings"}))
    (copy / "stages" / "evaluate.json").unlink()
    run(config, copy)
    assert tuple(read_records(copy)) == STAGES
    assert len(run_json(copy)["later_attempts"]) == 1


@pytest.mark.parametrize("damage", [{"later_attempts": 3}, {"versions": [1]}, {"attention": "magic"}])
def test_a_damaged_list_of_attempts_is_refused(config: RunConfig, copy: Path, damage: dict[str, Any]) -> None:
    content = {name: value for name, value in run_json(copy).items() if name != "later_attempts"}
    (copy / "run.json").write_text(json.dumps({**content, **damage}))
    with pytest.raises(RunMismatch, match="is damaged"):
        run(config, copy)


# ---- the attention kernel --------------------------------------------------------------------------------------------


def test_a_kernel_chosen_by_a_stopwatch_stays_with_the_run(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_train, "choose_attention", lambda _config, _dist: Choice("sdpa", {"sdpa": 1.0}, {}, {}))
    with pytest.raises(Killed):
        run(config, tmp_path, on_write=killed_at("step-0000002.json"))
    assert run_json(tmp_path)["attention"] == "sdpa"
    record = json.loads((tmp_path / "checkpoints" / "step-0000002.json").read_text())
    assert record["meta"]["attention"] == "sdpa"

    def fail(_config: RunConfig, _dist: Dist) -> Choice:
        raise AssertionError("the kernel was timed again")

    monkeypatch.setattr(stage_train, "choose_attention", fail)
    with pytest.raises(Killed):
        run(config, tmp_path, on_write=killed_at("stages/train.json"))
    assert read_records(tmp_path)["train"].surroundings["attention"] == "sdpa"


def test_every_stage_names_its_own_kernel(resumed: SeedResult) -> None:
    records = read_records(resumed.workdir)
    assert {record.surroundings["attention"] for record in records.values()} == {"sdpa"}
    assert {f"{stage}_attention_backend" for stage in STAGES[1:]} <= set(resumed.metrics)


@pytest.mark.parametrize("name", ["attention", "device", "num_threads", "versions"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_of_other_surroundings_is_another_configuration(copy: Path, stage: str, name: str) -> None:
    other = Path(shutil.copytree(copy, copy.parent / "seed=8-repeat=0"))
    sweep = {"announcements": [{"time": "2000-01-01T00:00:00+00:00", "seeds": [7, 8], "repeats": 1}]}
    (copy.parent / "sweep.json").write_text(json.dumps(sweep))
    assert probe_configuration(copy.parent, [copy, other]).result == "pass"
    path = other / "stages" / f"{stage}.json"
    record = json.loads(path.read_text())
    record["surroundings"][name] = "another"
    path.write_text(json.dumps(record))
    result = probe_configuration(copy.parent, [copy, other])
    assert (result.result, result.measured) == ("fail", 1)
    assert result.detail.startswith(f"{stage} {name} differs")


# ---- seconds and memory ----------------------------------------------------------------------------------------------


def test_the_spans_of_a_resumed_training_cover_all_of_it(resumed: SeedResult) -> None:
    files = load_run(resumed.workdir)
    assert resumed.metrics["resumed_at_steps"] == [5]
    (earlier,) = files.ledgers["train"]["earlier"]
    assert {"load", "warm_up", "steps"} <= {span["name"] for span in earlier["spans"]}
    unstated = {**files.records, "train": {**files.records["train"], "metrics": {}}}
    assert longest(replace(files, records=unstated), {"train": ("steps",)}) >= resumed.metrics["train_s"]
    assert longest(files, {"train": ("load",)}) > 0


def test_seconds_that_no_span_shows_count_all_the_same(resumed: SeedResult) -> None:
    files = load_run(resumed.workdir)
    ledger = {name: value for name, value in files.ledgers["train"].items() if name != "earlier"}
    records = {**files.records, "train": {**files.records["train"], "metrics": {"train_s": 50.0}}}
    lost = replace(files, ledgers={**files.ledgers, "train": ledger}, records=records)
    assert longest(lost, {"train": ("steps",)}) == pytest.approx(50.0)


def test_counting_the_code_lies_inside_a_span(resumed: SeedResult) -> None:
    ledger = json.loads((resumed.workdir / "ledger" / "quantize.json").read_text())
    assert "program" in {span["name"] for span in ledger["spans"]}


def test_peak_memory_is_each_stage_s_own_and_the_run_s_the_largest(
    config: RunConfig, stubs: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 300 << 20

    def train(_run: Run, _ledger: Ledger) -> tuple[dict[str, Any], list[str]]:
        return {"sum": float(np.ones(size, dtype=np.uint8)[-1])}, []

    monkeypatch.setitem(pipeline.RUN_STAGE, "train", train)
    result = run(config, tmp_path)
    metrics = {stage: record.metrics for stage, record in read_records(tmp_path).items()}
    peaks = {stage: values["peak_memory_bytes"] for stage, values in metrics.items()}
    assert result.metrics["peak_memory_bytes"] == max(peaks.values()) == peaks["train"] > size
    counted = {values["peak_memory_of"] for values in metrics.values()}
    if counted == {RESIDENT}:
        assert peaks["ttt"] < peaks["train"] - size // 2
    else:
        assert counted == {RESIDENT_EVER}  # a system without a /proc that may be written


def test_peak_memory_is_that_of_the_rank_with_most(config: RunConfig, stubs: None, tmp_path: Path) -> None:
    class Gang(Dist):
        """One rank that hears of another, of 10 TB."""

        def gather_rows(self, rows: np.ndarray) -> np.ndarray:
            """Return the other's row as well, where one number is gathered."""
            return np.concatenate([rows, [[10**13]]]) if rows.shape == (1, 1) else rows

    assert run(config, tmp_path, dist=Gang()).metrics["peak_memory_bytes"] == 10**13


# ---- which files are read --------------------------------------------------------------------------------------------


def test_no_stage_reads_a_training_shard_after_training(config: RunConfig, resumed: SeedResult) -> None:
    files = load_run(resumed.workdir)
    for stage in ("evaluate", "ttt"):
        assert not [read["file"] for read in files.ledgers[stage]["reads"] if "_train_" in read["file"]], stage
    shards = list_shards(config.data.val)
    assert probe_separation(files, shards).result == "pass"
    tokens = np.concatenate([open_shard(path) for path in list_shards(config.data.train)])
    counts = np.bincount(tokens, minlength=config.model.vocab_size)
    with np.load(resumed.workdir / inputs.TRAIN_COUNTS, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["count"], counts)
    table = load_tokenizer(Path(config.data.tokenizer)).byte_table
    _, validation = inputs.open_validation(Run(config, Dist.single(), Path(), ignore), Ledger("evaluate"))
    assert resumed.metrics["order0_bpb"] == order0_bpb(counts, validation, table)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_declared", [False, True])
def test_a_foreign_read_is_caught_in_every_stage(
    config: RunConfig, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, is_declared: bool
) -> None:
    foreign = tmp_path / "elsewhere" / "found_000000.bin"
    foreign.parent.mkdir()
    write_shard(foreign, np.array([1, 2, 3]))

    def read_more(_run: Run, ledger: Ledger) -> tuple[dict[str, Any], list[str]]:
        if is_declared:
            ledger.opened(foreign)
        else:
            open_shard(foreign)
        return {}, []

    files = load_run(copy)
    monkeypatch.setitem(pipeline.RUN_STAGE, stage, read_more)
    (copy / "stages" / f"{stage}.json").unlink()
    with pytest.raises(Killed):
        run(config, copy, on_write=killed_at(f"stages/{stage}.json"))
    ledger = json.loads((copy / "ledger" / f"{stage}.json").read_text())
    result = probe_separation(replace(files, ledgers={**files.ledgers, stage: ledger}), list_shards(config.data.val))
    assert (result.result, result.measured) == ("fail", 1)
    assert f"found_000000.bin opened in {stage}" in result.detail


@pytest.mark.parametrize(("stage", "split"), [("train", "val"), ("quantize", "val"), ("evaluate", "train"),
                                              ("ttt", "train"), ("train", "tokenizer")])  # fmt: skip
def test_each_stage_keeps_to_its_own_text(config: RunConfig, resumed: SeedResult, stage: str, split: str) -> None:
    files, place = load_run(resumed.workdir), getattr(config.data, split)
    path = Path(place) if split == "tokenizer" else list_shards(place)[0]
    ledger = Ledger(stage)
    ledger.opened(path)
    reads = [*files.ledgers[stage]["reads"], *ledger.reads]
    ledgers = {**files.ledgers, stage: {**files.ledgers[stage], "reads": reads}}
    assert probe_separation(replace(files, ledgers=ledgers), list_shards(config.data.val)).result == "fail"
