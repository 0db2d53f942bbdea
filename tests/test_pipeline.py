"""model/pipeline: a whole micro seed, killed, continued, tampered with, and refused where need be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from model.bundle.program import code_program
from model.config import DataConfig, RunConfig, RuntimeConfig
from model.corpus.shard_file import write_shard
from model.corpus.vocabulary import train_vocabulary
from model.data.tokenizer import load_tokenizer
from model.distributed import Dist
from model.files.tensors import load_tensors
from model.pipeline import seed as pipeline
from model.pipeline import stage_quantize
from model.pipeline.records import read_records
from model.pipeline.seed import RunMismatch, SeedResult, run_seed
from model.quant import artifact
from model.quant.artifact import load_artifact, read_artifact_info, save_artifact
from model.quant.quantized import dequantize
from model.quant.rounded import META_ROOM_BYTES
from model.report import STAGES, Interrupted
from model.score.bpb import bits_per_byte
from tests.micro_model import ignore, micro_model, micro_run, micro_train, micro_ttt

TEXT = """ash birch cedar elm fir hazel larch maple oak pine rowan spruce willow yew walks under over near beyond
the a quiet green tall old river meadow hill. Then, slowly, it rains; birds return."""
NUM_STEPS = 4
NOT_REPEATABLE = ("_s", "tokens_per_s", "peak_memory_bytes", "num_resumes", "resumed_at_steps", "lost_steps")


class Killed(BaseException):
    """What a test raises in place of a signal."""


class Corpus(NamedTuple):
    """A small corpus on disk."""

    config: RunConfig
    texts: list[str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    texts = [" ".join(rng.choice(TEXT.split(), size=int(rng.integers(5, 25)))) for _ in range(80)]
    path = folder / "trees.model"
    path.write_bytes(train_vocabulary(texts, vocab_size=310))
    tokenizer = load_tokenizer(path)
    write_shard(folder / "trees_val_000000.bin", np.concatenate(tokenizer.encode_documents(texts[:5])))
    write_shard(folder / "trees_train_000000.bin", np.concatenate(tokenizer.encode_documents(texts[5:])))
    data = DataConfig(train=str(folder / "trees_train_*.bin"), val=str(folder / "trees_val_*.bin"), tokenizer=str(path))
    config = micro_run(
        model=micro_model(vocab_size=tokenizer.vocab_size, num_layers=3, xsa_last_n=3, parallel_start_layer=2),
        train=micro_train(max_steps=NUM_STEPS),
        ttt=micro_ttt(chunk_tokens=16, window_tokens=32, batch_documents=2),
        data=data,
        runtime=RuntimeConfig(device="cpu", checkpoint_every_s=1e-9, report_every_s=0.0),  # one every step
    )
    return Corpus(config, texts[:5])


def run(config: RunConfig, workdir: Path, **options: Any) -> SeedResult:
    return run_seed(config, Dist.single(), workdir, options.pop("report", ignore), **options)


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> SeedResult:
    return run(corpus.config, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def copy(finished: SeedResult, tmp_path: Path) -> Path:
    """Return a copy of the finished run directory that a test may change."""
    shutil.copytree(finished.workdir, tmp_path / "run")
    return tmp_path / "run"


def repeatable(result: SeedResult) -> dict[str, Any]:
    return {name: value for name, value in result.metrics.items() if not name.endswith(NOT_REPEATABLE)}


def stages_heard(config: RunConfig, workdir: Path, **options: Any) -> list[str]:
    """Run and return which stages were run."""
    heard: list[str] = []

    def report(phase: str, step: int, total: int | None, _metrics: dict[str, Any]) -> None:
        if (step, total) == (0, None) and phase in STAGES and phase not in heard:
            heard.append(phase)

    run(config, workdir, report=report, **options)
    return heard


# ---- what a seed leaves ----------------------------------------------------------------------------------------------


def test_a_seed_goes_through_every_stage_and_leaves_its_figures(finished: SeedResult) -> None:
    records = read_records(finished.workdir)
    assert tuple(records) == STAGES
    for prefix in ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt"):
        figures = {name: finished.metrics[f"{prefix}_{name}"] for name in ("nats", "tokens", "bytes", "bpb", "s")}
        assert figures["bpb"] == bits_per_byte(figures["nats"], figures["bytes"])
    for prefix in ("tokens", "bytes"):
        counts = {finished.metrics[f"{p}_{prefix}"] for p in ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt")}
        assert len(counts) == 1, prefix  # the same targets every time
    wanted = {
        "steps", "train_s", "train_tokens", "tokens_per_s", "train_loss_last", "warmup_s", "num_resumes",
        "resumed_at_steps", "lost_steps", "attention_backend", "peak_memory_bytes", "quantize_s", "hessian_s",
        "solve_s", "compress_s", "model_bytes", "code_bytes", "artifact_bytes", "code_bytes_convention",
        "within_limit", "matrix_clip_sigmas", "evaluate_s", "order0_bpb", "ttt_s",
    }  # fmt: skip
    assert wanted <= set(finished.metrics)
    assert finished.metrics["artifact_bytes"] == finished.metrics["model_bytes"] + finished.metrics["code_bytes"]
    assert finished.metrics["model_bytes"] == (finished.workdir / "model.ssq").stat().st_size


def test_bytes_are_those_of_the_decoded_text(corpus: Corpus, finished: SeedResult) -> None:
    assert finished.metrics["pre_ttt_bytes"] == sum(len(text.encode()) for text in corpus.texts)
    assert finished.metrics["val_bytes"] == finished.metrics["pre_ttt_bytes"]
    assert finished.metrics["val_documents"] == 5


def test_document_rows_add_up_to_the_totals(finished: SeedResult) -> None:
    with np.load(finished.workdir / "evaluate.npz") as plain, np.load(finished.workdir / "ttt.npz") as adapted:
        assert plain["index"].tolist() == list(range(5))
        for name in ("index", "tokens", "bytes"):
            assert np.array_equal(plain[name], adapted[name])
        for column, prefix in (
            (plain["nats_plain"], "pre_ttt"),
            (adapted["nats_lr0"], "ttt_lr0"),
            (adapted["nats_ttt"], "post_ttt"),
        ):
            assert float(column.sum()) == pytest.approx(finished.metrics[f"{prefix}_nats"], rel=1e-12)
        assert int(plain["bytes"].sum()) == finished.metrics["pre_ttt_bytes"]


def test_records_hold_the_size_and_sha256_of_every_output(finished: SeedResult) -> None:
    from model.files.atomic import file_sha256

    outputs = {
        name: facts for record in read_records(finished.workdir).values() for name, facts in record.outputs.items()
    }
    assert {"train.safetensors", "steps.npz", "model.ssq", "evaluate.npz", "ttt.npz", "ledger/ttt.json"} <= set(outputs)
    for name, facts in outputs.items():
        path = finished.workdir / name
        assert facts == (path.stat().st_size, file_sha256(path))


def test_the_artifact_reloads_to_the_weights_that_were_scored(corpus: Corpus, finished: SeedResult) -> None:
    config, state = load_artifact(finished.workdir / "model.ssq")
    assert config == corpus.config.model
    assert len(state.matrices) == 6 * 3 + 1
    loaded, trained = dequantize(state), load_tensors(finished.workdir / "train.safetensors")
    for name, value in loaded.items():
        error = (value - trained[f"ema/{name}"]).norm() / trained[f"ema/{name}"].norm()
        assert float(error) < 0.25, name  # six bits at 12.85 sigmas: 0.12 by plain rounding


def test_the_artifact_is_unpacked_once(
    corpus: Corpus, finished: SeedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[str] = []
    unpack = artifact._unpack_state
    monkeypatch.setattr(artifact, "_unpack_state", lambda *given: unpacked.append("") or unpack(*given))
    result = run(corpus.config, tmp_path)
    assert repeatable(result) == repeatable(finished)
    assert len(unpacked) == 1
    (tmp_path / "stages/ttt.json").unlink()
    assert repeatable(run(corpus.config, tmp_path)) == repeatable(finished)
    assert len(unpacked) == 2  # a stage that goes on alone unpacks for itself


def test_what_is_scored_is_what_the_file_holds_at_that_time(
    corpus: Corpus, finished: SeedResult, tmp_path: Path
) -> None:
    path = tmp_path / "model.ssq"

    def report(phase: str, _step: int, total: int | None, _metrics: dict[str, Any]) -> None:
        if phase == "evaluate" and total is None and not (tmp_path / "changed").exists():
            config, state = load_artifact(path)
            louder = {name: w._replace(scales=w.scales * 1.5) for name, w in state.matrices.items()}
            save_artifact(path, replace(state, matrices=louder), config, {})
            (tmp_path / "changed").touch()

    changed = run(corpus.config, tmp_path, report=report)
    for prefix in ("pre_ttt", "ttt_lr0", "post_ttt"):
        assert changed.metrics[f"{prefix}_nats"] != finished.metrics[f"{prefix}_nats"]
    assert changed.metrics["live_nats"] == finished.metrics["live_nats"]


def test_no_checkpoint_and_no_half_written_file_stays(finished: SeedResult) -> None:
    assert list(finished.workdir.glob("checkpoints/*")) == []
    assert list(finished.workdir.rglob("*.tmp")) == []


# ---- reproducibility -------------------------------------------------------------------------------------------------


def test_the_same_seed_is_bit_identical_and_another_is_not(
    corpus: Corpus, finished: SeedResult, tmp_path: Path
) -> None:
    again = run(corpus.config, tmp_path / "again")
    other = run(replace(corpus.config, seed=0), tmp_path / "other")
    assert repeatable(again) == repeatable(finished)
    assert (again.workdir / "train.safetensors").read_bytes() == (finished.workdir / "train.safetensors").read_bytes()
    assert (other.workdir / "train.safetensors").read_bytes() != (finished.workdir / "train.safetensors").read_bytes()
    for name in ("live_nats", "pre_ttt_nats", "post_ttt_nats"):
        assert other.metrics[name] != finished.metrics[name]


def kill_when_written(name: str) -> Callable[[Path], None]:
    def on_write(path: Path) -> None:
        if path.name == name:
            raise Killed

    return on_write


def kill_after_stage(stage: str) -> Callable[[Path], None]:
    def on_write(path: Path) -> None:
        if path.parts[-2:] == ("stages", f"{stage}.json"):
            raise Killed

    return on_write


def test_killed_after_every_stage_it_ends_in_the_same_figures(
    corpus: Corpus, finished: SeedResult, tmp_path: Path
) -> None:
    for stage in STAGES:
        with pytest.raises(Killed):
            run(corpus.config, tmp_path, on_write=kill_after_stage(stage))
        assert tuple(read_records(tmp_path)) == STAGES[: STAGES.index(stage) + 1]
    assert repeatable(run(corpus.config, tmp_path)) == repeatable(finished)


def test_killed_in_training_it_goes_on_from_the_checkpoint(
    corpus: Corpus, finished: SeedResult, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(corpus.config, tmp_path, on_write=kill_when_written("step-0000003.json"))
    result = run(corpus.config, tmp_path)
    assert repeatable(result) == repeatable(finished)
    assert (result.metrics["num_resumes"], result.metrics["resumed_at_steps"]) == (1, [3])
    assert result.metrics["lost_steps"] == 0


def test_told_to_stop_it_leaves_a_checkpoint_and_goes_on(corpus: Corpus, finished: SeedResult, tmp_path: Path) -> None:
    asked = iter(range(100))
    with pytest.raises(Interrupted):
        run(corpus.config, tmp_path, should_stop=lambda: next(asked) >= 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("*.json"))[-1] == "step-0000002.json"
    result = run(corpus.config, tmp_path)
    assert repeatable(result) == repeatable(finished)
    assert result.metrics["resumed_at_steps"] == [2]


def test_restarted_from_scratch_it_neither_reads_nor_writes_checkpoints(
    corpus: Corpus, finished: SeedResult, tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(corpus.config, tmp_path, on_write=kill_when_written("step-0000002.json"))
    written: list[str] = []
    result = run(corpus.config, tmp_path, restart="scratch", on_write=lambda path: written.append(path.name))
    assert not [name for name in written if name.startswith("step-")]
    assert result.metrics["resumed_at_steps"] == []
    assert result.metrics["lost_steps"] == 2
    assert repeatable(result) == repeatable(finished)


# ---- called again ----------------------------------------------------------------------------------------------------


def test_called_again_on_a_finished_directory_it_does_nothing(corpus: Corpus, finished: SeedResult) -> None:
    before = {
        path: path.read_bytes()
        for path in finished.workdir.rglob("*")
        if path.is_file() and path.parent.name != "ledger"
    }
    assert stages_heard(corpus.config, finished.workdir) == []
    assert run(corpus.config, finished.workdir).metrics == finished.metrics
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("name", "redone"),
    [
        ("train.safetensors", STAGES),
        ("model.ssq", STAGES[1:]),
        ("evaluate.npz", STAGES[2:3]),  # which nothing builds on
        ("ttt.npz", STAGES[3:]),
        ("stages/ttt.json", STAGES[3:]),
    ],
)
@pytest.mark.parametrize("damage", ["altered", "removed"])
def test_an_altered_or_missing_output_is_made_again_with_all_that_follows(
    corpus: Corpus, copy: Path, monkeypatch: pytest.MonkeyPatch, name: str, redone: tuple[str, ...], damage: str
) -> None:
    done: list[str] = []
    for stage in STAGES:  # what the stages do is tested above; here only which of them are called

        def note(_run: Any, _ledger: Any, stage: str = stage) -> tuple[dict[str, Any], list[str]]:
            done.append(stage)
            return {}, []

        monkeypatch.setitem(pipeline.RUN_STAGE, stage, note)
    path = copy / name
    if damage == "removed":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    notes: list[str] = []
    run(corpus.config, copy, report=lambda _p, _s, _t, metrics: notes.append(str(metrics.get("note", ""))))
    assert tuple(done) == tuple(redone)
    if not (damage == "removed" and name.startswith("stages/")):
        assert any(f"stage {redone[0]} is done again" in note for note in notes)


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusal(config: RunConfig, workdir: Path, **options: Any) -> str:
    with pytest.raises(RunMismatch) as caught:
        run(config, workdir, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_configuration_seed_or_data_is_refused(corpus: Corpus, finished: SeedResult) -> None:
    base, workdir = corpus.config, finished.workdir
    longer = replace(base, train=replace(base.train, max_steps=NUM_STEPS + 1))
    told = refusal(longer, workdir)
    assert "was made with another configuration (config_hash " in told
    assert f"train.max_steps {NUM_STEPS}, now {NUM_STEPS + 1}" in told
    fewer = replace(base, data=replace(base.data, val_documents=3))
    told = refusal(fewer, workdir)
    assert "was made with another data (data_hash " in told
    assert f"data.val_documents {base.data.val_documents}, now 3" in told
    assert "was made for seed 42, not 0" in refusal(replace(base, seed=0), workdir)


def test_other_code_is_refused_unless_allowed_and_then_marked(
    corpus: Corpus, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "code_hash", lambda: "c" * 64)
    assert "pass --allow-code-change" in refusal(corpus.config, copy)
    run(corpus.config, copy, allow_code_change=True)
    assert json.loads((copy / "run.json").read_text())["code_changed"] is True
    run(corpus.config, copy)  # the directory belongs to the new code now, and stays marked
    assert json.loads((copy / "run.json").read_text())["code_changed"] is True


def test_a_damaged_run_json_is_refused(corpus: Corpus, copy: Path) -> None:
    (copy / "run.json").write_text('{"seed": 42}')
    assert "is damaged" in refusal(corpus.config, copy)


def test_data_that_cannot_be_used_is_refused_before_any_work(corpus: Corpus, tmp_path: Path) -> None:
    missing = replace(corpus.config, data=replace(corpus.config.data, val=str(tmp_path / "no_val_*.bin")))
    with pytest.raises((ValueError, FileNotFoundError), match="no_val"):
        run(missing, tmp_path / "run")
    assert not (tmp_path / "run" / "stages").exists()
    smaller = replace(corpus.config, model=replace(corpus.config.model, vocab_size=200))
    with pytest.raises(ValueError, match="vocab_size=200"):
        run(smaller, tmp_path / "run")


# ---- the size limit --------------------------------------------------------------------------------------------------


def with_limit(config: RunConfig, limit: int, what: Literal["mark", "fail", "fit"]) -> RunConfig:
    return replace(config, quant=replace(config.quant, size_limit_bytes=limit, on_oversize=what))


@pytest.fixture(autouse=True)
def one_program(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the code of the fixture's config whatever the config: compressing it takes a second each time."""
    monkeypatch.setattr(stage_quantize, "code_program", lambda _config: code_program(corpus.config))


