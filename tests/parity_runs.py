"""Golden sets 8, 9 and 10: the training loop, test-time training and plain evaluation, whole."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.banks import visit_plan
from model.config import ADAPTER_KINDS, EvalConfig, TrainConfig, TTTConfig
from model.corpus.shard_file import write_shard
from model.data.loader import SpanLoader
from model.data.packing import pack_row
from model.data.shards import find_documents
from model.data.tokenizer import ByteTable, target_bytes
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.score.bpb import DocumentScores, bits_per_byte, document_sums
from model.score.plain import row_bounds, score_rows
from model.train.trainer import Trainer, TrainResult
from model.ttt.documents import TTTResult, score_documents
from tests.parity_core import (
    GoldenSet,
    build_model,
    largest_error,
    model_config,
    relative_error,
    take_parameter,
    train_config,
)

PARAMETERS = "train_tiny_params.npz"
TTT = "doc_ttt_tiny.npz"
FLOAT32 = "train_tiny_f32ns.npz"


def check_training(golden: GoldenSet) -> None:
    """Set 8: the loader's batches, then 12 whole steps with Muon in bfloat16 and once more in float32."""
    settings = golden.settings("train_config")
    config = train_config(settings, span_group=1, clip="per_rank", embedding_dtype="float32")
    initial = golden.tensors("init/", file=PARAMETERS)
    with tempfile.TemporaryDirectory() as folder:
        loader = _write_and_open(golden, Path(folder), config)
        _check_batches(golden, loader, config)
        for dtype in ("bfloat16", "float32"):
            _check_run(golden, loader, replace(config, newton_schulz_dtype=dtype), initial)


def _write_and_open(golden: GoldenSet, folder: Path, config: TrainConfig) -> SpanLoader:
    """Write the stored shards as files, and open them as training does."""
    shards = []
    for key in sorted(golden.keys("shard"), key=lambda key: int(key.removeprefix("shard"))):
        shards.append(folder / f"golden_train_{int(key.removeprefix('shard')):06d}.bin")
        write_shard(shards[-1], golden.read(key))
    vocab_size = golden.settings("config")["vocab_size"]
    return SpanLoader(
        shards, micro_batch_tokens=config.micro_batch_tokens, span_group=config.span_group, vocab_size=vocab_size
    )


def _check_batches(golden: GoldenSet, loader: SpanLoader, config: TrainConfig) -> None:
    """Compare every micro-batch of the run with what the loader serves."""
    count = config.max_steps * config.micro_batches_per_step
    batches = [loader.batch(index, max_segment=config.seq_len) for index in range(count)]
    golden.compare("x", torch.cat([batch.inputs for batch in batches]), tolerance=0)
    golden.compare("y", torch.cat([batch.targets for batch in batches]), tolerance=0)
    golden.compare("cu_seqlens", torch.stack([batch.packing.cu_seqlens for batch in batches]), tolerance=0)


def _check_run(golden: GoldenSet, loader: SpanLoader, config: TrainConfig, initial: dict[str, np.ndarray]) -> None:
    """Train from the stored initial values and compare losses, norms, schedule, final and averaged weights."""
    model = build_model(model_config(golden.settings("config")), initial)
    micro_losses: list[float] = []
    model.register_forward_hook(lambda _module, _args, loss: micro_losses.append(float(loss.detach())))
    result = Trainer(model, loader, config, Dist.single(), _ignore).run()
    final = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if config.newton_schulz_dtype == "float32":
        golden.compare("step_loss", result.steps["loss"], tolerance=1e-4, file=FLOAT32)
        golden.compare("micro_loss", micro_losses, tolerance=1e-4, file=FLOAT32)
        norms = result.steps["grad_norm"]
        golden.compare("grad_norm_before_clip", norms, tolerance=1e-3, measure=relative_error, file=FLOAT32)
        _compare_movement(golden, final, initial, file=FLOAT32, tolerance=0.01)
        return
    _compare_losses(golden, "step_loss", result.steps["loss"], num_first=1)
    _compare_losses(golden, "micro_loss", np.array(micro_losses), num_first=config.micro_batches_per_step)
    _compare_schedule(golden, result, config)
    _compare_movement(golden, final, initial, file=PARAMETERS, tolerance=0.1)
    for key in golden.keys("ema/"):
        golden.compare(key, take_parameter(result.ema, key.removeprefix("ema/")), tolerance=2e-3)


