"""model.ttt.batches: which documents run together, in which windows, and how few sizes those have."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from model.config import TTTConfig
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.kernels.graphs import MOST_RECORDINGS
from model.ttt.batches import Limits, Schedule
from model.ttt.recorded_pass import PADDING_TOKENS, learn_step
from model.ttt.windows import share_documents, window_cost
from tests.micro_model import micro_ttt

BY_LENGTH = ((9, 3), (40, 5), (60, 11))


def plan(lengths: list[int], config: TTTConfig, num_slots: int, limits: Limits) -> list[tuple[int, bool, int]]:
    """Run a schedule to its end and return its batches: length, whether they are last chunks, windows."""
    schedule = Schedule(range(len(lengths)), lengths.__getitem__, config, num_slots, limits)
    held: dict[int, int] = {}
    batches, ends = [], dict.fromkeys(range(len(lengths)), 0)
    while (batch := schedule.next_batch(lambda slot, document: held.update({slot: document}))) is not None:
        assert len({task.slot for task in batch.tasks}) == len(batch.tasks)
        for slot, window in batch.tasks:
            assert held[slot] == window.document
            assert window.end - window.num_scored == ends[window.document]
            ends[window.document] = window.end
            assert window.is_last == batch.is_last == (window.end == lengths[window.document])
            assert window.end - window.start <= batch.length
        batches.append((batch.length, batch.is_last, len(batch.tasks)))
        schedule.complete(batch)
    assert list(ends.values()) == lengths
    return batches


@pytest.mark.parametrize("by_length", [(), BY_LENGTH])
@pytest.mark.parametrize("num_slots", [1, 3, 50])
def test_every_chunk_runs_once_in_order_within_the_limits(
    num_slots: int, by_length: tuple[tuple[int, int], ...]
) -> None:
    lengths = np.random.default_rng(3).integers(1, 90, 50).tolist()
    limits = Limits(rows=6, tokens=80, last_step=16, learn_step=11 if by_length else None)
    batches = plan(lengths, micro_ttt(chunk_by_length=by_length), num_slots, limits)
    assert all(count <= limits.max_rows(length) for length, _, count in batches)


def test_stream_order_costs_no_more_than_a_tenth_over_sorted_order() -> None:
    # a batch costs as much as 8,000 window tokens, whatever its size; half the documents have slots
    config = TTTConfig()
    lengths = np.minimum(np.random.default_rng(5).lognormal(6.2, 1.0, 400), 18_000).astype(int).tolist()
    limits = Limits(rows=128, tokens=131_072, last_step=256, round_rows=4)
    costs = []
    for order in (lengths, sorted(lengths, reverse=True)):
        batches = plan(order, config, 200, limits)
        costs.append(sum(8000 + length * count * (0.3 if is_last else 1) for length, is_last, count in batches))
    assert costs[0] < 1.1 * costs[1]
    assert costs[0] < 2 * sum(window_cost(length, config) for length in lengths)


LADDERED = {"last_step": 256, "round_rows": 4, "padding_tokens": PADDING_TOKENS}
MACHINES = [(380, 76_000), (630, 131_072)]  # slots and tokens of a batch on devices of 80 and 141 GB


def web_lengths(num_documents: int, seed: int = 0) -> list[int]:
    return np.clip(np.random.default_rng(seed).lognormal(6.2, 1.0, num_documents), 20, 18_000).astype(int).tolist()


@pytest.mark.parametrize(
    "config", [
        TTTConfig(), TTTConfig(chunk_tokens=48), TTTConfig(chunk_tokens=48, chunk_by_length=((256, 8), (2000, 24))),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("num_slots", "tokens"), MACHINES)
def test_thousands_of_documents_meet_few_sizes_and_little_padding(
    num_slots: int, tokens: int, config: TTTConfig
) -> None:
    limits = Limits(rows=256, tokens=tokens, learn_step=learn_step(config), **LADDERED)
    lengths = web_lengths(6250)
    batches = [each for each in plan(lengths, config, num_slots, limits) if not each[1]]
    sizes = {(limits.pad_rows(count, length), length) for length, _, count in batches}
    assert len(sizes) < MOST_RECORDINGS
    work = sum(window_cost(length, config) for length in lengths)
    padded = sum(length * limits.pad_rows(count, length) for length, _, count in batches)
    assert padded < 1.1 * work
    assert padded + 8000 * len(batches) < (1.4 if config.chunk_by_length else 1.3) * work  # 8,000: about what one costs


def test_rows_that_would_be_padding_take_shorter_windows() -> None:
    limits = Limits(rows=8, tokens=10_000, last_step=16, padding_tokens=1000, learn_step=16)  # 1, 2, 4, 6 or 8 rows
    config, lengths = micro_ttt(chunk_by_length=((20, 4),), chunk_tokens=16, window_tokens=32), [40] * 5 + [15] * 3
    batches = plan(lengths, config, 7, limits)
    assert batches[:2] == [(16, False, 7), (32, False, 6)]  # five of 32 tokens leave a row for one of 8
    assert plan(lengths, config, 7, limits._replace(padding_tokens=None))[:2] == [(16, False, 7), (32, False, 5)]


def test_no_lengths_can_bring_more_sizes_than_are_kept() -> None:
    for _, tokens in MACHINES:
        limits = Limits(rows=256, tokens=tokens, **LADDERED)
        sizes = {
            (limits.pad_rows(count, length), length)
            for length in range(64, 2049, 64)
            for count in range(1, limits.max_rows(length) + 1)
        }
        assert len(sizes) <= MOST_RECORDINGS


def test_a_batch_takes_windows_that_fill_its_rows_but_for_little_padding() -> None:
    limits = Limits(rows=256, tokens=131_072, **LADDERED)
    for length in (64, 640, 2048):
        for num_ready in range(1, 300):
            count = limits.take_rows(num_ready, length)
            assert 1 <= count <= min(num_ready, limits.max_rows(length))
            padding = (limits.pad_rows(count, length) - count) * length
            assert padding <= max(PADDING_TOKENS, length * (math.ceil(limits.max_rows(length) / 16) - 1))


def test_a_schedule_of_fifty_thousand_documents_is_made_in_seconds() -> None:
    lengths, started = web_lengths(50_000), time.process_time()
    limits = Limits(rows=256, tokens=131_072, **LADDERED)
    schedule = Schedule(range(len(lengths)), lengths.__getitem__, TTTConfig(), 630, limits)
    while (batch := schedule.next_batch(lambda _slot, _document: None)) is not None:
        schedule.complete(batch)
    starts = np.concatenate(([0], np.cumsum(np.array(lengths) + 1)))
    tokens = np.full(starts[-1], 5, np.uint16)
    tokens[starts[:-1]] = 1
    share = share_documents(ValidationSet(tokens, starts[:-1]), TTTConfig(), Dist(rank=3, world_size=8))
    assert 5500 < len(share) < 7500
    assert time.process_time() - started < 20
