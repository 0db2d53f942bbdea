"""The smallest model that has every part, token streams for it, and settings that run it in a second.

For tests of the model package; tests/micro.py has the smallest spec for those of the runner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import EvalConfig, ModelConfig, QuantConfig, RunConfig, RuntimeConfig, TrainConfig, TTTConfig
from model.corpus.shard_file import write_shard
from model.data.loader import SpanLoader
from model.data.shards import BOS_ID, find_documents
from model.data.tokenizer import ByteTable
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT

VOCAB_SIZE = 64

# settings of the model that are off in the published recipe: each alone, and all of them
FRONTIER_PARTS: dict[str, dict[str, Any]] = {
    "lanes": {"lane_routing": "full"},
    "attn_gate": {"attn_gate_width": 5},
    "smear": {"smear_gate_width": 6},
    "slope": {"leaky_slope": 0.3},
    "mlp_gate": {"mlp_gate_width": 7},
    "passes": {"pass_embeddings": True},
}
FRONTIER_PARTS["all"] = {name: value for part in FRONTIER_PARTS.values() for name, value in part.items()}
# the MLP's gate where lanes stay apart until the end, and the whole width of everything
FRONTIER_PARTS["apart"] = {**FRONTIER_PARTS["all"], "lane_routing": "merge"}
FRONTIER_PARTS["wide"] = {**FRONTIER_PARTS["all"], **dict.fromkeys(
    ("attn_gate_width", "smear_gate_width", "mlp_gate_width"), 32
)}  # fmt: skip


class LoneRank(Dist):
    """One rank of a gang whose others are not there: it gets back what it brought."""

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return tensor as it is."""
        return tensor


def ignore(_phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
    """Take a progress report and do nothing with it."""


def micro_model(**changes: Any) -> ModelConfig:
    """Five layers (an odd number, so that banks do not share out evenly), visits 0 1 2 | 1 2 3 4 with looping."""
    fields = {
        "vocab_size": VOCAB_SIZE, "num_layers": 5, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2.0,
        "rope_dims": 4, "xsa_last_n": 5, "loop_start": 1, "loop_end": 2, "num_loops": 1, "parallel_start_layer": 3,
    }  # fmt: skip
    return ModelConfig(**{**fields, **changes})


def micro_train(**changes: Any) -> TrainConfig:
    """Four micro-batches of 64 tokens a step, scheduled by steps, float32 throughout."""
    fields = {
        "max_steps": 6, "budget_s": None, "batch_tokens": 256, "micro_batch_tokens": 64, "seq_len": 32,
        "span_group": 4, "muon_momentum_warmup_steps": 4, "newton_schulz_dtype": "float32",
        "embedding_dtype": "float32", "ema_decay": 0.9,
    }  # fmt: skip
    return TrainConfig(**{**fields, **changes})


def micro_ttt(**changes: Any) -> TTTConfig:
    """Chunks of 8 in windows of 24, three documents at once, steps large enough to see."""
    fields = {"lora_rank": 2, "lr": 0.01, "chunk_tokens": 8, "window_tokens": 24, "batch_documents": 3}
    return TTTConfig(**{**fields, **changes})


def micro_run(**changes: Any) -> RunConfig:
    """A whole seed in about two seconds."""
    fields = {
        "model": micro_model(),
        "train": micro_train(),
        "quant": QuantConfig(
            num_calibration_batches=2, calibration_windows=2, calibration_seq_len=64, keep_float_numel=256
        ),
        "evaluation": EvalConfig(row_tokens=256, seq_len=32),
        "ttt": micro_ttt(),
        "runtime": RuntimeConfig(device="cpu", checkpoint_every_s=0.0, report_every_s=0.0),
    }
    return RunConfig(**{**fields, **changes})


def random_model(config: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model of which no parameter has its initial value, so that every part shows in its output."""
    config = config or micro_model()
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config, compute_dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            width = 3 * parameter.size(-1) ** -0.5 if name.endswith("bank") else 0.3
            parameter.copy_((parameter if not name.endswith(("bank", "weight")) else 0) + width * noise)
    return model.to(dtype)


def learnable_tokens(count: int, *, seed: int = 0, vocab_size: int = VOCAB_SIZE, mean_length: int = 20) -> np.ndarray:
    """Return a stream (count,) uint16 of documents that follow a noisy rule, starting with a BOS."""
    rng = np.random.default_rng(seed)
    tokens = np.empty(count, dtype=np.uint16)
    previous = BOS_ID
    for place in range(count):
        if place == 0 or rng.random() < 1 / mean_length:
            previous = BOS_ID
        elif rng.random() < 0.3:
            previous = int(rng.integers(4, vocab_size))
        else:
            previous = 4 + (3 * previous + 5) % (vocab_size - 4)
        tokens[place] = previous
    return tokens


def micro_validation(*lengths: int, seed: int = 1) -> ValidationSet:
    """Return a stream of documents of the given lengths, each its BOS included."""
    rng = np.random.default_rng(seed)
    parts = [np.append(BOS_ID, rng.integers(4, VOCAB_SIZE, length - 1)) for length in lengths]
    tokens = np.concatenate(parts).astype(np.uint16)
    return ValidationSet(tokens, find_documents(tokens))


def micro_bytes() -> ByteTable:
    """Return a byte table: pieces of 1 to 4 bytes, every third with a leading space; ids 0 to 3 are control pieces."""
    ids = np.arange(VOCAB_SIZE)
    is_control = ids < 4
    base_bytes = np.where(is_control, 0, 1 + ids % 4).astype(np.int16)
    return ByteTable(base_bytes, (ids % 3 == 0) & ~is_control, is_control)


def micro_loader(folder: Path, *, num_tokens: int = 4000, config: TrainConfig | None = None) -> SpanLoader:
    """Write two training shards into folder and return a loader over them."""
    config = config or micro_train()
    paths = [folder / f"micro_train_{number:06d}.bin" for number in range(2)]
    for number, path in enumerate(paths):
        if not path.exists():
            write_shard(path, learnable_tokens(num_tokens, seed=number))
    return SpanLoader(
        paths,
        micro_batch_tokens=config.micro_batch_tokens,
        span_group=config.span_group,
        vocab_size=VOCAB_SIZE,
    )
