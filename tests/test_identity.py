"""model/pipeline/identity: which settings make a stage another computation, and which do not."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest

from model.config import ADAPTER_KINDS, SECTIONS, RunConfig
from model.pipeline.identity import STAGE_INPUTS, dependents, planning_identity, stage_identity
from model.presets import published
from model.report import STAGES

KNOWN: dict[str, Any] = {
    "seed": 42, "repeat": 0, "world_size": 8, "data_hash": "d" * 64, "code_hash": "c" * 64,
}  # fmt: skip
# section -> the stages whose output a setting of it decides; of the whole run, the others
MOVES = {
    "model": STAGES,
    "train": STAGES,
    "quant": ("quantize", "evaluate", "ttt"),
    "evaluation": ("evaluate",),
    "ttt": ("ttt",),
    "data": (),  # its hash is taken over the contents, and given
    "runtime": (),
}
MOVES_OF = {"runtime.device": STAGES, "runtime.attention": STAGES}
OTHER = {
    "model.loop_end": 4, "model.mlp_mult": 3.0, "train.micro_batch_tokens": 49_152, "train.batch_tokens": 393_216,
    "evaluation.seq_len": 1024, "ttt.adapter_kinds": ADAPTER_KINDS[:2], "runtime.attention": "sdpa",
    "train.budget_s": None, "data.val_documents": 7, "data.val_tokens": 7, "model.num_heads": 16,
    "model.xsa_last_n": 5, "model.loop_start": 2, "model.num_layers": 12,
    "quant.matrix_bits": 5, "quant.embedding_bits": 7, "ttt.lora_alpha": 144.0, "ttt.chunk_by_length": ((512, 32),),
}  # fmt: skip
PUBLISHED = {
    "train": "ecae36e87ce9f264",
    "quantize": "3ad7fceaa5992f69",
    "evaluate": "e7bed4fb09be3fd9",
    "ttt": "40ea1dc998f3dd7c",
}  # the first 16 digits


def identities(config: RunConfig, **known: Any) -> dict[str, str]:
    return {stage: planning_identity(stage, config, **{**KNOWN, **known}) for stage in STAGES}


def settings() -> Iterator[str]:
    for section, kind in SECTIONS.items():
        yield from (f"{section}.{entry.name}" for entry in dataclasses.fields(kind))


def with_another_value(config: RunConfig, dotted: str) -> RunConfig:
    """Return config with another value, valid by itself, in one setting."""
    section, name = dotted.split(".")
    before = getattr(getattr(config, section), name)
    choices = [value for value in get_args(get_type_hints(SECTIONS[section])[name]) if isinstance(value, str)]
    if dotted in OTHER:
        value = OTHER[dotted]
    elif choices:
        value = next(choice for choice in choices if choice != before)
    elif isinstance(before, bool):
        value = not before
    elif not before and not isinstance(before, str):  # nothing to double or halve
        value = 1 if isinstance(before, int) else 0.5
    else:
        value = f"{before}x" if isinstance(before, str) else before / 2 if isinstance(before, float) else before * 2
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize("dotted", list(settings()))
def test_a_setting_makes_exactly_the_stages_that_read_it_another_computation(dotted: str) -> None:
    config = published()
    other = with_another_value(config, dotted)
    assert other != config
    before, after = identities(config), identities(other)
    moved = tuple(stage for stage in STAGES if before[stage] != after[stage])
    assert moved == MOVES_OF.get(dotted, MOVES[dotted.split(".")[0]])


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", 43), ("repeat", 1), ("world_size", 4), ("data_hash", "e" * 64), ("code_hash", "e" * 64)],
)
def test_seed_repeat_ranks_data_and_code_decide_every_stage(name: str, value: Any) -> None:
    before, after = identities(published()), identities(published(), **{name: value})
    assert not set(before.values()) & set(after.values())


def test_equal_configurations_are_equal_computations() -> None:
    spelled = replace(published(), ttt=replace(published().ttt, lr=np.float64(1e-4), adapter_kinds=list(ADAPTER_KINDS)))  # type: ignore[arg-type]
    assert identities(spelled) == identities(published())
    assert len(set(identities(published()).values())) == len(STAGES)  # and no two stages are


def test_weights_made_to_fit_depend_on_the_program_s_settings() -> None:
    fitted = replace(published(), quant=replace(published().quant, on_oversize="fit"))
    other = replace(fitted, ttt=replace(fitted.ttt, lora_rank=8))
    before, after = identities(fitted), identities(other)
    assert before["train"] == after["train"]
    assert before["quantize"] != after["quantize"]


@pytest.mark.parametrize(("on_oversize", "moved"), [("fit", ("quantize", "evaluate", "ttt")), ("mark", ())])
def test_weights_made_to_fit_depend_on_what_packs_the_program(
    monkeypatch: pytest.MonkeyPatch, on_oversize: Literal["fit", "mark"], moved: tuple[str, ...]
) -> None:
    config = replace(published(), quant=replace(published().quant, on_oversize=on_oversize))
    before, version = identities(config), metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "python-minifier" else version(name))
    after = identities(config)
    assert tuple(stage for stage in STAGES if before[stage] != after[stage]) == moved


def test_the_published_recipe_keeps_its_identities() -> None:
    assert {stage: name[:16] for stage, name in identities(published()).items()} == PUBLISHED


@pytest.mark.parametrize("fact", ["device", "attention", "versions"])
def test_what_moves_bits_is_in_the_full_identity(fact: str) -> None:
    facts: dict[str, Any] = {"device": "cpu", "attention": "sdpa", "versions": {"torch": "2.13.0"}}
    full = [
        stage_identity("train", published(), **KNOWN, backends=backends, inputs={})
        for backends in (facts, {**facts, fact: "another"})
    ]
    assert full[0] != full[1]


def test_what_builds_on_a_stage() -> None:
    assert tuple(STAGE_INPUTS) == STAGES
    assert {stage: dependents(stage) for stage in STAGES} == {
        "train": ("quantize", "evaluate", "ttt"), "quantize": ("evaluate", "ttt"), "evaluate": (), "ttt": (),
    }  # fmt: skip


def test_planning_needs_no_torch() -> None:
    code = "import sys, model.pipeline.identity; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
