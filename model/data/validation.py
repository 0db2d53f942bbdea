"""The validation stream and its documents.

A document starts at its BOS and ends with the BOS of the next one, so that every token of the stream but the first is
the target of exactly one document; the stream's last document has no such end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.data.shards import BOS_ID, check_token_range, find_documents, find_first_bos, open_shard


@dataclass(frozen=True, slots=True)
class ValidationSet:
    """A stream of tokens (N,) uint16 and the index of each document's BOS in it, document_starts (D,) int64."""

    tokens: np.ndarray
    document_starts: np.ndarray

    @property
    def num_documents(self) -> int:
        """Documents in the stream, a lone last BOS included."""
        return int(self.document_starts.size)

    @property
    def num_targets(self) -> int:
        """Scored predictions: every token but the first."""
        return int(self.tokens.size) - 1

    @property
    def document_ranges(self) -> np.ndarray:
        """(D, 2) int64: first token and one past the last token of each document, the next BOS included.

        A document of n = end - start tokens has n - 1 targets; a BOS that ends the stream has none.
        """
        ends = np.append(self.document_starts[1:] + 1, self.tokens.size)
        return np.stack([self.document_starts, ends], axis=1)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, its own BOS first and the next document's BOS last, uint16."""
        start, end = self.document_ranges[index]
        return self.tokens[start:end]


def load_validation(
    shards: Sequence[Path],
    *,
    vocab_size: int,
    val_documents: int | None = None,
    val_tokens: int | None = None,
    on_open: Callable[[Path], None] | None = None,
) -> ValidationSet:
    """Return the stream of all shards end to end, cut to its first val_documents documents and val_tokens tokens.

    One shard stays a memory map; several are joined in memory. on_open is called with each path that is read.
    Raises ValueError if the stream does not start with a BOS, a shard has none, a token is outside the vocabulary, or
    fewer than 2 tokens are left to score.
    """
    if not shards:
        raise ValueError("data.val matches no shard: the validation set is empty")
    parts = []
    for path in shards:
        if on_open is not None:
            on_open(path)
        tokens = open_shard(path)
        if find_first_bos(tokens) is None:
            raise ValueError(f"shard {path} has no BOS (id {BOS_ID}); it was made with another tokenizer")
        check_token_range(tokens, vocab_size, path)
        parts.append(tokens)
    stream = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if stream[0] != BOS_ID:
        raise ValueError(f"validation shard {shards[0]} starts with token {stream[0]}, not with BOS (id {BOS_ID})")
    starts = find_documents(stream)
    num_tokens = int(stream.size)
    if val_documents is not None and val_documents < starts.size:
        num_tokens = int(starts[val_documents])
    if val_tokens is not None:
        num_tokens = min(num_tokens, val_tokens)
    if num_tokens < 2:
        raise ValueError(
            f"the validation set is empty: {num_tokens} token left of {shards[0]} (data.val_documents={val_documents}, "
            f"data.val_tokens={val_tokens}), at least 2 are needed"
        )
    return ValidationSet(stream[:num_tokens], starts[starts < num_tokens])
