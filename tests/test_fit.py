"""`on_oversize: fit`: never over the limit, filled to it or at a bound, and the bytes where the loss wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.banks import split_banks
from model.config import QuantConfig
from model.gpt import GPT
from model.presets import tiny
from model.quant import rounded
from model.quant.artifact import pack_artifact, read_artifact_info
from model.quant.calibrate import collect_hessians
from model.quant.fit import MAX_GROWTH, Clips, Fitted, GroupCurve, fit_to_limit, group_curves
from model.quant.quantized import QuantizedState
from model.quant.rounded import clip_metrics, save_rounded
from model.quant.sensitivity import NUM_DRAWS, LossProbe
from model.quant.state import StateQuantizer, configured_clips, group_of, looped_layers
from tests.fake_recorder import FakeRecorder
from tests.micro_model import LoneRank, ignore, micro_loader, micro_model, micro_run, random_model
from tests.rounding import quantize_state
from tests.test_gptq import random_state

GROUPS = ("attention", "looped_attention", "mlp", "looped_mlp", "embedding")
EVEN = dict.fromkeys(GROUPS, 1e-3)
LOOPED = looped_layers(tiny().model)


def entropy_bytes(quantized: QuantizedState, _clips: Clips | None = None) -> int:
    """Return an ideal coder's bytes for all codes: a smooth stand-in for a real artifact."""
    total = 0.0
    for weight in quantized.matrices.values():
        share = torch.bincount(weight.codes.flatten().int() + 128, minlength=256) / weight.codes.numel()
        total += float(-(share[share > 0].log2() * share[share > 0]).sum()) * weight.codes.numel() / 8
    return int(total)


def fitted(
    limit: int, *, seed: int = 5, rises: Mapping[str, float] = EVEN, offset: int = 0, **changes: float
) -> Fitted:
    """Fit random weights of the tiny model under a limit; offset stands for headers and code."""
    state, hessians = random_state(seed)
    config = replace(tiny().quant, size_limit_bytes=limit, **changes)
    quantizer = StateQuantizer(state, hessians, config, looped=LOOPED)
    return fit_to_limit(quantizer, lambda rounded, _clips: entropy_bytes(rounded) + offset, lambda _state: rises)


@pytest.fixture(scope="module")
def configured_bytes() -> int:
    """Return the bytes of the tiny model at its configured clips."""
    state, hessians = random_state(5)
    return entropy_bytes(quantize_state(state, hessians, tiny().quant))


@pytest.mark.parametrize("share", [0.7, 0.95, 1.0, 1.2])
def test_the_limit_is_filled_from_below_in_either_direction(configured_bytes: int, share: float) -> None:
    limit = int(share * configured_bytes)
    result = fitted(limit)
    assert limit - 0.01 * configured_bytes <= result.artifact_bytes <= limit
    assert result.num_passes <= 4
    configured = configured_clips(tiny().quant)
    wider = [result.clips[group] > configured[group] for group in GROUPS]
    assert any(wider) if share < 1 else not all(wider)


def test_what_no_group_accounts_for_counts_too(configured_bytes: int) -> None:
    result = fitted(configured_bytes + 120_000, offset=123_456)
    assert configured_bytes + 110_000 <= result.artifact_bytes <= configured_bytes + 120_000


def test_a_lower_limit_never_gives_a_group_finer_steps(configured_bytes: int) -> None:
    rises = dict(zip(GROUPS, (1e-3, 3e-3, 1e-4, 0.0, 5e-3), strict=True))
    clips = [fitted(int(share * configured_bytes), rises=rises).clips for share in (0.6, 0.8, 1.0, 1.2)]
    for tight, wide in pairwise(clips):
        assert all(tight[group] >= wide[group] for group in GROUPS)
        assert tight != wide


def test_equal_input_gives_equal_choices(configured_bytes: int) -> None:
    first, second = (fitted(configured_bytes) for _ in range(2))
    assert (first.clips, first.artifact_bytes, first.num_passes) == (
        second.clips,
        second.artifact_bytes,
        second.num_passes,
    )


