"""Named tensors in one file, in the safetensors format: 8 bytes length, a JSON header, the numbers end to end.

Read without a parser that could be led astray: every size in the header is checked before memory is taken, and nothing
in a file is executed. Source: the format's description at github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from model.files.atomic import replace_file

TENSOR_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in TENSOR_TYPES.items()}
LENGTH_BYTES = 8
HEADER_LIMIT_BYTES = 16 << 20
TENSOR_LIMIT_BYTES = 1 << 36  # of one file: above it, this is no checkpoint of ours


class _Place(NamedTuple):
    """Where one tensor lies behind the header, and what it is."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, complete or not at all."""
    # widest types first, so that every tensor starts at a multiple of its item size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in TYPE_NAMES:
            raise ValueError(f"tensor {name} has type {tensor.dtype}, which a tensor file cannot hold")
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % LENGTH_BYTES)
    with replace_file(path) as file:
        file.write(len(raw).to_bytes(LENGTH_BYTES, "little") + raw)
        for name in order:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a file of save_tensors. Raises ValueError, naming it, if it is damaged."""
    with path.open("rb") as file:
        try:
            places, offset = _read_header(file)
            return {place.name: _read_tensor(file, place, offset) for place in places}
        except ValueError as error:
            raise ValueError(f"tensor file {path} is damaged ({error}); remove it to make it again") from None


def _read_header(file: BinaryIO) -> tuple[list[_Place], int]:
    """Return where every tensor lies and where the numbers begin, all sizes found to agree with the file's."""
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    offset = LENGTH_BYTES + header_bytes
    if file_bytes < LENGTH_BYTES or header_bytes > HEADER_LIMIT_BYTES or offset > file_bytes:
        raise ValueError(f"its {file_bytes} bytes cannot hold the header it announces")
    if file_bytes > TENSOR_LIMIT_BYTES:
        raise ValueError(f"{file_bytes} bytes are over the limit of {TENSOR_LIMIT_BYTES}")
    try:
        header = json.loads(file.read(header_bytes))
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except ValueError:
        raise ValueError("its header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no table of tensors")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    places = sorted((_parse_place(name, entry) for name, entry in entries.items()), key=lambda place: place.start)
    reached = 0
    for place in places:
        if place.start != reached:
            raise ValueError(f"tensor {place.name[:80]!r} does not begin where the one before it ends")
        reached = place.end
    if reached != file_bytes - offset:
        raise ValueError(f"its tensors take {reached} bytes, it holds {file_bytes - offset}")
    return places, offset


def _parse_place(name: str, entry: object) -> _Place:
    """Return one entry of the header if it makes sense by itself."""

    def is_sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(size) is int and 0 <= size <= TENSOR_LIMIT_BYTES for size in value)

    shown = repr(name[:80])
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TENSOR_TYPES:
        raise ValueError(f"tensor {shown} has the unknown type {str(dtype)[:20]!r}")
    if not is_sizes(shape) or not is_sizes(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise ValueError(f"tensor {shown} has an impossible shape or place")
    start, end = offsets
    if end - start != math.prod(shape) * TENSOR_TYPES[dtype].itemsize:
        raise ValueError(f"tensor {shown} of shape {shape} and type {dtype} does not take {end - start} bytes")
    return _Place(name, TENSOR_TYPES[dtype], tuple(shape), start, end)


def _read_tensor(file: BinaryIO, place: _Place, offset: int) -> Tensor:
    """Return one tensor in memory of its own."""
    if place.start == place.end:
        return torch.empty(place.shape, dtype=place.dtype)
    data = bytearray(place.end - place.start)
    file.seek(offset + place.start)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ValueError(f"it ends inside tensor {place.name[:80]!r}")
    return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)
