"""Set F5: adaptation of the model with lanes and gates: scaled adapters, chunks by length, parts left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from model.config import ModelConfig, TTTConfig
from model.distributed import Dist
from model.ttt.documents import TTTResult, score_documents
from tests.micro_model import ignore
from tests.parity_core import GoldenSet, build_model, model_config
from tests.parity_frontier_model import frontier_config
from tests.parity_runs import compare_scores, read_byte_table, read_stream, ttt_config

MODEL = "model_gates.npz"  # whose parameters are adapted
MLP_GATE = "var_mlp_gate_param/"


def check_ttt_scaled(golden: GoldenSet) -> None:
    """Set F5: scores with and without adaptation in both float types, four variants, two forwards that lack a part."""
    settings, own = golden.settings("ttt_config"), golden.settings("config")
    config = replace(ttt_config(settings), lora_alpha=settings["ttt_lora_alpha"])
    model, parameters = frontier_config(model_config(own), own), golden.tensors("param/", file=MODEL)
    validation, table = read_stream(golden), read_byte_table(golden)
    ranges = validation.document_ranges
    golden.compare("doc_start", ranges[:, 0], tolerance=0)
    golden.compare("doc_len", ranges[:, 1] - ranges[:, 0], tolerance=0)
    initial = {kind.replace("lm_head", "head"): torch.from_numpy(a) for kind, a in golden.tensors("A/").items()}

    def score(
        config: TTTConfig,
        model: ModelConfig = model,
        parameters: dict[str, np.ndarray] = parameters,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> TTTResult:
        return score_documents(
            build_model(model, parameters, dtype=dtype), validation, table, config, Dist.single(), ignore,
            seed=0, initial=initial, is_looped=settings["looping_active"], **options,
        )  # fmt: skip

    on = score(config)
    golden.compare("doc_tokens", on.scores.tokens, tolerance=0)
    golden.compare("doc_bytes", on.scores.bytes, tolerance=0)
    compare_scores(golden, "on", on)
    compare_scores(golden, "off", score(config, is_adapting=False))
    compare_scores(golden, "off", score(replace(config, lr=0.0)))
    wide: dict[str, Any] = {"dtype": torch.float64}
    compare_scores(golden, "on64", score(config, **wide), doc_tolerance=1e-6, token_tolerance=1e-6)
    compare_scores(golden, "var_scale_one", score(replace(config, lora_alpha=None)))
    compare_scores(golden, "var_beta2_999", score(replace(config, beta2=0.999)))
    by_length = replace(config, chunk_by_length=settings["chunk_by_length"])
    for same in (by_length, replace(by_length, batch_documents=99, order="sorted")):
        compare_scores(golden, "var_chunk_by_length", score(same))
    compare_scores(golden, "var_mlp_gate", score(config, *gate_mlps(golden, model, parameters)))
    for name, part in (("no_attn_gate", "attn_gate"), ("no_smear", "smear_lambda")):
        lacking = {**parameters, part: np.zeros_like(parameters[part])}  # a factor of 1; nothing of the token before
        scores = score(config, parameters=lacking, **wide).scores
        totals = [scores.nats.sum() / scores.tokens.sum(), scores.bpb]
        golden.compare(f"control_{name}_loss_bpb", totals, tolerance=1e-4)


def gate_mlps(
    golden: GoldenSet, model: ModelConfig, parameters: dict[str, np.ndarray]
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the model with the gates of its MLPs in place of those of its heads and embeddings."""
    gates = golden.tensors(MLP_GATE)
    kept = {name: value for name, value in parameters.items() if not name.startswith(("attn_gate", "smear_"))}
    width = gates["mlp_gate_weight"].shape[1]
    return replace(model, attn_gate_width=0, smear_gate_width=0, mlp_gate_width=width), {**kept, **gates}
