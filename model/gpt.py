"""The model: weights in banks, a plan of visits to the layers, and the one forward pass.

Training, evaluation, calibration and test-time training all call GPT.forward; nothing is flipped on a live module.
Source: parameter-golf PR #1536. Who knows nanochat's GPT meets twelve things more, each explained where it comes first:

  bank         all layers' matrices of one kind in one tensor                         GPT.__init__
  projection   a matrix product as a module, so that calibration can hook its input   Projection
  visit        one run of a layer; with looping on, some layers come three times      Visit
  rows         sequences packed end to end, or each on its own, padded on the left    GPT.forward
  num_scored   how many positions at the end of each row count                        GPT.forward
  adapters     one low-rank set for each row of the batch and each visit              GPT.forward
  stream       the residual stream, its last addition still to be made                model.kernels.residual
  x0           the embedded tokens, mixed into the stream at every visit              GPT._attend
  XSA          what a token's own value adds to its attention is taken out again      GPT._attention
  skip         what a visit of the first half leaves for one of the second            GPT._run_visits
  lanes        from a layer on, attention and MLPs work on streams of their own       model.kernels.lanes
  softcap      logits squeezed into +-logit_softcap                                   GPT.forward

Parts that a configuration may add (gates, smearing, crossed lanes, vectors for the passes) are off in that recipe;
docs/recipe.md has their formulas and sources.
"""

# B sequences, T tokens, D model_dim, H query heads, K kv heads, E head_dim, V vocab, R lora_rank, L layers
# M mlp_hidden

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention.self_attention import Factors, HeadGate, Rows, self_attention
from model.banks import STARTS, LayerWeights, draw_weights, layer_weights, num_skips, optional_shapes, visit_plan
from model.config import ModelConfig
from model.data.packing import Packing, segment_positions
from model.kernels.adapters import adapt_product, add_low_rank_, add_product, reduce_inputs
from model.kernels.cross_entropy import projected_cross_entropy, softcap_cross_entropy
from model.kernels.dispatch import uses_triton
from model.kernels.lanes import CrossedLanes, Lanes, cross_norm, mean_norm, merge_norm
from model.kernels.mlp import mlp, project_and_activate
from model.kernels.residual import Mix, Skip, Smear, Stream, add_norm, mix_norm, settle, smear_norm
from model.layers import rotary_tables, softcap
from model.lora import HEAD, Adapters, VisitAdapters


class Projection(nn.Module):
    """A matrix product with a weight from a bank; a module only so that calibration can hook its input."""

    def forward(self, x: Tensor, weight: Tensor, function: Any = F.linear) -> Any:
        """Return x W^T for x (..., in) and weight (out, in), or what another function makes of both."""
        return function(x, weight)


class ActivatedProjection(nn.Module):
    """The MLP's first product and its activation, together so that a kernel can do both at once."""

    def forward(self, x: Tensor, weight: Tensor, needs_hidden: bool, slope: float) -> tuple[Tensor | None, Tensor]:
        """Return (x W^T or its signs, its activation); without needs_hidden the first may be None."""
        return project_and_activate(x, weight, needs_hidden, slope)


class Visit(NamedTuple):
    """One run of a layer, with the weights that all its visits share and the adapters of this visit alone."""

    layer: int
    w: LayerWeights
    adapters: VisitAdapters
    shift: Tensor | None  # (D,), added to the stream first of all: the vector of a pass over the repeated block


@dataclass
class Context:
    """What every visit of one forward pass shares."""

    x0: Tensor  # (B, T, D), as the last visit handed it on: its gradient comes back visit by visit
    cos: Tensor  # (T or B x T, rope_dims / 2)
    sin: Tensor
    rows: Rows
    num_scored: int  # positions at the end of each row that are scored


