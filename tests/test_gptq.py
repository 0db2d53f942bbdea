"""GPTQ rounding: golden figures, properties that hold for any weights, whole models, and Hessians from hooks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model.banks import join_banks, parameter_shapes, split_banks, tensor_shapes
from model.config import QuantConfig
from model.gpt import GPT
from model.presets import tiny
from model.quant.hessians import HessianCollector
from model.quant.quantized import QuantizedState, QuantizedWeight, dequantize
from tests.rounding import quantize_state, quantize_weight, quantize_weights, round_to_nearest

GOLDEN = Path(__file__).parent / "golden" / "gptq.npz"
SETTINGS: dict[str, Any] = {"bits": 6, "clip_sigmas": 12.85, "damping_frac": 0.01, "block_columns": 128}


def random_problem(seed: int, num_rows: int, num_columns: int, *, num_dead: int = 0) -> tuple[Tensor, Tensor]:
    """Return a weight and the Hessian of correlated inputs, some of which are always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(num_columns, num_columns, generator=generator)
    x = torch.randn(4 * num_columns, num_columns, generator=generator) @ mix
    x[:, torch.randperm(num_columns, generator=generator)[:num_dead]] = 0
    weight = torch.randn(num_rows, num_columns, generator=generator)
    weight *= 0.02 * torch.rand(num_rows, 1, generator=generator) + 0.01
    return weight, x.T @ x


