"""Runs a Triton kernel from its source, in float32 on a CPU: numpy stands in for what it calls.

Denormal numbers are flushed to zero, as a GPU's exponential does. Only what the kernels under test use is here.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

SMALLEST = np.finfo(np.float32).tiny
PROGRAM, COUNT = [0, 0, 0], [0]  # of the launch that runs, whichever module its functions are from


class Value(np.ndarray[Any, Any]):
    """A block or scalar of a kernel."""

    def to(self, dtype: Any) -> Value:
        """Return the value in another type."""
        return as_value(self.astype(dtype))


def as_value(x: Any) -> Value:
    """Return an array as a kernel's value."""
    return np.asarray(x).view(Value)


class Constant:
    """tl.constexpr: a number that also has itself as its value."""

    def __new__(cls, value: Any) -> Any:
        return type("Constant", (type(value),), {"value": value})(value)


class Pointer:
    """Places in a flat array."""

    def __init__(self, array: np.ndarray, places: Any = 0) -> None:
        self.array, self.places = array, places
        self.dtype = types.SimpleNamespace(element_ty=array.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.array, self.places + np.asarray(offset))


class Descriptor:
    """A tensor that comes and goes in blocks; what lies outside reads as zero and is not written."""

    def __init__(self, x: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> None:
        self.array, self.shape = x.detach().as_strided(shape, strides).numpy(), block_shape
        self.dtype = self.array.dtype

    @classmethod
    def from_tensor(cls, x: Tensor, shape: list[int]) -> Descriptor:
        """Return a descriptor of x with blocks of a shape."""
        return cls(x, list(x.shape), list(x.stride()), shape)

    def _part(self, at: list[Any]) -> np.ndarray:
        return self.array[tuple(slice(int(first), int(first) + n) for first, n in zip(at, self.shape))]

    def load(self, at: list[Any]) -> Value:
        """Return the block at a place."""
        block, part = np.zeros(self.shape, self.array.dtype), self._part(at)
        block[tuple(map(slice, part.shape))] = part
        return as_value(block)

    def store(self, at: list[Any], value: Any) -> None:
        """Write the block at a place."""
        part = self._part(at)
        assert list(value.shape) == self.shape, (value.shape, self.shape)
        part[:] = np.asarray(value)[tuple(map(slice, part.shape))]


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    if mask is None:
        return as_value(pointer.array[pointer.places])
    places = np.where(mask, pointer.places, 0)
    assert places.min(initial=0) >= 0, "a load before the tensor"
    return as_value(np.where(mask, pointer.array[places], np.asarray(other, pointer.array.dtype)))


def _store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    if mask is None:
        pointer.array[pointer.places] = value
        return
    places, mask, values = np.broadcast_arrays(pointer.places, np.asarray(mask), np.asarray(value))
    assert places[mask].min(initial=0) >= 0, "a store before the tensor"
    pointer.array[places[mask]] = values[mask]


def _exp(x: Any, power: Any = np.exp) -> Value:
    with np.errstate(over="ignore", under="ignore"):
        result = power(np.asarray(x, np.float32))
    return as_value(np.where(result < SMALLEST, np.float32(0), result))


def _log(x: Any) -> Value:
    with np.errstate(divide="ignore"):
        return as_value(np.log(np.asarray(x, np.float32)))


def _sum(x: Any, axis: int | None = None) -> Value:
    x = np.asarray(x)
    return as_value(np.sum(x, axis=axis, dtype=np.float32 if x.dtype.kind == "f" else None))


def _where(chosen: Any, x: Any, y: Any) -> Value:
    kind = np.float32 if "f" in (np.asarray(x).dtype.kind, np.asarray(y).dtype.kind) else np.int64
    return as_value(np.where(chosen, np.asarray(x, kind), np.asarray(y, kind)))


def _divide_up(x: Any, y: Any) -> int:
    return -(-int(x) // int(y))


def _language() -> types.ModuleType:
    language = types.ModuleType("triton.language")
    language.__dict__.update(
        constexpr=Constant, int32=np.int32, int64=np.int64, float32=np.float32,
        load=_load, store=_store, exp=_exp, log=_log,
        program_id=lambda axis: as_value(PROGRAM[axis]), num_programs=lambda _axis: COUNT[0], cdiv=_divide_up,
        arange=lambda first, end: as_value(np.arange(first, end)), zeros=lambda shape, t: as_value(np.zeros(shape, t)),
        full=lambda shape, value, dtype: as_value(np.full(shape, value, dtype)),
        sum=_sum, where=_where, exp2=lambda x: _exp(x, np.exp2), log2=lambda x: as_value(np.log2(x)),
        max=lambda x, axis: as_value(np.max(np.asarray(x), axis=axis)),
        minimum=lambda x, y: as_value(np.minimum(x, y)), zeros_like=lambda x: as_value(np.zeros_like(x)),
        abs=lambda x: as_value(np.abs(x)), debug_barrier=lambda: None, static_range=range,
        rsqrt=lambda x: as_value(1 / np.sqrt(np.asarray(x, np.float32))), sqrt=lambda x: as_value(np.sqrt(x)),
        sigmoid=lambda x: as_value(1 / (1 + _exp(-np.asarray(x)))), maximum=lambda x, y: as_value(np.maximum(x, y)),
        range=lambda first, end, step, **_options: range(int(first), int(end), int(step)),
        dot=lambda x, y, total=0: as_value(total + x @ y), reshape=lambda x, shape: as_value(np.reshape(x, shape)),
        cast=lambda x, dtype: as_value(np.asarray(x).astype(dtype)),
        permute=lambda x, axes: as_value(np.transpose(x, axes)), split=lambda x: (x[..., 0], x[..., 1]),
        join=lambda x, y: as_value(np.stack((x, y), -1)),
        broadcast_to=lambda x, shape: as_value(np.broadcast_to(x, shape)),
    )  # fmt: skip
    return language


def _jit(function: Any = None, **_options: Any) -> Any:
    return function if function is not None else _jit


def load_kernels(path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a module of kernels, imported apart from the real one; its launches run here, row after row."""
    language = _language()
    triton = types.ModuleType("triton")
    triton.__dict__.update(jit=_jit, language=language, cdiv=_divide_up)
    triton.__dict__["next_power_of_2"] = lambda n: 1 << (n - 1).bit_length()
    tools, descriptors = types.ModuleType("triton.tools"), types.ModuleType("triton.tools.tensor_descriptor")
    descriptors.__dict__["TensorDescriptor"] = Descriptor
    for module in (triton, language, tools, descriptors):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    spec = importlib.util.spec_from_file_location(f"faked_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        for name in ("num_warps", "num_stages", "maxnreg"):
            options.pop(name, None)
        given = [Pointer(_flat(x)) if isinstance(x, Tensor) else x for x in args]
        COUNT[0] = grid[0]
        for PROGRAM[:] in itertools.product(*map(range, (*grid, 1, 1)[:3])):
            kernel(*given, **options)

    monkeypatch.setattr(module, "launch", launch)
    return module


def _flat(x: Tensor) -> np.ndarray:
    """Return the memory from a tensor's first number on, whatever its strides: as a kernel sees it."""
    whole = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))
    return whole.numpy()