class GPT(nn.Module):
    """The decoder; parameters are created empty (also on the meta device), init_weights fills them."""

    def __init__(
        self, config: ModelConfig, *, compute_dtype: torch.dtype = torch.float32, attention_backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.attention_backend = attention_backend
        num_layers, dim = config.num_layers, config.model_dim
        # Banks, because Muon orthogonalizes all matrices of a bank as one batch, and ranks share a bank out by layer.
        # Two kinds of equal shape lie in one: rows [0, L) are the first, [L, 2 L) the second.
        self.tok_emb = nn.Embedding(config.vocab_size, dim, _weight=torch.empty(config.vocab_size, dim))
        self.qo_bank = nn.Parameter(torch.empty(2 * num_layers, dim, dim))  # queries, then output projections
        self.kv_bank = nn.Parameter(torch.empty(2 * num_layers, config.kv_dim, dim))  # keys, then values
        self.mlp_up_bank = nn.Parameter(torch.empty(num_layers, config.mlp_hidden, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(num_layers, dim, config.mlp_hidden))
        self.attn_scale = nn.Parameter(torch.ones(num_layers, dim))
        self.mlp_scale = nn.Parameter(torch.ones(num_layers, dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(num_layers, dim), torch.zeros(num_layers, dim)), dim=1))
        self.q_gain = nn.Parameter(torch.full((num_layers, config.num_heads), config.q_gain_init))
        # Row j of skip_weights belongs to the j-th visit of the second half, not to a layer: with looping on the same
        # row joins other layers than before.
        self.skip_weights = nn.Parameter(torch.ones(num_skips(config), dim))
        self.skip_gates = nn.Parameter(torch.zeros(num_skips(config), dim))
        for name, shape in optional_shapes(config).items():
            self.register_parameter(name, nn.Parameter(torch.full(shape, STARTS.get(name, 0.0))))
        # by layer, not by visit: a hook hears all visits of its layer
        plain = [f"layers_{i}_{kind}" for i in range(num_layers) for kind in ("qkv", "o", "down")]
        self.projections = nn.ModuleDict({name: Projection() for name in [*plain, "head"]})
        self.projections.update({f"layers_{i}_up": ActivatedProjection() for i in range(num_layers)})

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw the initial weights: each tensor from its own generator, rounded to bf16 once.

        Embedding normal; queries, keys, values and MLP inputs orthogonal; output and MLP down projections zero.
        Drawn on the CPU, each by one thread: the same seed gives the same bits for every device and number of threads.
        """
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the last bits of a QR decomposition depend on it; more than a few also slow it down
        try:
            draw_weights(dict(self.named_parameters()), self.config, seed, num_workers=num_threads)
        finally:
            torch.set_num_threads(num_threads)

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
        weights: list[LayerWeights] | None = None,
    ) -> Tensor:
        """Return the loss in nats (float32), or the capped logits where targets is None.

        tokens (B, T) integers; targets (B, T). packing cuts a single row (B = 1) into segments that do not see each
        other; without it each row is one causal sequence. left_padding (B,) int64: leading tokens of each row that
        do not belong to it. With num_scored = n only the last n positions of each row are scored: targets and results
        have n columns, and work that cannot reach them is left out. adapters: one set a row.
        reduction: "mean" -> scalar; "sum" -> scalar; "none" -> (B, T or n). Logits are (B, T or n, V).
        weights: what layer_weights returned, where no weight has changed since then.
        """
        assert packing is None or (left_padding is None and num_scored is None), "a pack is scored whole"
        hidden = self._run_visits(tokens, is_looped, packing, left_padding, adapters, num_scored, weights)  # (B, n, D)
        # the head is the embedding again (tied weights), and may have an adapter of its own
        embedding, head = self.tok_emb.weight, adapters.head() if adapters is not None else None
        project, cap = self.projections["head"], self.config.logit_softcap
        if head is None and targets is not None:
            return projected_cross_entropy(hidden, embedding, targets, cap, project, reduction=reduction)
        embedding = embedding.to(hidden.dtype)
        if head is None:
            logits = project(hidden, embedding)  # (B, n, V)
        else:
            logits, _ = adapt_product(hidden, embedding, head, {HEAD: (0, embedding.size(0))}, project)
        # cap * tanh(x / cap): logits stay within +-cap, so no token can cost more than 2 * cap + ln V
        if targets is None:
            return softcap(logits, cap)
        return softcap_cross_entropy(logits, targets, cap, reduction=reduction)

    def visit(self, tokens: Tensor, *, is_looped: bool, packing: Packing | None = None) -> None:
        """Run every visit for those who listen to `projections`; arguments as for forward."""
        hidden = self._run_visits(tokens, is_looped, packing, None, None, None)
        # the head's hook hears its input; no row of the embedding is multiplied, for nobody wants the logits
        self.projections["head"](hidden, self.tok_emb.weight[:0].to(hidden.dtype))

    def _run_visits(
        self,
        tokens: Tensor,
        is_looped: bool,
        packing: Packing | None,
        left_padding: Tensor | None,
        adapters: Adapters | None,
        num_scored: int | None,
        weights: list[LayerWeights] | None = None,
    ) -> Tensor:
        """Run every visit and return the final normed hidden state (B, n, D)."""
        # The plan lists layers in the order of their visits: a first half that leaves skips, a second that takes them.
        plan = visit_plan(self.config, is_looped=is_looped)
        visits = self._visits((*plan.encoder, *plan.decoder), is_looped, adapters, weights or layer_weights(self))
        n = num_scored or tokens.size(1)
        x0 = self._embed(tokens, left_padding)  # (B, T, D)
        context = Context(x0, *self._rotary(tokens, packing, left_padding), Rows(packing, left_padding, None, {}), n)
        stream, skips = self._encode(visits[: len(plan.encoder)], context)
        lanes: Lanes | CrossedLanes = Lanes(stream, None)
        for step, visit in enumerate(visits[len(plan.encoder) :]):
            skip = None
            # Last in, first out: the second half goes back through the outputs of the first, as in a U-Net. A skip
            # is merged by a learned gate: (1 - g) * weight * skip + g * x, g the sigmoid of a vector.
            if step < self.skip_weights.size(0) and skips:
                skip = Skip(skips.pop(), self.skip_weights[step], self.skip_gates[step])
            is_last = step + 1 == len(plan.decoder)
            is_one = isinstance(lanes, Lanes) and lanes.mlp is None
            is_parting = is_one and visit.layer >= self.config.parallel_start_layer
            if isinstance(lanes, CrossedLanes) or (is_parting and self.config.lane_routing == "full"):
                lanes = self._cross(visit, lanes, context, skip, is_last=is_last)
            else:
                lanes = self._decode(visit, lanes, context, skip, is_parting=is_parting, is_last=is_last)
        return self._join(lanes, n)

    def _visits(
        self, layers: tuple[int, ...], is_looped: bool, adapters: Adapters | None, weights: list[LayerWeights]
    ) -> list[Visit]:
        """Return the visits: a layer has the same weights at each of its own, but adapters of its own for each."""
        own = [VisitAdapters(None, None)] * len(layers)
        if adapters is not None:  # a layer's output scales lie in its matrices, and so they do in its adapters
            scales = {"o": [weights[i].attn_scale for i in layers], "mlp": [weights[i].mlp_scale for i in layers]}
            own = adapters.scaled({kind: torch.stack(rows) for kind, rows in scales.items()}).visits(len(layers))
        # Each pass over the repeated block begins with a vector of its own, so that a layer can tell the passes apart.
        shifts = iter(self.get_parameter("pass_embeddings") if self.config.pass_embeddings and is_looped else ())
        starts = [next(shifts, None) if layer == self.config.loop_start else None for layer in layers]
        return [Visit(layer, weights[layer], *each) for layer, each in zip(layers, zip(own, starts), strict=True)]

    def _embed(self, tokens: Tensor, left_padding: Tensor | None) -> Tensor:
        """Return x0 (B, T, D), the normed embeddings; with smear each has taken up some of the token before it."""
        x = F.embedding(tokens, self.tok_emb.weight).to(self.compute_dtype)
        if not self.config.smear_gate_width:
            return add_norm(Stream(x, None))[1]
        bos_id = self.config.bos_id if self.config.smear_bos_mask else None
        how = Smear(self.get_parameter("smear_gate"), self.get_parameter("smear_lambda"), bos_id)
        return smear_norm(x, tokens, how, left_padding)

    def _encode(self, visits: list[Visit], context: Context) -> tuple[Stream, list[Tensor]]:
        """Return the stream after the first half of the visits, and what each of them left for the second half."""
        stream = Stream(context.x0, None)
        skips: list[Tensor] = []
        for visit in visits:
            x, stream = self._attend(visit, stream, context)
            # A visit's output exists only once the next one has made the pending addition, so it is kept from there.
            if visit is not visits[0]:
                skips.append(x)
            stream = self._mlp(visit, stream)
        x = settle(stream)
        if visits:
            skips.append(x)
        return Stream(x, None), skips

    def _decode(
        self, visit: Visit, lanes: Lanes, context: Context, skip: Skip | None, *, is_parting: bool, is_last: bool
    ) -> Lanes:
        """Return the lanes after one visit of the second half, which parts them from parallel_start_layer on."""
        n = context.num_scored
        # After the last visit no attention follows that could look at the other positions, unless an MLP still does.
        is_narrow = is_last and n < context.x0.size(1) and (is_parting or lanes.mlp is not None)
        x, attention = self._attend(visit, lanes.attention, context, skip, n if is_narrow else None)
        if is_parting:
            # Nothing but MLPs reads this lane, and they mix no positions: only those that are scored go on in it.
            return Lanes(attention, self._mlp(visit, Stream(last_positions(x, n), None)))
        if lanes.mlp is not None:
            return Lanes(attention, self._mlp(visit, lanes.mlp))
        return Lanes(self._mlp(visit, attention), None)

    def _cross(
        self, visit: Visit, lanes: Lanes | CrossedLanes, context: Context, skip: Skip | None, *, is_last: bool
    ) -> CrossedLanes:
        """Return the lanes after a visit whose attention and MLP both write into both; the first one parts them."""
        w, scale = visit.w, norm_scale(visit.layer)
        mix, width = Mix(context.x0, w.resid_mix), self.config.attn_gate_width
        if isinstance(lanes, Lanes):  # parted as the stream comes in: a skip is merged into attention's lane only
            y, y_normed = add_norm(lanes.attention, scale)
            x, _, normed, columns, context.x0 = mix_norm(Stream(y, None), mix, scale, skip, width)
        else:
            x, y, normed, y_normed, columns, context.x0 = cross_norm(lanes, mix, scale, skip, width)
        n = context.num_scored if is_last else x.size(1)  # what comes after the last visit mixes no positions
        made = self._attention(visit, normed, columns, context, n), self._mlp_output(visit, last_positions(y_normed, n))
        assert w.routes is not None
        return CrossedLanes(last_positions(x, n), last_positions(y, n), *made, w.routes, w.mlp_gate)

    def _join(self, lanes: Lanes | CrossedLanes, n: int) -> Tensor:
        """Return the lanes' mean, by a learned share unless they were crossed, or the one lane; normed (B, n, D)."""
        if isinstance(lanes, CrossedLanes):
            return mean_norm(lanes)
        x, delta, gate = lanes.attention
        stream = Stream(last_positions(x, n), None if delta is None else last_positions(delta, n), gate)
        if lanes.mlp is None:
            return add_norm(stream)[1]
        return merge_norm(stream, lanes.mlp, self.get_parameter("lane_merge"))

    def _attend(
        self, visit: Visit, stream: Stream, context: Context, skip: Skip | None = None, num_queries: int | None = None
    ) -> tuple[Tensor, Stream]:
        """Return the stream as it came in (skip merged), and after the attention part of the layer.

        With num_queries the second is made for the last positions of each row only.
        """
        n = num_queries or stream.x.size(1)
        # x is the stream with skip merged; the block reads mixed = mix[0] * x + mix[1] * x0, by learned vectors, so
        # that the tokens themselves stay within reach of every visit; normed is its norm.
        mix = Mix(context.x0, visit.w.resid_mix, visit.shift)
        scale, width = norm_scale(visit.layer), self.config.attn_gate_width
        x, mixed, normed, columns, context.x0 = mix_norm(stream, mix, scale, skip, width)
        return x, Stream(last_positions(mixed, n), self._attention(visit, normed, columns, context, n))

    def _attention(self, visit: Visit, normed: Tensor, columns: Tensor | None, context: Context, n: int) -> Tensor:
        """Return what attention adds at the last n positions of each row (B, n, D), its scale included."""
        config, (layer, w, adapters, _) = self.config, visit
        qkv, reduced = self._project(visit, normed)  # (B, T, D + 2 K E)
        gate = None
        if columns is not None:  # a factor on every head's output, made from the first columns of what it was made of
            assert w.attn_gate is not None
            gate = HeadGate(last_positions(columns, n), w.attn_gate)
        # XSA (exclusive self-attention, the last xsa_last_n layers): the part of y along the token's own value goes,
        # for the residual stream holds the token already.
        y = self_attention(
            qkv,
            context.cos,
            context.sin,
            w.q_gain,
            context.rows._replace(num_queries=n if n < normed.size(1) else None),
            num_kv_heads=config.num_kv_heads,
            is_value_excluded=layer >= config.num_layers - config.xsa_last_n,
            gate=gate,
            backend=self.attention_backend,
        )  # (B, n, D)
        apply, low_rank = self.projections[f"layers_{layer}_o"], adapters.attention
        if reduced is None or low_rank is None:
            output: Tensor = apply(y, w.out)
            return output
        # TRAP: o-LoRA reads the block's input, not y, as the reference does
        return add_product(y, w.out, last_positions(reduced, n), low_rank, "o", apply)

    def _project(self, visit: Visit, normed: Tensor) -> tuple[Tensor | Factors, Tensor | None]:
        """Return the joined queries, keys and values, or their factors, and what an o adapter makes of the input."""
        apply, weight, adapters = self.projections[f"layers_{visit.layer}_qkv"], visit.w.qkv, visit.adapters.attention
        if adapters is None:
            return Factors(normed, weight, apply), None
        dim, width = self.config.model_dim, self.config.kv_dim
        places = {"q": (0, dim), "k": (dim, dim + width), "v": (dim + width, dim + 2 * width)}
        columns = {kind: place for kind, place in places.items() if kind in adapters.b}
        return adapt_product(normed, weight, adapters, columns, apply)

    def _mlp(self, visit: Visit, stream: Stream) -> Stream:
        """Return the stream after the MLP part of the layer; its gate, where it has one, counts what the MLP adds."""
        x, normed = add_norm(stream, norm_scale(visit.layer))
        return Stream(x, self._mlp_output(visit, normed), visit.w.mlp_gate)

    def _mlp_output(self, visit: Visit, normed: Tensor) -> Tensor:
        """Return what the MLP makes of its normed input (B, n, D), its scale included."""
        layer, w, adapters, _ = visit
        up, down = (self.projections[f"layers_{layer}_{kind}"] for kind in ("up", "down"))
        if adapters.mlp is None:
            return mlp(normed, w.up, w.down, up, down, self.config.leaky_slope)
        reduced, normed = reduce_inputs(normed, adapters.mlp)
        out = mlp(normed, w.up, w.down, up, down, self.config.leaky_slope)
        return add_low_rank_(out, reduced, adapters.mlp, "mlp")

    def _rotary(self, tokens: Tensor, packing: Packing | None, left_padding: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the rotation tables for every position of the rows."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        if left_padding is not None:
            # from 0 at a row's first own token; what stands before it is masked, so any angle does
            positions = (positions - left_padding.unsqueeze(1)).clamp_min(0)  # (B, T)
        elif packing is not None and self.config.rotary_positions == "segment":
            # "packed", as published, counts on over the whole row: the same scores in exact arithmetic
            positions = segment_positions(packing, tokens.size(1))
        dtype = torch.float64 if self.compute_dtype == torch.float64 else torch.float32
        return rotary_tables(positions, rope_dims=self.config.rope_dims, base=self.config.rope_base, dtype=dtype)


def build_model(
    config: ModelConfig, device: torch.device, *, embedding_dtype: str = "float32", attention: str = "auto"
) -> GPT:
    """Return an unfilled model on a device, its embedding stored in embedding_dtype.

    Activations are bf16 on CUDA and float32 on a CPU, where bf16 is many times slower.
    """
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = GPT(config, compute_dtype=compute_dtype, attention_backend=attention).to(device)
    model.tok_emb.weight.data = model.tok_emb.weight.data.to(getattr(torch, embedding_dtype))
    return model


def last_positions(x: Tensor, n: int) -> Tensor:
    """Return the last n positions of each row of x (B, T, D), x itself where that is all: slicing costs a backward."""
    return x if x.size(1) == n else x[:, -n:]


def norm_scale(layer: int) -> float:
    """Return 1 / sqrt(layer + 1), the factor on the normed inputs of a layer (by layer, not by visit)."""
    return (layer + 1) ** -0.5


def fits_graphs(model: GPT) -> bool:
    """Return whether this model's work can be recorded: 16-bit floats on CUDA, where nothing waits for the host."""
    return uses_triton(torch.empty(0, dtype=model.compute_dtype, device=model.qo_bank.device))


def fits_row_graphs(model: GPT) -> bool:
    """Return whether packed rows can be recorded too: "sdpa" lays out their segments on the host."""
    return fits_graphs(model) and model.attention_backend != "sdpa"
