"""Named configurations: the published recipe, its 500-step baseline, and a tiny one for a laptop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from model.config import EvalConfig, ModelConfig, RunConfig, TrainConfig, TTTConfig


def published() -> RunConfig:
    """Return the recipe of parameter-golf PR #1536 with our repairs (see docs/recipe.md)."""
    return RunConfig()


def bench_500() -> RunConfig:
    """Return 500 steps of the published recipe on one GPU, as the published code was measured."""
    base = published()
    return replace(
        base,
        train=replace(base.train, max_steps=500, budget_s=None, batch_tokens=196_608, span_group=1, clip="per_rank"),
        quant=replace(base.quant, calibration_documents="unmasked"),
        evaluation=replace(base.evaluation, row_tokens=32_768),
        ttt=replace(base.ttt, order="sorted"),
    )


def tiny() -> RunConfig:
    """Return a model that trains, quantizes and adapts in two minutes on one CPU core (the demo)."""
    base = published()
    return replace(
        base,
        model=ModelConfig(
            vocab_size=1024,
            num_layers=4,
            model_dim=128,
            num_heads=4,
            num_kv_heads=2,
            mlp_mult=3.0,
            rope_dims=16,
            xsa_last_n=4,
            loop_start=1,
            loop_end=2,
            num_loops=1,
            parallel_start_layer=3,
        ),
        train=TrainConfig(
            max_steps=120,
            budget_s=None,
            batch_tokens=2048,
            micro_batch_tokens=1024,
            seq_len=512,
            span_group=2,
            muon_momentum_warmup_steps=60,
            ema_decay=0.95,
            newton_schulz_dtype="float32",
            embedding_dtype="float32",
        ),
        quant=replace(
            base.quant,
            num_calibration_batches=4,
            calibration_windows=8,
            calibration_seq_len=512,
            keep_float_numel=4096,
        ),
        evaluation=EvalConfig(row_tokens=8192, seq_len=512),
        ttt=TTTConfig(lora_rank=8, lr=1e-3, chunk_tokens=64, window_tokens=256, batch_documents=16),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"published": published, "tiny": tiny, "bench_500": bench_500}
