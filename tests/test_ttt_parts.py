"""Every part that a model can have is in the one forward: plain, packed and adapting with nothing learned agree."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from model.audit.causality import (
    probe_across_documents,
    probe_causality,
    probe_chunk_borders,
    probe_independence,
    probe_ttt_causality,
)
from model.audit.dependence import probe_dependencies
from model.audit.distribution import probe_gold_swap
from model.audit.forward import probe_target_gate, probe_two_forwards
from model.audit.system import System
from model.audit.updates import probe_adapter_states, probe_frozen_updates, probe_poisoned_update
from model.audit.verdicts import PASS
from model.config import EvalConfig
from model.distributed import Dist
from model.gpt import GPT
from model.score.plain import score_rows
from model.ttt.document_pass import DocumentPass
from model.ttt.recorded_pass import RecordedPass
from model.ttt.slots import Slots
from tests.micro_model import (
    FRONTIER_PARTS,
    ignore,
    micro_bytes,
    micro_model,
    micro_run,
    micro_ttt,
    micro_validation,
    random_model,
)

PARTS = {"none": {}, **{name: parts for name, parts in FRONTIER_PARTS.items() if name != "wide"}}
ALL = PARTS["all"]
UNMASKED = {"smear_gate_width": 8, "smear_bos_mask": False}
LENGTHS = (20, 24, 2, 9)  # all within a window
TTT = micro_ttt(lr=0.0, lora_alpha=3.0, batch_documents=4)
PADDED = replace(TTT, chunk_by_length=((9, 5), (20, 7)))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make_model(parts: dict[str, Any], dtype: torch.dtype) -> GPT:
    """Return a random model with these parts."""
    return random_model(micro_model(**parts), dtype=dtype).requires_grad_(False)


def score_alone(model: GPT, *, is_looped: bool) -> np.ndarray:
    """Return the nll (N,) of a stream's targets, each document put through the model by itself."""
    validation, alone = micro_validation(*LENGTHS), []
    for start, end in validation.document_ranges:
        tokens = torch.from_numpy(validation.tokens[start:end].astype(np.int64)).unsqueeze(0)
        nll = model(tokens[:, :-1], tokens[:, 1:], is_looped=is_looped, reduction="none")[0]
        alone.append(nll.numpy())
    return np.concatenate(alone)


def score_every_way(parts: dict[str, Any], dtype: torch.dtype, *, is_looped: bool) -> dict[str, np.ndarray]:
    """Return that nll by each path that scores a stream."""
    validation, model = micro_validation(*LENGTHS), make_model(parts, dtype)
    rows = EvalConfig(row_tokens=96, seq_len=24)
    found = {"alone": score_alone(model, is_looped=is_looped)}
    found["packed"] = score_rows(model, validation, rows, Dist.single(), ignore, is_looped=is_looped)
    for name, kind, config in (("adapted", DocumentPass, TTT), ("padded", RecordedPass, PADDED)):
        work = kind(model, validation, config, ignore, label="parts", is_looped=is_looped)
        work.run_adapted(range(len(LENGTHS)), Slots(model, config, 1, 4, is_looped=is_looped, num_spare=1))
        found[name] = work.nll.numpy()
    return found


@pytest.mark.parametrize("is_looped", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in PARTS), ("all", torch.float32)], ids=str
)
def test_zero_adapters_and_no_learning_are_the_plain_forward(name: str, dtype: torch.dtype, is_looped: bool) -> None:
    found = score_every_way(PARTS[name], dtype, is_looped=is_looped)
    for way, nll in found.items():
        tolerance = TOLERANCE[torch.float32] if way == "packed" else TOLERANCE[dtype]  # rows keep float32
        assert np.abs(nll - found["alone"]).max() < tolerance, way


@pytest.mark.parametrize("name", [name for name in PARTS if name != "none"])
def test_each_part_changes_the_scores(name: str) -> None:
    # else the test above would say nothing of it
    base, found = (score_alone(make_model(parts, torch.float32), is_looped=True) for parts in ({}, PARTS[name]))
    assert np.abs(base - found).max() > 1e-2


def test_without_its_mask_only_a_packed_row_smears_across_documents() -> None:
    found = score_every_way(UNMASKED, torch.float64, is_looped=True)
    firsts = np.cumsum((0, *LENGTHS[:-1]))
    for way, nll in found.items():
        gap = np.abs(nll - found["alone"])
        assert gap[: LENGTHS[0] - 1].max() < 1e-5, way  # the row's first token has no neighbor anyway
        assert (gap[firsts[1:]].min() > 1e-3) == (way == "packed"), way


# ---- the audit's probes over a model with everything on --------------------------------------------------------------


def make_system(parts: dict[str, Any], **ttt: Any) -> System:
    """Return a random model with these parts under audit, over documents of a few chunks."""
    config = micro_run(
        model=micro_model(**parts), evaluation=EvalConfig(row_tokens=128, seq_len=32), ttt=micro_ttt(**ttt)
    )
    tokenizer = SimpleNamespace(byte_table=micro_bytes(), vocab_size=config.model.vocab_size)
    model = random_model(config.model).requires_grad_(False)
    return System(model, micro_validation(30, 61, 27, 44, 33), cast(Any, tokenizer), config, sample=4)


PROBES = (
    probe_causality, probe_chunk_borders, probe_ttt_causality, probe_across_documents, probe_independence,
    probe_dependencies, probe_gold_swap, probe_target_gate, probe_two_forwards, probe_adapter_states,
    probe_poisoned_update, probe_frozen_updates,
)  # fmt: skip


@pytest.mark.slow  # the audit's own test shows it for a run of the whole pipeline
@pytest.mark.parametrize(
    ("parts", "ttt"), [({}, {}), (ALL, {"lora_alpha": 3.0, "chunk_by_length": ((31, 5), (45, 7))})], ids=["none", "all"]
)
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_passes(probe: Any, parts: dict[str, Any], ttt: dict[str, Any]) -> None:
    result = probe(make_system(parts, **ttt))
    assert result.result == PASS, result


@pytest.mark.slow
def test_smearing_across_documents_is_caught() -> None:
    assert probe_across_documents(make_system(ALL | {"smear_bos_mask": False})).result != PASS


@pytest.mark.slow
@pytest.mark.parametrize("by_length", [(), ((31, 5),)])
def test_that_no_other_length_was_tried_is_said_where_chunks_go_by_it(by_length: tuple[tuple[int, int], ...]) -> None:
    found = probe_ttt_causality(make_system({}, chunk_by_length=by_length)).not_checked
    assert ("another length of the same document" in found) == bool(by_length)
