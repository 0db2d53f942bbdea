"""model/train/optim.py: the mathematics of Muon and clipping; agreement with the record's figures is in test_parity."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from model.banks import optional_shapes, parameter_shapes
from model.distributed import Dist
from model.gpt import GPT
from model.presets import published
from model.train.gradients import clip_, collect_gradients
from model.train.optim import AdamW, Muon, Optimizers, muon_scale, muon_update, newton_schulz, split_parameters
from tests.gang_work import run_gang
from tests.micro_model import FRONTIER_PARTS, micro_model, micro_train, random_model


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 16), (3, 16, 8), (8, 8)])
def test_newton_schulz_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, ...]) -> None:
    G = randn(*shape)
    X = newton_schulz(G, steps=10, dtype=torch.float32)
    values = torch.linalg.svdvals(X)
    assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    inner = U.mT @ X @ Vh.mT  # diagonal if the singular vectors are the same
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-4)


@pytest.mark.parametrize("shape", [(3, 16, 32), (3, 32, 16)])
def test_polar_express_comes_nearer_to_one_in_five_rounds_and_keeps_directions(shape: tuple[int, ...]) -> None:
    U, _, Vh = torch.linalg.svd(randn(*shape), full_matrices=False)
    X = newton_schulz(U @ torch.diag(torch.logspace(-2, 0, 16)) @ Vh, dtype=torch.float32, coefficients="polar_express")
    values = torch.linalg.svdvals(X)
    assert float((values - 1).abs().max()) < 0.15
    inner = U.mT @ X @ Vh.mT
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), atol=1e-4)
    more = newton_schulz(X, steps=7, dtype=torch.float32, coefficients="polar_express")  # the last round is repeated
    assert float((torch.linalg.svdvals(more) - 1).abs().max()) < 0.15


def test_the_optimizer_uses_the_orthogonalization_of_its_settings() -> None:
    moved = {}
    for kind in ("newton_schulz", "polar_express"):
        bank = nn.Parameter(torch.zeros(3, 16, 8))
        bank.grad = randn(3, 16, 8)
        Muon({"bank": bank}, micro_train(orthogonalization=kind), Dist.single()).step(lr=1.0, momentum=0.0)
        update = muon_update(randn(3, 16, 8), torch.zeros(3, 16, 8), momentum=0.0, coefficients=kind)
        moved[kind] = bank.detach()
        assert torch.allclose(moved[kind], -(2**0.5) * update, atol=1e-6)
    assert float((moved["polar_express"] - moved["newton_schulz"]).abs().max()) > 0.02


def test_newton_schulz_ignores_scale_commutes_with_transposition_and_keeps_zero() -> None:
    G = randn(2, 8, 16)
    X = newton_schulz(G, dtype=torch.float32)
    assert torch.allclose(newton_schulz(1000 * G, dtype=torch.float32), X, atol=1e-4)
    assert torch.equal(newton_schulz(G.mT, dtype=torch.float32), X.mT)
    assert not newton_schulz(torch.zeros(2, 4, 3)).any()
    assert newton_schulz(G).dtype == torch.bfloat16


def test_the_first_update_has_unit_rows_orthogonalized_and_fills_the_buffer() -> None:
    grad, buffer = randn(3, 8, 16), torch.zeros(3, 8, 16)
    update = muon_update(grad, buffer, momentum=0.9)
    assert torch.equal(buffer, grad)
    rows = 1.9 * grad  # grad + 0.9 * buffer, then each row divided by its norm
    rows = rows / rows.norm(dim=-1, keepdim=True)
    assert torch.allclose(update, newton_schulz(rows, dtype=torch.float32), atol=1e-5)


def test_a_bank_moves_by_lr_times_scale_times_update_after_decay() -> None:
    config = micro_train(matrix_weight_decay=0.5)
    bank = nn.Parameter(randn(3, 16, 8))
    before, bank.grad = bank.detach().clone(), randn(3, 16, 8, seed=1)
    update = muon_update(bank.grad, torch.zeros(3, 16, 8), momentum=0.95)
    Muon({"bank": bank}, config, Dist.single()).step(lr=0.1, momentum=0.95)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 2**0.5 * update
    assert torch.allclose(bank.detach(), expected, atol=1e-6)
    assert (muon_scale(16, 8), muon_scale(8, 16)) == (2**0.5, 1.0)


@pytest.mark.parametrize("max_norm", [0.3, 1e6])
def test_clipping_scales_all_gradients_by_one_factor(max_norm: float) -> None:
    grads = [randn(4, 4), randn(7, seed=1), randn(seed=2)]
    before = [grad.clone() for grad in grads]
    norm = float(torch.cat([grad.flatten() for grad in before]).norm())
    assert float(clip_(grads, max_norm)) == pytest.approx(norm, rel=1e-6)
    factor = min(1.0, max_norm / (norm + 1e-6))
    for grad, old in zip(grads, before):
        assert torch.allclose(grad, factor * old, rtol=1e-6)


def test_a_parameter_that_nothing_used_gets_a_zero_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    used.sum().backward()  # type: ignore[no-untyped-call]
    assert [grad.tolist() for grad in collect_gradients([used, unused])] == [[1, 1, 1], [0, 0]]


def test_every_parameter_is_in_one_group() -> None:
    model = GPT(micro_model())
    banks, embedding, vectors = split_parameters(model)
    assert set(banks) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    assert embedding is model.tok_emb.weight
    assert set(vectors) == {
        "attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights", "skip_gates", "lane_merge",
    }  # fmt: skip


@pytest.mark.parametrize("part", FRONTIER_PARTS)
def test_every_parameter_of_every_setting_is_in_exactly_one_group_and_moves(part: str) -> None:
    model = random_model(micro_model(**FRONTIER_PARTS[part]))
    banks, _, vectors = split_parameters(model)
    names = [*banks, "tok_emb.weight", *vectors]
    assert sorted(names) == sorted(parameter_shapes(model.config))
    assert set(optional_shapes(model.config)) <= set(vectors)
    optimizers = Optimizers(model, micro_train(), Dist.single())
    stepped = [id(p) for group in optimizers.adamw.param_groups for p in group["params"]]
    stepped += [id(p) for p in optimizers.muon.banks.values()]
    assert sorted(stepped) == sorted(id(p) for p in model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizers.step(lr_factor=1.0, momentum=0.9)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_first_adamw_step_moves_by_the_learning_rate_and_decays() -> None:
    model, config = random_model(), micro_train()
    optimizers = Optimizers(model, config, Dist.single())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizers.step(lr_factor=0.25, momentum=0.9)
    for name, lr, decay in (("tok_emb.weight", 0.03, 0.095), ("q_gain", 0.02, 0.02), ("lane_merge", 0.02, 0.02)):
        expected = before[name] * (1 - 0.25 * lr * decay) - 0.25 * lr  # a first step of Adam is lr * sign(gradient)
        assert torch.allclose(model.get_parameter(name).detach(), expected, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    sizes = ((64, 33), (7,), ())
    ours, theirs = ([nn.Parameter(randn(*size).to(dtype)) for size in sizes] for _ in range(2))
    rates = [{"lr": 0.03, "weight_decay": 0.095}, {"lr": 0.02, "weight_decay": 0.0}]

    def groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": parameters[:1], **rates[0]}, {"params": parameters[1:], **rates[1]}]

    mine = AdamW(groups(ours), betas=(0.9, 0.95), eps=1e-8)
    torchs = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step in range(3):
        for optimizer, parameters in ((mine, ours), (torchs, theirs)):
            for index, parameter in enumerate(parameters):
                parameter.grad = randn(*parameter.shape, seed=10 * step + index).to(dtype)
            if step == 1:
                parameters[1].grad = None  # stays as it is, and does not count a step
            optimizer.param_groups[0]["lr"] = 0.03 * (3 - step)
            optimizer.step()
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two)
        assert mine.state[one].keys() == torchs.state[two].keys()
        assert all(torch.equal(mine.state[one][key], value) for key, value in torchs.state[two].items())
        assert all(mine.state[one][key].dtype == value.dtype for key, value in torchs.state[two].items())


def test_a_step_needs_nothing_of_pytorchs_compiler() -> None:
    code = """
