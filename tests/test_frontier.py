"""Crossed lanes, gates, smearing, slope and pass vectors: each alone and all together, in the one forward pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.banks import optional_shapes, parameter_shapes, visit_plan
from model.config import ADAPTER_KINDS, ModelConfig, config_from_plain
from model.data.packing import Packing
from model.distributed import Dist
from model.fields import plain_settings
from model.gpt import GPT
from model.lora import Adapters, Layout
from model.quant.artifact import load_artifact, save_artifact
from model.quant.artifact_header import tensor_entries
from model.quant.calibrate import collect_hessians
from model.quant.quantized import dequantize
from model.train.trainer import Ema
from tests.micro_model import FRONTIER_PARTS, ignore, micro_loader, micro_model, micro_run, random_model
from tests.rounding import quantize_state
from tests.test_gpt import documents, make_adapters, make_rows, pack

PARTS = list(FRONTIER_PARTS)
both_loop_states = pytest.mark.parametrize("is_looped", [False, True])
every_part = pytest.mark.parametrize("part", PARTS)


def frontier_model(part: str, **changes: object) -> GPT:
    """Return a random model in float64 with the settings of a part on."""
    return random_model(micro_model(**{**FRONTIER_PARTS[part], **changes}), dtype=torch.float64)


def padded(parts: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Return documents as rows with made-up tokens in front, and how many."""
    rows = [torch.cat((torch.full((length - part.numel(),), 7), part)) for part in parts]
    return torch.stack(rows), torch.tensor([length - part.numel() for part in parts])


# ---- one forward -----------------------------------------------------------------------------------------------------


@every_part
@both_loop_states
def test_a_document_s_logits_do_not_depend_on_its_neighbors(part: str, is_looped: bool) -> None:
    model, parts = frontier_model(part), documents(9, 1, 17, 30)
    alone = [model(each.unsqueeze(0), is_looped=is_looped)[0] for each in parts]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        row, packing = pack(parts[index] for index in order)
        logits = model(row, is_looped=is_looped, packing=packing)[0]
        assert torch.allclose(logits, torch.cat([alone[index] for index in order]), rtol=0, atol=1e-12)


def test_without_its_mask_smearing_reaches_over_a_document_s_start() -> None:
    row, packing = pack(documents(9, 12))
    models = [frontier_model("smear", smear_bos_mask=mask) for mask in (True, False)]
    masked, open_ = (model(row, is_looped=True, packing=packing) for model in models)
    assert torch.equal(masked[:, :9], open_[:, :9])
    assert float((masked - open_)[0, 9].detach().abs().max()) > 1e-3


def test_a_cut_inside_a_document_keeps_its_neighbor_and_a_row_s_first_token_has_none() -> None:
    """The mask looks at tokens, not at segments."""
    model, (document,) = frontier_model("smear"), documents(12)
    x0: list[Tensor] = []
    model.projections["layers_0_qkv"].register_forward_pre_hook(lambda _module, inputs: x0.append(inputs[0][0]))
    packing = Packing(torch.tensor([0, 5, 12], dtype=torch.int32), 7)
    model(document.unsqueeze(0), is_looped=False, packing=packing)
    model(document.unsqueeze(0), is_looped=False)
    model(document[5:].unsqueeze(0), is_looped=False)
    cut, whole, inside = x0
    assert torch.allclose(cut, whole, rtol=0, atol=1e-13)
    assert torch.allclose(whole[6:], inside[1:], rtol=0, atol=1e-13)
    assert float((whole[5] - inside[0]).detach().abs().max()) > 1e-3


@every_part
@both_loop_states
@pytest.mark.parametrize("num_scored", [None, 4])
def test_windows_with_zero_adapters_are_the_plain_forward(part: str, is_looped: bool, num_scored: int | None) -> None:
    """Padded on the left, the last positions only, adapters that change nothing: what test-time training runs.

    The windows begin inside their documents: padding is nobody's neighbor even where no document starts.
    """
    model, parts = frontier_model(part), [document[1:] for document in documents(8, 17, 12)]
    rows, padding = padded(parts, 16)
    adapters = zero_adapters(model, len(parts), is_looped)
    logits = model(rows, is_looped=is_looped, left_padding=padding, adapters=adapters, num_scored=num_scored)
    for found, part_tokens in zip(logits, parts):
        alone = model(part_tokens.unsqueeze(0), is_looped=is_looped)[0]
        count = num_scored or part_tokens.numel()
        assert torch.allclose(found[-count:], alone[-count:], rtol=0, atol=1e-12)


