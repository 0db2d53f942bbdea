"""Runs a row-wise Triton kernel from its source, in float32 on a CPU: numpy stands in for what it calls.

Denormal numbers are flushed to zero, as a GPU's exponential does. Only what the kernels under test use is here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

SMALLEST = np.finfo(np.float32).tiny


class Value(np.ndarray[Any, Any]):
    """A block or scalar of a kernel."""

    def to(self, dtype: Any) -> Value:
        """Return the value in another type."""
        return as_value(self.astype(dtype))


def as_value(x: Any) -> Value:
    """Return an array as a kernel's value."""
    return np.asarray(x).view(Value)


class Pointer:
    """Places in a flat array."""

    def __init__(self, array: np.ndarray, places: Any = 0) -> None:
        self.array, self.places = array, places
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.places + np.asarray(offset))


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    if mask is None:
        return as_value(pointer.array[pointer.places])
    places = np.where(mask, pointer.places, 0)
    return as_value(np.where(mask, pointer.array[places], np.asarray(other, pointer.array.dtype)))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if mask is None:
        pointer.array[pointer.places] = value
    else:
        pointer.array[np.asarray(pointer.places)[mask]] = np.asarray(value)[mask]


def _exp(x: Any) -> Value:
    with np.errstate(over="ignore", under="ignore"):
        result = np.exp(np.asarray(x, np.float32))
    return as_value(np.where(result < SMALLEST, np.float32(0), result))


def _log(x: Any) -> Value:
    with np.errstate(divide="ignore"):
        return as_value(np.log(np.asarray(x, np.float32)))


def load_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of kernels, imported apart from the real one; its launches run here, row after row."""
    program = [0]
    language = types.ModuleType("triton.language")
    language.__dict__.update(
        constexpr=object, int64=np.int64, float32=np.float32, load=_load, store=_store, exp=_exp, log=_log,
        program_id=lambda _axis: as_value(program[0]), arange=lambda first, end: as_value(np.arange(first, end)),
        sum=lambda x, axis: as_value(np.sum(np.asarray(x), axis=axis, dtype=np.float32)),
        max=lambda x, axis: as_value(np.max(np.asarray(x), axis=axis)),
        where=lambda chosen, x, y: as_value(np.where(chosen, np.float32(x), np.float32(y))),
        abs=lambda x: as_value(np.abs(x)), debug_barrier=lambda: None,
    )  # fmt: skip
    triton = types.ModuleType("triton")
    triton.__dict__.update(jit=lambda function: function, language=language)
    triton.__dict__["next_power_of_2"] = lambda n: 1 << (n - 1).bit_length()
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    spec = importlib.util.spec_from_file_location(f"faked_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        options.pop("num_warps", None)
        given = [Pointer(x.detach().view(-1).numpy()) if isinstance(x, Tensor) else x for x in args]
        for program[0] in range(grid[0]):
            kernel(*given, **options)

    monkeypatch.setattr(module, "launch", launch)
    return module
