"""Evaluation and adaptation on CUDA: kernels against PyTorch, recordings and bf16 against single float32 passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.banks import split_banks
from model.config import EvalConfig, TTTConfig
from model.data.shards import BOS_ID, find_documents
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT
from model.kernels.adapter_update import AdamSettings, adam_rows_, gather_rows, scale_rows
from model.kernels.graphs import Recorder
from model.presets import published
from model.quant.sensitivity import LossProbe
from model.score.plain import RowScorer, row_bounds, score_rows
from model.ttt.document_pass import DocumentPass
from model.ttt.documents import make_slots
from model.ttt.recorded_pass import RecordedPass, RecordedStep
from model.ttt.slots import Slots
from tests.micro_model import ignore, micro_loader

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CONFIG = replace(published().ttt, batch_documents=16)
BY_LENGTH = replace(CONFIG, lora_alpha=144.0, chunk_tokens=48, chunk_by_length=((100, 8), (700, 24)))


def full_model(dtype: torch.dtype) -> GPT:
    """The published model with random weights, none of them zero."""
    model = GPT(published().model, compute_dtype=dtype)
    model.init_weights(3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for bank in (model.qo_bank[model.config.num_layers :], model.mlp_down_bank):
            bank.copy_(0.02 * torch.randn(bank.shape, generator=generator))
        model.q_gain.fill_(1.5)
    return model.to(CUDA).requires_grad_(False)


def documents(*lengths: int) -> ValidationSet:
    """Random documents of a small vocabulary, so that adaptation has something to learn."""
    rng = np.random.default_rng(6)
    tokens = np.concatenate([np.append(BOS_ID, rng.integers(4, 60, n - 1)) for n in lengths]).astype(np.uint16)
    return ValidationSet(tokens, find_documents(tokens))


def adapt(kind: type[DocumentPass], model: GPT, validation: ValidationSet, config: TTTConfig = CONFIG) -> np.ndarray:
    """Return the nll (N,) of every target."""
    work = kind(model, validation, config, ignore, label="gpu")
    everyone = range(validation.num_documents)
    spare = Slots(model, config, 1, validation.num_documents)
    work.run_adapted(everyone, make_slots(model, config, everyone, seed=1) if kind is RecordedPass else spare)
    if isinstance(work.learning, RecordedStep):
        assert work.learning.recorded
        assert not work.learning.recorder.failed
    return np.asarray(work.nll.cpu().numpy())


def test_the_kernels_gather_and_step_as_plain_pytorch_does() -> None:
    torch.manual_seed(0)
    size, index = 100_003, torch.tensor([4, 1, 2])
    values, moments = torch.randn(5, size), 1e-4 * torch.rand(5, size)
    gradients = (0.01 * torch.randn(3, size)).bfloat16()
    correction = 1 - 0.999 ** torch.tensor([1.0, 2.0, 9.0])
    settings = AdamSettings(1e-4, 0.5, 0.999, 1e-10)
    ours, sums, at, steps, factors = (x.to(CUDA) for x in (values, moments, index, gradients, correction))
    for factor in (1.0, 1.3):
        gathered = gather_rows(ours, at, torch.bfloat16, factor).cpu()
        assert torch.equal(gathered, gather_rows(values, index, torch.bfloat16, factor))
        adam_rows_(values, moments, index, gradients, correction, settings, factor)
        adam_rows_(ours, sums, at, steps, factors, settings, factor)
    assert torch.allclose(ours.cpu(), values, rtol=1e-6, atol=1e-8)
    assert torch.allclose(sums.cpu(), moments, rtol=1e-6, atol=1e-12)


def test_the_kernel_scales_as_float32_does() -> None:
    """A part of longer rows, as adapters lie there, into a tensor of its own and where it stands."""
    torch.manual_seed(0)
    rows, scale = torch.randn(3, 200_003, device=CUDA).bfloat16(), 1 + 0.3 * torch.randn(17, 40, device=CUDA)
    part, kept = rows[:, 1008 : 1008 + 17 * 40 * 96].view(3, 17, 40, 96), rows.clone()
    wanted = (part.float() * scale.unsqueeze(-1)).bfloat16()
    assert torch.equal(scale_rows(part, scale), wanted)
    assert torch.equal(rows, kept)
    scale_rows(part, scale, out=part)
    assert torch.equal(part, wanted)
    assert torch.equal(rows[:, :1008], kept[:, :1008])
    assert torch.equal(rows[:, 1008 + 17 * 40 * 96 :], kept[:, 1008 + 17 * 40 * 96 :])


def test_a_recorded_step_does_what_single_operations_do() -> None:
    model, validation = full_model(torch.bfloat16), documents(700, 700, 700)
    found = []
    for is_recorded in (False, True):
        slots = Slots(model, CONFIG, 1, 3, num_spare=1)
        for slot in range(3):
            slots.reset(slot, slot)
        start = slots.values[:3].cpu()
        recorder = RecordedStep(model, validation.tokens, CONFIG, slots, is_looped=True)
        if is_recorded:
            recorder.prepare(4, 256)
        losses = []
        for chunk in range(3):
            ends = [int(start) + 256 + 64 * chunk for start, _ in validation.document_ranges]
            table = torch.tensor([*((end, slot, 256, 64) for slot, end in enumerate(ends)), (256, 3, 256, 64)])
            run = recorder.run(table, 256) if is_recorded else recorder.score_and_learn(table.to(CUDA), 256)
            losses.append(run[:3].clone())
        assert len(recorder.recorded) == is_recorded
        found.append((torch.stack(losses).cpu(), slots.values[:3].cpu(), slots.num_updates[:3].tolist()))
    (single, values, counts), (recorded, recorded_values, recorded_counts) = found
    assert counts == recorded_counts == [3, 3, 3]
    assert torch.isfinite(recorded).all()
    assert float((single - recorded).abs().max()) < 0.02  # other backends' backward adds in any order
    assert float((values - recorded_values).norm()) < 0.1 * float((values - start).norm())


def test_recorded_rows_score_what_single_passes_do() -> None:
    model, validation = full_model(torch.bfloat16), documents(*(300 + 7 * n for n in range(30)))
    config = EvalConfig(row_tokens=1024, seq_len=256)
    alone = []
    for start, end in row_bounds(validation.num_targets, config):
        part = ValidationSet(validation.tokens[start : end + 1], find_documents(validation.tokens[start : end + 1]))
        alone.append(score_rows(model, part, config, Dist.single(CUDA), ignore))  # one row is never recorded
    scorer = RowScorer(model)
    for num_sizes in (1, 2):  # the last row, a shorter one, comes once a pass
        scored = score_rows(model, validation, config, Dist.single(CUDA), ignore, scorer=scorer)
        assert len(scorer.recorded) == num_sizes
        assert np.isfinite(scored).all()
        assert np.abs(scored - np.concatenate(alone)).max() < 1e-3
        assert scored.std() > 0.01


@pytest.mark.parametrize("documents", ["masked", "unmasked"])
def test_what_rounding_costs_is_the_same_with_and_without_recordings(tmp_path: Path, documents: str) -> None:
    model, found = full_model(torch.bfloat16), []
    config = replace(published().quant, calibration_documents=documents, calibration_windows=8, calibration_seq_len=256)
    matrices = split_banks({name: parameter.data for name, parameter in model.named_parameters()})
    chosen = sorted(name for name, matrix in matrices.items() if matrix.ndim == 2)[:3]
    changes = {name: 0.02 * torch.randn_like(matrices[name]) for name in chosen}
    for is_recorded in (True, False):
        probe = LossProbe(model, micro_loader(tmp_path), config, seed=3)
        if not is_recorded:
            probe._seen = Never()
        found.append(probe.measure_rises({name: [name] for name in chosen}, changes))
        assert bool(probe._recorder.recorded) == is_recorded
        assert not probe._recorder.failed
    assert found[0] == found[1]
    assert len(set(found[0].values())) == len(chosen)


class Never(set[tuple[object, ...]]):
    """Nothing was seen before."""

    def __contains__(self, _: object) -> bool:
        return False


def test_sdpa_scores_rows_without_recording_them() -> None:
    validation, config = documents(*(300 + 7 * n for n in range(9))), EvalConfig(row_tokens=1024, seq_len=256)
    found = []
    for backend in ("auto", "sdpa"):
        model = full_model(torch.bfloat16)
        model.attention_backend = backend
        scorer = RowScorer(model)
        found.append(score_rows(model, validation, config, Dist.single(CUDA), ignore, scorer=scorer))
        assert bool(scorer.recorded) == (backend == "auto")
        assert not scorer.recorder.failed
    assert np.isfinite(found[1]).all()
    assert abs(float((found[0] - found[1]).mean())) < 0.01


def test_work_that_waits_for_the_host_runs_unrecorded_and_leaves_the_gpu_sane() -> None:
    recorder, x = Recorder(), torch.ones(1 << 20, device=CUDA)

    def waits(x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * float(x[:4].sum().item())

    waits(x)
    torch.cuda.empty_cache()
    reserved = torch.cuda.memory_reserved()
    for _ in range(2):
        assert torch.equal(recorder.run("bad", waits, x, device=CUDA), 8 * x)
    assert recorder.failed == {"bad"}
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved + (4 << 20)
    for number in (1, 2, 3):  # recording still works, and so do random numbers
        assert torch.equal(recorder.run("good", lambda x: 2 * x, number * x, device=CUDA), 2 * number * x)
    assert set(recorder.recorded) == {"good"}
    assert torch.isfinite(torch.rand(4, device=CUDA)).all()


@pytest.mark.parametrize("config", [CONFIG, BY_LENGTH], ids=["published", "by_length"])
def test_bf16_graphs_agree_with_float32_steps(config: TTTConfig) -> None:
    validation = documents(400, 90, 2300, 30, 641, 5)
    plain = adapt(DocumentPass, full_model(torch.float32), validation, config)
    fast = adapt(RecordedPass, full_model(torch.bfloat16), validation, config)
    assert np.isfinite(fast).all()
    ranges = validation.document_ranges
    gaps = [abs(float((fast - plain)[start : end - 1].mean())) for start, end in ranges if end - start > 64]
    assert max(gaps) < 0.02


def test_two_passes_agree_to_the_bit() -> None:
    model, validation = full_model(torch.bfloat16), documents(400, 90, 2300, 2900, 641, 5, 2300)
    first, second = (adapt(RecordedPass, model, validation) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.std() > 0.01
