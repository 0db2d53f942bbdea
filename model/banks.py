"""How weights lie in banks, the order in which layers are visited, and the names and shapes that follow from both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


# Shapes: L num_layers, D model_dim, KV kv_dim, H num_heads, V vocab_size, S skip connections
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
        "lane_merge": (),
    }


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
