"""Every setting of a run, as frozen dataclasses, with presets and the hash that names a configuration.

Three kinds of fields: what decides the score (model, train, quant, ttt, evaluation: hashed), what is run on
(data: hashed apart), and how it is run (seed, runtime: not hashed). Importing this module needs no torch.
Numbers without a source are those of the reference record, parameter-golf PR #1536.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from model.fields import added, fit_fields, plain_settings, require, require_choice

SIZE_LIMIT_BYTES = 16_000_000  # of the track: model and code, decimal
TIME_LIMIT_S = 600.0  # of the track: training, and again evaluation
FloatType = Literal["bfloat16", "float32"]
ADAPTER_KINDS = ("q", "k", "v", "o", "mlp", "head")
ATTENTION_BACKENDS = ("auto", "sdpa", "varlen", "fa2", "fa3", "fa4", "triton")  # see model/attention/backends.py


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A GPT with shared weight banks, depth recurrence, U-Net skips and two lanes near the end."""

    vocab_size: int = 8192
    num_layers: int = 11
    model_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 4
    mlp_mult: float = 4.0  # hidden width over model_dim
    rope_dims: int = 16  # of head_dim; the other dims are not rotated
    rope_base: float = 10_000.0
    rotary_positions: Literal["segment", "packed"] = "segment"  # packed: index in the row, as published
    xsa_last_n: int = 11  # layers, counted from the last, that remove a token's own value direction
    loop_start: int = 3  # first layer of the repeated block
    loop_end: int = 5  # last layer of the repeated block
    num_loops: int = 2  # extra passes over the block once looping is on
    parallel_start_layer: int = 7  # from here attention and MLP read separate lanes
    logit_softcap: float = 30.0
    q_gain_init: float = 5.0
    embedding_init_std: float = 0.005
    lane_routing: Literal["merge", "full"] = added("merge")  # full: both lanes take from attention and MLPs (PR #1529)
    attn_gate_width: int = added(0)  # input columns that decide a factor on each head's output (PR #1667); 0: none
    smear_gate_width: int = added(0)  # columns that decide how much of the token before is added (PR #1667); 0: none
    smear_bos_mask: bool = added(True)  # a document's first token takes nothing from the document before
    bos_id: int = added(1)  # for that mask
    leaky_slope: float = added(0.5)  # of the activation below zero
    mlp_gate_width: int = added(0)  # columns that decide a factor on the MLP's output (PR #1941); 0: none
    pass_embeddings: bool = added(False)  # a vector for each pass over the repeated block (PR #1518)

    def __post_init__(self) -> None:
        fit_fields(self, "model")
        for name in ("vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads"):
            require(getattr(self, name) >= 1, f"model.{name}={getattr(self, name)} must be at least 1")
        dim, heads, kv_heads = self.model_dim, self.num_heads, self.num_kv_heads
        require(dim % heads == 0, f"model.num_heads={heads} must divide model.model_dim={dim}")
        require(heads % kv_heads == 0, f"model.num_kv_heads={kv_heads} must divide model.num_heads={heads}")
        require(self.vocab_size <= 65_536, f"model.vocab_size={self.vocab_size} must fit uint16 tokens (at most 65536)")
        require(
            self.rope_dims % 2 == 0 and 0 < self.rope_dims <= self.head_dim,
            f"model.rope_dims={self.rope_dims} must be even and at most the head width {self.head_dim}",
        )
        require(
            0 <= self.loop_start <= self.loop_end < self.num_layers,
            f"model.loop_start={self.loop_start} and model.loop_end={self.loop_end} must satisfy "
            f"0 <= loop_start <= loop_end < num_layers={self.num_layers}",
        )
        require(self.num_loops >= 0, f"model.num_loops={self.num_loops} must not be negative")
        require(
            0 <= self.xsa_last_n <= self.num_layers,
            f"model.xsa_last_n={self.xsa_last_n} must be between 0 and num_layers={self.num_layers}",
        )
        require(self.mlp_hidden >= 1, f"model.mlp_mult={self.mlp_mult} leaves no hidden unit")
        for name in ("rope_base", "logit_softcap"):
            require(getattr(self, name) > 0, f"model.{name}={getattr(self, name)} must be positive")
        for name in ("parallel_start_layer", "embedding_init_std"):
            require(getattr(self, name) >= 0, f"model.{name}={getattr(self, name)} must not be negative")
        for name in ("attn_gate_width", "smear_gate_width", "mlp_gate_width"):
            value = getattr(self, name)
            require(0 <= value <= self.model_dim, f"model.{name}={value} must be 0 to model.model_dim={self.model_dim}")
        require(
            not self.smear_gate_width or 0 <= self.bos_id < self.vocab_size,
            f"model.bos_id={self.bos_id} must be a token: 0 to {self.vocab_size - 1}",
        )
        require(0 <= self.leaky_slope <= 1, f"model.leaky_slope={self.leaky_slope} must be between 0 and 1")
        require(
            not self.pass_embeddings or self.parallel_start_layer > self.loop_end,
            f"model.pass_embeddings=true needs model.parallel_start_layer={self.parallel_start_layer} above "
            f"model.loop_end={self.loop_end}: the vectors are added where there is one lane",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.model_dim // self.num_heads

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    @property
    def mlp_hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.mlp_mult * self.model_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Batching, schedule and optimizers of the training stage."""

    max_steps: int = 20_000
    budget_s: float | None = TIME_LIMIT_S  # wall clock; None: the schedule counts steps instead
    reserve_s: float = 12.0  # part of budget_s kept for calibration and quantization
    batch_tokens: int = 786_432  # per optimizer step, all ranks together
    micro_batch_tokens: int = 98_304  # inputs of one span, one packed row
    seq_len: int = 2048  # longest attention segment, tokens
    span_group: int = 8  # consecutive spans taken from one shard
    warmdown_frac: float = 0.667
    min_lr_frac: float = 0.0
    loop_start_frac: float = 0.35  # looping is on from this fraction of the schedule
    embedding_lr: float = 0.03
    matrix_lr: float = 0.022
    vector_lr: float = 0.02
    embedding_weight_decay: float = 0.095
    matrix_weight_decay: float = 0.095
    vector_weight_decay: float = 0.02
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    muon_momentum: float = 0.97
    muon_momentum_start: float = 0.92
    muon_momentum_warmup_steps: int = 1500
    newton_schulz_steps: int = 5
    newton_schulz_dtype: FloatType = "bfloat16"  # of gradient, momentum and iteration alike
    embedding_dtype: FloatType = "bfloat16"  # master copy, gradient and moments of the embedding
    grad_clip_norm: float = 0.3
    clip: Literal["per_micro_batch", "per_rank", "global"] = "per_micro_batch"
    ema_decay: float = 0.997
    orthogonalization: Literal["newton_schulz", "polar_express"] = added("newton_schulz")
    ema_horizon_frac: float | None = added(None)  # the average's memory, 1 / (1 - decay) steps; None: ema_decay counts
    muon_momentum_warmup_frac: float | None = added(None)  # None: muon_momentum_warmup_steps counts

    def __post_init__(self) -> None:
        fit_fields(self, "train")
        for name in ("max_steps", "batch_tokens", "micro_batch_tokens", "seq_len", "span_group", "newton_schulz_steps"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)} must be at least 1")
        require(
            self.batch_tokens % self.micro_batch_tokens == 0,
            f"train.micro_batch_tokens={self.micro_batch_tokens} must divide train.batch_tokens={self.batch_tokens}",
        )
        require(
            self.budget_s is None or 0 <= self.reserve_s < self.budget_s,
            f"train.reserve_s={self.reserve_s} must be below train.budget_s={self.budget_s}",
        )
        for name in ("warmdown_frac", "min_lr_frac", "loop_start_frac", "ema_decay"):
            require(0 <= getattr(self, name) <= 1, f"train.{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum", "muon_momentum_start"):
            require(0 <= getattr(self, name) < 1, f"train.{name}={getattr(self, name)} must be at least 0 and below 1")
        for name in (
            *(f"{group}_{what}" for group in ("embedding", "matrix", "vector") for what in ("lr", "weight_decay")),
            "muon_momentum_warmup_steps",
        ):
            require(getattr(self, name) >= 0, f"train.{name}={getattr(self, name)} must not be negative")
        for name in ("grad_clip_norm", "adam_eps"):
            require(getattr(self, name) > 0, f"train.{name}={getattr(self, name)} must be positive")
        horizon, warmup = self.ema_horizon_frac, self.muon_momentum_warmup_frac
        require(horizon is None or 0 < horizon <= 1, f"train.ema_horizon_frac={horizon} must be above 0 and at most 1")
        require(warmup is None or 0 <= warmup <= 1, f"train.muon_momentum_warmup_frac={warmup} must be between 0 and 1")

    @property
    def micro_batches_per_step(self) -> int:
        """Spans of one optimizer step over all ranks."""
        return self.batch_tokens // self.micro_batch_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantConfig:
    """Calibration, GPTQ rounding and the artifact's size limit."""

    matrix_bits: int = 6
    matrix_clip_sigmas: float = 12.85  # row scale = clip_sigmas * std / qmax
    embedding_bits: int = 8
    embedding_clip_sigmas: float = 20.0
    num_calibration_batches: int = 64
    calibration_windows: int = 48  # per batch
    calibration_seq_len: int = 2048
    calibration_documents: Literal["masked", "unmasked"] = "masked"
    damping_frac: float = 0.01  # of the Hessian's mean diagonal
    block_columns: int = 128
    keep_float_numel: int = 65_536  # tensors of at most this many numbers stay float16
    size_limit_bytes: int = SIZE_LIMIT_BYTES  # model + code, decimal
    on_oversize: Literal["mark", "fail", "fit"] = "mark"
    codec: Literal["rans", "brotli"] = "rans"  # of the artifact's codes; the same weights either way
    attention_clip_sigmas: float | None = added(None)  # None: matrix_clip_sigmas
    mlp_clip_sigmas: float | None = added(None)  # None: matrix_clip_sigmas
    looped_attention_clip_sigmas: float | None = added(None)  # in the repeated block; None: as outside
    looped_mlp_clip_sigmas: float | None = added(None)  # in the repeated block; None: as outside
    fit_unit: Literal["group", "matrix"] = added("group")  # what on_oversize "fit" chooses clip_sigmas for
    lqer_rank: int = added(0)  # of the correction of a rounded embedding (LQER, PR #1797); 0: none
    lqer_group: int = added(64)  # entries of the correction's second factor that share a scale

    def __post_init__(self) -> None:
        fit_fields(self, "quant")
        for name in ("matrix_bits", "embedding_bits"):
            require(2 <= getattr(self, name) <= 8, f"quant.{name}={getattr(self, name)} must be between 2 and 8")
        clips = [field.name for field in dataclasses.fields(self) if field.name.endswith("_clip_sigmas")]
        for name in (*clips, "damping_frac"):
            value = getattr(self, name)
            require(value is None or value > 0, f"quant.{name}={value} must be positive")
        for name in (
            "num_calibration_batches", "calibration_windows", "calibration_seq_len", "block_columns",
            "size_limit_bytes", "lqer_group",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"quant.{name}={getattr(self, name)} must be at least 1")
        for name in ("keep_float_numel", "lqer_rank"):
            require(getattr(self, name) >= 0, f"quant.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Plain evaluation: the whole validation stream in packed rows."""

    row_tokens: int = 65_536  # inputs of one packed row
    seq_len: int = 2048  # longest attention segment, tokens
    tail: Literal["scored", "dropped"] = "scored"  # dropped: only whole rows, as published

    def __post_init__(self) -> None:
        fit_fields(self, "evaluation")
        require(self.seq_len >= 1, f"evaluation.seq_len={self.seq_len} must be at least 1")
        require(
            self.row_tokens >= 1 and self.row_tokens % self.seq_len == 0,
            f"evaluation.row_tokens={self.row_tokens} must be a multiple of evaluation.seq_len={self.seq_len}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TTTConfig:
    """Per-document LoRA test-time training."""

    lora_rank: int = 96
    lr: float = 1e-4
    weight_decay: float = 0.5
    beta2: float = 0.999  # Adam's second moment; beta1 is 0
    eps: float = 1e-10
    chunk_tokens: int = 64  # predictions scored between two updates
    window_tokens: int = 2048  # before the chunk's end, the chunk's own included
    updates_per_chunk: int = 1
    adapter_kinds: tuple[str, ...] = ADAPTER_KINDS
    adapter_key: Literal["seed", "document"] = "seed"  # what A's starting value depends on besides visit and kind
    order: Literal["stream", "sorted"] = "stream"  # sorted: by length over the whole set, as published
    batch_documents: int = 64  # adapter slots held at once
    lora_alpha: float | None = added(None)  # an adapter's result is multiplied by alpha / rank; None: by 1
    # (limit, chunk): documents of at most limit tokens, the next one's first counted, have chunks of so many; the first
    # limit that holds counts, chunk_tokens above all
    chunk_by_length: tuple[tuple[int, int], ...] = added(())

    def __post_init__(self) -> None:
        fit_fields(self, "ttt")
        for name in ("lora_rank", "chunk_tokens", "window_tokens", "updates_per_chunk", "batch_documents"):
            require(getattr(self, name) >= 1, f"ttt.{name}={getattr(self, name)} must be at least 1")
        require(
            self.window_tokens >= self.chunk_tokens,
            f"ttt.window_tokens={self.window_tokens} must be at least ttt.chunk_tokens={self.chunk_tokens}",
        )
        for name in ("lr", "weight_decay"):
            require(getattr(self, name) >= 0, f"ttt.{name}={getattr(self, name)} must not be negative")
        require(self.eps > 0, f"ttt.eps={self.eps} must be positive")
        alpha, limits = self.lora_alpha, [limit for limit, _ in self.chunk_by_length]
        require(alpha is None or alpha > 0, f"ttt.lora_alpha={alpha} must be positive, or left out for a scale of 1")
        shown = f"ttt.chunk_by_length={[list(pair) for pair in self.chunk_by_length]}"
        require(limits == sorted({0, *limits})[1:], f"{shown}: limits must be positive, each above the one before it")
        for _, chunk in self.chunk_by_length:
            require(
                1 <= chunk <= self.window_tokens,
                f"{shown}: a chunk of {chunk} must be at least 1 and at most ttt.window_tokens={self.window_tokens}",
            )
        require(0 < self.beta2 < 1, f"ttt.beta2={self.beta2} must be between 0 and 1")
        kinds = self.adapter_kinds
        require(0 < len(set(kinds)) == len(kinds), f"ttt.adapter_kinds={list(kinds)} must be one or more, none twice")
        for kind in kinds:
            require_choice("ttt.adapter_kinds", kind, ADAPTER_KINDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where tokens come from. train and val are globs of shards; limits cut the validation stream."""

    train: str = ""
    val: str = ""
    tokenizer: str = ""
    val_documents: int | None = None
    val_tokens: int | None = None

    def __post_init__(self) -> None:
        fit_fields(self, "data")
        for name in ("train", "val", "tokenizer"):  # "~" is whoever's home wrote it down; from here on paths are plain
            object.__setattr__(self, name, os.path.expanduser(getattr(self, name)))
        for name in ("val_documents", "val_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}={value} must be at least 1, or left out")


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeConfig:
    """How a run is executed; nothing here may change a score beyond rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    attention: str = "auto"
    checkpoint_every_s: float = 120.0  # inside training; 0 turns checkpoints off
    report_every_s: float = 1.0

    def __post_init__(self) -> None:
        fit_fields(self, "runtime")
        require_choice("runtime.attention", self.attention, ATTENTION_BACKENDS)
        for name in ("checkpoint_every_s", "report_every_s"):
            require(getattr(self, name) >= 0, f"runtime.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One seed of one recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    seed: int = 42

    def __post_init__(self) -> None:
        fit_fields(self, "")
        quant, entries = self.quant, self.quant.lqer_rank * self.model.model_dim
        require(
            quant.lqer_rank <= min(self.model.vocab_size, self.model.model_dim) and entries % quant.lqer_group == 0,
            f"quant.lqer_rank={quant.lqer_rank} must be at most the embedding's smaller side, and times "
            f"model.model_dim={self.model.model_dim} a multiple of quant.lqer_group={quant.lqer_group}",
        )


def config_from_plain(content: Mapping[str, Any]) -> RunConfig:
    """Return the configuration that plain_settings or JSON made plain; what is left out has its default.

    Raises ValueError naming a section or setting that does not exist, or a value that cannot be.
    """
    sections: dict[str, Any] = {}
    for name, value in content.items():
        kind = SECTIONS.get(name)
        if name == "seed":
            sections[name] = value
            continue
        require(kind is not None and isinstance(value, Mapping), f"configuration has no section {name!r}")
        assert kind is not None
        unknown = sorted(set(value) - {entry.name for entry in dataclasses.fields(kind)})
        require(not unknown, f"configuration has no setting {name}.{unknown[0] if unknown else ''}")
        sections[name] = kind(**value)
    return RunConfig(**sections)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig, "train": TrainConfig, "quant": QuantConfig, "evaluation": EvalConfig, "ttt": TTTConfig,
    "data": DataConfig, "runtime": RuntimeConfig,
}  # fmt: skip
HASHED_SECTIONS = ("model", "train", "quant", "ttt", "evaluation")
RECIPE_SECTIONS = ("model", "train", "quant")  # of an artifact


def config_hash(config: RunConfig, *, world_size: int) -> str:
    """Return the sha256 (hex) of everything in config that decides a score, and the number of ranks.

    Seed, data paths and runtime settings do not enter.
    """
    return _hash_sections(config, HASHED_SECTIONS, world_size)


def recipe_hash(config: RunConfig, *, world_size: int) -> str:
    """Return the sha256 (hex) of the sections of config that make an artifact, and the number of ranks.

    How it is scored does not enter, though under quant.on_oversize "fit" every setting in the program moves weights.
    """
    return _hash_sections(config, RECIPE_SECTIONS, world_size)


def _hash_sections(config: RunConfig, sections: tuple[str, ...], world_size: int) -> str:
    plain = {"world_size": world_size, **{name: plain_settings(getattr(config, name)) for name in sections}}
    return hashlib.sha256(canonical_json(plain).encode()).hexdigest()


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no spaces, the form that hashes are taken over."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
