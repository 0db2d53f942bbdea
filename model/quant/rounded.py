"""From averaged weights to the artifact on disk: rounded, written, read back, and held against the size limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.banks import EMBEDDING
from model.config import RunConfig, canonical_json
from model.quant.artifact import ArtifactReader, save_artifact
from model.quant.fit import fit_to_limit
from model.quant.quantized import QuantizedState
from model.quant.sensitivity import LossProbe
from model.quant.state import StateQuantizer, configured_clips, looped_layers

# What fit leaves for the artifact's meta besides its own choice, whatever that meta says: a program that trains on its
# own knows fewer hashes than a sweep does, and would otherwise choose other weights.
META_ROOM_BYTES = 512


def save_rounded(
    path: Path,
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    config: RunConfig,
    *,
    probe: LossProbe,
    meta: Mapping[str, Any],
    code_bytes: int,
    span: Callable[[str], AbstractContextManager[object]] = lambda _name: nullcontext(),
    reader: ArtifactReader | None = None,
) -> dict[str, Any]:
    """Round weights by GPTQ, write the artifact to path, read it back, and return the metrics of size and rounding.

    probe: holds a model with these weights; asked only where quant.on_oversize is "fit". meta: what the artifact holds
    besides its model; where it is made to fit, the clip_sigmas that were chosen are added. code_bytes count towards
    quant.size_limit_bytes. span(name) encloses "round", inside it each "compress" and "sensitivity", and "reload".
    reader: what the file holds stays there for those who score it.
    Raises ValueError if the artifact does not reload, or is over the limit where quant.on_oversize is "fail".
    """

    def write(state: QuantizedState, chosen: Mapping[str, float] | None = None) -> int:
        full = dict(meta) if chosen is None else {**meta, "clip_sigmas": dict(chosen)}
        with span("compress"):
            save_artifact(path, state, config.model, full, codec=config.quant.codec)
        room = max(META_ROOM_BYTES - len(canonical_json(dict(meta))), 0)
        return path.stat().st_size + code_bytes + room

    with span("round"):  # what it writes on the way included
        quantizer = StateQuantizer(dict(weights), dict(hessians), config.quant, looped=looped_layers(config.model))
        if config.quant.on_oversize == "fit":
            state, metrics = _fit(quantizer, probe, write, span)
        else:
            clips = configured_clips(config.quant)
            state, metrics = quantizer.quantize(clips), clip_metrics(clips)
            write(state)
    with span("reload"):
        check_reload(path, state, reader or ArtifactReader())
    return {**weigh(config, model_bytes=path.stat().st_size, code_bytes=code_bytes), **metrics}


def _fit(
    quantizer: StateQuantizer,
    probe: LossProbe,
    write: Callable[[QuantizedState, Mapping[str, float]], int],
    span: Callable[[str], AbstractContextManager[object]],
) -> tuple[QuantizedState, dict[str, Any]]:
    """Round so that the artifact fills its limit, write it, and return what it holds and the metrics of the choice."""
    newest: QuantizedState | None = None

    def measure_bytes(state: QuantizedState, clips: Mapping[str, float]) -> int:
        nonlocal newest
        newest = state
        return write(state, clips)

    def measure_rises(state: QuantizedState) -> dict[str, float]:
        with span("sensitivity"):
            return probe.measure_rises(quantizer.members(), quantizer.changes(state))

    fitted = fit_to_limit(quantizer, measure_bytes, measure_rises)
    if newest is not fitted.state:  # the last pass need not have been the best; packing takes a second or more
        write(fitted.state, fitted.clips)
    chosen = {"clip_sigmas_configured": configured_clips(quantizer.config), "rounding_nats": fitted.rises}
    return fitted.state, {**clip_metrics(fitted.clips), **chosen, "fit_passes": fitted.num_passes}


def clip_metrics(clips: Mapping[str, float]) -> dict[str, Any]:
    """Return the clip_sigmas as used: by group, and as one number for all matrices but the embedding, if it is one."""
    of_matrices = {value for group, value in clips.items() if group != EMBEDDING}
    return {"clip_sigmas": dict(clips), "matrix_clip_sigmas": of_matrices.pop() if len(of_matrices) == 1 else None}


def weigh(config: RunConfig, *, model_bytes: int, code_bytes: int) -> dict[str, Any]:
    """Return the size metrics of an artifact and its code.

    Raises ValueError if they are over the limit where quant.on_oversize is "fail".
    """
    total, limit = model_bytes + code_bytes, config.quant.size_limit_bytes
    if total > limit and config.quant.on_oversize == "fail":
        raise ValueError(
            f"artifact of seed {config.seed} has {total} bytes with code, over quant.size_limit_bytes={limit}; "
            "set quant.on_oversize to 'fit' or 'mark', or raise quant.matrix_clip_sigmas"
        )
    return {
        "model_bytes": model_bytes,
        "code_bytes": code_bytes,
        "artifact_bytes": total,
        "size_limit_bytes": limit,
        "within_limit": total <= limit,
    }


def check_reload(path: Path, state: QuantizedState, reader: ArtifactReader) -> None:
    """Raise ValueError unless the file holds exactly this state, which decides every weight."""
    loaded = _parts(reader.load(path)[1])
    for name, parts in _parts(state).items():
        found = loaded.get(name, [])
        if len(found) != len(parts) or not all(map(torch.equal, found, [part.cpu() for part in parts])):
            raise ValueError(f"artifact {path} does not reload: {name} differs")


def _parts(state: QuantizedState) -> dict[str, list[Tensor]]:
    """Return the arrays of every tensor of a state: integers and scales, a correction's included, or float16."""
    matrices = {
        name: [weight.codes, weight.scales, *(weight.correction or ())] for name, weight in state.matrices.items()
    }
    return matrices | {name: [tensor] for name, tensor in state.floats.items()}
