"""The SentencePiece tokenizer: checked before it is trusted, and its bytes-per-piece table.

SentencePiece is a C++ parser of a binary file, so an unknown file first runs in a child process with limited memory
and time; only a file that survives there is loaded here. The table decides what bits per byte are divided by, so every
piece of it is compared with SentencePiece's own decoding, and a tokenizer whose text it cannot count is refused.
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
processor.decode([[{BOS_ID}, index] for index in ids])
"""


@dataclass(frozen=True, slots=True)
class ByteTable:
    """What each piece stands for in bytes, by id.

    base_bytes (V,) int16: UTF-8 length, a space for each U+2581; 1 for a byte piece, 0 for special pieces.
    has_leading_space (V,) bool: the piece starts with a U+2581 that is not in the text where a document begins, and is
    not counted in base_bytes: it is worth one byte more after an ordinary piece.
    is_boundary (V,) bool: control, unknown and unused pieces, after which that leading space is not in the text.
    Source: golden set 1.
    """

    base_bytes: np.ndarray
    has_leading_space: np.ndarray
    is_boundary: np.ndarray


def target_bytes(table: ByteTable, tokens: np.ndarray) -> np.ndarray:
    """Return the bytes (N,) int16 that each token of a stream (N + 1,) but the first stands for.

    A piece's leading space counts one byte unless the token before is a control, unknown or unused piece.
    """
    spaces: np.ndarray = table.has_leading_space[tokens[1:]] & ~table.is_boundary[tokens[:-1]]
    return np.add(table.base_bytes[tokens[1:]], spaces, dtype=np.int16)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A loaded tokenizer: ids 0..vocab_size - 1, BOS_ID opens a document. sha256 is the model file's.

    unknown_id stands for text that no piece has; what it stood for cannot be got back.
    """

    path: Path
    sha256: str
    vocab_size: int
    unknown_id: int
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

    def decode_documents(self, documents: Sequence[np.ndarray]) -> list[str]:
        """Return decode of each document's ids."""
        return list(self._processor.decode([ids.tolist() for ids in documents]))

    def is_byte(self, index: int) -> bool:
        """Return whether a piece is one byte of a character that has no piece."""
        return bool(self._processor.is_byte(index))


def load_tokenizer(path: Path, *, vocab_size: int | None = None) -> Tokenizer:
    """Return the tokenizer in a SentencePiece model file.

    Raises FileNotFoundError if there is none, ValueError if it cannot be parsed, its size is not vocab_size (where
    given), it has more pieces than uint16 tokens allow, its BOS is not BOS_ID, or bytes of its text cannot be counted.
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
    table = build_byte_table(processor)
    fault = counting_fault(processor, table)
    if fault:
        raise ValueError(f"tokenizer {path} {fault}: bits per byte cannot be told with it; give another tokenizer")
    return Tokenizer(path, hashlib.sha256(model).hexdigest(), size, int(processor.unk_id()), table, processor)


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
    openings = processor.decode([[BOS_ID, index] for index in range(size)])
    for index in range(size):
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            is_boundary[index] = True
        elif processor.is_byte(index):
            base_bytes[index] = 1
        else:
            piece = processor.id_to_piece(index)
            text = piece.replace(SPACE_MARK, " ")
            # some models keep the space that a document begins with; there it is a byte like any other
            has_leading_space[index] = piece.startswith(SPACE_MARK) and openings[index] == text[1:]
            base_bytes[index] = len(text.encode()) - int(has_leading_space[index])
    if size and base_bytes.max() > np.iinfo(np.int16).max:
        raise ValueError(f"tokenizer piece {int(base_bytes.argmax())} has {int(base_bytes.max())} bytes, too long")
    return ByteTable(base_bytes.astype(np.int16), has_leading_space, is_boundary)


def counting_fault(processor: spm.SentencePieceProcessor, table: ByteTable) -> str:
    """Return why a table cannot count the text that a tokenizer decodes to, or an empty string.

    Every piece is decoded where a document begins and behind another piece.
    """
    size = table.base_bytes.size
    ordinary = [i for i in range(size) if not table.is_boundary[i] and not processor.is_byte(i)]
    plain = [i for i in ordinary if SPACE_MARK not in processor.id_to_piece(i)]
    anchor = next((i for i in (*plain, *ordinary) if processor.decode([i]).strip()), None)
    if anchor is None:
        return "has no piece with any text"
    for before in (BOS_ID, anchor):
        pairs = np.array([[before, index] for index in ordinary], dtype=TOKEN_DTYPE)
        counted = target_bytes(table, pairs.ravel())[::2]
        start = len(processor.decode([before]).encode())
        for index, text, ours in zip(ordinary, processor.decode(pairs.tolist()), counted.tolist(), strict=True):
            length = len(text.encode()) - start
            if length != ours:
                return f"has piece {index} ({processor.id_to_piece(index)!r}), {length} bytes of text counted as {ours}"
    word = processor.decode([anchor])
    if processor.decode(processor.encode(word)) == f"{word} ":
        return "ends every document with a space that its text does not have (treat_whitespace_as_suffix)"
    return ""
