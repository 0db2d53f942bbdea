"""The model: weights in banks, a plan of visits to the layers, and the one forward pass.

Training, evaluation, calibration and test-time training all call GPT.forward. Calibration listens through forward
pre-hooks on the modules in `projections`; test-time training passes adapters; nothing is flipped on a live module.
Source: parameter-golf PR #1536.
"""

# B sequences, T tokens, D model_dim, H query heads, K kv heads, E head_dim, V vocab, R lora_rank, L layers, M mlp_hidden

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.data.packing import Packing, segment_positions
from model.kernels.attention import attention
from model.kernels.cross_entropy import softcap_cross_entropy
from model.kernels.window_attention import window_attention
from model.layers import (
    exclude_own_value,
    low_rank,
    merge_skip,
    normalize_and_rotate,
    rms_norm,
    rotary_tables,
    softcap,
    squared_leaky_relu,
)
from model.lora import Adapters, Pair

BANKS = ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
EMBEDDING = "tok_emb.weight"


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


class Projection(nn.Module):
    """A matrix product with a weight from a bank; a module only so that calibration can hook its input."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x W^T for x (..., in) and weight (out, in)."""
        return F.linear(x, weight)


class LayerWeights(NamedTuple):
    """One layer's weights in the compute type."""

    qkv: Tensor  # (D + 2 K E, D)
    out: Tensor  # (D, D)
    up: Tensor  # (M, D)
    down: Tensor  # (D, M)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    resid_mix: Tensor  # (2, D)
    q_gain: Tensor  # (H,)


class Context(NamedTuple):
    """What every visit of one forward pass shares."""

    x0: Tensor  # (B, T, D)
    cos: Tensor  # (T or B x T, rope_dims / 2)
    sin: Tensor
    packing: Packing | None
    left_padding: Tensor | None  # (B,)


