"""What stages read and leave: the names of their files, data, models and weights, opened the same way by all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention.backends import resolve_backend
from model.data.loader import SpanLoader
from model.data.shards import list_shards
from model.data.tokenizer import Tokenizer, load_tokenizer
from model.data.validation import ValidationSet, load_validation
from model.files.ledger import Ledger
from model.files.tensors import load_tensors
from model.gpt import GPT, build_model
from model.pipeline.run import Run
from model.quant.quantized import dequantize
from model.score.bpb import DocumentScores

Outcome = tuple[dict[str, Any], list[str]]

WEIGHTS, STEPS, ARTIFACT = "train.safetensors", "steps.npz", "model.ssq"

EVALUATED, ADAPTED, SCORE_LOG = "evaluate.npz", "ttt.npz", "ttt_scores.npz"

SET_UP_S = 120.0  # a scoring pass may take so long to set itself up; after that it reports every batch

TRAIN_COUNTS = "train_counts.npz"  # how often each token occurs in the training shards; written before the stages


def open_training(run: Run, ledger: Ledger) -> SpanLoader:
    """Return the loader over the training shards."""
    config = run.config
    return SpanLoader(
        list_shards(config.data.train, field="data.train"),
        micro_batch_tokens=config.train.micro_batch_tokens,
        span_group=config.train.span_group,
        vocab_size=config.model.vocab_size,
        on_open=ledger.opened,
    )


def open_validation(run: Run, ledger: Ledger) -> tuple[Tokenizer, ValidationSet]:
    """Return the tokenizer and the validation stream."""
    data = run.config.data
    ledger.opened(Path(data.tokenizer))
    tokenizer = load_tokenizer(Path(data.tokenizer), vocab_size=run.config.model.vocab_size)
    validation = load_validation(
        list_shards(data.val, field="data.val"),
        vocab_size=run.config.model.vocab_size,
        val_documents=data.val_documents,
        val_tokens=data.val_tokens,
        on_open=ledger.opened,
    )
    return tokenizer, validation


def attention_backend_name(run: Run, model: GPT) -> str:
    """Return the attention kernel that this model uses on packed rows."""
    probe = torch.empty(1, 1, 1, run.config.model.head_dim, dtype=model.compute_dtype, device=run.dist.device)
    return resolve_backend(model.attention_backend, probe, is_packed=True)


def load_weights(run: Run, ledger: Ledger, kind: str) -> dict[str, Tensor]:
    """Return the "live" or "ema" weights that training left, on the rank's device."""
    ledger.opened(run.workdir / WEIGHTS)
    prefix = f"{kind}/"
    tensors = load_tensors(run.workdir / WEIGHTS, prefix=prefix)
    return {name.removeprefix(prefix): value.to(run.dist.device) for name, value in tensors.items()}


def load_model(run: Run, weights: dict[str, Tensor]) -> GPT:
    """Return a frozen model that holds weights, on the rank's device; the embedding in its training type."""
    model = build_model(
        run.config.model,
        run.dist.device,
        embedding_dtype=run.config.train.embedding_dtype,
        attention=run.config.runtime.attention,
    )
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def load_quantized(run: Run, ledger: Ledger) -> dict[str, Tensor]:
    """Return the weights that the artifact's bytes on the disk hold, unpacked by whichever stage needs them first.

    Raises ValueError if it is another model's.
    """
    path = run.workdir / ARTIFACT
    ledger.opened(path)
    config, state = run.artifacts.load(path)
    if config != run.config.model:
        raise ValueError(f"artifact {path} holds a model of another shape than the configuration's; quantize again")
    return dequantize(state)


def document_arrays(scores: DocumentScores, **nats: np.ndarray) -> dict[str, np.ndarray]:
    """Return the per-document columns of one or more passes over the same targets."""
    return {"index": np.arange(scores.tokens.size), "tokens": scores.tokens, "bytes": scores.bytes, **nats}
