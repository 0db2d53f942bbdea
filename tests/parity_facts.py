"""Golden set 3: names, shapes, groups, settings and constants of the full-size model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.banks import EMBEDDING_PARAMETER, num_skips, tensor_shapes, visit_plan
from model.config import ADAPTER_KINDS, ModelConfig, QuantConfig
from model.distributed import Dist
from model.gpt import GPT, build_model, norm_scale
from model.lora import num_adapter_parameters
from model.train.optim import Optimizers, muon_scale, muon_update
from tests.parity_core import GoldenSet, model_config, our_place, take_parameter, train_config

# our matrix kind -> the published name inside blocks.<layer>.
PUBLISHED_MATRIX = {
    "q": "attn.c_q.weight", "k": "attn.c_k.weight", "v": "attn.c_v.weight", "o": "attn.proj.weight",
    "up": "mlp.fc.weight", "down": "mlp.proj.weight",
}  # fmt: skip


def check_facts(golden: GoldenSet) -> None:
    """Set 3: build the model that the stored settings describe and compare what can be said without training it."""
    hyper = golden.read("hyperparameters")
    config = model_config(hyper)
    model = build_model(config, Dist.single().device, embedding_dtype=train_config(hyper).embedding_dtype)
    model.init_weights(int(hyper["seed"]))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    golden.compare("total_params", sum(tensor.numel() for tensor in parameters.values()), tolerance=0)
    golden.check(
        "buffers_in_state_dict", [name for name, _ in model.named_buffers()] == _stored(golden, "buffers_in_state_dict")
    )
    _check_shapes(golden, parameters)
    _check_layers(golden, config)
    _check_init(golden, parameters)
    _check_optimizers(golden, model, hyper)
    _check_quantization(golden, config, hyper)
    num_visits = visit_plan(config, is_looped=True).num_visits
    golden.compare("ttt_slots_looping", num_visits, tolerance=0)
    per_document = num_adapter_parameters(
        config, num_visits=num_visits, lora_rank=hyper["ttt_lora_rank"], kinds=ADAPTER_KINDS
    )
    golden.compare("ttt_lora_params_per_doc", per_document, tolerance=0)


def _stored(golden: GoldenSet, key: str) -> Any:
    return golden.content[golden.files[0]][key]


def _check_shapes(golden: GoldenSet, parameters: Mapping[str, Tensor]) -> None:
    """Every published parameter is ours with its shape and storage type, and we have none besides."""
    facts = _stored(golden, "params")
    for name, fact in facts.items():
        ours = take_parameter(parameters, name)
        stored = [list(ours.shape), str(ours.dtype).removeprefix("torch.")]
        golden.check(f"params/{name}", stored == [fact["shape"], fact["dtype_during_training"]])
    golden.check("params", {our_place(name)[0] for name in facts} == set(parameters))


def _check_layers(golden: GoldenSet, config: ModelConfig) -> None:
    for is_looped, mode in ((True, "looping"), (False, "plain")):
        plan = visit_plan(config, is_looped=is_looped)
        golden.compare(f"encoder_indices_{mode}", plan.encoder, tolerance=0)
        golden.compare(f"decoder_indices_{mode}", plan.decoder, tolerance=0)
    layers = range(config.num_layers)
    golden.compare("num_skip_weights", num_skips(config), tolerance=0)
    golden.compare("ln_scale_factors", [norm_scale(layer) for layer in layers], tolerance=1e-15)
    golden.compare("xsa_layers", layers[config.num_layers - config.xsa_last_n :], tolerance=0)
    golden.compare("parallel_layers", layers[config.parallel_start_layer :], tolerance=0)


def _check_init(golden: GoldenSet, parameters: Mapping[str, Tensor]) -> None:
    """Constant initial values must agree exactly; the statistics of random ones are of one draw."""
    for name, fact in _stored(golden, "init").items():
        ours = take_parameter(parameters, name).float()
        if fact["min"] == fact["max"]:
            golden.check(f"init/{name}", bool((ours == fact["mean"]).all()))
        elif name.endswith("resid_mix"):
            golden.check(
                f"init/{name}", (ours.min(), ours.max(), ours.mean()) == (fact["min"], fact["max"], fact["mean"])
            )
        else:
            golden.leave_out(f"init/{name}")
    half = parameters["qo_bank"].size(0) // 2
    for name, fact in _stored(golden, "init_facts").items():
        if name == "out_bank_zero":
            golden.check(f"init_facts/{name}", bool((parameters["qo_bank"][half:] == 0).all()) == fact)
        elif name == "down_zero":
            golden.check(f"init_facts/{name}", bool((parameters["mlp_down_bank"] == 0).all()) == fact)
        else:
            golden.leave_out(f"init_facts/{name}")


def _check_optimizers(golden: GoldenSet, model: GPT, hyper: Mapping[str, Any]) -> None:
    """Compare which parameter is updated by what, with which settings."""
    config = train_config(hyper)
    optimizers = Optimizers(model, config, Dist.single())
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    embedding, vectors = (
        {**group, "params": [name_of[id(parameter)] for parameter in group["params"]]}
        for group in optimizers.adamw.param_groups
    )
    defaults = {name: p.default for name, p in inspect.signature(muon_update).parameters.items()}
    muon = {
        "lr": config.matrix_lr, "momentum": config.muon_momentum, "backend_steps": config.newton_schulz_steps,
        "nesterov": defaults["is_nesterov"], "weight_decay": config.matrix_weight_decay,
        "row_normalize": defaults["normalize_rows"], "params": list(optimizers.muon.banks),
    }  # fmt: skip
    ours = {"tok": ("AdamW", embedding), "muon": ("Muon", muon), "scalar": ("AdamW", vectors)}
    grouped = set()
    for kind, fact in _stored(golden, "optimizers").items():
        name, group = ours[kind]
        [expected] = fact["groups"]
        same = {key for key in expected if key in group} - {"params"}
        grouped |= set(group["params"])
        golden.check(
            f"optimizers/{kind}",
            type(optimizers.adamw if name == "AdamW" else optimizers.muon).__name__ == fact["cls"]
            and {"lr", "weight_decay"} <= same
            and all(_plain(group[key]) == expected[key] for key in same)
            and {our_place(param)[0] for param in expected["params"]} == set(group["params"])
            and sum(dict(model.named_parameters())[param].numel() for param in group["params"]) == expected["numel"],
        )
    golden.check(
        "params_in_no_optimizer", sorted(set(name_of.values()) - grouped) == _stored(golden, "params_in_no_optimizer")
    )
    for bank, factor in _stored(golden, "muon_scale").items():
        golden.check(f"muon_scale/{bank}", muon_scale(*dict(model.named_parameters())[bank].shape[-2:]) == factor)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _check_quantization(golden: GoldenSet, config: ModelConfig, hyper: Mapping[str, Any]) -> None:
    """Compare which matrices are rounded, to how many bits at how many sigmas, and what stays float16."""
    quant = QuantConfig(
        matrix_bits=hyper["matrix_bits"], matrix_clip_sigmas=hyper["matrix_clip_sigmas"],
        embedding_bits=hyper["embed_bits"], embedding_clip_sigmas=hyper["embed_clip_sigmas"],
    )  # fmt: skip
    rounded, kept = {}, set()
    for name, shape in tensor_shapes(config).items():
        is_embedding = name == "embedding"
        if torch.Size(shape).numel() <= quant.keep_float_numel:
            kept.add(name)
            continue
        rounded[_published_matrix(name)] = {
            "shape": list(shape),
            "bits": quant.embedding_bits if is_embedding else quant.matrix_bits,
            "clip_sigmas": quant.embedding_clip_sigmas if is_embedding else quant.matrix_clip_sigmas,
        }
    facts = _stored(golden, "quantization")
    golden.check("quantization/quantized", rounded == facts["quantized"])
    golden.check(
        "quantization/passthrough_float16", kept == {our_place(name)[0] for name in facts["passthrough_float16"]}
    )


def _published_matrix(name: str) -> str:
    """Return the published name of one of our matrices: layers.3.q -> blocks.3.attn.c_q.weight."""
    if name == "embedding":
        return EMBEDDING_PARAMETER
    _, layer, kind = name.split(".")
    return f"blocks.{layer}.{PUBLISHED_MATRIX[kind]}"
