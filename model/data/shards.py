"""Token shards on disk: a header of 256 little-endian int32, then little-endian uint16 tokens.

Shards are read through a memory map, so one may be larger than memory and opening it costs nothing. What the header
claims is compared with the file's size before anything is mapped.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC = 20240520
VERSION = 1
BOS_ID = 1
TOKEN_DTYPE = np.dtype("<u2")
SCAN_TOKENS = 1 << 20  # tokens looked at in one go when a shard is searched, 2 MiB


def list_shards(pattern: str, *, field: str = "shards") -> list[Path]:
    """Return the files that match a glob, sorted by name, the order in which they are read.

    The part of the pattern that is there under its very name is taken as it is: `[v2] exp/*.bin` looks into the folder
    called "[v2] exp" where there is one.
    Raises FileNotFoundError naming field if nothing matches, ValueError if pattern is empty.
    """
    if not pattern:
        raise ValueError(f"{field} is empty; give a glob of shards such as corpus/*_train_*.bin")
    whole = Path(os.path.expanduser(pattern))
    literal = next((path for path in (whole, *whole.parents) if os.path.lexists(path)), Path())
    found = glob.glob(str(Path(glob.escape(str(literal)), whole.relative_to(literal))))
    paths = sorted(map(Path, found), key=lambda path: (path.name, str(path)))
    if not paths:
        raise FileNotFoundError(f"{field}={pattern}: no such shard; make some with `seedsweep data builtin --out DIR`")
    return paths


def read_num_tokens(path: Path) -> int:
    """Return the token count of a shard after checking its header against the size of the file.

    Raises FileNotFoundError if there is no such file, ValueError on a wrong magic number, version or length.
    """
    try:
        info = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"shard {path} is missing") from None
    if not stat.S_ISREG(info.st_mode):
        raise ValueError(f"shard {path} is not a regular file")
    if info.st_size < HEADER_BYTES:
        raise ValueError(f"shard {path} is truncated: {info.st_size} bytes, the header alone has {HEADER_BYTES}")
    header = np.fromfile(path, dtype="<i4", count=3)
    if header[0] != MAGIC:
        raise ValueError(f"shard {path} has magic number {header[0]}, not {MAGIC}: not a token shard")
    if header[1] != VERSION:
        raise ValueError(f"shard {path} has format version {header[1]}, only {VERSION} is known")
    num_tokens = int(header[2])
    expected = HEADER_BYTES + TOKEN_DTYPE.itemsize * num_tokens
    if num_tokens < 1:
        raise ValueError(f"shard {path} says it has {num_tokens} tokens, at least 1 is needed")
    if info.st_size != expected:
        word = "truncated" if info.st_size < expected else "of wrong length"
        raise ValueError(f"shard {path} is {word}: {num_tokens} tokens take {expected} bytes, it has {info.st_size}")
    return num_tokens


def open_shard(path: Path) -> np.memmap:
    """Return the tokens of a shard, (N,) uint16, as a read-only memory map.

    Raises FileNotFoundError or ValueError as read_num_tokens does.
    """
    num_tokens = read_num_tokens(path)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def token_blocks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (offset, block) over tokens, a few MiB at a time."""
    for offset in range(0, tokens.size, SCAN_TOKENS):
        yield offset, tokens[offset : offset + SCAN_TOKENS]


def find_first_bos(tokens: np.ndarray) -> int | None:
    """Return the index of the first BOS, or None; reads no further than that."""
    for offset, block in token_blocks(tokens):
        is_bos = block == BOS_ID
        if is_bos.any():
            return offset + int(is_bos.argmax())
    return None


def find_documents(tokens: np.ndarray) -> np.ndarray:
    """Return the index of every BOS, (D,) int64."""
    found = [offset + np.flatnonzero(block == BOS_ID) for offset, block in token_blocks(tokens)]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def check_token_range(tokens: np.ndarray, vocab_size: int, path: Path) -> None:
    """Raise ValueError naming path if any token is not below vocab_size."""
    for offset, block in token_blocks(tokens):
        if int(block.max()) >= vocab_size:
            place = int((block >= vocab_size).argmax())
            raise ValueError(
                f"shard {path} has token id {block[place]} at {offset + place}, outside vocab_size={vocab_size}; "
                "it was made with another tokenizer"
            )