def test_chosen_clips_give_the_same_codes_out_of_a_configuration(configured_bytes: int) -> None:
    result = fitted(configured_bytes)
    state, hessians = random_state(5)
    settings = {f"{group}_clip_sigmas": value for group, value in result.clips.items()}
    again = quantize_state(state, hessians, replace(tiny().quant, **settings), looped=LOOPED)
    for name, weight in result.state.matrices.items():
        assert torch.equal(weight.codes, again.matrices[name].codes), name
        assert torch.equal(weight.scales, again.matrices[name].scales), name


def test_a_group_that_costs_more_gets_finer_steps(configured_bytes: int) -> None:
    even = fitted(configured_bytes)
    for group in ("looped_mlp", "embedding"):
        result = fitted(configured_bytes, rises={**EVEN, group: 4e-3})
        assert result.clips[group] < even.clips[group]
        assert all(result.clips[other] >= even.clips[other] for other in GROUPS if other != group)


def test_a_limit_that_nothing_reaches_ends_at_the_finest_steps(configured_bytes: int) -> None:
    result = fitted(100 * configured_bytes)
    state, hessians = random_state(5)
    curves = group_curves(StateQuantizer(state, hessians, tiny().quant), configured_clips(tiny().quant))
    for group, weights in {"mlp": state["mlp_up_bank"], "embedding": state["tok_emb.weight"]}.items():
        sigmas = weights.abs() / weights.std(dim=-1, keepdim=True)
        assert 4 < result.clips[group] < 6  # Gaussian weights: one in 100,000 lies beyond 4.4
        assert float((sigmas > result.clips[group]).double().mean()) < 2e-5
    assert all(curve.lowest <= curve.configured for curve in curves.values())


def test_every_matrix_may_have_steps_of_its_own(configured_bytes: int) -> None:
    state, hessians = random_state(5)
    config = replace(tiny().quant, size_limit_bytes=configured_bytes, fit_unit="matrix")
    quantizer = StateQuantizer(state, hessians, config, looped=LOOPED)
    units = quantizer.members()
    assert all(names == [unit] for unit, names in units.items())
    assert len(units) == 6 * tiny().model.num_layers + 1
    even = {name: 1e-9 * tensor.numel() for name, tensor in split_banks(state).items() if name in units}
    rises = {unit: 1.44 * rise if unit in ("layers.1.k", "layers.3.up") else rise for unit, rise in even.items()}
    result = fit_to_limit(quantizer, entropy_bytes, lambda _state: rises)
    assert result.clips.keys() == units.keys()
    assert configured_bytes - 0.01 * configured_bytes <= result.artifact_bytes <= configured_bytes
    assert result.clips["layers.1.k"] == pytest.approx(result.clips["layers.2.k"] / 1.2, rel=0.02)
    assert result.clips["layers.3.up"] == pytest.approx(result.clips["layers.2.up"] / 1.2, rel=0.02)
    weight = split_banks(state)["layers.1.k"]
    expected = (result.clips["layers.1.k"] * weight.std(dim=-1) / 31).half()
    assert torch.equal(result.state.matrices["layers.1.k"].scales, expected)


def test_a_limit_out_of_reach_is_refused_with_the_bytes_that_are_left() -> None:
    with pytest.raises(ValueError, match=r"size_limit_bytes=1000 cannot be met: \d+ bytes are left") as caught:
        fitted(1000)
    assert "\n" not in str(caught.value)


def test_noise_below_zero_gives_no_group_the_coarsest_steps(configured_bytes: int) -> None:
    result = fitted(configured_bytes, rises={**EVEN, "mlp": -1e-3})
    assert result.clips["mlp"] < MAX_GROWTH * configured_clips(tiny().quant)["mlp"]
    nothing = fitted(configured_bytes, rises=dict.fromkeys(GROUPS, 0.0))
    ratios = {round(nothing.clips[group] / value, 2) for group, value in configured_clips(tiny().quant).items()}
    assert len(ratios) == 1  # nothing to go by: all groups move alike