class GPT(nn.Module):
    """The decoder; parameters are created empty (also on the meta device), init_weights fills them."""

    def __init__(self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        num_layers, dim = config.num_layers, config.model_dim
        self.tok_emb = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, dim), freeze=False)
        self.qo_bank = nn.Parameter(torch.empty(2 * num_layers, dim, dim))  # queries, then output projections
        self.kv_bank = nn.Parameter(torch.empty(2 * num_layers, config.kv_dim, dim))  # keys, then values
        self.mlp_up_bank = nn.Parameter(torch.empty(num_layers, config.mlp_hidden, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(num_layers, dim, config.mlp_hidden))
        self.attn_scale = nn.Parameter(torch.ones(num_layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(num_layers, dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(num_layers, dim), torch.zeros(num_layers, dim)), dim=1))
        self.q_gain = nn.Parameter(torch.full((num_layers, config.num_heads), config.q_gain_init))
        self.skip_weights = nn.Parameter(torch.ones(num_skips(config), dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips(config), dim))
        self.lane_merge = nn.Parameter(torch.tensor(0.5))
        names = [f"layers_{i}_{kind}" for i in range(num_layers) for kind in ("qkv", "o", "up", "down")]
        self.projections = nn.ModuleDict({name: Projection() for name in [*names, "head"]})

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights: each tensor from its own generator, rounded to bf16 once.

        Embedding normal; queries, keys, values and MLP inputs orthogonal; output and MLP down projections zero.
        """
        config, num_layers = self.config, self.config.num_layers
        self.tok_emb.weight.normal_(0, config.embedding_init_std, generator=_generator(seed, EMBEDDING))
        self.qo_bank.zero_()
        self.mlp_down_bank.zero_()
        for name, rows in (("qo_bank", num_layers), ("kv_bank", 2 * num_layers), ("mlp_up_bank", num_layers)):
            for index in range(rows):
                nn.init.orthogonal_(getattr(self, name)[index], generator=_generator(seed, f"{name}/{index}"))
        for name in BANKS:
            bank = getattr(self, name)
            bank.copy_(bank.bfloat16())
        self.tok_emb.weight.copy_(self.tok_emb.weight.bfloat16())

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        is_looped: bool,
        packing: Packing | None = None,
        left_padding: Tensor | None = None,
        adapters: Adapters | None = None,
        num_scored: int | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Return the loss in nats (float32), or the capped logits where targets is None.

        tokens (B, T) integers; targets (B, T). packing cuts a single row (B = 1) into segments that do not see each
        other; without it each row is one causal sequence. left_padding (B,) int64: leading tokens of each row that
        are no part of it. With num_scored = n only the last n positions of each row are scored: targets and results
        have n columns, and work that cannot reach them is left out. adapters: one set a row.
        reduction: "mean" -> scalar; "sum" -> scalar; "none" -> (B, T or n). Logits are (B, T or n, V).
        """
        hidden = self._hidden(tokens, is_looped, packing, left_padding, adapters, num_scored)  # (B, n, D)
        logits = self.projections["head"](hidden, self.tok_emb.weight.to(hidden.dtype))  # (B, n, V)
        pair = adapters.head() if adapters is not None else None
        if pair is not None:
            logits = logits + low_rank(hidden, pair)
        if targets is None:
            return softcap(logits, self.config.logit_softcap)
        return softcap_cross_entropy(logits, targets, self.config.logit_softcap, reduction=reduction)

    def _hidden(
        self, tokens: Tensor, is_looped: bool, packing: Packing | None, left_padding: Tensor | None,
        adapters: Adapters | None, num_scored: int | None,
    ) -> Tensor:
        """Run every visit and return the final normed hidden state (B, n, D)."""
        plan = visit_plan(self.config, is_looped=is_looped)
        pairs = adapters.by_visit(plan.num_visits) if adapters is not None else [{}] * plan.num_visits
        weights = self._layer_weights()
        n = num_scored or tokens.size(1)
        x = rms_norm(F.embedding(tokens, self.tok_emb.weight).to(self.compute_dtype))  # (B, T, D)
        cos, sin = self._rotary(tokens, packing, left_padding)
        context = Context(x, cos, sin, packing, left_padding)
        skips: list[Tensor] = []
        for visit, layer in enumerate(plan.encoder):
            x = self._attend(layer, x, weights[layer], context, pairs[visit])
            x = x + self._mlp(layer, x, weights[layer], pairs[visit])
            skips.append(x)
        lane: Tensor | None = None  # the MLPs' lane, once the lanes have parted
        for step, layer in enumerate(plan.decoder):
            visit = len(plan.encoder) + step
            if step < self.skip_weights.size(0) and skips:
                x = merge_skip(x, skips.pop(), self.skip_weights[step], self.skip_gates[step])
            if lane is None and layer >= self.config.parallel_start_layer:
                lane = x[:, -n:]  # no MLP of this lane looks at another position
            if lane is None:
                x = self._attend(layer, x, weights[layer], context, pairs[visit])
                x = x + self._mlp(layer, x, weights[layer], pairs[visit])
            else:
                num_queries = n if visit + 1 == plan.num_visits else x.size(1)
                x = self._attend(layer, x, weights[layer], context, pairs[visit], num_queries)
                lane = lane + self._mlp(layer, lane, weights[layer], pairs[visit])
        x = x[:, -n:]
        if lane is not None:
            share = self.lane_merge.to(x.dtype)
            x = share * x + (1 - share) * lane
        return rms_norm(x)

    def _attend(
        self, layer: int, x: Tensor, w: LayerWeights, context: Context, pairs: dict[str, Pair],
        num_queries: int | None = None,
    ) -> Tensor:
        """Return a*x + b*x0 plus the scaled attention output, for the last num_queries positions of each row."""
        config = self.config
        batch, time, _ = x.shape
        n = num_queries or time
        mixed = w.resid_mix[0] * x + w.resid_mix[1] * context.x0
        normed = rms_norm(mixed, norm_scale(layer))
        sizes = (config.model_dim, config.kv_dim, config.kv_dim)
        q, k, v = self.projections[f"layers_{layer}_qkv"](normed, w.qkv).split(sizes, dim=-1)
        if pairs:
            q, k, v = (
                base + low_rank(normed, pairs[kind]) if kind in pairs else base
                for kind, base in (("q", q), ("k", k), ("v", v))
            )
        q = q.view(batch, time, config.num_heads, config.head_dim)
        k = k.view(batch, time, config.num_kv_heads, config.head_dim)
        v = v.view(batch, time, config.num_kv_heads, config.head_dim)
        q = normalize_and_rotate(q[:, -n:], context.cos[..., -n:, :], context.sin[..., -n:, :], w.q_gain)
        k = normalize_and_rotate(k, context.cos, context.sin)
        if context.left_padding is None and n == time:
            y = attention(q, k, v, context.packing)  # (B, T, H, E)
        else:
            y = window_attention(q, k, v, context.left_padding)  # (B, n, H, E)
        if layer >= config.num_layers - config.xsa_last_n:
            y = exclude_own_value(y, v[:, -n:])
        out = self.projections[f"layers_{layer}_o"](y.reshape(batch, n, config.model_dim), w.out)
        if "o" in pairs:
            out = out + low_rank(normed[:, -n:], pairs["o"])
        return mixed[:, -n:] + w.attn_scale * out

    def _mlp(self, layer: int, x: Tensor, w: LayerWeights, pairs: dict[str, Pair]) -> Tensor:
        """Return the scaled MLP output for x (B, T, D)."""
        normed = rms_norm(x, norm_scale(layer))
        hidden = squared_leaky_relu(self.projections[f"layers_{layer}_up"](normed, w.up))  # (B, T, M)
        out = self.projections[f"layers_{layer}_down"](hidden, w.down)
        if "mlp" in pairs:
            out = out + low_rank(normed, pairs["mlp"])
        return w.mlp_scale * out

    def _layer_weights(self) -> list[LayerWeights]:
        """Return every layer's weights, cast once to the compute type."""
        dtype, count = self.compute_dtype, self.config.num_layers
        qo, kv = self.qo_bank.to(dtype).unbind(0), self.kv_bank.to(dtype).unbind(0)
        up, down = self.mlp_up_bank.to(dtype).unbind(0), self.mlp_down_bank.to(dtype).unbind(0)
        attn_scale, mlp_scale = self.attn_scale.to(dtype).unbind(0), self.mlp_scale.to(dtype).unbind(0)
        mix, gain = self.resid_mix.to(dtype).unbind(0), self.q_gain.unbind(0)
        return [
            LayerWeights(
                torch.cat((qo[i], kv[i], kv[count + i])), qo[count + i], up[i], down[i],
                attn_scale[i], mlp_scale[i], mix[i], gain[i],
            )
            for i in range(count)
        ]

    def _rotary(
        self, tokens: Tensor, packing: Packing | None, left_padding: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the rotation tables for every position of the rows."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        if left_padding is not None:
            positions = (positions - left_padding.unsqueeze(1)).clamp_min(0)  # (B, T)
        elif packing is not None and self.config.rotary_positions == "segment":
            positions = segment_positions(packing, tokens.size(1))
        dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        return rotary_tables(positions, rope_dims=self.config.rope_dims, base=self.config.rope_base, dtype=dtype)


def norm_scale(layer: int) -> float:
    """Return 1 / sqrt(layer + 1), the factor on the normed inputs of a layer (by layer, not by visit)."""
    return (layer + 1) ** -0.5


def _generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator that depends on the seed and a tensor's name only."""
    digest = hashlib.sha256(f"weights/{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