def _ignore(_phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
    """Take a progress report and do nothing with it."""


def _compare_losses(golden: GoldenSet, key: str, ours: np.ndarray, *, num_first: int) -> None:
    """The losses of step 0 must agree closely; later ones follow bfloat16 noise."""
    golden.compare(key, ours, tolerance=1e-5, measure=lambda a, b: largest_error(a[:num_first], b[:num_first]))
    golden.compare(key, ours, tolerance=5e-3)


def _compare_schedule(golden: GoldenSet, result: TrainResult, config: TrainConfig) -> None:
    """Compare what the run recorded of its schedule."""
    factor = result.steps["lr_factor"]
    rates = np.stack([config.embedding_lr * factor, config.matrix_lr * factor, config.vector_lr * factor], axis=1)
    golden.compare("lr_tok_muon_scalar", rates, tolerance=1e-12)
    golden.compare("muon_momentum", result.steps["momentum"], tolerance=1e-12)
    golden.compare("looping", result.steps["is_looped"].astype(bool), tolerance=0)


def _compare_movement(
    golden: GoldenSet, final: dict[str, Tensor], initial: dict[str, np.ndarray], *, file: str, tolerance: float
) -> None:
    """Compare each final tensor: the distance to the golden one as a share of how far that one moved."""
    for key in golden.keys("final/", file=file):
        name = key.removeprefix("final/")
        start = initial[name].astype(np.float64)

        def share_of_movement(ours: np.ndarray, expected: np.ndarray, start: np.ndarray = start) -> float:
            moved, distance = float(np.linalg.norm(expected - start)), float(np.linalg.norm(ours - expected))
            return distance / moved if moved else distance

        golden.compare(key, take_parameter(final, name), tolerance=tolerance, measure=share_of_movement, file=file)


def check_ttt(golden: GoldenSet) -> None:
    """Set 9: scores with and without adaptation, in both float types, and three variants of the adapters."""
    settings = golden.settings("ttt_config")
    config = ttt_config(settings)
    validation, table = read_stream(golden), read_byte_table(golden)
    ranges = validation.document_ranges
    golden.compare("doc_start", ranges[:, 0], tolerance=0)
    golden.compare("doc_len", ranges[:, 1] - ranges[:, 0], tolerance=0)
    start = {kind.replace("lm_head", "head"): torch.from_numpy(a) for kind, a in golden.tensors("A/").items()}
    model_settings, parameters = model_config(golden.settings("config")), golden.tensors("param/")

    def score(config: TTTConfig, *, is_looped: bool = settings["looping_active"], **options: Any) -> TTTResult:
        model = build_model(model_settings, parameters, dtype=options.pop("dtype", torch.float32))
        num_visits = visit_plan(model_settings, is_looped=is_looped).num_visits
        initial = {kind: start[kind][:num_visits] for kind in config.adapter_kinds}  # a layer's first visit comes first
        return score_documents(
            model, validation, table, config, Dist.single(), _ignore,
            seed=0, initial=initial, is_looped=is_looped, **options,
        )  # fmt: skip

    on, off = score(config), score(config, is_adapting=False)
    golden.compare("doc_tokens", on.scores.tokens, tolerance=0)
    golden.compare("doc_bytes", on.scores.bytes, tolerance=0)
    compare_scores(golden, "on", on)
    compare_scores(golden, "off", off)
    compare_scores(golden, "off", score(replace(config, lr=0.0)))
    compare_scores(golden, "on64", score(config, dtype=torch.float64), doc_tolerance=1e-6, token_tolerance=1e-6)
    compare_scores(golden, "var_grad_steps2", score(replace(config, updates_per_chunk=2)))
    compare_scores(golden, "var_no_k_mlp_o", score(replace(config, adapter_kinds=("q", "v", "head"))))
    compare_scores(golden, "var_plain_layers", score(config, is_looped=False))


def ttt_config(settings: Mapping[str, Any]) -> TTTConfig:
    """Return our config of the published script's adaptation settings."""
    if settings["ttt_optimizer"] != "adam" or settings["ttt_beta1"] != 0:
        raise ValueError("only adam with beta1=0 is implemented for test-time training")
    optional = {"k": settings["ttt_k_lora"], "o": settings["ttt_o_lora"], "mlp": settings["ttt_mlp_lora"]}
    return TTTConfig(
        lora_rank=settings["ttt_lora_rank"],
        lr=settings["ttt_lora_lr"],
        weight_decay=settings["ttt_weight_decay"],
        beta2=settings["ttt_beta2"],
        eps=settings["eps"],
        chunk_tokens=settings["ttt_chunk_size"],
        window_tokens=settings["ttt_eval_seq_len"],
        updates_per_chunk=settings["ttt_grad_steps"],
        adapter_kinds=tuple(kind for kind in ADAPTER_KINDS if optional.get(kind, True)),
        batch_documents=settings["ttt_batch_size"],
    )


def compare_scores(
    golden: GoldenSet,
    prefix: str,
    result: TTTResult,
    *,
    doc_tolerance: float = 3e-4,
    token_tolerance: float = 5e-5,
) -> None:
    """Compare per-token and per-document scores and the totals."""
    scores = result.scores
    golden.compare(f"{prefix}_token_nll", result.nll, tolerance=token_tolerance)
    golden.compare(f"{prefix}_doc_loss_sum", scores.nats, tolerance=doc_tolerance)
    totals = [scores.nats.sum() / scores.tokens.sum(), scores.bpb]
    golden.compare(f"{prefix}_loss_bpb", totals, tolerance=token_tolerance)


def check_evaluation(golden: GoldenSet) -> None:
    """Set 10: plain evaluation by the published rule, with the tail scored too, and in one row."""
    num_sequences, seq_len = (int(value) for value in golden.read("batch_seqs_seq_len"))
    rows = EvalConfig(row_tokens=num_sequences * seq_len, seq_len=seq_len, tail="dropped")
    validation, table = read_stream(golden), read_byte_table(golden)
    num_targets = validation.num_targets
    bounds = row_bounds(num_targets, rows)
    num_scored = bounds[-1][1]
    golden.compare("n_stream", validation.tokens.size, tolerance=0)
    sequences = replace(rows, row_tokens=seq_len)
    golden.compare("n_after_load", row_bounds(num_targets, sequences)[-1][1] + 1, tolerance=0)
    golden.compare("n_scored", num_scored, tolerance=0)
    _check_rows(golden, validation, bounds, seq_len)
    counts = target_bytes(table, validation.tokens)
    golden.compare("total_bytes", counts[:num_scored].sum(dtype=np.int64), tolerance=0)
    golden.compare("tail_bytes", counts[num_scored:].sum(dtype=np.int64), tolerance=0)

    whole = -(-num_targets // seq_len) * seq_len
    model = build_model(model_config(_borrowed_settings(golden)), golden.tensors("param/", file=TTT))
    for mode in ("plain", "loop"):

        def score(config: EvalConfig, is_looped: bool = mode == "loop") -> np.ndarray:
            return score_rows(model, validation, config, Dist.single(), _ignore, is_looped=is_looped)

        nll = score(rows)[:num_scored]
        golden.compare(f"{mode}_token_nll", nll, tolerance=1e-4)
        golden.compare(f"{mode}_loss_bpb", _loss_and_bpb(nll, counts[:num_scored]), tolerance=1e-5)
        sums = document_sums(validation, table, nll, num_scored=num_scored, seconds=0.0)
        _check_documents(golden, f"{mode}_doc_loss_sum", sums)
        full = score(replace(rows, tail="scored"))
        golden.compare(f"{mode}_tail_token_nll", full[num_scored:], tolerance=1e-4)
        golden.compare(f"{mode}_full_loss_bpb", _loss_and_bpb(full, counts), tolerance=1e-5)
        onepack = score(replace(rows, row_tokens=whole, tail="scored"))
        golden.compare(f"{mode}_onepack_token_nll", onepack, tolerance=1e-4)
        golden.compare(f"{mode}_onepack_loss_bpb", _loss_and_bpb(onepack, counts), tolerance=1e-5)


def read_stream(golden: GoldenSet) -> ValidationSet:
    tokens = np.asarray(golden.read("stream")).astype(np.uint16)
    return ValidationSet(tokens, find_documents(tokens))


def read_byte_table(golden: GoldenSet) -> ByteTable:
    return ByteTable(*(golden.read(name) for name in ("base_bytes", "has_leading_space", "is_boundary")))


def _borrowed_settings(golden: GoldenSet) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(str(golden.read("config", file=TTT)))
    return loaded


def _loss_and_bpb(nll: np.ndarray, num_bytes: np.ndarray) -> list[float]:
    """Return [nats a token, bits a byte] of some targets."""
    nats = float(nll.sum(dtype=np.float64))
    return [nats / nll.size, bits_per_byte(nats, int(num_bytes.sum(dtype=np.int64)))]


def _check_rows(golden: GoldenSet, validation: ValidationSet, bounds: list[tuple[int, int]], seq_len: int) -> None:
    """Compare the packing of every scored row, and which document each scored input belongs to."""
    packings = [pack_row(validation.tokens[a:b], max_segment=seq_len) for a, b in bounds]
    for number, packing in enumerate(packings):
        golden.compare(f"cu_seqlens_batch{number}", packing.cu_seqlens, tolerance=0)
    golden.compare("max_seqlen_batches", [packing.max_seqlen for packing in packings], tolerance=0)
    positions = np.arange(bounds[-1][1])
    documents = np.searchsorted(validation.document_starts, positions, side="right") - 1
    golden.compare("doc_id_of_position", documents, tolerance=0)


def _check_documents(golden: GoldenSet, key: str, sums: DocumentScores) -> None:
    """Compare per-document sums; the tolerance is that of a token, for the mean over the document's tokens."""
    num_tokens = np.maximum(sums.tokens, 1)
    golden.compare(key, sums.nats, tolerance=1e-4, measure=lambda a, b: largest_error(a / num_tokens, b / num_tokens))
    golden.compare("doc_tokens", sums.tokens, tolerance=0)
    golden.compare("doc_bytes", sums.bytes, tolerance=0)
