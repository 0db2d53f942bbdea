"""Golden sets 2 and 3: logits, losses and gradients of the model, and the facts of the full size."""

from __future__ import annotations

import torch

from model.banks import visit_plan
from model.data.packing import Packing, pack_row
from model.data.shards import find_documents
from tests.parity_core import (
    GoldenSet,
    build_model,
    compare_all,
    error_of_largest_entry,
    model_config,
)

GRADIENTS = "model_tiny_grads.npz"


def check_model(golden: GoldenSet) -> None:
    """Set 2: four forward passes, and the gradients of those that have any."""
    config = model_config(golden.settings("config"))
    parameters = golden.tensors("param/")
    tokens, targets = (torch.from_numpy(golden.read(key)).long() for key in ("x", "y"))
    packing = Packing(torch.from_numpy(golden.read("cu_seqlens")), int(golden.read("max_seqlen")))
    for key in golden.keys("logits/"):
        case = key.removeprefix("logits/")
        kind, _, mode = case.partition("_")
        model = build_model(config, parameters)
        row = packing if kind == "varlen" else None
        logits = model(tokens, packing=row, is_looped=mode == "loop")
        golden.compare(key, logits[0], tolerance=1e-4)
        loss = model(tokens, targets, packing=row, is_looped=mode == "loop")
        golden.compare(f"loss/{case}", loss, tolerance=1e-5)
        loss.backward()
        gradients = {name: _gradient(value) for name, value in model.named_parameters()}
        compare_all(
            golden, f"{case}/", gradients, parameters, tolerance=1e-4, measure=error_of_largest_entry, file=GRADIENTS
        )
    _check_plans(golden)


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _check_plans(golden: GoldenSet) -> None:
    """Compare the visit lists, and our packing of the row against the stored one."""
    config = model_config(golden.settings("config"))
    for is_looped, mode in ((True, "looping"), (False, "plain")):
        plan = visit_plan(config, is_looped=is_looped)
        golden.compare(f"encoder_indices_{mode}", plan.encoder, tolerance=0)
        golden.compare(f"decoder_indices_{mode}", plan.decoder, tolerance=0)
    row = golden.read("x")[0]
    packing = pack_row(row, max_segment=0)
    golden.compare("cu_seqlens", packing.cu_seqlens, tolerance=0)
    golden.compare("max_seqlen", packing.max_seqlen, tolerance=0)
    golden.compare("bos_positions", find_documents(row), tolerance=0)