def zero_adapters(model: GPT, slots: int, is_looped: bool) -> Adapters:
    """Return adapters whose B is zero."""
    if is_looped:
        return make_adapters(model, slots, zero=True)
    layout = Layout(model.config, visit_plan(model.config, is_looped=False).num_visits, 2, ADAPTER_KINDS)
    views = layout.view(torch.zeros(slots, layout.num_parameters, dtype=torch.float64))
    for value in views.a.values():
        value.fill_(0.3)
    return views


@every_part
@pytest.mark.parametrize("parallel_start_layer", [3, 4, 9])
def test_the_last_positions_give_adapters_the_full_pass_s_losses_and_gradients(
    part: str, parallel_start_layer: int
) -> None:
    model = frontier_model(part, parallel_start_layer=parallel_start_layer).requires_grad_(False)
    tokens = torch.stack(documents(16, 16))
    targets = tokens.roll(-1, dims=1)
    found = []
    for num_scored in (None, 6):
        layout, rows = make_rows(model, 2)
        adapters = layout.view(rows.requires_grad_())
        columns = targets if num_scored is None else targets[:, -num_scored:]
        nll = model(tokens, columns, is_looped=True, adapters=adapters, num_scored=num_scored, reduction="none")
        found.append((nll[:, -6:].detach(), torch.autograd.grad(nll[:, -6:].mean(), rows)[0]))
    (full, full_gradient), (last, last_gradient) = found
    assert float(full_gradient.abs().max()) > 0
    assert torch.allclose(last, full, rtol=0, atol=1e-12)
    assert torch.allclose(last_gradient, full_gradient, rtol=0, atol=1e-13)


@every_part
def test_a_later_token_changes_no_earlier_logits(part: str) -> None:
    model, (row,) = frontier_model(part), documents(20)
    other = row.clone()
    other[13] = 4 + (other[13] - 3) % 60
    before, after = (model(tokens.unsqueeze(0), is_looped=True)[0] for tokens in (row, other))
    assert torch.equal(before[:13], after[:13])


# ---- what each part does ---------------------------------------------------------------------------------------------


def test_gates_and_vectors_change_nothing_where_they_start() -> None:
    """Only the MLP's gate, which starts at 0.993, and lanes are another map from the first step on."""
    base = micro_model()
    config = replace(base, attn_gate_width=5, smear_gate_width=6, pass_embeddings=True)
    row, packing = pack(documents(9, 12))
    logits = []
    for each in (base, config):
        model = GPT(each)
        model.load_state_dict(random_model(base).state_dict(), strict=False)
        logits.append(model(row, is_looped=True, packing=packing))
    assert torch.equal(*logits)


def test_new_parameters_start_as_published() -> None:
    model = GPT(micro_model(**FRONTIER_PARTS["all"]))
    model.init_weights(3)
    starts = {"lane_keep": 1.1, "lane_write": 1.0, "mlp_gate_bias": 5.0}
    for name in optional_shapes(model.config):
        assert (model.get_parameter(name) == torch.tensor(starts.get(name, 0.0))).all(), name
    assert "lane_merge" not in dict(model.named_parameters())


@every_part
def test_parameters_are_those_that_are_listed_and_all_of_them_learn(part: str) -> None:
    model, (row, packing) = frontier_model(part), pack(documents(12, 9))
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(model.config)
    model(row, row.roll(-1), is_looped=True, packing=packing).backward()
    for name in optional_shapes(model.config):
        grad = model.get_parameter(name).grad
        assert grad is not None, name
        rows = grad if name == "pass_embeddings" else grad.unsqueeze(0)  # every pass has a vector of its own
        assert all(float(row.abs().max()) > 0 for row in rows), name