def quantized_only(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Run up to the end of quantization and return that stage's metrics."""
    with pytest.raises(Killed):
        run(config, workdir, on_write=kill_after_stage("quantize"))
    metrics: dict[str, Any] = dict(read_records(workdir)["quantize"].metrics)
    return metrics


def test_an_artifact_over_the_limit_is_marked_by_default(corpus: Corpus, finished: SeedResult, tmp_path: Path) -> None:
    assert finished.metrics["within_limit"] is True
    metrics = quantized_only(with_limit(corpus.config, 1000, "mark"), tmp_path)
    assert metrics["within_limit"] is False
    assert metrics["artifact_bytes"] > 1000


def test_an_artifact_over_the_limit_fails_the_seed_where_asked(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"artifact of seed 42 has \d+ bytes with code, over quant\.size_limit_bytes=1000"
    ):
        run(with_limit(corpus.config, 1000, "fail"), tmp_path)
    assert "quantize" not in read_records(tmp_path)


def test_an_artifact_is_made_to_fit_where_asked(corpus: Corpus, finished: SeedResult, tmp_path: Path) -> None:
    limit = finished.metrics["artifact_bytes"] + 100
    metrics = quantized_only(with_limit(corpus.config, limit, "fit"), tmp_path)
    assert metrics["within_limit"] is True
    assert limit - 250 - META_ROOM_BYTES <= metrics["artifact_bytes"] <= limit
    assert metrics["model_bytes"] == (tmp_path / "model.ssq").stat().st_size
    assert read_artifact_info(tmp_path / "model.ssq").header.meta["clip_sigmas"] == metrics["clip_sigmas"]
    assert metrics["clip_sigmas"].keys() == metrics["rounding_nats"].keys() == metrics["clip_sigmas_configured"].keys()
    assert metrics["clip_sigmas"] != metrics["clip_sigmas_configured"]
    assert metrics["fit_passes"] >= 2
    assert 0 < metrics["solve_s"] < metrics["solve_s"] + metrics["sensitivity_s"] < metrics["quantize_s"]
    assert "clip_sigmas" not in read_artifact_info(finished.workdir / "model.ssq").header.meta
    with pytest.raises(ValueError, match=r"quant\.size_limit_bytes=1000 cannot be met"):
        run(with_limit(corpus.config, 1000, "fit"), tmp_path / "impossible")