def test_a_model_without_large_matrices_fits_or_is_refused() -> None:
    assert fitted(1000, keep_float_numel=10**9, offset=900).artifact_bytes == 900
    with pytest.raises(ValueError, match="cannot be met: 900 bytes are left"):
        fitted(800, keep_float_numel=10**9, offset=900)


def test_foretold_bytes_are_those_of_plain_rounding() -> None:
    state, hessians = random_state(6)
    quantizer = StateQuantizer(state, {name: torch.eye(h.shape[0]) for name, h in hessians.items()}, tiny().quant)
    curves = group_curves(quantizer, configured_clips(tiny().quant))
    for factor in (0.5, 1.0, 3.0):
        clips = {group: factor * value for group, value in configured_clips(tiny().quant).items()}
        foretold = sum(curve.num_bytes(clips[group]) for group, curve in curves.items())
        assert foretold == pytest.approx(entropy_bytes(quantizer.quantize(clips)), rel=0.01)


def test_a_curve_is_that_of_a_gaussian() -> None:
    edges = torch.arange(64 * 512 + 1, dtype=torch.float64) / 512
    below = torch.erf(edges / 2**0.5).numpy()
    curve = GroupCurve(below, num_weights=8, qmax=31, configured=12.85, lowest=4.0, highest=50.0)
    step = 12.85 / 31
    bits = 0.5 * np.log2(2 * np.pi * np.e * (1 + step**2 / 12)) - np.log2(step)  # the codes' own variance is larger
    assert curve.num_bytes(12.85) == pytest.approx(bits, abs=2e-3)
    assert curve.slope() == pytest.approx(1 / (1 + step**2 / 12) / np.log(2), abs=5e-3)


def test_every_matrix_has_the_group_of_its_layer() -> None:
    assert list(LOOPED) == [1, 2]
    assert group_of("layers.1.q", LOOPED) == "looped_attention"
    assert group_of("layers.3.o", LOOPED) == "attention"
    assert group_of("layers.0.up", LOOPED) == "mlp"
    assert group_of("layers.2.down", LOOPED) == "looped_mlp"
    assert group_of("embedding", LOOPED) == "embedding"
    assert not looped_layers(replace(tiny().model, num_loops=0))


def test_a_group_without_a_setting_of_its_own_has_its_wider_groups() -> None:
    assert configured_clips(QuantConfig()) == {**dict.fromkeys(GROUPS[:4], 12.85), "embedding": 20.0}
    config = QuantConfig(matrix_clip_sigmas=10.0, mlp_clip_sigmas=12.0, looped_attention_clip_sigmas=11.0)
    assert list(configured_clips(config).values()) == [10.0, 11.0, 12.0, 12.0, 20.0]


def test_scales_of_a_group_have_its_sigmas() -> None:
    state, hessians = random_state(3)
    config = replace(tiny().quant, mlp_clip_sigmas=10.0, looped_mlp_clip_sigmas=8.0, attention_clip_sigmas=12.0)
    rounded = quantize_state(state, hessians, config, looped=LOOPED)
    for name, sigmas in {"layers.0.up": 10.0, "layers.1.down": 8.0, "layers.3.q": 12.0, "layers.2.v": 12.0}.items():
        kind, layer = name.rsplit(".", 1)[1], int(name.split(".")[1])
        bank, part = {"up": ("mlp_up_bank", 0), "down": ("mlp_down_bank", 0), "q": ("qo_bank", 0), "v": ("kv_bank", 1)}[
            kind
        ]
        weight = state[bank][part * tiny().model.num_layers + layer]
        assert torch.equal(rounded.matrices[name].scales, (sigmas * weight.std(dim=-1) / 31).half()), name


def test_a_tensor_that_nobody_foresaw_stays_float16() -> None:
    state, hessians = random_state(3)
    state |= {"some_gate": torch.randn(4, 24), "some_factor": torch.tensor(0.25)}
    rounded = quantize_state(state, hessians, replace(tiny().quant, keep_float_numel=0), looped=LOOPED)
    assert torch.equal(rounded.floats["some_gate"], state["some_gate"].half())
    assert rounded.floats["some_factor"].shape == ()
    assert not any("." not in name for name in set(rounded.matrices) - {"embedding"})


