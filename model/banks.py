"""How weights lie in banks, start and are taken out, the order of visits, and the names that follow from both."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class VisitPlan:
    """The layers in the order they are visited; encoder outputs are skip sources for the decoder, last first."""

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def num_visits(self) -> int:
        """Layer visits of one forward pass."""
        return len(self.encoder) + len(self.decoder)


def visit_plan(config: ModelConfig, *, is_looped: bool) -> VisitPlan:
    """Return the plan with or without the extra passes over layers loop_start..loop_end."""
    layers = list(range(config.num_layers))
    if not is_looped or config.num_loops == 0:
        half = config.num_layers // 2
        return VisitPlan(tuple(layers[:half]), tuple(layers[half:]))
    block = layers[config.loop_start : config.loop_end + 1]
    order = layers[: config.loop_start] + block * (config.num_loops + 1) + layers[config.loop_end + 1 :]
    half = len(order) // 2
    return VisitPlan(tuple(order[:half]), tuple(order[half:]))


def num_skips(config: ModelConfig) -> int:
    """Return how many skip rows the model has: the decoder visits of the looping plan that find a source."""
    plan = visit_plan(config, is_looped=True)
    return min(len(plan.encoder), len(plan.decoder))


# Shapes: L num_layers, D model_dim, KV kv_dim, H num_heads, V vocab_size, S skip connections, M mlp_hidden
# P numbers of a packed gate
EMBEDDING = "embedding"

EMBEDDING_PARAMETER = "tok_emb.weight"

# matrix kind -> (bank, which part of the bank's first axis); o and v are the second halves of their banks
BANK_OF_KIND: dict[str, tuple[str, int]] = {
    "q": ("qo_bank", 0),
    "k": ("kv_bank", 0),
    "v": ("kv_bank", 1),
    "o": ("qo_bank", 1),
    "up": ("mlp_up_bank", 0),
    "down": ("mlp_down_bank", 0),
}

# Matrices that read the same input share one Hessian: its name -> the kinds, in the order of their rows
KINDS_OF_HESSIAN: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("up",), "down": ("down",)}

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")


def matrix_name(layer: int, kind: str) -> str:
    """Return the name of one matrix, or of one Hessian, of a layer."""
    return f"layers.{layer}.{kind}"


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every parameter of the model that config describes."""
    num_layers, dim, hidden = config.num_layers, config.model_dim, config.mlp_hidden
    num_visits = num_layers + config.num_loops * (config.loop_end - config.loop_start + 1)
    num_skips = num_visits // 2  # the encoder is the first half, rounded down
    return {
        EMBEDDING_PARAMETER: (config.vocab_size, dim),
        "qo_bank": (2 * num_layers, dim, dim),
        "kv_bank": (2 * num_layers, config.kv_dim, dim),
        "mlp_up_bank": (num_layers, hidden, dim),
        "mlp_down_bank": (num_layers, dim, hidden),
        "attn_scale": (num_layers, dim),
        "mlp_scale": (num_layers, dim),
        "resid_mix": (num_layers, 2, dim),
        "q_gain": (num_layers, config.num_heads),
        "skip_weights": (num_skips, dim),
        "skip_gates": (num_skips, dim),
        **optional_shapes(config),
    }


# What an optional parameter starts with where that is not zero. sigmoid(5) = 0.993: an MLP's gate starts almost open.
STARTS = {"lane_merge": 0.5, "lane_keep": 1.1, "lane_write": 1.0, "mlp_gate_bias": 5.0}


def optional_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the parameters that not every configuration has, all small: lanes, gates, passes.

    lane_keep is by layer and lane, lane_write by layer, source (attention, MLP) and lane.
    """
    num_layers, shapes = config.num_layers, dict[str, tuple[int, ...]]()
    if config.lane_routing == "merge":
        shapes["lane_merge"] = ()
    else:
        shapes |= {"lane_keep": (num_layers, 2), "lane_write": (num_layers, 2, 2)}
    if config.attn_gate_width:
        shapes["attn_gate"] = (num_layers, config.num_heads, config.attn_gate_width)
    if config.smear_gate_width:
        shapes |= {"smear_gate": (config.smear_gate_width,), "smear_lambda": ()}
    if config.mlp_gate_width:
        shapes |= {"mlp_gate_weight": (num_layers, config.mlp_gate_width), "mlp_gate_bias": (num_layers,)}
    if config.pass_embeddings:
        shapes["pass_embeddings"] = (config.num_loops + 1, config.model_dim)
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of every tensor after the banks are split, in the artifact's order."""
    shapes = parameter_shapes(config)
    matrices = {
        matrix_name(layer, kind): shapes[bank][1:]
        for kind, (bank, _) in BANK_OF_KIND.items()
        for layer in range(config.num_layers)
    }
    small = {name: shape for name, shape in shapes.items() if name not in BANKS and name != EMBEDDING_PARAMETER}
    return {**matrices, EMBEDDING: shapes[EMBEDDING_PARAMETER], **small}


