"""model/pipeline/finished: stages that another run has finished are taken over, to the bit, or computed and said so."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.audit.files import probe_records
from model.audit.finished_run import load_run
from model.audit.records import probe_separation, probe_size
from model.bundle.program import PACKED_NAME, READABLE_NAME, Program, settings_of
from model.config import RunConfig
from model.controls.self_test import make_corpus, micro_config
from model.data.shards import list_shards
from model.distributed import Dist
from model.files import linked
from model.files.atomic import file_sha256, replace_file, writing_aside_in
from model.files.linked import share_file
from model.pipeline import finished, stage_quantize
from model.pipeline import seed as pipeline
from model.pipeline.inputs import ADAPTED, ARTIFACT, EVALUATED, STEPS, WEIGHTS
from model.pipeline.records import StageRecord, read_records, record_path
from model.pipeline.run import NO_ORDERS, Donor, Orders, Run
from model.pipeline.seed import OtherHashes, SeedResult, run_seed
from model.pipeline.stage_quantize import write_program
from model.report import STAGES

OUTPUTS = {"train": (WEIGHTS, STEPS), "quantize": (ARTIFACT,), "evaluate": (EVALUATED,), "ttt": (ADAPTED,)}
NOT_REPEATABLE = ("_s", "tokens_per_s", "peak_memory_bytes")


class Killed(BaseException):
    """What a test raises in place of a signal."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return variant(micro_config(make_corpus(tmp_path_factory.mktemp("data") / "corpus")), "train", max_steps=3)


def variant(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def donor(workdir: Path) -> Donor:
    return Donor(workdir.name, lambda name: (workdir / name).read_bytes(), workdir)


def donors(workdir: Path, *stages: str) -> Orders:
    return Orders(donors={stage: donor(workdir) for stage in stages or STAGES})


class Heard:
    """Listens to a run: the stages that it computed, and what it noted."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.notes: list[str] = []

    def __call__(self, phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        """Hear one report."""
        if (step, total) == (0, None) and phase in STAGES and phase not in self.computed:
            self.computed.append(phase)
        if "note" in metrics:
            self.notes.append(str(metrics["note"]))

    @property
    def refusals(self) -> list[str]:
        """What was not taken over, and why."""
        return [note for note in self.notes if "is not taken over" in note]


def run(config: RunConfig, workdir: Path, orders: Orders = NO_ORDERS, **options: Any) -> tuple[SeedResult, Heard]:
    heard = Heard()
    return run_seed(config, options.pop("dist", Dist.single()), workdir, heard, orders=orders, **options), heard


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


def hashes_of(workdir: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the sha256 of every output but those with timings in them."""
    outputs = {name: o.sha256 for record in read_records(workdir).values() for name, o in record.outputs.items()}
    return {name: sha256 for name, sha256 in outputs.items() if not name.startswith("ledger/") and name not in but}


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


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each stage write what its settings decide, and the program one of its settings."""

    def program_of(config: RunConfig) -> Program:
        return Program(f"program of {config.ttt.lr}", str(config.ttt.lr).encode())

    def stub(stage: str) -> Callable[[Run, Any], tuple[dict[str, Any], list[str]]]:
        def run_stage(run: Run, _ledger: Any) -> tuple[dict[str, Any], list[str]]:
            names = list(OUTPUTS[stage])
            for name in names:
                with replace_file(run.workdir / name) as file:
                    file.write(f"{name} of {run.config.train.max_steps} {run.config.quant.matrix_bits}".encode())
            metrics: dict[str, Any] = {f"{stage}_s": 1.0, f"{stage}_attention_backend": "sdpa"}
            if stage == "quantize":
                program = program_of(run.config)
                metrics |= {"model_bytes": 1, "code_bytes": program.num_bytes}
                names += write_program(program, run.workdir)
            return metrics, names

        return run_stage

    for stage in STAGES:
        monkeypatch.setitem(pipeline.RUN_STAGE, stage, stub(stage))
    monkeypatch.setattr(finished, "code_program", program_of)


@pytest.fixture
def base(config: RunConfig, stubs: None, tmp_path: Path) -> Path:
    run(config, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def slow(config: RunConfig) -> RunConfig:
    return variant(config, "ttt", lr=1e-3)


def edit_record(workdir: Path, stage: str, **changes: Any) -> None:
    path = record_path(workdir, stage)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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


def killed_at(name: str) -> Callable[[Path], None]:
    """Return an on_write that ends the process when this file has been written."""

    def on_write(path: Path) -> None:
        if path.as_posix().endswith(f"/{name}"):
            raise Killed

    return on_write


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


def test_what_was_taken_over_is_given_on_under_the_name_of_the_run_that_computed_it(
    config: RunConfig, base: Path, tmp_path: Path
) -> None:
    run(config, tmp_path / "second", donors(base))
    run(config, tmp_path / "third", donors(tmp_path / "second"))
    assert {record.reused_from for record in read_records(tmp_path / "third").values()} == {"base"}


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


# ---- records and hashes ----------------------------------------------------------------------------------------------


def test_a_record_of_the_first_version_is_read_and_gives_nothing(config: RunConfig, base: Path, tmp_path: Path) -> None:
    since = ("surroundings", "identity", "inputs", "reused_from")
    for stage in STAGES:
        path = record_path(base, stage)
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in since}))
    record = read_records(base)["quantize"]
    assert (record.identity, record.inputs, record.surroundings, record.reused_from) == (None, {}, {}, None)
    assert run(config, base)[1].computed == []  # it is gone on with
    assert run(config, tmp_path / "own", donors(base))[1].computed == list(STAGES)


def test_a_record_comes_back_as_it_was_written(base: Path) -> None:
    for stage, record in read_records(base).items():
        plain = json.loads(record_path(base, stage).read_text())
        assert record.to_json() == {**plain, "outputs": {k: dict(v) for k, v in plain["outputs"].items()}}
        assert isinstance(record, StageRecord)
        assert set(record.outputs) >= set(OUTPUTS[stage])


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