def output_error(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> float:
    """Return trace(E H E^T) in float64: the summed squared error of the layer's outputs."""
    error = (weight - quantized.dequantize()).double()
    return float(torch.trace(error @ hessian.double() @ error.T))


def random_state(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state dict of the tiny model and Hessians of correlated inputs for all its matrices."""
    generator = torch.Generator().manual_seed(seed)
    config = tiny().model
    state = {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config).items()}
    sizes = {"qkv": config.model_dim, "o": config.model_dim, "up": config.model_dim, "down": config.mlp_hidden}
    names = {f"layers.{i}.{kind}": size for i in range(config.num_layers) for kind, size in sizes.items()}
    hessians = {}
    for name, size in {**names, "embedding": config.model_dim}.items():
        x = torch.randn(2 * size, size, generator=generator) @ torch.randn(size, size, generator=generator)
        hessians[name] = x.T @ x
    return state, hessians


def test_golden_figures_of_the_published_solver() -> None:
    golden = np.load(GOLDEN)
    cases = [key.removeprefix("W_") for key in golden if key.startswith("W_")]
    assert cases
    for case in cases:
        weight, hessian = torch.from_numpy(golden[f"W_{case}"]), torch.from_numpy(golden[f"H_{case}"])
        settings: dict[str, Any] = {
            **SETTINGS,
            "bits": round(math.log2(golden[f"cfg_{case}"][2] + 1)) + 1,
            "clip_sigmas": float(golden[f"cfg_{case}"][3]),
        }
        quantized = quantize_weight(weight, hessian, **settings)
        assert np.array_equal(quantized.scales.numpy(), golden[f"s_{case}"])
        off = np.abs(quantized.codes.numpy().astype(int) - golden[f"Q_{case}"])
        assert off.max() <= 1
        assert (off > 0).mean() <= 0.005
        assert output_error(weight, hessian, quantized) == pytest.approx(float(golden[f"err_gptq_{case}"]), rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_output_error_is_below_round_to_nearest(seed: int) -> None:
    weight, hessian = random_problem(seed, 40, 200, num_dead=seed)
    nearest = round_to_nearest(weight, bits=6, clip_sigmas=12.85)
    assert output_error(weight, hessian, quantize_weight(weight, hessian, **SETTINGS)) < 0.7 * output_error(
        weight, hessian, nearest
    )


def test_uncorrelated_inputs_leave_nothing_to_push() -> None:
    weight, _ = random_problem(0, 16, 64)
    quantized = quantize_weight(weight, torch.eye(64), **SETTINGS)
    assert torch.equal(quantized.codes, round_to_nearest(weight, bits=6, clip_sigmas=12.85).codes)


def test_a_batch_agrees_with_its_matrices_one_by_one() -> None:
    problems = [random_problem(seed, 24, 160, num_dead=2) for seed in range(3)]
    batch = quantize_weights(torch.stack([w for w, _ in problems]), torch.stack([h for _, h in problems]), **SETTINGS)
    for (weight, hessian), quantized in zip(problems, batch, strict=True):
        alone = quantize_weight(weight, hessian, **SETTINGS)
        assert torch.equal(quantized.scales, alone.scales)
        assert (quantized.codes != alone.codes).float().mean() < 0.005  # rounding of another matrix product


def test_block_width_only_changes_rounding() -> None:
    weight, hessian = random_problem(5, 24, 130)
    wide = quantize_weight(weight, hessian, **{**SETTINGS, "block_columns": 130})
    narrow = quantize_weight(weight, hessian, **{**SETTINGS, "block_columns": 7})
    assert (wide.codes != narrow.codes).float().mean() < 0.005


def test_dead_inputs_get_code_zero_but_count_in_the_scale() -> None:
    weight, hessian = random_problem(2, 8, 32)
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 5] = 3.0
    quantized = quantize_weight(weight, hessian, **SETTINGS)
    assert not quantized.codes[:, 5].any()
    assert torch.equal(quantized.scales, (12.85 * weight.std(dim=1) / 31).half())


def test_scales_are_never_zero() -> None:
    weight, hessian = random_problem(3, 4, 32)
    weight[0], weight[1], weight[2] = 0, 1e-7 * weight[1], 0.5  # empty, below float16, constant
    for quantized in (
        quantize_weight(weight, hessian, **SETTINGS),
        round_to_nearest(weight, bits=6, clip_sigmas=12.85),
    ):
        assert (quantized.scales > 0).all()
        restored = quantized.dequantize()
        assert restored.isfinite().all()
        assert not restored[0].any()
        assert (restored[2] - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_outside_2_to_8_are_refused(bits: int) -> None:
    weight, hessian = random_problem(0, 4, 8)
    with pytest.raises(ValueError, match=f"bits={bits} must be between 2 and 8"):
        quantize_weight(weight, hessian, **{**SETTINGS, "bits": bits})


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_stay_within_their_bits(bits: int) -> None:
    weight, hessian = random_problem(1, 16, 48)
    codes = quantize_weight(weight, hessian, **{**SETTINGS, "bits": bits, "clip_sigmas": 1.0}).codes.int()
    assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_an_unusable_hessian_is_named() -> None:
    state, hessians = random_state(0)
    hessians["layers.3.down"][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"hessian of layers\.3\.down is not positive definite.*damping_frac"):
        quantize_state(state, hessians, tiny().quant)


def test_a_diverged_weight_is_named() -> None:
    state, hessians = random_state(0)
    state["kv_bank"][tiny().model.num_layers + 2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"cannot quantize layers\.2\.v: it holds infinities"):
        quantize_state(state, hessians, tiny().quant)


def test_tensors_too_large_for_float16_are_named() -> None:
    state, hessians = random_state(0)
    state["resid_mix"][0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="cannot quantize resid_mix: its values do not fit float16"):
        quantize_state(state, hessians, tiny().quant)
    state["resid_mix"][0, 0, 0] = 0
    state["mlp_up_bank"][1] *= 1e8
    with pytest.raises(ValueError, match=r"cannot quantize layers\.1\.up: its scales do not fit float16"):
        quantize_state(state, hessians, tiny().quant)


def assert_each_better_than_nearest(
    state: dict[str, Tensor], hessians: dict[str, Tensor], quantized: QuantizedState, config: QuantConfig
) -> None:
    """Check bits, scales and the error in the Hessian's norm of every matrix against plain rounding."""
    tensors = split_banks(state)
    for name, weight in quantized.matrices.items():
        kind = name.rsplit(".", 1)[-1]
        hessian = hessians[name.replace(kind, "qkv") if kind in "qkv" else name]
        is_embedding = name == "embedding"
        nearest = round_to_nearest(
            tensors[name],
            bits=config.embedding_bits if is_embedding else config.matrix_bits,
            clip_sigmas=config.embedding_clip_sigmas if is_embedding else config.matrix_clip_sigmas,
        )
        assert weight.bits == nearest.bits
        assert torch.equal(weight.scales, nearest.scales)
        assert output_error(tensors[name], hessian, weight) < output_error(tensors[name], hessian, nearest), name


def test_all_tiny_matrices_round_better_than_nearest() -> None:
    state, hessians = random_state(1)
    config = tiny().quant
    quantized = quantize_state(state, hessians, config)
    tensors = split_banks(state)
    large = {name for name, tensor in tensors.items() if tensor.numel() > config.keep_float_numel}
    assert set(quantized.matrices) == large
    assert set(quantized.floats) == set(tensors) - large
    assert_each_better_than_nearest(state, hessians, quantized, config)


def test_every_matrix_of_a_trained_model_rounds_better_than_nearest() -> None:
    torch.manual_seed(0)
    config = replace(tiny().model, vocab_size=256)
    model = GPT(config)
    model.init_weights(0)
    steps = torch.randint(1, 4, (2, 129)).cumsum(dim=1) % 256  # a walk: each token tells much about the next
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model(steps[:, :-1], steps[:, 1:], is_looped=True).backward()
        optimizer.step()
    with HessianCollector(model) as collector, torch.no_grad():
        model(steps[:, :-1], is_looped=True)
    hessians = collector.finish(num_batches=1)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    quantized = quantize_state(state, hessians, tiny().quant)
    assert len(quantized.matrices) == 6 * config.num_layers + 1
    assert_each_better_than_nearest(state, hessians, quantized, tiny().quant)


def test_small_matrices_stay_float16() -> None:
    state, hessians = random_state(2)
    quantized = quantize_state(state, hessians, QuantConfig(keep_float_numel=64 * 128))
    assert {name.rsplit(".", 1)[-1] for name in quantized.matrices} == {"q", "o", "up", "down", "embedding"}
    assert torch.equal(quantized.floats["layers.1.v"], state["kv_bank"][tiny().model.num_layers + 1].half())
    nothing = quantize_state(state, {}, QuantConfig(keep_float_numel=10**9))
    assert not nothing.matrices
    assert {name: tensor.shape for name, tensor in dequantize(nothing).items()} == {
        name: tensor.shape for name, tensor in state.items()
    }


def test_dequantized_banks_stay_within_half_a_step_of_simple_weights() -> None:
    state, hessians = random_state(3)
    plain = {name: torch.eye(hessian.shape[0]) for name, hessian in hessians.items()}  # GPTQ is then plain rounding
    config = tiny().quant
    quantized = quantize_state(state, plain, config)
    restored = dequantize(quantized)
    assert list(restored) == list(parameter_shapes(tiny().model))
    for name, tensor in state.items():
        step = max((float(w.scales.max()) for w in quantized.matrices.values()), default=0.0)
        assert restored[name].dtype == torch.float32
        assert (restored[name] - tensor).abs().max() <= step / 2 + 1e-3


def test_splitting_and_joining_banks_are_inverse() -> None:
    state, _ = random_state(4)
    split = split_banks(state)
    assert {name: tuple(tensor.shape) for name, tensor in split.items()} == tensor_shapes(tiny().model)
    assert torch.equal(split["layers.1.o"], state["qo_bank"][tiny().model.num_layers + 1])
    assert torch.equal(split["layers.1.v"], state["kv_bank"][tiny().model.num_layers + 1])
    for name, tensor in join_banks(split).items():
        assert torch.equal(tensor, state[name]), name


class Projection(nn.Module):
    """A product with a weight that is handed in, as the model's projections are."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.T


class TwoProjections(nn.Module):
    """Calls one projection three times and the head once."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleDict({"layers_12_qkv": Projection(), "head": Projection()})

    def forward(self, x: Tensor) -> Tensor:
        for factor in (1.0, 2.0, 3.0):
            self.projections["layers_12_qkv"](factor * x, torch.ones(5, x.shape[-1]))
        out: Tensor = self.projections["head"](x, torch.ones(5, x.shape[-1]))
        return out


def test_hooks_sum_every_visit_and_leave_afterwards() -> None:
    torch.manual_seed(0)
    model, batches = TwoProjections(), [torch.randn(2, 7, 6) for _ in range(3)]
    with HessianCollector(model) as collector:
        for x in batches:
            model(x)
    model(batches[0])  # after the block: not counted
    hessians = collector.finish(num_batches=3)
    rows = torch.cat([x.reshape(-1, 6) for x in batches])
    expected = rows.T @ rows / 3
    assert set(hessians) == {"layers.12.qkv", "embedding"}
    torch.testing.assert_close(hessians["embedding"], expected)
    torch.testing.assert_close(hessians["layers.12.qkv"], (1 + 4 + 9) * expected)


def test_hessians_of_ranks_are_summed_before_division() -> None:
    torch.manual_seed(0)
    model, x = TwoProjections(), torch.randn(9, 6)
    with HessianCollector(model) as collector:
        model(x)
    doubled = collector.finish(num_batches=2, all_reduce=lambda total: total.mul_(2))  # two ranks with the same data
    torch.testing.assert_close(doubled["embedding"], x.T @ x)


def test_bf16_inputs_are_summed_in_float32() -> None:
    torch.manual_seed(0)
    model, x = TwoProjections(), torch.randn(4096, 6).bfloat16()
    with HessianCollector(model) as collector:
        model.projections["head"](x, torch.ones(5, 6).bfloat16())
    hessian = collector.finish(num_batches=1)["embedding"]
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(hessian, x.float().T @ x.float())


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu() -> None:
    state, hessians = random_state(7)
    on_cpu = quantize_state(state, hessians, tiny().quant)
    on_gpu = quantize_state(
        {name: tensor.cuda() for name, tensor in state.items()},
        {name: tensor.cuda() for name, tensor in hessians.items()},
        tiny().quant,
    )
    for name, weight in on_cpu.matrices.items():
        other = on_gpu.matrices[name]
        assert torch.equal(weight.scales, other.scales.cpu()), name
        assert (weight.codes != other.codes.cpu()).float().mean() < 0.01, name
