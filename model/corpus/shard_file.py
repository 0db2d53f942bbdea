"""Writing a token shard: the header and the tokens, whole or absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.data.shards import HEADER_INTS, MAGIC, TOKEN_DTYPE, VERSION
from model.files.atomic import replace_file


def shard_header(num_tokens: int) -> bytes:
    """Return the 1,024 bytes that open a shard of num_tokens tokens."""
    if not 1 <= num_tokens < 2**31:
        raise ValueError(f"num_tokens={num_tokens}: a shard holds between 1 and {2**31 - 1} tokens")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (N,), ids below 65,536, as a shard; path is complete or absent."""
    array = np.asarray(tokens)
    if array.size and (int(array.min()) < 0 or int(array.max()) > np.iinfo(TOKEN_DTYPE).max):
        raise ValueError(f"shard {path}: token ids must lie between 0 and 65535")
    with replace_file(path) as file:
        file.write(shard_header(array.size))
        array.astype(TOKEN_DTYPE).tofile(file)
