"""From averaged weights to the artifact on disk: rounded, written, read back, and held against the size limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import RunConfig
from model.quant.artifact import load_artifact, save_artifact
from model.quant.gptq import fit_to_limit, quantize_state
from model.quant.quantized import QuantizedState, dequantize


def save_rounded(
    path: Path,
    weights: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    config: RunConfig,
    *,
    meta: Mapping[str, Any],
    code_bytes: int,
    span: Callable[[str], AbstractContextManager[object]] = lambda _name: nullcontext(),
) -> dict[str, Any]:
    """Round weights by GPTQ, write the artifact to path, read it back, and return the size metrics.

    meta: what the artifact holds besides its model. code_bytes count towards quant.size_limit_bytes. span(name)
    encloses "round", inside it each "compress", and "reload".
    Raises ValueError if the artifact does not reload, or is over the limit where quant.on_oversize is "fail".
    """

    def write(state: QuantizedState) -> int:
        with span("compress"):
            save_artifact(path, state, config.model, dict(meta), codec=config.quant.codec)
        return path.stat().st_size + code_bytes

    with span("round"):  # what it writes on the way included
        if config.quant.on_oversize == "fit":
            fitted = fit_to_limit(dict(weights), dict(hessians), config.quant, write)
            state, sigmas = fitted.state, fitted.matrix_clip_sigmas
        else:
            state = quantize_state(dict(weights), dict(hessians), config.quant)
            sigmas = config.quant.matrix_clip_sigmas
        write(state)
    with span("reload"):
        check_reload(path, state)
    return {**weigh(config, model_bytes=path.stat().st_size, code_bytes=code_bytes), "matrix_clip_sigmas": sigmas}


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


def check_reload(path: Path, state: QuantizedState) -> None:
    """Raise ValueError unless the file holds exactly this state."""
    loaded = dequantize(load_artifact(path)[1])
    for name, value in dequantize(state).items():
        if not torch.equal(loaded[name].cpu(), value.cpu()):
            raise ValueError(f"artifact {path} does not reload: {name} differs")