# ---- what rounding costs, measured ----------------------------------------------------------------------------------


def micro_probe(folder: Path, model: GPT, **changes: object) -> LossProbe:
    """Return a probe of a micro model over learnable text."""
    quant = replace(micro_run().quant, **changes)
    return LossProbe(model, micro_loader(folder), quant, seed=3)


@pytest.fixture
def micro_quantizer(tmp_path: Path) -> tuple[GPT, StateQuantizer]:
    """Return a micro model and the quantizer of its weights."""
    model, config = random_model().requires_grad_(False), micro_run().quant
    hessians = collect_hessians(model, micro_loader(tmp_path), config, LoneRank.single(), ignore, seed=3)
    state: dict[str, Tensor] = {name: p.clone() for name, p in model.named_parameters()}
    return model, StateQuantizer(state, hessians, config, looped=looped_layers(micro_model()))


def test_the_probe_leaves_the_model_as_it_was_and_is_deterministic(
    tmp_path: Path, micro_quantizer: tuple[GPT, StateQuantizer]
) -> None:
    model, quantizer = micro_quantizer
    before = {name: p.clone() for name, p in model.named_parameters()}
    changes = quantizer.changes(quantizer.quantize(configured_clips(quantizer.config)))
    first, second = (micro_probe(tmp_path, model).measure_rises(quantizer.members(), changes) for _ in range(2))
    assert first == second
    assert list(first) == list(GROUPS)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("documents", ["masked", "unmasked"])
def test_recorded_tries_see_the_change_that_is_made_meanwhile(
    tmp_path: Path, micro_quantizer: tuple[GPT, StateQuantizer], documents: str
) -> None:
    model, quantizer = micro_quantizer
    changes = quantizer.changes(quantizer.quantize(configured_clips(quantizer.config)))
    loader, config = micro_loader(tmp_path), replace(quantizer.config, calibration_documents=documents)
    plain = LossProbe(model, loader, config, seed=3).measure_rises(quantizer.members(), changes)
    recorder = FakeRecorder(lambda inputs, *_: tuple(inputs.shape))
    probe = LossProbe(model, loader, config, seed=3, recorder=recorder)
    assert probe.measure_rises(quantizer.members(), changes) == plain
    assert 1 <= recorder.num_made <= NUM_DRAWS  # a size's first try is not recorded, all others are replayed
    assert len(set(plain.values())) > 1


def test_many_units_are_tried_on_less_text_each(tmp_path: Path, micro_quantizer: tuple[GPT, StateQuantizer]) -> None:
    model, quantizer = micro_quantizer
    quantizer.config = replace(quantizer.config, fit_unit="matrix")
    changes = quantizer.changes(quantizer.quantize(configured_clips(quantizer.config)))
    probe = micro_probe(tmp_path, model, calibration_windows=8)
    sizes = []
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].numel()))
    rises = probe.measure_rises(quantizer.members(), changes)
    assert rises.keys() == quantizer.members().keys()
    num_windows = 12 * 8 // len(rises)
    assert 1 <= num_windows < 8
    assert sizes == [64 * num_windows] * (2 * (1 + 2 * len(rises)))


@pytest.mark.parametrize("documents", ["masked", "unmasked"])
def test_a_rise_grows_with_the_square_of_the_change(
    tmp_path: Path, micro_quantizer: tuple[GPT, StateQuantizer], documents: str
) -> None:
    _, quantizer = micro_quantizer
    changes = quantizer.changes(quantizer.quantize(configured_clips(quantizer.config)))
    exact = random_model(dtype=torch.float64).requires_grad_(False)  # float32 would drown changes this small
    probe = micro_probe(tmp_path, exact, calibration_documents=documents)
    small, large, none = (
        probe.measure_rises(quantizer.members(), {name: factor * change for name, change in changes.items()})
        for factor in (0.02, 0.04, 0.0)
    )
    assert none == dict.fromkeys(GROUPS, 0.0)
    for group in GROUPS:
        assert large[group] == pytest.approx(4 * small[group], rel=0.15, abs=5e-7), group
        assert large[group] != 0


