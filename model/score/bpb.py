"""From nats to bits per byte: the only home of the conversion and of counting bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from model.data.tokenizer import ByteTable, target_bytes
from model.data.validation import ValidationSet


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Return nats summed over some targets as bits per byte of those targets' text."""
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need at least one byte of text, got {num_bytes}")
    # bytes, not tokens: a tokenizer with longer pieces has fewer losses, each of them larger
    return nats / math.log(2) / num_bytes


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """Sums per validation document: targets and bytes int64, nats float64, each (D,); and the seconds they took."""

    tokens: np.ndarray
    bytes: np.ndarray
    nats: np.ndarray
    seconds: float

    @property
    def bpb(self) -> float:
        """Bits per byte over all documents."""
        return bits_per_byte(float(self.nats.sum()), int(self.bytes.sum()))

    def metrics(self, prefix: str) -> dict[str, float | int]:
        """Return the totals as flat metrics prefix_nats, _tokens, _bytes, _bpb and _s."""
        return {
            f"{prefix}_nats": float(self.nats.sum()),
            f"{prefix}_tokens": int(self.tokens.sum()),
            f"{prefix}_bytes": int(self.bytes.sum()),
            f"{prefix}_bpb": self.bpb,
            f"{prefix}_s": self.seconds,
        }


def document_bounds(validation: ValidationSet, num_scored: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first target of each document and one past its last, (D,) int64 each, of the first num_scored targets.

    A target belongs to the document of its input.
    """
    ranges = validation.document_ranges  # (D, 2) tokens, the BOS of the next document included
    # one target less than tokens: the last token of a range is a target only
    return np.minimum(ranges[:, 0], num_scored), np.minimum(ranges[:, 1] - 1, num_scored)


def document_bytes(validation: ValidationSet, table: ByteTable, *, num_scored: int) -> np.ndarray:
    """Return the bytes (D,) int64 of each document's targets among the first num_scored."""
    starts, ends = document_bounds(validation, num_scored)
    # a running sum, so that a document's bytes are one subtraction
    total = np.concatenate(([0], np.cumsum(target_bytes(table, validation.tokens)[:num_scored], dtype=np.int64)))
    return np.subtract(total[ends], total[starts])


def document_sums(
    validation: ValidationSet, table: ByteTable, nll: np.ndarray, *, num_scored: int, seconds: float
) -> DocumentScores:
    """Return targets, bytes and nats by document of per-target nll (N,); only the first num_scored targets count."""
    num_bytes = document_bytes(validation, table, num_scored=num_scored)
    return add_nats(num_bytes, validation, nll, num_scored=num_scored, seconds=seconds)


def add_nats(
    num_bytes: np.ndarray, validation: ValidationSet, nll: np.ndarray, *, num_scored: int, seconds: float
) -> DocumentScores:
    """Return what document_sums returns, from the document_bytes (D,).

    Nats are summed in stream order, so that they do not depend on how the targets were spread over rows or ranks.
    """
    starts, ends = document_bounds(validation, num_scored)
    # in float64, so that others can add the same losses up in another order and compare
    nats = np.array([nll[a:b].sum(dtype=np.float64) for a, b in zip(starts, ends)])
    return DocumentScores(ends - starts, num_bytes, nats, seconds)
