"""What decides a stage's output, as one hash: two stages of the same identity are the same computation.

A sweep of variants computes each of them once. What is known before work starts gives the planning identity, by which
runs are put in order; what a stage's record holds is the full one, with device, kernel and versions in it.
Importing this module needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from model.bundle.program import settings_of, tool_versions
from model.config import RunConfig, canonical_json
from model.fields import plain_settings

IDENTITY_FORMAT = 1

# stage -> the stages whose outputs it reads, in order; quantize takes the averaged weights of training, evaluate scores
# live and averaged weights and the artifact, ttt adapts the artifact alone
STAGE_INPUTS: Mapping[str, tuple[str, ...]] = {
    "train": (),
    "quantize": ("train",),
    "evaluate": ("train", "quantize"),
    "ttt": ("quantize",),
}

STAGE_SECTIONS: Mapping[str, tuple[str, ...]] = {  # of the configuration, read by the stage itself
    "train": ("model", "train"),
    "quantize": ("model", "train", "quant"),  # train: calibration draws from the same spans
    "evaluate": ("model", "train", "evaluation"),  # train: the type that the embedding is kept in
    "ttt": ("model", "train", "ttt"),
}


def stage_identity(
    stage: str,
    config: RunConfig,
    *,
    seed: int,
    repeat: int,
    world_size: int,
    data_hash: str | None,
    code_hash: str,
    backends: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> str:
    """Return the sha256 (hex) of all that decides what a stage leaves.

    backends: what beside code and settings moves bits (device, attention kernel, versions, and on a CPU threads and
    instruction set). inputs: the identities of the stages it builds on, by STAGE_INPUTS. Two repeats of a seed are two
    computations by intent and never the same.
    """
    assert set(inputs) == set(STAGE_INPUTS[stage]), f"{stage} builds on {STAGE_INPUTS[stage]}, not {tuple(inputs)}"
    decides = {
        "format": IDENTITY_FORMAT,
        "stage": stage,
        "settings": read_settings(stage, config),
        "seed": seed,
        "repeat": repeat,
        "world_size": world_size,
        "data_hash": data_hash,
        "code_hash": code_hash,
        "backends": dict(backends),
        "inputs": dict(inputs),
    }
    return hashlib.sha256(canonical_json(decides).encode()).hexdigest()


def planning_identity(
    stage: str,
    config: RunConfig,
    *,
    seed: int,
    repeat: int,
    world_size: int,
    data_hash: str | None,
    code_hash: str,
) -> str:
    """Return the identity of a stage as far as it is known before work starts.

    Device and versions are equal within one sweep, so that equal planning identities become equal full ones. data_hash
    may be None as long as nobody has computed it, but for all stages that are compared alike.
    """
    asked = {"device": config.runtime.device, "attention": config.runtime.attention}

    def identify(name: str) -> str:
        inputs = {earlier: identify(earlier) for earlier in STAGE_INPUTS[name]}
        return stage_identity(
            name,
            config,
            seed=seed,
            repeat=repeat,
            world_size=world_size,
            data_hash=data_hash,
            code_hash=code_hash,
            backends=asked,
            inputs=inputs,
        )

    return identify(stage)


def read_settings(stage: str, config: RunConfig) -> dict[str, Any]:
    """Return the settings that a stage reads, by section.

    Where the artifact is made to fit the size limit, the weights depend on the size of the program, and so on every
    setting that the program carries and on the tools that pack it. Training does not, and stays shared.
    """
    found = {name: plain_settings(getattr(config, name)) for name in STAGE_SECTIONS[stage]}
    is_fitted = stage == "quantize" and config.quant.on_oversize == "fit"
    return {**found, "program": settings_of(config), "tools": tool_versions()} if is_fitted else found


def dependents(stage: str) -> tuple[str, ...]:
    """Return the stages that build on a stage, directly or not, in order."""
    found = {stage}
    for name, inputs in STAGE_INPUTS.items():  # in an order in which inputs come first
        if found & set(inputs):
            found.add(name)
    return tuple(name for name in STAGE_INPUTS if name in found and name != stage)