def test_an_artifact_written_for_real_fills_its_limit(micro_quantizer: tuple[GPT, StateQuantizer]) -> None:
    _, quantizer = micro_quantizer

    def measure(state: QuantizedState, clips: Clips) -> int:
        return len(pack_artifact(state, micro_model(), {"clip_sigmas": clips}))

    plain = measure(quantizer.quantize(configured_clips(quantizer.config)), {})
    for limit in (plain - 1000, plain + 300):
        quantizer.config = replace(quantizer.config, size_limit_bytes=limit)
        result = fit_to_limit(quantizer, measure, lambda _state: EVEN)
        assert limit - 250 <= result.artifact_bytes == measure(result.state, result.clips) <= limit


def test_one_number_stands_for_all_matrices_where_it_does() -> None:
    assert clip_metrics(configured_clips(QuantConfig()))["matrix_clip_sigmas"] == 12.85
    metrics = clip_metrics(configured_clips(QuantConfig(mlp_clip_sigmas=12.0)))
    assert metrics["matrix_clip_sigmas"] is None
    assert metrics["clip_sigmas"]["looped_mlp"] == 12.0


def test_what_the_meta_says_changes_no_choice(tmp_path: Path) -> None:
    model, config = random_model().requires_grad_(False), micro_run()
    loader = micro_loader(tmp_path)
    hessians = collect_hessians(model, loader, config.quant, LoneRank.single(), ignore, seed=3)
    config = replace(config, quant=replace(config.quant, on_oversize="fit", size_limit_bytes=60_000))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    chosen = []
    for meta in ({"seed": 3}, {"seed": 3, "data_hash": "ab" * 32, "code_hash": "cd" * 32}):
        metrics = save_rounded(
            tmp_path / "model.ssq", weights, hessians, config,
            probe=LossProbe(model, loader, config.quant, seed=3), meta=meta, code_bytes=38_000,
        )  # fmt: skip
        assert metrics["artifact_bytes"] <= 60_000
        header = read_artifact_info(tmp_path / "model.ssq").header
        assert header.meta == {**meta, "clip_sigmas": metrics["clip_sigmas"]}
        chosen.append(metrics["clip_sigmas"])
    assert chosen[0] == chosen[1]
    assert chosen[0] != configured_clips(config.quant)


@pytest.mark.parametrize(("best", "num_packed"), [(1, 2), (0, 3)])
def test_the_artifact_is_packed_again_only_where_the_last_pass_was_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: int, num_packed: int
) -> None:
    def two_passes(
        quantizer: StateQuantizer, measure_bytes: Callable[[QuantizedState, Clips], int], _: object
    ) -> Fitted:
        configured = configured_clips(quantizer.config)
        passes = [{group: factor * clip for group, clip in configured.items()} for factor in (1.0, 1.5)]
        tried = [
            (state, clips, measure_bytes(state, clips)) for clips in passes for state in [quantizer.quantize(clips)]
        ]
        state, clips, size = tried[best]
        return Fitted(state, clips, {}, size, len(tried))

    packed: list[str] = []

    def span(name: str) -> AbstractContextManager[None]:
        packed.extend([name] if name == "compress" else [])
        return nullcontext()

    monkeypatch.setattr(rounded, "fit_to_limit", two_passes)
    model, config = random_model().requires_grad_(False), micro_run()
    loader = micro_loader(tmp_path)
    hessians = collect_hessians(model, loader, config.quant, LoneRank.single(), ignore, seed=3)
    config = replace(config, quant=replace(config.quant, on_oversize="fit"))
    metrics = save_rounded(  # which reads the artifact back and holds it against the state of the best pass
        tmp_path / "model.ssq", dict(model.named_parameters()), hessians, config,
        probe=LossProbe(model, loader, config.quant, seed=3), meta={}, code_bytes=0, span=span,
    )  # fmt: skip
    assert len(packed) == num_packed
    assert read_artifact_info(tmp_path / "model.ssq").header.meta["clip_sigmas"] == metrics["clip_sigmas"]
