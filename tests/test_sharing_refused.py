"""model/pipeline/finished: a stage that is another computation, or not whole, is computed and said so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model.bundle.program import PACKED_NAME
from model.config import RunConfig
from model.distributed import Dist
from model.files import linked
from model.files.atomic import file_sha256, replace_file
from model.pipeline import seed as pipeline
from model.pipeline.inputs import ARTIFACT, STEPS, WEIGHTS
from model.pipeline.records import read_records, record_path
from model.pipeline.run import Orders
from model.pipeline.seed import OtherHashes
from model.report import STAGES
from tests.sharing_tools import (
    Killed,
    base,
    config,
    donor,
    donors,
    edit_record,
    killed_at,
    run,
    slow,
    stubs,
    variant,
)

__all__ = ["base", "config", "slow", "stubs"]


def alter(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no record": (lambda base: record_path(base, "train").unlink(), "No such file"),
    "torn record": (lambda base: record_path(base, "train").write_text('{"stage": "tr'), "is damaged"),
    "record of another kind": (lambda base: record_path(base, "train").write_text("[1]"), "is damaged"),
    "output missing": (lambda base: (base / STEPS).unlink(), "No such file"),
    "output altered": (lambda base: alter(base / WEIGHTS), "does not have the sha256 of its record"),
    "output outside": (
        lambda base: edit_record(base, "train", outputs={"../x": {"bytes": 1, "sha256": "0"}}),
        "none of this run's",
    ),
    "another identity": (lambda base: edit_record(base, "train", identity="0" * 64), "is another computation"),
    "no identity": (lambda base: edit_record(base, "train", identity=None), "its record does not say"),
    "another stage": (
        lambda base: record_path(base, "train").write_bytes(record_path(base, "evaluate").read_bytes()),
        "is another computation",
    ),
}


@pytest.mark.parametrize("is_folder", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_donor_does_not_have_whole_is_computed_and_said_in_one_line(
    config: RunConfig, base: Path, tmp_path: Path, damage: str, is_folder: bool
) -> None:
    make, why = DAMAGES[damage]
    make(base)
    giver = donor(base) if is_folder else donor(base)._replace(folder=None)
    _, heard = run(config, tmp_path / "other", Orders(donors={"train": giver}))
    assert heard.computed == list(STAGES)
    (line,) = heard.refusals
    assert line.startswith("stage train of base is not taken over: ")
    assert why in line
    assert "\n" not in line
    assert read_records(tmp_path / "other")["train"].reused_from is None
    assert list((tmp_path / "other").rglob("*.tmp")) == []


def test_another_seed_or_repeat_or_versions_are_another_computation(
    config: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(replace(config, seed=8), tmp_path / "seed", donors(base))[1].computed == list(STAGES)
    assert run(config, tmp_path / "repeat", replace(donors(base), repeat=1))[1].computed == list(STAGES)
    before = pipeline.library_versions()
    monkeypatch.setattr(pipeline, "library_versions", lambda: {**before, "torch": "9.9.9"})
    assert run(config, tmp_path / "versions", donors(base))[1].computed == list(STAGES)


def test_a_stage_computed_from_other_bits_is_not_taken(config: RunConfig, base: Path, tmp_path: Path) -> None:
    """On a GPU two trainings of one identity end in different weights: what was made of one does not fit the other."""
    own = tmp_path / "own"
    with pytest.raises(Killed):
        run(config, own, on_write=killed_at("stages/train.json"))
    (own / WEIGHTS).write_bytes(b"the same recipe, other bits")
    output = {"bytes": (own / WEIGHTS).stat().st_size, "sha256": file_sha256(own / WEIGHTS)}
    record = json.loads(record_path(own, "train").read_text())
    edit_record(own, "train", outputs={**record["outputs"], WEIGHTS: output})
    _, heard = run(config, own, donors(base))
    assert heard.computed == ["quantize", "evaluate"]  # ttt reads the artifact alone, which came out the same
    assert "was computed from another train.safetensors" in heard.refusals[0]


def test_own_stages_that_read_other_bits_are_done_again(config: RunConfig, base: Path) -> None:
    edit_record(base, "ttt", inputs={ARTIFACT: "0" * 64})
    _, heard = run(config, base)
    assert heard.computed == ["ttt"]
    assert heard.notes == [f"stage ttt is done again: stage ttt was computed from another {ARTIFACT}"]


def test_code_that_changed_under_way_is_no_computation_to_share(
    config: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        run(config, tmp_path / "mixed", on_write=killed_at("stages/train.json"))
    monkeypatch.setattr(pipeline, "code_hash", lambda: "c" * 64)
    run(config, tmp_path / "mixed", allow_code_change=True)
    assert [record.identity is None for record in read_records(tmp_path / "mixed").values()] == [False, *[True] * 3]
    _, heard = run(config, tmp_path / "other", donors(tmp_path / "mixed"))
    assert heard.computed == list(STAGES)


def test_a_donor_that_is_replaced_meanwhile_gives_what_its_record_says_or_nothing(
    config: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, wanted = os.link, (base / WEIGHTS).read_bytes()

    def replace_first(source: Path, path: Path) -> None:
        with replace_file(Path(source)) as file:
            file.write(b"of another attempt")
        link(source, path)

    def replace_then(source: Path, path: Path) -> None:
        link(source, path)
        with replace_file(Path(source)) as file:
            file.write(b"of another attempt")

    monkeypatch.setattr(os, "link", replace_then)
    run(config, tmp_path / "in time", donors(base, "train"))
    assert read_records(tmp_path / "in time")["train"].reused_from == "base"
    assert (tmp_path / "in time" / WEIGHTS).read_bytes() == wanted
    (base / WEIGHTS).write_bytes(wanted)
    monkeypatch.setattr(os, "link", replace_first)
    _, heard = run(config, tmp_path / "too late", donors(base, "train"))
    assert "does not have the sha256 of its record" in heard.refusals[0]
    assert read_records(tmp_path / "too late")["train"].reused_from is None


@pytest.mark.parametrize("name", [WEIGHTS, STEPS, "stages/train.json", ARTIFACT, PACKED_NAME, "stages/quantize.json"])
def test_killed_in_the_middle_of_taking_it_goes_on(slow: RunConfig, base: Path, tmp_path: Path, name: str) -> None:
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.raises(Killed):
        run(slow, tmp_path / "slow", donors(base), on_write=killed_at(name))
    done = set(read_records(tmp_path / "slow"))
    assert done == {stage for stage in STAGES[:2] if STAGES.index(stage) < (name in (ARTIFACT, PACKED_NAME))} or (
        name.startswith("stages/")
    )
    _, heard = run(slow, tmp_path / "slow", donors(base))
    assert heard.computed == ["ttt"]
    assert {path: path.read_bytes() for path in before} == before
    assert list(tmp_path.rglob("*.tmp")) == []


def test_killed_between_link_and_move_nothing_stands_under_the_name(
    config: RunConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(_aside: Path, _path: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(linked, "move_file", kill)
        with pytest.raises(Killed):
            run(config, tmp_path / "other", donors(base))
    assert not (tmp_path / "other" / WEIGHTS).exists()
    assert run(config, tmp_path / "other", donors(base))[1].computed == []


@pytest.mark.parametrize("damage", ["altered", "removed"])
@pytest.mark.parametrize("has_donor", [True, False])
def test_a_taken_output_that_is_damaged_is_taken_or_made_again(
    config: RunConfig, base: Path, tmp_path: Path, has_donor: bool, damage: str
) -> None:
    own = tmp_path / "own"
    run(config, own, donors(base))
    (own / ARTIFACT).unlink()
    if damage == "altered":
        (own / ARTIFACT).write_bytes(b"x")
    _, heard = run(config, own, donors(base) if has_donor else Orders())
    assert heard.computed == ([] if has_donor else ["quantize", "evaluate", "ttt"])
    assert any("stage quantize is done again" in note for note in heard.notes)
    assert (own / ARTIFACT).read_bytes() == (base / ARTIFACT).read_bytes()
    assert read_records(own)["quantize"].reused_from == ("base" if has_donor else None)


def test_an_artifact_that_is_too_large_with_the_own_code_is_not_taken(
    config: RunConfig, stubs: None, tmp_path: Path
) -> None:
    size = len(f"{ARTIFACT} of {config.train.max_steps} {config.quant.matrix_bits}")
    limited = variant(config, "quant", on_oversize="fail", size_limit_bytes=size + len("0.001"))
    longer = variant(variant(limited, "ttt", lr=1e-3), "ttt", lr=0.00125)
    run(variant(limited, "ttt", lr=1e-3), tmp_path / "base")
    _, heard = run(longer, tmp_path / "other", donors(tmp_path / "base", "train", "quantize"))
    assert heard.computed == ["quantize", "evaluate", "ttt"]
    assert "over quant.size_limit_bytes" in heard.refusals[0]


def test_a_record_of_the_first_version_is_read_and_gives_nothing(config: RunConfig, base: Path, tmp_path: Path) -> None:
    since = ("surroundings", "identity", "inputs", "reused_from")
    for stage in STAGES:
        path = record_path(base, stage)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in since}))
    record = read_records(base)["quantize"]
    assert (record.identity, record.inputs, record.surroundings, record.reused_from) == (None, {}, {}, None)
    assert run(config, base)[1].computed == []  # it is gone on with
    assert run(config, tmp_path / "own", donors(base))[1].computed == list(STAGES)


@pytest.mark.parametrize(
    ("rank", "name", "what"),
    [
        (0, "code_hash", "other code"),
        (1, "code_hash", "other code"),
        (0, "config_hash", "another configuration"),
        (1, "config_hash", "another configuration"),
        (0, "data_hash", "other data"),  # which a node hashes once
    ],
)
def test_a_rank_that_is_not_as_the_driver_says_so_in_one_line(
    config: RunConfig, tmp_path: Path, rank: int, name: str, what: str
) -> None:
    with pytest.raises(OtherHashes) as caught:
        run(config, tmp_path, Orders(hashes={name: "e" * 64, "other": None}), dist=Dist(rank=rank))
    assert f"rank {rank} has {what} ({name} " in str(caught.value)
    assert "the driver's is eeeeeeeeeeee" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stages").exists()
    assert not (tmp_path / "run.json").exists()


def test_hashes_that_agree_or_are_not_known_pass(config: RunConfig, base: Path) -> None:
    known = json.loads((base / "run.json").read_text())
    for hashes in ({name: known[name] for name in ("code_hash", "config_hash", "data_hash")}, {"data_hash": None}):
        assert run(config, base, Orders(hashes=hashes))[1].computed == []