def test_the_heads_gate_is_in_what_calibration_hears_of_the_output_projection() -> None:
    gated, (row, packing) = frontier_model("attn_gate"), pack(documents(12, 9))
    plain = random_model(micro_model(), dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name != "attn_gate"})
    heard: list[dict[str, Tensor]] = []
    for model in (plain, gated):
        seen: dict[str, Tensor] = {}
        for name in ("layers_0_qkv", "layers_0_o"):
            model.projections[name].register_forward_pre_hook(
                lambda _module, inputs, name=name, seen=seen: seen.__setitem__(name, inputs[0][0])
            )
        with torch.no_grad():
            model.visit(row, is_looped=True, packing=packing)
        heard.append(seen)
    before, after = heard
    gate = gated.get_parameter("attn_gate")[0]
    factor = 2 * torch.sigmoid(before["layers_0_qkv"][:, :5] @ gate.T)  # (T, H)
    wanted = before["layers_0_o"].view(21, 4, 8) * factor.unsqueeze(-1)
    assert torch.allclose(after["layers_0_o"], wanted.flatten(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", ["mlp_gate", "all"])
def test_a_closed_mlp_gate_closes_the_adapter_too(part: str) -> None:
    model, tokens = frontier_model(part), torch.stack(documents(10, 10))
    with torch.no_grad():
        model.get_parameter("mlp_gate_bias").fill_(-1e4)
        adapters = make_adapters(model, 2, zero=True)
        plain = model(tokens, is_looped=True)
        adapters.b["mlp"][:] = 0.3
        assert torch.equal(model(tokens, is_looped=True, adapters=adapters), plain)
        model.get_parameter("mlp_gate_bias").fill_(1.0)
        assert not torch.allclose(model(tokens, is_looped=True, adapters=adapters), model(tokens, is_looped=True))


def test_pass_vectors_enter_while_looping_only_and_skips_do_not_hold_them() -> None:
    row, packing = pack(documents(12, 9))
    model = frontier_model("passes")
    plain = random_model(micro_model(), dtype=torch.float64)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "pass_embeddings"})
    assert torch.equal(*(each(row, is_looped=False, packing=packing) for each in (model, plain)))
    # by hand: a pass's vector v before the mix is mix[0] * v more behind it, in the visit that begins the pass
    visits: list[Tensor] = []
    for each in (model, plain):
        each.projections["layers_1_qkv"].register_forward_pre_hook(lambda _module, inputs: visits.append(inputs[0][0]))
        each(row, is_looped=True, packing=packing)
    first_with, _, first_without, _ = visits
    assert float((first_with - first_without).detach().abs().max()) > 1e-3


# ---- the way through a run -------------------------------------------------------------------------------------------


def test_an_artifact_holds_every_small_tensor_as_float16(tmp_path: Path) -> None:
    config = micro_run(model=micro_model(**FRONTIER_PARTS["all"]))
    model = random_model(config.model)
    hessians = collect_hessians(model, micro_loader(tmp_path), config.quant, Dist.single(), ignore, seed=1)
    state = quantize_state(dict(model.state_dict()), hessians, config.quant)
    for entry in tensor_entries(config.model, state):
        assert entry.is_float == (entry.name in parameter_shapes(config.model)) or entry.name.startswith("layers"), (
            entry
        )
    save_artifact(tmp_path / "model.bin", state, config.model, {})
    read, loaded = load_artifact(tmp_path / "model.bin")
    assert read == config.model
    restored = dequantize(loaded)
    GPT(read).load_state_dict(restored, strict=True)
    for name in optional_shapes(config.model):
        assert torch.equal(restored[name], model.get_parameter(name).detach().half().float()), name


@every_part
def test_a_configuration_comes_back_from_plain_values_and_the_average_holds_every_parameter(part: str) -> None:
    config = micro_run(model=ModelConfig(**{**plain_settings(micro_model()), **FRONTIER_PARTS[part]}))
    assert config_from_plain(plain_settings(config)) == config
    model = random_model(config.model)
    assert set(Ema(model).cast()) == set(parameter_shapes(config.model))
