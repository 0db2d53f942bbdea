"""Golden sets F1 to F3: two-lane routing, the gates of heads and embeddings, and three parts each on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.banks import optional_shapes, visit_plan
from model.config import ModelConfig
from model.data.packing import Packing
from tests.parity_core import (
    GoldenSet,
    build_model,
    compare_all,
    error_of_largest_entry,
    model_config,
)

PARTS = ("lane_routing", "attn_gate_width", "smear_gate_width", "smear_bos_mask", "bos_id")
PARTS += ("leaky_slope", "mlp_gate_width", "pass_embeddings")
DTYPES = (torch.float32, torch.float64)  # the figures are float32's; float64 agrees with them as closely


def frontier_config(base: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """Return base with the parts that the settings name; a number of vectors is a claim about ours."""
    changes = {name: settings[name] for name in PARTS if name in settings}
    if "pass_embeddings" in changes:
        assert changes["pass_embeddings"] in (0, base.num_loops + 1), changes
        changes["pass_embeddings"] = bool(changes["pass_embeddings"])
    return replace(base, **changes)


def check_two_lane(golden: GoldenSet) -> None:
    """F1: every case, both kinds of floats."""
    settings = golden.settings("config")
    config = frontier_config(model_config(settings), settings)
    check_cases(golden, config, golden.tensors("param/"))
    check_plans(golden, config)
    account_for_documents(golden)


def check_gates(golden: GoldenSet) -> None:
    """F2: as F1, and what a forward without the mask at document starts gives."""
    check_two_lane(golden)
    settings = golden.settings("config")
    config = replace(frontier_config(model_config(settings), settings), smear_bos_mask=False)
    check_cases(golden, config, golden.tensors("param/"), *(f"unmasked_{part}/" for part in ("logits", "loss", "grad")))


def check_extras(golden: GoldenSet) -> None:
    """F3: the base, and each part alone on top of it."""
    settings, shared = golden.settings("config"), golden.tensors("param/")
    base = frontier_config(model_config(settings), settings)
    check_plans(golden, base)
    account_for_documents(golden)
    names = list(dict.fromkeys(key.split("/")[0] for key in golden.keys("") if "/logits/" in key))
    extra = {key: value for name in names for key, value in golden.tensors(f"{name}/param/").items()}
    for name in names:
        own = golden.settings(f"{name}/config") if golden.keys(f"{name}/config") else {}
        config = frontier_config(base, own)
        # a part that comes twice has its tensors once: what a variant does not bring is another's
        given = {**shared, **extra, **golden.tensors(f"{name}/param/")}
        unused = {*optional_shapes(base), *extra} - set(optional_shapes(config))
        parameters = {key: value for key, value in given.items() if key not in unused}
        check_cases(golden, config, parameters, *(f"{name}/{part}/" for part in ("logits", "loss", "grad")))


def check_cases(
    golden: GoldenSet,
    config: ModelConfig,
    parameters: Mapping[str, np.ndarray],
    logits: str = "logits/",
    loss: str = "loss/",
    grad: str = "grad/",
) -> None:
    """Hold every case under the prefixes against ours: logits, loss, and the gradients that are there."""
    tokens, targets = (torch.from_numpy(golden.read(key)).long() for key in ("x", "y"))
    packing = Packing(torch.from_numpy(golden.read("cu_seqlens")), int(golden.read("max_seqlen")))
    for key in golden.keys(logits):
        case = key.removeprefix(logits)
        kind, _, mode = case.partition("_")
        how = {"packing": packing if kind == "varlen" else None, "is_looped": mode == "loop"}
        for dtype in DTYPES:
            model = build_model(config, parameters, dtype=dtype)
            golden.compare(key, model(tokens, **how)[0], tolerance=1e-4)
            mean = model(tokens, targets, **how)
            golden.compare(loss + case, mean, tolerance=1e-5)
            mean.backward()
            gradients = {name: gradient(value) for name, value in model.named_parameters()}
            prefix = f"{grad}{case}/"
            names = [name.removeprefix(prefix) for name in golden.keys(prefix)]
            compare_all(golden, prefix, gradients, names, tolerance=1e-4, measure=error_of_largest_entry)


def gradient(parameter: Tensor) -> Tensor:
    """Return a parameter's gradient, zeros where nothing used it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def check_plans(golden: GoldenSet, config: ModelConfig) -> None:
    """Compare the lists of visits."""
    for is_looped, mode in ((True, "looping"), (False, "plain")):
        plan = visit_plan(config, is_looped=is_looped)
        golden.compare(f"encoder_indices_{mode}", plan.encoder, tolerance=0)
        golden.compare(f"decoder_indices_{mode}", plan.decoder, tolerance=0)


def account_for_documents(golden: GoldenSet) -> None:
    """Compare the places of the documents' first tokens with the row."""
    settings = golden.settings("config")
    starts = np.flatnonzero(golden.read("x")[0] == settings.get("bos_id", 1))
    golden.compare("bos_positions", starts, tolerance=0)
