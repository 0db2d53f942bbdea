"""The settings of the smallest model that goes through every stage: three layers, eight steps, a few documents."""

from __future__ import annotations

from typing import Any


def smallest(*, vocab_size: int, **runtime: float) -> dict[str, Any]:
    """Return overrides of a preset, for a tokenizer of so many pieces; runtime: settings of its section."""
    return {
        "model": {
            "vocab_size": vocab_size, "num_layers": 3, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1,
            "mlp_mult": 2.0, "rope_dims": 8, "xsa_last_n": 3, "loop_start": 1, "loop_end": 1, "num_loops": 1,
            "parallel_start_layer": 2,
        },
        "train": {
            "max_steps": 8, "batch_tokens": 512, "micro_batch_tokens": 256, "seq_len": 128, "span_group": 2,
            "muon_momentum_warmup_steps": 4,
        },
        "quant": {"num_calibration_batches": 2, "calibration_windows": 2, "calibration_seq_len": 128},
        "evaluation": {"row_tokens": 512, "seq_len": 128},
        "ttt": {"lora_rank": 2, "window_tokens": 128, "batch_documents": 4},
        "runtime": {"device": "cpu", **runtime},
    }  # fmt: skip