def split_banks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return views of every matrix and small tensor of a model's state dict, under the artifact's names."""
    num_layers = state["mlp_up_bank"].shape[0]
    tensors = {
        matrix_name(layer, kind): state[bank][part * num_layers + layer]
        for kind, (bank, part) in BANK_OF_KIND.items()
        for layer in range(num_layers)
    }
    small = {name: tensor for name, tensor in state.items() if name not in BANKS and name != EMBEDDING_PARAMETER}
    return {**tensors, EMBEDDING: state[EMBEDDING_PARAMETER], **small}


def join_banks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's state dict from split tensors: the inverse of split_banks."""
    layers = [int(name.split(".")[1]) for name in tensors if name.startswith("layers.")]
    parts: dict[str, list[Tensor]] = {bank: [] for bank in BANKS}
    for kind, (bank, _) in BANK_OF_KIND.items():  # q before o, k before v, as the banks are laid out
        parts[bank] += [tensors[matrix_name(layer, kind)] for layer in range(max(layers) + 1)]
    small = {name: tensor for name, tensor in tensors.items() if name != EMBEDDING and not name.startswith("layers.")}
    banks = {bank: torch.stack(matrices) for bank, matrices in parts.items()}
    return {EMBEDDING_PARAMETER: tensors[EMBEDDING], **banks, **small}


# ---- what a forward pass takes out of the banks ----------------------------------------------------------------------


class LayerWeights(NamedTuple):
    """One layer's weights, taken from the banks: matrices in the compute type, vectors as stored.

    out and down already hold the layer's output scales: a scale on the rows of a matrix costs nothing, a scale on the
    residual stream costs a pass over it. Routes and the MLP's gate are packed into whole pieces of 16 bytes.
    """

    qkv: Tensor  # (D + 2 KV, D)
    out: Tensor  # (D, D), rows times attn_scale
    up: Tensor  # (M, D)
    down: Tensor  # (D, M), rows times mlp_scale
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    resid_mix: Tensor  # (2, D)
    q_gain: Tensor  # (H,)
    attn_gate: Tensor | None  # (H, W)
    routes: Tensor | None  # (8,): lane_keep, then lane_write, then two zeros
    mlp_gate: Tensor | None  # (P,): bias, weights, zeros


def layer_weights(model: Any) -> list[LayerWeights]:
    """Return every layer's weights out of a GPT's parameters, cast once to the compute type.

    Once a forward pass, for all visits: a layer that is visited three times is cast once. While no weight changes,
    they serve any number of passes.
    """
    weights, dtype = dict(model.named_parameters(recurse=False)), model.compute_dtype
    qo, count = weights["qo_bank"], weights["mlp_up_bank"].size(0)
    attn_scale, mlp_scale = weights["attn_scale"], weights["mlp_scale"]
    kv = weights["kv_bank"].to(dtype)
    qkv = torch.cat((qo[:count].to(dtype), kv[:count], kv[count:]), dim=1)
    # scaled before the cast: the product is rounded to the compute type once
    out = (qo[count:] * attn_scale.unsqueeze(-1)).to(dtype)
    up, down = weights["mlp_up_bank"].to(dtype), (weights["mlp_down_bank"] * mlp_scale.unsqueeze(-1)).to(dtype)
    stacked = (qkv, out, up, down, attn_scale, mlp_scale, weights["resid_mix"], weights["q_gain"])
    optional = (weights.get("attn_gate"), _routes(weights), _mlp_gates(weights))
    columns = [[None] * count if each is None else each.unbind(0) for each in (*stacked, *optional)]
    return [LayerWeights(*row) for row in zip(*columns, strict=True)]


def _routes(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return what the lanes keep and take, (L, 8), where they are crossed."""
    if "lane_keep" not in weights:
        return None
    return F.pad(torch.cat((weights["lane_keep"], weights["lane_write"].flatten(1)), dim=1), (0, 2))


def _mlp_gates(weights: Mapping[str, Tensor]) -> Tensor | None:
    """Return the bias and weights of every MLP's gate (L, P), P a multiple of four."""
    if "mlp_gate_weight" not in weights:
        return None
    joined = torch.cat((weights["mlp_gate_bias"].unsqueeze(1), weights["mlp_gate_weight"]), dim=1)
    return F.pad(joined, (0, -joined.size(1) % 4))


# ---- initial weights -------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw_weights(weights: Mapping[str, Tensor], config: ModelConfig, seed: int, *, num_workers: int = 1) -> None:
    """Draw embedding and banks in place, each matrix from a generator of its own, rounded to bf16 once.

    So many matrices are drawn at a time, each by one thread: the bits do not depend on it.
    """
    num_layers, embedding = config.num_layers, torch.empty(weights[EMBEDDING_PARAMETER].shape)
    embedding.normal_(0, config.embedding_init_std, generator=_generator(seed, EMBEDDING_PARAMETER))
    weights[EMBEDDING_PARAMETER].copy_(embedding.bfloat16())
    # Output projections stay zero: at the start every layer passes its stream on as it is.
    weights["qo_bank"].zero_()
    weights["mlp_down_bank"].zero_()
    rows = {"qo_bank": num_layers, "kv_bank": 2 * num_layers, "mlp_up_bank": num_layers}
    places = [(name, index) for name, count in rows.items() for index in range(count)]

    def draw(place: tuple[str, int]) -> Tensor:
        name, index = place
        matrix = torch.empty(weights[name].shape[1:])
        return nn.init.orthogonal_(matrix, generator=_generator(seed, f"{name}/{index}")).bfloat16()

    with ThreadPoolExecutor(num_workers, "draw") as pool:
        for (name, index), matrix in zip(places, pool.map(draw, places), strict=True):
            weights[name][index].copy_(matrix)


def _generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed and a tensor's name only."""
    digest = hashlib.sha256(f"weights/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
