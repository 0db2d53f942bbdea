"""model/pipeline/finished: stages that another run has finished are taken over, to the bit and file by file."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.audit.files import probe_records
from model.audit.finished_run import load_run
from model.audit.records import probe_separation, probe_size
from model.bundle.program import PACKED_NAME, READABLE_NAME, Program, settings_of
from model.config import RunConfig
from model.data.shards import list_shards
from model.files.atomic import file_sha256, writing_aside_in
from model.files.linked import share_file
from model.pipeline import finished, stage_quantize
from model.pipeline import seed as pipeline
from model.pipeline.inputs import ADAPTED, ARTIFACT, EVALUATED, STEPS, WEIGHTS
from model.pipeline.records import StageRecord, read_records, record_path
from model.pipeline.run import Orders
from model.pipeline.seed import SeedResult
from model.report import STAGES
from tests.sharing_tools import (
    OUTPUTS,
    base,
    config,
    donor,
    donors,
    hashes_of,
    run,
    slow,
    stubs,
    variant,
)

__all__ = ["base", "config", "slow", "stubs"]

NOT_REPEATABLE = ("_s", "tokens_per_s", "peak_memory_bytes")


# ---- real stages -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of four runs, each computed alone: base, two that adapt otherwise, one of fewer bits."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        count_settings_only(patch)
        for name, changed in variants(config).items():
            run(changed, folder / name)
    return folder


def count_settings_only(patch: pytest.MonkeyPatch) -> None:
    """Let the counted program be its settings: minifying the sources takes seconds for each configuration."""
    for module in (stage_quantize, finished):
        patch.setattr(module, "code_program", program_of)


def program_of(config: RunConfig) -> Program:
    settings = json.dumps(settings_of(config), sort_keys=True)
    return Program(settings, settings.encode()[::-1])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count_settings_only(monkeypatch)


def variants(config: RunConfig) -> dict[str, RunConfig]:
    return {
        "base": config,
        "slow": variant(config, "ttt", lr=1e-3),
        "coarse": variant(config, "quant", matrix_bits=4),
        "short": variant(config, "evaluation", row_tokens=256, seq_len=32),
    }


def repeatable(result: SeedResult | Mapping[str, Any]) -> dict[str, Any]:
    metrics = result.metrics if isinstance(result, SeedResult) else result
    return {name: value for name, value in metrics.items() if not name.endswith(NOT_REPEATABLE)}


@pytest.mark.parametrize(
    ("name", "computed"),
    [("slow", ["ttt"]), ("coarse", ["quantize", "evaluate", "ttt"]), ("short", ["evaluate"])],
)
def test_a_variant_that_shares_stages_ends_in_the_bits_of_one_that_ran_alone(
    config: RunConfig, sweep: Path, counted: None, tmp_path: Path, name: str, computed: list[str]
) -> None:
    result, heard = run(variants(config)[name], tmp_path / name, donors(sweep / "base"))
    assert heard.computed == computed
    assert hashes_of(tmp_path / name, but=(STEPS,)) == hashes_of(sweep / name, but=(STEPS,))
    ours, alone, base = (read_records(folder) for folder in (tmp_path / name, sweep / name, sweep / "base"))
    assert repeatable(result) == repeatable(pipeline.join_metrics(alone))
    for stage in STAGES:
        is_taken = stage not in computed
        assert ours[stage].reused_from == ("base" if is_taken else None)
        assert ours[stage].identity == alone[stage].identity
        assert (ours[stage].identity == base[stage].identity) is is_taken
        assert ours[stage].config_hash == alone[stage].config_hash != base[stage].config_hash
        assert ours[stage].inputs == alone[stage].inputs
        if is_taken:
            assert ours[stage].seconds == base[stage].seconds
    assert ours["train"].outputs == base["train"].outputs  # the seconds of each step with them
    assert list((tmp_path / name).rglob("*.tmp")) == []


def test_an_audit_reads_a_run_that_took_stages_over_as_any_other(
    config: RunConfig, sweep: Path, counted: None, tmp_path: Path
) -> None:
    run(variants(config)["slow"], tmp_path / "slow", donors(sweep / "base"))
    files = load_run(tmp_path / "slow")
    for result in (probe_records(files), probe_separation(files, list_shards(config.data.val)), probe_size(files)):
        assert result.result == "pass", result.detail
    unsaid = {stage: {**record, "reused_from": None} for stage, record in files.records.items()}
    assert probe_separation(replace(files, records=unsaid), list_shards(config.data.val)).result == "fail"


def test_no_stage_writes_into_the_files_that_it_replaces(
    config: RunConfig, sweep: Path, counted: None, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(sweep / "base", tmp_path / "base"))
    run(config, tmp_path / "other", donors(source))
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    shared = [path for path in before if path.stat().st_nlink == 2]
    assert {path.name for path in shared} >= {name for names in OUTPUTS.values() for name in names}
    shutil.rmtree(tmp_path / "other" / "stages")
    _, heard = run(config, tmp_path / "other")
    assert heard.computed == list(STAGES)
    assert {path: path.read_bytes() for path in before} == before


# ---- stages that only write a word -----------------------------------------------------------------------------------


def test_taken_files_are_the_same_on_the_disk(slow: RunConfig, base: Path, tmp_path: Path) -> None:
    run(slow, tmp_path / "slow", donors(base))
    for name in (WEIGHTS, STEPS, ARTIFACT, EVALUATED):
        assert (tmp_path / "slow" / name).samefile(base / name)
    for name in (READABLE_NAME, PACKED_NAME, ADAPTED):  # of its own
        assert not (tmp_path / "slow" / name).samefile(base / name)


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_they_are_copied_where_the_disk_has_no_links(
    slow: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(_source: object, _path: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    _, heard = run(slow, tmp_path / "slow", donors(base))
    assert heard.computed == ["ttt"]
    assert (tmp_path / "slow" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    assert not (tmp_path / "slow" / WEIGHTS).samefile(base / WEIGHTS)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_they_are_read_where_there_is_no_folder(slow: RunConfig, base: Path, tmp_path: Path) -> None:
    there = donor(base)._replace(folder=None)
    written: list[str] = []
    _, heard = run(
        slow, tmp_path / "slow", Orders(donors=dict.fromkeys(STAGES, there)),
        on_write=lambda path: written.append(path.relative_to(tmp_path / "slow").as_posix()),
    )  # fmt: skip
    assert heard.computed == ["ttt"]
    assert hashes_of(tmp_path / "slow", but=(READABLE_NAME, PACKED_NAME)) == hashes_of(
        base, but=(READABLE_NAME, PACKED_NAME)
    )
    for stage, names in OUTPUTS.items():  # told of like own outputs, the record last
        assert max(map(written.index, names)) < written.index(f"stages/{stage}.json")


def test_what_was_taken_over_is_given_on_under_the_name_of_the_run_that_computed_it(
    config: RunConfig, base: Path, tmp_path: Path
) -> None:
    run(config, tmp_path / "second", donors(base))
    run(config, tmp_path / "third", donors(tmp_path / "second"))
    assert {record.reused_from for record in read_records(tmp_path / "third").values()} == {"base"}


def test_checkpoints_are_not_shared_and_own_ones_go(config: RunConfig, base: Path, tmp_path: Path) -> None:
    for workdir in (base, tmp_path / "own"):
        (workdir / "checkpoints").mkdir(parents=True)
        (workdir / "checkpoints" / "step-0000001.json").write_text("{}")
    run(config, tmp_path / "own", donors(base))
    assert list((tmp_path / "own" / "checkpoints").iterdir()) == []
    assert (base / "checkpoints" / "step-0000001.json").exists()


def test_the_kernel_of_a_taken_training_is_noted(config: RunConfig, base: Path, tmp_path: Path) -> None:
    run(config, tmp_path / "own", donors(base, "train"))
    assert json.loads((tmp_path / "own" / "run.json").read_text())["attention"] == "sdpa"


def test_files_that_were_attached_to_a_stage_travel_with_it(config: RunConfig, stubs: None, tmp_path: Path) -> None:
    def attach(stage: str) -> list[str]:
        (tmp_path / "base" / "gpu.npz").write_bytes(b"clocks")
        return ["gpu.npz"] if stage == "train" else []

    run(config, tmp_path / "base", Orders(attach=attach))
    run(config, tmp_path / "own", donors(tmp_path / "base"))
    assert (tmp_path / "own" / "gpu.npz").read_bytes() == b"clocks"
    assert "gpu.npz" in read_records(tmp_path / "own")["train"].outputs


def test_files_are_shared_by_way_of_the_own_folder_and_not_once_it_is_gone(tmp_path: Path) -> None:
    source, place, root = tmp_path / "source", tmp_path / "root" / ".driver-1-1", tmp_path / "root"
    source.write_bytes(b"bytes")
    place.mkdir(parents=True)
    with writing_aside_in(place, root):
        share_file(source, root / "taken", sha256=file_sha256(source))
        assert (root / "taken").samefile(source)
        share_file(source, root / "taken", sha256=file_sha256(source))  # onto itself, which a rename leaves as it is
        assert list(place.iterdir()) == []
        place.rmdir()
        with pytest.raises(OSError, match="has taken this over"):
            share_file(source, root / "late", sha256=file_sha256(source))
    assert not (root / "late").exists()


def test_a_record_comes_back_as_it_was_written(base: Path) -> None:
    for stage, record in read_records(base).items():
        plain = json.loads(record_path(base, stage).read_text())
        assert record.to_json() == {**plain, "outputs": {k: dict(v) for k, v in plain["outputs"].items()}}
        assert isinstance(record, StageRecord)
        assert set(record.outputs) >= set(OUTPUTS[stage])
