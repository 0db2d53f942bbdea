"""Which part of a document is read and scored when, and which rank does it."""

# N predictions of a document

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from model.config import TTTConfig
from model.data.validation import ValidationSet
from model.distributed import Dist


class Window(NamedTuple):
    """Inputs [start, end) of a document, of whose predictions the last num_scored are scored."""

    document: int
    start: int
    end: int
    num_scored: int
    num_updates: int  # adapter updates made before this score
    is_last: bool


def chunk_length(num_predictions: int, config: TTTConfig) -> int:
    """Return how many predictions a chunk has in a document with num_predictions: its own length decides, no other's.

    A limit counts tokens, of which a document has one more than predictions: its last is the next document's first.
    """
    return next((chunk for limit, chunk in config.chunk_by_length if num_predictions < limit), config.chunk_tokens)


def longest_chunk(config: TTTConfig) -> int:
    """Return the most predictions that a chunk of any document has."""
    return max([config.chunk_tokens, *(chunk for _, chunk in config.chunk_by_length)])


def chunk_window(document: int, num_predictions: int, chunk: int, config: TTTConfig) -> Window:
    """Return the window that scores one chunk of a document with num_predictions predictions."""
    size = chunk_length(num_predictions, config)
    first = chunk * size
    end = min(first + size, num_predictions)
    return Window(
        document,
        max(0, end - config.window_tokens),
        end,
        end - first,
        chunk * config.updates_per_chunk,
        end == num_predictions,
    )


def unadapted_windows(document: int, num_predictions: int, config: TTTConfig) -> Iterator[Window]:
    """Yield the windows that score a document without adaptation.

    All chunks that end inside the first window_tokens see the document from its start, so one pass scores them all.
    """
    size = chunk_length(num_predictions, config)
    covered = min(num_predictions, config.window_tokens // size * size)
    if covered:
        yield Window(document, 0, covered, covered, 0, covered == num_predictions)
    for chunk in range(covered // size, -(-num_predictions // size)):
        if chunk * size >= covered:
            yield chunk_window(document, num_predictions, chunk, config)._replace(num_updates=0)


def round_up(length: int, step: int) -> int:
    """Return the smallest multiple of step that is not below length."""
    return -(-length // step) * step


def window_cost(num_predictions: int, config: TTTConfig) -> int:
    """Return the window tokens that a document's chunks read: what adapting it costs."""
    size = chunk_length(num_predictions, config)
    ends = np.minimum(np.arange(size, num_predictions + size, size), num_predictions)
    return int(np.minimum(ends, config.window_tokens).sum())


def share_documents(validation: ValidationSet, config: TTTConfig, dist: Dist) -> list[int]:
    """Return this rank's documents in working order: each goes to the rank with the least work so far."""
    lengths = np.diff(validation.document_ranges, axis=1)[:, 0] - 1  # predictions
    order = np.arange(lengths.size)  # the stream's, unless longest first is asked for
    if config.order == "sorted":
        order = np.argsort(-lengths, kind="stable")
    load = [0] * dist.world_size
    mine = []
    for document in order:
        if lengths[document] < 1:
            continue
        rank = load.index(min(load))
        load[rank] += window_cost(int(lengths[document]), config)
        if rank == dist.rank:
            mine.append(int(document))
    return mine
