"""Every formula agrees with published scripts (tests/golden*), and the parity command says so when one does not."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.gpt import GPT
from model.presets import published
from model.train import optim
from tests import parity
from tests.parity_core import GoldenSet, model_config, train_config

GOLDEN = Path(__file__).parent / "golden"
FRONTIER = Path(__file__).parent / "golden_frontier"
SET_OF = {parity_set.name: parity_set for parity_set in parity.SETS}
MAX_COPY_BYTES, MAX_FRONTIER_BYTES = 6_000_000, 3_000_000


def folder_of(name: str) -> Path:
    """Return the folder that has a set's files."""
    return FRONTIER if name.startswith("F") else GOLDEN


@pytest.mark.parametrize("name", SET_OF)
def test_a_set_agrees_with_the_published_figures(name: str) -> None:
    outcome = parity.run_set(SET_OF[name], folder_of(name))
    assert outcome.has_passed, (outcome.line(), outcome.failures)
    if name.startswith("F"):  # all have a tolerance, but for the batches that its script made
        assert set(outcome.not_compared) <= {"reference_batches"}


def test_the_sets_are_numbered_and_the_copies_are_small() -> None:
    numbers = [name.split()[0] for name in SET_OF]
    assert numbers[:10] == [str(number) for number in range(1, 11)]
    assert numbers[10:] == sorted(set(numbers[10:]) & {f"F{number}" for number in range(1, 7)})
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) <= MAX_COPY_BYTES
    assert sum(path.stat().st_size for path in FRONTIER.iterdir()) <= MAX_FRONTIER_BYTES
    for parity_set in parity.SETS:
        assert all((folder_of(parity_set.name) / file).is_file() for file in parity_set.files + parity_set.borrowed)


def test_the_published_preset_has_exactly_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = GPT(published().model)
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_944_537


def test_the_published_preset_has_the_published_settings() -> None:
    hyper = GoldenSet(GOLDEN, ("model_full_facts.json",)).read("hyperparameters")
    config = published()
    assert config.model == model_config(hyper)
    by_time = {"budget_s": hyper["max_wallclock_seconds"], "reserve_s": hyper["gptq_reserve_seconds"]}
    assert config.train == replace(train_config(hyper, **by_time), embedding_dtype="bfloat16")
    assert config.quant.num_calibration_batches == hyper["gptq_calibration_batches"]
    assert (config.quant.matrix_bits, config.quant.embedding_bits) == (hyper["matrix_bits"], hyper["embed_bits"])
    assert config.quant.matrix_clip_sigmas == hyper["matrix_clip_sigmas"]
    assert config.quant.embedding_clip_sigmas == hyper["embed_clip_sigmas"]
    ttt = config.ttt
    assert (ttt.lora_rank, ttt.lr, ttt.weight_decay) == (
        hyper["ttt_lora_rank"], hyper["ttt_lora_lr"], hyper["ttt_weight_decay"],
    )  # fmt: skip
    assert (ttt.chunk_tokens, ttt.window_tokens) == (hyper["ttt_chunk_size"], hyper["ttt_eval_seq_len"])
    assert (ttt.batch_documents, ttt.updates_per_chunk) == (hyper["ttt_batch_size"], hyper["ttt_grad_steps"])


def test_the_initial_random_weights_have_the_published_statistics() -> None:
    facts = GoldenSet(GOLDEN, ("model_full_facts.json",)).content["model_full_facts.json"]
    model = GPT(published().model)
    model.init_weights(seed=0)
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "tok_emb.weight"):
        ours, theirs = model.get_parameter(name).detach(), facts["init"][name]
        assert float(ours.std()) == pytest.approx(theirs["std"], rel=2e-3), name
        assert abs(float(ours.mean())) < 1e-4, name
    q = model.qo_bank.detach()[0]
    assert float((q @ q.T - torch.eye(q.size(0))).abs().max()) < 2 * facts["init_facts"]["q_orthonormal_err"]


def test_a_changed_figure_fails_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = GOLDEN / "newton_schulz.npz"
    shutil.copy(GOLDEN / "muon.npz", tmp_path)
    with np.load(source) as archive:
        arrays = {key: archive[key] for key in archive.files}
    arrays["out_2d"] = arrays["out_2d"] + np.float32(0.5)
    np.savez(tmp_path / source.name, **arrays)
    assert parity.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[: len(SET_OF)]] == [name.split()[:2] for name in SET_OF]
    assert any(line.startswith("4 muon") and "FAIL" in line and "newton_schulz:out_2d" in line for line in lines)
    assert any(line.startswith("6 packing") and "missing cu_seqlens.json" in line for line in lines)
    assert lines[-1] == f"0 of 1 sets pass, {len(SET_OF) - 1} missing"


@pytest.mark.parametrize("file", ["polar_express.npz", "bpb_luts.npz"])
def test_sets_that_are_not_there_are_named_and_do_not_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    shutil.copy((FRONTIER if file.startswith("polar") else GOLDEN) / file, tmp_path)
    assert parity.main([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[: len(SET_OF)]
    assert [line.split()[:2] for line in lines] == [name.split()[:2] for name in SET_OF]
    assert [" pass " in line for line in lines] == [file in parity_set.files for parity_set in parity.SETS]
    assert sum("missing " in line for line in lines) == len(SET_OF) - 1
    assert not any("FAIL" in line for line in lines)


def test_a_folder_without_any_set_fails_every_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(" FAIL  missing " in line for line in lines[: len(SET_OF)])
    assert lines[-1] == f"0 of {len(SET_OF)} sets pass"


def test_a_set_that_lacks_one_of_its_files_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(GOLDEN / "newton_schulz.npz", tmp_path)
    assert parity.main([str(tmp_path)]) == 1
    assert any("4 muon" in line and "FAIL  FileNotFoundError: missing muon.npz" in line
               for line in capsys.readouterr().out.splitlines())  # fmt: skip


def test_another_round_of_polar_express_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = optim.COEFFICIENTS["polar_express"]
    monkeypatch.setitem(optim.COEFFICIENTS, "polar_express", rounds[:4] + rounds[3:4])
    outcome = parity.run_set(SET_OF["F4 polar express"], FRONTIER)
    assert {"coefficients", "out64_0", "p1_after1_f32"} <= {item.key for item in outcome.failures}


def test_unstated_and_unknown_keys_are_listed_as_not_compared(tmp_path: Path) -> None:
    source = GOLDEN / "bpb_luts.npz"
    with np.load(source) as archive:
        np.savez(tmp_path / source.name, **{key: archive[key] for key in archive.files}, surprise=np.zeros(3))
    outcome = parity.run_set(SET_OF["1 bytes"], tmp_path)
    assert outcome.has_passed
    assert outcome.not_compared == ("surprise",)


def test_a_folder_that_is_not_there_is_bad_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main([str(tmp_path / "nowhere")]) == 2
    assert "is not a folder" in capsys.readouterr().err
