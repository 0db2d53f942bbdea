"""The SentencePiece tokenizer: checked before it is trusted, and its bytes-per-piece table.

SentencePiece is a C++ parser of a binary file, so an unknown file first runs in a child process with limited memory
and time; only a file that survives there is loaded here. How bytes of a target are counted from the table is decided
in model/evaluate.py.
"""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece as spm

from model.data.shards import BOS_ID, TOKEN_DTYPE

SPACE_MARK = "\u2581"
FILE_LIMIT_BYTES = 64 << 20  # the largest public tokenizers have a few MiB
PROBE_MEMORY_BYTES = 1 << 30
PROBE_TIMEOUT_S = 60

PROBE_CODE = f"""
import contextlib, resource, sys
with contextlib.suppress(ValueError, OSError):  # macOS has no such limit; the time limit still holds
    resource.setrlimit(resource.RLIMIT_AS, ({PROBE_MEMORY_BYTES}, {PROBE_MEMORY_BYTES}))
import sentencepiece
model = sys.stdin.buffer.read()
processor = sentencepiece.SentencePieceProcessor(model_proto=model)
ids = list(range(processor.get_piece_size()))
assert all(isinstance(processor.id_to_piece(index), str) for index in ids)
processor.decode(ids), processor.encode("A probe, 1 line: \\u00e9 \\u6587 \\U0001f600 \\u2581\\t\\n.")
"""


@dataclass(frozen=True, slots=True)
class ByteTable:
    """What each piece stands for in bytes, by id.

    base_bytes (V,) int16: UTF-8 length without a leading U+2581; 1 for a byte piece, 0 for special pieces.
    has_leading_space (V,) bool: the piece starts with U+2581, worth one byte more after an ordinary piece.
    is_boundary (V,) bool: control, unknown and unused pieces, after which that leading space is not in the text.
    Source: golden set 1.
    """

    base_bytes: np.ndarray
    has_leading_space: np.ndarray
    is_boundary: np.ndarray


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A loaded tokenizer: ids 0..vocab_size - 1, BOS_ID opens a document. sha256 is the model file's."""

    path: Path
    sha256: str
    vocab_size: int
    byte_table: ByteTable
    _processor: spm.SentencePieceProcessor = field(repr=False)

    def encode_document(self, text: str) -> np.ndarray:
        """Return BOS and the pieces of text, (n,) uint16; text reaches SentencePiece unchanged."""
        return np.array([BOS_ID, *self._processor.encode(text)], dtype=TOKEN_DTYPE)

    def encode_documents(self, texts: list[str], *, num_threads: int = 1) -> list[np.ndarray]:
        """Return encode_document of each text, worked out by num_threads threads."""
        return [
            np.array([BOS_ID, *pieces], dtype=TOKEN_DTYPE)
            for pieces in self._processor.encode(texts, num_threads=num_threads)
        ]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids, the normalized form of what was encoded; special pieces give nothing."""
        return str(self._processor.decode(np.asarray(ids).tolist()))


def load_tokenizer(path: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer in a SentencePiece model file.

    Raises FileNotFoundError if there is none, ValueError if it cannot be parsed, its size is not vocab_size (where
    given), it has more pieces than uint16 tokens allow, or its BOS is not BOS_ID.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} is missing; give a SentencePiece .model file")
    if path.stat().st_size > FILE_LIMIT_BYTES:
        raise ValueError(f"tokenizer {path} has {path.stat().st_size} bytes, over the limit of {FILE_LIMIT_BYTES}")
    model = path.read_bytes()
    fault = probe_fault(model)
    if fault:
        raise ValueError(f"tokenizer {path} is not a usable SentencePiece model ({fault})")
    processor = spm.SentencePieceProcessor(model_proto=model)
    size = int(processor.get_piece_size())
    if vocab_size is not None and size != vocab_size:
        raise ValueError(f"tokenizer {path} has {size} pieces, but model.vocab_size={vocab_size}; make them equal")
    if size > np.iinfo(TOKEN_DTYPE).max + 1:
        raise ValueError(f"tokenizer {path} has {size} pieces, more than uint16 tokens can name (65536)")
    if processor.bos_id() != BOS_ID:
        raise ValueError(f"tokenizer {path} has BOS id {processor.bos_id()}, documents must start with id {BOS_ID}")
    return Tokenizer(path, hashlib.sha256(model).hexdigest(), size, build_byte_table(processor), processor)


@functools.lru_cache(maxsize=16)
def probe_fault(model: bytes) -> str:
    """Return why a child process of 1 GiB could not load and use a SentencePiece model, or an empty string."""
    if not model:
        return "the file is empty"  # SentencePiece takes an empty model for none at all
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", PROBE_CODE], input=model, capture_output=True, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return f"loading took more than {PROBE_TIMEOUT_S} s"
    if child.returncode == 0:
        return ""
    if child.returncode < 0:
        return f"loading it ended with signal {-child.returncode}"
    lines = child.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else f"loading it ended with exit code {child.returncode}"


def build_byte_table(processor: spm.SentencePieceProcessor) -> ByteTable:
    """Return the byte table of every piece of a tokenizer.

    Raises ValueError if a piece is longer than int16 can say.
    """
    size = int(processor.get_piece_size())
    base_bytes = np.zeros(size, dtype=np.int64)
    has_leading_space = np.zeros(size, dtype=np.bool_)
    is_boundary = np.zeros(size, dtype=np.bool_)
    for index in range(size):
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            is_boundary[index] = True
        elif processor.is_byte(index):
            base_bytes[index] = 1
        else:
            piece = processor.id_to_piece(index)
            has_leading_space[index] = piece.startswith(SPACE_MARK)
            base_bytes[index] = len(piece.removeprefix(SPACE_MARK).encode())
    if size and base_bytes.max() > np.iinfo(np.int16).max:
        raise ValueError(f"tokenizer piece {int(base_bytes.argmax())} has {int(base_bytes.max())} bytes, too long")
    return ByteTable(base_bytes.astype(np.int16), has_leading_space, is_boundary)