import sys
import torch
from model.distributed import Dist
from model.train.optim import Optimizers
from tests.micro_model import micro_train, random_model
model = random_model()
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizers = Optimizers(model, micro_train(), Dist.single())
optimizers.step(lr_factor=1.0, momentum=0.9)
optimizers.state_dict()
sys.exit("torch._dynamo" in sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr


def test_a_restored_optimizer_goes_on_as_the_saved_one() -> None:
    def steps(optimizers: Optimizers, model: GPT, first: int) -> None:
        for step in range(first, first + 2):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = randn(*parameter.shape, seed=100 * step + index).to(parameter.dtype)
            optimizers.step(lr_factor=1.0, momentum=0.9)

    config = replace(micro_train(), newton_schulz_dtype="bfloat16", embedding_dtype="bfloat16")
    models = [random_model(seed=5) for _ in range(2)]
    for model in models:
        model.tok_emb.weight.data = model.tok_emb.weight.data.bfloat16()
    first, second = (Optimizers(model, config, Dist.single()) for model in models)
    steps(first, models[0], 0)
    saved = {name: value.clone() for name, value in first.state_dict().items()}
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(saved)
    steps(first, models[0], 2)
    steps(second, models[1], 2)
    for (name, one), two in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(one, two), name


def test_an_optimizer_can_be_saved_and_restored_before_its_first_step() -> None:
    saved = Optimizers(random_model(), micro_train(), Dist.single()).state_dict()
    assert not [name for name in saved if name.startswith("adamw/")]
    model = random_model()
    restored = Optimizers(model, micro_train(), Dist.single())
    restored.load_state_dict(saved)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    restored.step(lr_factor=1.0, momentum=0.9)
    assert restored.state_dict()["adamw/0/step"] == 1


def test_moments_have_the_types_of_the_record() -> None:
    model = random_model()
    model.tok_emb.weight.data = model.tok_emb.weight.data.bfloat16()
    optimizers = Optimizers(model, published().train, Dist.single())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(lr_factor=1.0, momentum=0.9)
    state = optimizers.state_dict()
    assert {state[f"muon/{name}"].dtype for name in optimizers.muon.buffers} == {torch.bfloat16}
    assert state["adamw/0/exp_avg"].dtype == torch.bfloat16
    assert state["adamw/1/exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_messages_that_fly_beside_the_work_change_no_bit(world_size: int, tmp_path: Path) -> None:
    ranks = run_gang(world_size, tmp_path, "optimizer")
    for dtype in ("float32", "bfloat16"):
        for rank in ranks:
            assert np.array_equal(rank[f"{dtype}/own"], rank[f"{dtype}/blocking"])
            assert np.array_equal(rank[f"{dtype}/own"], ranks[0][f"{dtype}/own"])
            assert rank[f"{dtype}/order"].tolist() == ranks[0][f"{dtype}/order"].tolist()
    steps = ranks[0]["float32/order"].reshape(3, -1)
    for step in steps:  # four banks, embedding and vectors start before the first update is gathered
        assert [name.split()[0] for name in step] == ["mean"] * 6 + ["gather"] * 4
    for place in range(4):  # waits in any order bring each rank its due
        mean = (world_size + 1) / 2
        for rank in ranks:
            assert rank[f"wait/mean {place}"] == mean
            assert rank[f"wait/share {place}"].tolist() == [mean]
            assert rank[f"wait/gather {place}"].tolist() == [float(other + 1) for other in range(world_size)]
