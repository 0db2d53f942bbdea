"""Whether the bytes that bits per byte are divided by are those of the text: every validation document decoded.

Pieces are checked one by one when a tokenizer is loaded; what only whole documents show is found here: text that the
tokenizer lost, tokens that no text gives, and shards that another tokenizer made.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from model.config import DataConfig
from model.data import remembered
from model.data.manifest import DataHashes
from model.data.shards import list_shards, token_blocks
from model.data.tokenizer import SPACE_MARK, Tokenizer, load_tokenizer, target_bytes
from model.data.validation import ValidationSet, load_validation

BATCH_TOKENS = 1 << 20  # decoded in one go
CHARACTER_BYTES = 4  # the most that UTF-8 needs
SNIPPET_CHARACTERS = 40
REMEDY = "use a tokenizer with byte fallback, such as `seedsweep data text` trains"


def check_text(data: DataConfig, hashes: DataHashes, *, vocab_size: int) -> None:
    """Check that the byte table counts the text of the validation set, all of it; remembered for large sets.

    40 million tokens take about 5 s, once on a node for the same shards, tokenizer and limits.
    Raises ValueError with what text_fault finds, or as load_tokenizer and load_validation do.
    """
    facts = (
        list(hashes.val.values()),
        hashes.tokenizer,
        data.val_documents,
        data.val_tokens,
        sentencepiece.__version__,
    )
    name = hashlib.sha256(repr(("text", *facts)).encode()).hexdigest()
    shards = list_shards(data.val, field="data.val")
    place = remembered.place_named(name) if is_large(shards) else None
    if remembered.recall(place) == {"text": name}:
        return
    tokenizer = load_tokenizer(Path(data.tokenizer).expanduser(), vocab_size=vocab_size)
    validation = load_validation(
        shards, vocab_size=vocab_size, val_documents=data.val_documents, val_tokens=data.val_tokens
    )
    fault = text_fault(tokenizer, validation)
    if fault:
        raise ValueError(f"data.val={data.val}: {fault}")
    remembered.remember(place, {"text": name})


def is_large(shards: list[Path]) -> bool:
    """Return whether shards take long enough to decode that the answer is worth remembering."""
    return sum(path.stat().st_size for path in shards) >= remembered.LEAST_BYTES


def text_fault(tokenizer: Tokenizer, validation: ValidationSet) -> str:
    """Return why the byte table does not count the text of a validation set, in one line, or an empty string."""
    fault = unknown_fault(tokenizer, validation)
    if fault:
        return fault
    for first, documents in batch_documents(validation):
        counts = count_bytes(tokenizer, documents)
        texts = tokenizer.decode_documents(documents)
        for index, text, counted in zip(range(first, first + len(texts)), texts, counts.tolist(), strict=True):
            if SPACE_MARK in text:
                return (
                    f"tokenizer {tokenizer.path} has no piece for the space: document {index} ({snippet(text)}) would "
                    "count 3 bytes for each; use one that was trained on text with spaces"
                )
            length = len(text.encode())
            is_last = index == validation.num_documents - 1
            if counted != length and not (is_last and is_cut(tokenizer, documents[-1])):
                return (
                    f"document {index} ({snippet(text)}) has {length} bytes of text, tokenizer {tokenizer.path} counts "
                    f"{counted}: these are not the tokens of a text under it; make the shards again with it"
                )
    return ""


def unknown_fault(tokenizer: Tokenizer, validation: ValidationSet) -> str:
    """Return a line if some token stands for text that the tokenizer has lost, else an empty string."""
    num_unknown, place = count_unknown(tokenizer, validation.tokens)
    if not num_unknown:
        return ""
    index = int(np.searchsorted(validation.document_starts, place, side="right")) - 1
    text = tokenizer.decode(validation.document(index))
    return (
        f"{num_unknown} of {validation.tokens.size} tokens are unknown to tokenizer {tokenizer.path}, first in "
        f"document {index} ({snippet(text)}): their text is lost, so bits per byte cannot be told; {REMEDY}"
    )


def count_unknown(tokenizer: Tokenizer, tokens: np.ndarray) -> tuple[int, int]:
    """Return how many tokens (N,) are the unknown one, and the place of the first (-1 for none)."""
    total, place = 0, -1
    for offset, block in token_blocks(tokens):
        is_unknown = block == tokenizer.unknown_id
        if place < 0 and is_unknown.any():
            place = offset + int(is_unknown.argmax())
        total += int(np.count_nonzero(is_unknown))
    return total, place


def batch_documents(validation: ValidationSet) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yield the number of a document, and the own tokens (BOS first) of it and of those after it, a batch at a time."""
    bounds = [*validation.document_starts.tolist(), validation.tokens.size]
    first, waiting, size = 0, [], 0
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        waiting.append(np.asarray(validation.tokens[start:end]))
        size += end - start
        if size >= BATCH_TOKENS or index == validation.num_documents - 1:
            yield first, waiting
            first, waiting, size = index + 1, [], 0


def count_bytes(tokenizer: Tokenizer, documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return the bytes (D,) int64 that the table counts for documents, each with its BOS (of no bytes) first."""
    stream = np.concatenate(documents)
    by_token = np.concatenate(([0], target_bytes(tokenizer.byte_table, stream).astype(np.int64)))
    starts = np.cumsum([0, *(len(tokens) for tokens in documents[:-1])])
    return np.asarray(np.add.reduceat(by_token, starts))


def is_cut(tokenizer: Tokenizer, tokens: np.ndarray) -> bool:
    """Return whether the stream was cut inside a character: without its last byte pieces the document is sound."""
    whole = len(tokens)
    while whole > 1 and len(tokens) - whole < CHARACTER_BYTES and tokenizer.is_byte(int(tokens[whole - 1])):
        whole -= 1
        if len(tokenizer.decode(tokens[:whole]).encode()) == count_bytes(tokenizer, [tokens[:whole]])[0]:
            return True
    return False


def snippet(text: str) -> str:
    """Return the beginning of a text, quoted."""
    cut = text[:SNIPPET_CHARACTERS]
    return repr(cut if len(cut) == len(text) else f"{cut}...")
