"""Named tensors in one safetensors file, written whole and read back with every damage told in one line.

Files are read as bytes, not mapped into memory: a disk that fails while a mapped file is read ends the process, and
the ledger of reads would not see it opened. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from model.files.atomic import replace_file

# what the library raises over a header that is no header, and torch over shapes and types that it does not have
DAMAGE = (SafetensorError, KeyError, TypeError, ValueError, RuntimeError)
REASON_CHARACTERS = 200  # a name in a damaged file may be as long as the file


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write named tensors as one file, complete or not at all; the same tensors give the same bytes.

    Returns the sha256 (hex) of the file. Raises ValueError for a type that the format does not have.
    """
    # copies, because the library refuses tensors that share memory, as slices of a bank may
    own = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        content = save(own)
    except KeyError as error:
        raise ValueError(f"tensor file {path} cannot hold numbers of type {error}") from None
    with replace_file(path) as file:
        file.write(content)
    return hashlib.sha256(content).hexdigest()


def load_tensors(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """Read those of a file of save_tensors whose names begin with prefix. Raises ValueError, naming a damaged file."""
    content = path.read_bytes()
    try:
        return {name: tensor for name, tensor in load(content).items() if name.startswith(prefix)}
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:REASON_CHARACTERS]
        raise ValueError(f"tensor file {path} is damaged ({reason}); remove it to make it again") from None
