"""Named tensors in one safetensors file, written whole and read back with every damage told in one line.

Files are read as bytes, not mapped into memory: a disk that fails while a mapped file is read ends the process, and
the ledger of reads would not see it opened. Nothing in a file is executed. The bytes are those that the library would
write; it makes them in memory, which takes a copy of everything, and a hash another reading.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from model.files.atomic import replace_file

# what the library raises over a header that is no header, and torch over shapes and types that it does not have
DAMAGE = (SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
REASON_CHARACTERS = 200  # a name in a damaged file may be as long as the file
# the format's names of numbers; tensors of a later one stand further ahead in a file, those of one by name
TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "C64": torch.complex64,
    "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
LENGTH_BYTES = 8  # of the header's length; the header is padded to a multiple of as many
MOST_HEADER_BYTES = 100_000_000  # more than that the library refuses


class Place(NamedTuple):
    """Where a tensor lies: its bytes from start on, counted from the file's first one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors as one file, complete or not at all; the same tensors give the same bytes.

    Returns the sha256 (hex) of the file, taken while it is written. Raises ValueError for a type that the format does
    not have.
    """
    for tensor in tensors.values():
        if tensor.dtype not in TYPE_NAMES:
            raise ValueError(f"tensor file {path} cannot hold numbers of type {tensor.dtype}")
    ranks = {dtype: rank for rank, dtype in enumerate(TYPES.values())}
    names = sorted(tensors, key=lambda name: (-ranks[tensors[name].dtype], name))
    header = _write_header({name: tensors[name] for name in names})
    digest = hashlib.sha256(header)
    with replace_file(path) as file, ThreadPoolExecutor(1, "hash") as hasher:
        file.write(header)
        hashed = []
        for name in names:  # one at a time comes from the device
            block = as_bytes(tensors[name].detach().to("cpu").contiguous())
            hashed.append(hasher.submit(digest.update, block))
            file.write(block)
        for done in hashed:
            done.result()
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(bytearray())


def _write_header(tensors: Mapping[str, Tensor]) -> bytes:
    """Return what stands before the numbers of tensors, which follow in this order."""
    entries, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def load_tensors(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Read a file of save_tensors; of one with a prefix, only the tensors whose names begin with it are read.

    Raises ValueError, naming the file, if it is damaged.
    """
    with path.open("rb") as file:
        found = _load_some(file, prefix) if prefix else None
        if found is not None:
            return found
        file.seek(0)
        content = file.read()
    try:
        return {name: tensor for name, tensor in load(content).items() if name.startswith(prefix)}
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:REASON_CHARACTERS]
        raise ValueError(f"tensor file {path} is damaged ({reason}); remove it to make it again") from None


def _load_some(file: BufferedReader, prefix: str) -> dict[str, Tensor] | None:
    """Return the tensors with a prefix; None for a file with anything about it that the library has to judge."""
    places = _find_places(file)
    if places is None:
        return None
    found = {}
    for name, place in places.items():
        if name.startswith(prefix):
            try:
                found[name] = torch.empty(place.shape, dtype=place.dtype)
            except DAMAGE:  # empty, but of sizes beyond torch's
                return None
            block = as_bytes(found[name])
            file.seek(place.start)
            if file.readinto(block) != len(block):
                return None
    return found


def _find_places(file: BufferedReader) -> dict[str, Place] | None:
    """Return where each tensor of a file lies; None unless they fill it, one after the other, as its header says."""
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(LENGTH_BYTES), "little")
    end = LENGTH_BYTES + header_bytes
    if end > min(file_bytes, MOST_HEADER_BYTES):
        return None
    places = {}
    try:
        for name, entry in json.loads(file.read(header_bytes)).items():
            place = Place(TYPES[entry["dtype"]], tuple(entry["shape"]), end)
            if not _is_next(place, entry, end - LENGTH_BYTES - header_bytes):
                return None
            end += place.dtype.itemsize * math.prod(place.shape)
            places[name] = place
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return places if end == file_bytes else None


def _is_next(place: Place, entry: Mapping[str, Any], offset: int) -> bool:
    """Return whether a header's entry is of a tensor that begins at offset, and ends where its shape says."""
    is_shape = all(type(size) is int and size >= 0 for size in place.shape)
    return is_shape and entry["data_offsets"] == [offset, offset + place.dtype.itemsize * math.prod(place.shape)]
