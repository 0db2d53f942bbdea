"""model.ttt.recorded_pass and the adapters' kernels: recorded steps and large batches change no score."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.bounds import window_bounds
from model.config import TTTConfig
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.kernels import adapter_update
from model.kernels import adapters as adapters_module
from model.kernels.adapter_update import AdamSettings, adam_rows_, gather_rows
from model.kernels.adapters import GradientBuffers, LowRank, adapt_product, add_low_rank_, add_product, reduce_inputs
from model.kernels.graphs import MOST_FAILURES, MOST_RECORDINGS
from model.lora import Adapters, Layout
from model.ttt.batches import Limits, Schedule
from model.ttt.document_pass import DocumentPass
from model.ttt.learning_step import LearningStep
from model.ttt.ledger_reading import choose_events, times_scored
from model.ttt.recorded_pass import PADDING_TOKENS, RecordedPass, RecordedStep, learn_step
from model.ttt.score_ledger import SCORE, UPDATE
from model.ttt.slots import Slots
from model.ttt.windows import longest_chunk, share_documents, window_cost
from tests.fake_recorder import FakeRecorder
from tests.fake_triton import load_kernels
from tests.micro_model import FRONTIER_PARTS, ignore, micro_model, micro_ttt, micro_validation, random_model

LENGTHS = (70, 5, 33, 12, 2, 57, 9, 40)
DOCUMENTS = range(len(LENGTHS))


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The formula, one document at a time: (x A^T) B^T."""
    return torch.stack([x[i] @ a[i].T @ b[i].T for i in range(x.size(0))])


def run(
    kind: type[DocumentPass], config: TTTConfig, *, num_slots: int = 3, dtype: torch.dtype = torch.float64
) -> DocumentPass:
    model, validation = random_model(dtype=dtype).requires_grad_(False), micro_validation(*LENGTHS)
    work = kind(model, validation, config, ignore, label="test")
    work.run_adapted(DOCUMENTS, Slots(model, config, 7, num_slots, num_spare=1))
    return work


BY_LENGTH = ((9, 3), (40, 5), (60, 11))
FULL = {"adapter_kinds": ("q", "k", "v", "o", "mlp", "head")}


@pytest.mark.parametrize(
    "changes",
    [
        *({"adapter_kinds": kinds, "updates_per_chunk": count}
          for kinds in (FULL["adapter_kinds"], ("v", "o"), ("mlp",), ("q", "head")) for count in (1, 2)),
        FULL | {"lora_alpha": 3.0}, FULL | {"chunk_by_length": BY_LENGTH},
        {"adapter_kinds": ("v",), "chunk_tokens": 2, "window_tokens": 80, "lr": 1e-4},
    ],
)  # fmt: skip
def test_steps_of_fixed_size_score_what_steps_of_any_size_score(changes: dict[str, Any]) -> None:
    config = micro_ttt(**changes)
    plain, fixed = run(DocumentPass, config), run(RecordedPass, config, num_slots=len(LENGTHS))
    assert float(plain.nll.abs().min()) > 0
    assert torch.allclose(fixed.nll, plain.nll, rtol=0, atol=1e-12)


def test_the_ledger_holds_every_target_once_and_an_update_after_each_chunk_but_the_last() -> None:
    for kind, changes in itertools.product((DocumentPass, RecordedPass), ({}, {"chunk_by_length": BY_LENGTH})):
        work = run(kind, micro_ttt(**changes))
        events, validation = work.close_ledger(), work.validation
        assert (times_scored(events, validation.document_starts, validation.num_targets) == 1).all()
        chunks = Counter(choose_events(events, SCORE).column("document").tolist())
        updates = Counter(choose_events(events, UPDATE).column("document").tolist())
        assert all(updates[document] == count - 1 for document, count in chunks.items())


@pytest.mark.parametrize("lag", [1, 7, 1000])
def test_entries_that_wait_for_a_gpu_reach_the_ledger_in_order(lag: int) -> None:
    config = micro_ttt(updates_per_chunk=2)
    model, validation = random_model(dtype=torch.float64).requires_grad_(False), micro_validation(*LENGTHS)
    work = DocumentPass(model, validation, config, ignore, label="test")
    work.ledger_lag = lag
    work.run_adapted(DOCUMENTS, Slots(model, config, 7, 3))
    assert 0 < len(work.unlogged) <= lag
    late, at_once = work.close_ledger(), run(DocumentPass, config).close_ledger()
    assert not work.unlogged
    assert late.chain == at_once.chain
    assert np.array_equal(late.loss_sum, at_once.loss_sum)


@pytest.mark.parametrize("num_slots", [1, 2, 8])
def test_scores_do_not_depend_on_the_number_of_slots(num_slots: int) -> None:
    for by_length, (dtype, tolerance) in itertools.product(
        ((), BY_LENGTH), ((torch.float64, 1e-12), (torch.float32, 1e-5))
    ):
        config = micro_ttt(chunk_by_length=by_length)
        first, second = (run(RecordedPass, config, num_slots=n, dtype=dtype) for n in (3, num_slots))
        assert torch.allclose(first.nll, second.nll, rtol=0, atol=tolerance)


def test_the_spare_slot_stays_zero() -> None:
    model = random_model(dtype=torch.float64).requires_grad_(False)
    slots = Slots(model, micro_ttt(), 7, 2, num_spare=1)
    recorder = RecordedStep(model, micro_validation(40).tokens, micro_ttt(), slots, is_looped=True)
    recorder.prepare(4, 24)
    assert not slots.values[2].any()
    assert not slots.moments[2].any()
    assert not slots.values[:2].any()


@pytest.mark.parametrize("changes", [{}, {"chunk_by_length": BY_LENGTH}])
def test_a_size_that_cannot_be_recorded_scores_the_same_step_by_step(
    changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = micro_ttt(**changes)
    expected = run(RecordedPass, config, num_slots=8).nll
    for broken in (set(), {1, 2}, set(range(100))):
        work, recorder = recorded_pass(config, is_broken=lambda table, broken=broken: table.size(0) in broken)
        assert torch.equal(work.nll, expected), broken
        assert (recorder.num_made > 0) == (len(broken) < 100)
        assert recorder.num_recovered == len(recorder.failed) <= MOST_FAILURES
    assert caplog.text.count("could not be recorded: RuntimeError: operation not permitted") >= MOST_FAILURES


@pytest.mark.parametrize("most_recordings", [1, 3])
def test_few_recordings_are_kept_and_scores_do_not_depend_on_how_many(most_recordings: int) -> None:
    work, recorder = recorded_pass(micro_ttt(), most_recordings=most_recordings)
    assert len(recorder.recorded) == most_recordings
    assert recorder.num_made > most_recordings
    assert torch.equal(work.nll, run(RecordedPass, micro_ttt(), num_slots=8).nll)


class NoHostCopies(TorchDispatchMode):
    """Refuses what a recording cannot hold: numbers taken from the host's memory, or given to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation unless it is one of those."""
        assert func not in (torch.ops.aten.lift_fresh.default, torch.ops.aten._local_scalar_dense.default), func
        return func(*args, **(kwargs or {}))


def test_a_padded_step_can_be_recorded() -> None:
    config = micro_ttt(chunk_by_length=BY_LENGTH)
    model = random_model(micro_model(**FRONTIER_PARTS["all"])).requires_grad_(False)
    slots = Slots(model, config, 7, 2, num_spare=1)
    step = LearningStep(model, micro_validation(70).tokens, config, slots, is_looped=True, is_padded=True)
    table = torch.from_numpy(step.fill_table(3, 22))
    table[:2] = torch.tensor([[14, 0, 14, 3], [50, 1, 20, 11]])
    with NoHostCopies():
        losses = step.score_and_learn(table, 22)
        bounds = window_bounds(22 - table[:, 2], 3, 22, 11, table.device)  # as the kernels of a GPU take it
    assert losses.shape == (3, 11)
    assert bounds.keys.tolist() == [0, 8, 22, 24, 44, 44, 66]
    assert bounds.queries.tolist() == [0, 0, 11, 11, 22, 22, 33]
    assert window_bounds(torch.tensor([8, 2]), 2, 10, 4, table.device).queries.tolist() == [0, 2, 4, 4, 8]


# ---- what runs together ----------------------------------------------------------------------------------------------


def recorded_pass(
    config: TTTConfig, is_broken: Callable[..., bool] = lambda _table: False, **options: Any
) -> tuple[RecordedPass, FakeRecorder]:
    """Adapt all documents with steps recorded by a fake recorder."""
    model, validation = random_model(dtype=torch.float64).requires_grad_(False), micro_validation(*LENGTHS)
    slots = Slots(model, config, 7, len(LENGTHS), num_spare=1)
    recorder = FakeRecorder(lambda table: (table.size(0), longest_chunk(config)), is_broken, **options)
    work = RecordedPass(model, validation, config, ignore, label="test")
    work.learning = RecordedStep(
        model, validation.tokens, config, slots, is_looped=True, is_padded=learn_step(config) is not None,
        recorder=recorder,
    )  # fmt: skip
    work.run_adapted(DOCUMENTS, slots)
    return work, recorder


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


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_buffers", [False, True])
def test_joined_adapters_have_the_values_and_gradients_of_their_formula(has_buffers: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, time, dim, rank = 3, 5, 6, 2
    widths = {"q": 4, "k": 2, "o": 4}
    x, weight = draw(rows, time, dim), draw(6, dim)
    seen, out_weight = draw(rows, time, 7), draw(4, 7)  # what the o adapter's result is added to a product of
    a, b = draw(rows, 3 * rank, dim), {kind: draw(rows, width, rank) for kind, width in widths.items()}
    leaves = [x, a, *b.values(), seen, out_weight]
    grad, grad_out = draw(rows, time, 6), draw(rows, time, 4)

    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    parts = torch.split(inputs[1], rank, dim=1)
    expected = inputs[0] @ weight.T + torch.cat([low_rank(inputs[0], parts[i], inputs[2 + i]) for i in range(2)], dim=2)
    expected_out = inputs[5] @ inputs[6].T + low_rank(inputs[0], parts[2], inputs[4])
    wanted = torch.autograd.grad((expected * grad).sum() + (expected_out * grad_out).sum(), inputs)

    ours = [leaf.clone().requires_grad_(not has_buffers or place in (0, 5, 6)) for place, leaf in enumerate(leaves)]
    zero = [torch.full_like(leaf, torch.nan) for leaf in leaves[1:5]]
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    buffers = GradientBuffers(zero[0], dict(zip(b, zero[1:])), anchor) if has_buffers else None
    adapters = LowRank(ours[1], dict(zip(b, ours[2:5])), buffers)
    y, reduced = adapt_product(ours[0], weight, adapters, {"q": (0, 4), "k": (4, 6)}, torch.nn.functional.linear)
    assert reduced is not None
    places: list[int] = []
    reduced.register_hook(lambda grad: places.append(grad.stride(1)))
    out = add_product(ours[5], ours[6], reduced, adapters, "o", torch.nn.functional.linear)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(out, expected_out, rtol=0, atol=1e-12)
    torch.autograd.backward((y * grad).sum() + (out * grad_out).sum())
    assert places == [3 * rank]  # beside room for the others, so that nothing is copied to them
    middle = zero if has_buffers else [leaf.grad for leaf in ours[1:5]]
    got = [ours[0].grad, *middle, ours[5].grad, ours[6].grad]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kinds", "num_sets", "time", "is_joined"),
    [
        ("qkv", 2, 21, True),
        ("qk", 1, 16, True),
        ("q", 2, 17, False),
        ("qv", 2, 17, True),
        ("v", 1, 21, False),
        ("qkv", 2, 7, False),
    ],
)
def test_one_kernel_makes_a_product_with_its_adapters(
    kinds: str, num_sets: int, time: int, is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of any length: a tile that reaches beyond its rows must not touch those of the next set.

    Columns without an adapter, too, and ranks that are no whole number of steps.
    """
    kernels = load_kernels(Path(adapters_module.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    for name in ("TILE_M", "TILE_N", "DEPTH"):
        monkeypatch.setattr(kernels, name, 8)
    monkeypatch.setattr(kernels, "STEP", 12)
    monkeypatch.setattr(kernels, "has_bulk_copies", lambda _device: True)
    monkeypatch.setitem(sys.modules, "model.kernels.adapter_update_triton", kernels)
    monkeypatch.setattr(adapters_module, "uses_triton", lambda _x: True)
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    places, rank = {"q": (0, 16), "k": (16, 24), "v": (24, 40)}, 16
    products: list[Tensor] = []
    x, weight, a = draw(num_sets, time, 16), draw(40, 16), draw(num_sets, (len(kinds) + 1) * rank, 16)
    columns = {kind: places[kind] for kind in kinds}
    b = {kind: draw(num_sets, end - first, rank) for kind, (first, end) in columns.items()}
    adapters = LowRank(a, {**b, "o": draw(num_sets, 24, rank)})

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        products.append(x)
        return x @ weight.T

    y, rest = adapt_product(x, weight, adapters, columns, apply)
    parts = torch.split(adapters.a, rank, dim=1)
    expected = x @ weight.T
    for i, (kind, (first, end)) in enumerate(columns.items()):
        expected[..., first:end] += low_rank(x, parts[i], b[kind])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert rest is not None
    torch.testing.assert_close(rest, x @ parts[-1].mT)
    # the last adapter's result is added to a product of something else
    seen, out_weight = draw(num_sets, time, 32), draw(24, 32)
    out = add_product(seen, out_weight, rest, adapters, "o", apply)
    expected = seen @ out_weight.T + rest @ adapters.b["o"].mT
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    assert len(products) == (0 if is_joined else 1 if time >= 8 else 2)  # one adapter of few columns stays apart


def test_an_adapter_of_its_own_input_reads_it() -> None:
    generator = torch.Generator().manual_seed(6)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (2, 2, 4), (2, 5, 2)))
    pair = LowRank(a, {"mlp": b})
    reduced, same = reduce_inputs(x.requires_grad_(), pair)
    y = add_low_rank_(torch.zeros(2, 3, 5), reduced, pair, "mlp")
    assert torch.allclose(y, low_rank(x, a, b), atol=1e-6)
    assert torch.equal(same, x)
    grad, grad_same = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5), (2, 3, 4)))
    torch.autograd.backward((y * grad).sum() + (same * grad_same).sum())
    wanted = torch.autograd.grad((low_rank(x, a, b) * grad).sum(), x)[0] + grad_same
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted, atol=1e-6)


def test_output_scales_lie_in_the_adapters_and_come_back_into_their_gradients() -> None:
    """Into the buffers, too, and only when every gradient is there."""
    generator = torch.Generator().manual_seed(9)
    model = random_model(dtype=torch.float64)
    layout = Layout(model.config, 3, 2, ("q", "o", "mlp"))
    rows, found = torch.randn(2, layout.num_parameters, generator=generator, dtype=torch.float64), []
    x = torch.randn(2, 5, model.config.model_dim, generator=generator, dtype=torch.float64)
    dim = model.config.model_dim
    scales = {kind: torch.randn(3, dim, generator=generator, dtype=torch.float64) for kind in ("o", "k", "mlp")}
    for has_buffers in (True, False):
        gradients = torch.full_like(rows, torch.nan)
        leaf = rows.clone().requires_grad_(not has_buffers)
        adapters = layout.view(leaf)
        if has_buffers:
            anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
            adapters = replace(adapters, gradients=layout.view(gradients), anchor=anchor)
        total = x.new_zeros(())
        for visit, each in enumerate(adapters.scaled(scales).visits(3)):
            assert each.attention is not None
            assert each.mlp is not None
            y, reduced = adapt_product(x, x.new_zeros(dim, dim), each.attention, {"q": (0, dim)}, F.linear)
            assert reduced is not None
            if not has_buffers:
                wanted = scales["o"][visit] * (reduced @ adapters.b["o"][:, visit].mT)
                assert torch.allclose(add_low_rank_(torch.zeros_like(x), reduced, each.attention, "o"), wanted)
            out = add_product(y, x.new_zeros(dim, dim), reduced, each.attention, "o", F.linear)
            hidden, same = reduce_inputs(out + y, each.mlp)
            total = total + add_low_rank_(same * 1.0, hidden, each.mlp, "mlp").square().sum()
        total.backward()
        if not has_buffers:
            assert leaf.grad is not None
            gradients = leaf.grad
        found.append([*layout.view(gradients).a.values(), *layout.view(gradients).b.values()])
    assert all(map(torch.allclose, *found))
    assert len(found[0]) == 6


def test_a_layout_gives_every_number_of_a_row_to_one_adapter() -> None:
    model = random_model()
    layout = Layout(model.config, 7, 2, ("q", "k", "v", "o", "mlp", "head"))
    row = torch.arange(layout.num_parameters).float().expand(2, -1).contiguous()
    views = layout.view(row)
    numbers = torch.cat([tensor[1].flatten() for tensor in views.tensors()])
    assert torch.equal(numbers.sort().values, row[1])
    assert views.attention_a is not None
    assert torch.equal(views.attention_a[:, :, 2:4], views.a["k"])
    assert isinstance(views, Adapters)


@pytest.mark.parametrize("rows", [[1], [3, 0]])
def test_stepping_rows_is_adam_without_momentum_on_those_rows_only(rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(8)
    values, moments = torch.randn(4, 50, generator=generator), torch.zeros(4, 50)
    reference = [torch.nn.Parameter(values[row].clone()) for row in rows]
    optimizers = [torch.optim.AdamW([p], lr=0.01, betas=(0.0, 0.999), eps=1e-10, weight_decay=0.5) for p in reference]
    kept, index = values.clone(), torch.tensor(rows)
    for step in range(1, 4):
        gradients = torch.randn(len(rows), 50, generator=generator)
        for parameter, optimizer, gradient in zip(reference, optimizers, gradients):
            parameter.grad = gradient.clone()
            optimizer.step()
        correction = torch.full((len(rows),), 1 - 0.999**step)
        adam_rows_(values, moments, index, gradients, correction, AdamSettings(0.01, 0.5, 0.999, 1e-10))
    assert torch.allclose(gather_rows(values, index, torch.float64).float(), torch.stack([*reference]), atol=1e-5)
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(values[others], kept[others])


def test_the_kernel_scales_as_plain_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of longer rows, to a tensor of their own and where they stand; no number beside them changes."""
    kernels = load_kernels(Path(adapter_update.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    monkeypatch.setattr(kernels, "BLOCK", 8)
    generator = torch.Generator().manual_seed(4)
    rows, scale = torch.randn(3, 50, generator=generator), torch.randn(2, 5, generator=generator)
    part = rows[:, 7:37].view(3, 2, 5, 3)
    expected, kept = adapter_update.scale_rows(part, scale), rows.clone()
    assert torch.equal(expected, part * scale.unsqueeze(-1))
    assert torch.equal(kernels.launch_scale(part, scale, None), expected)
    assert kernels.launch_scale(part, scale, part) is part
    assert torch.equal(part, expected)
    assert torch.equal(rows[:, :7], kept[:, :7])
    assert torch.equal(rows[:, 37:], kept[:, 37:])


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_kernels_gather_and_step_as_plain_pytorch_does(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels(Path(adapter_update.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    generator, index = torch.Generator().manual_seed(9), torch.tensor([3, 1])
    values, moments = (torch.rand(4, 5000, generator=generator) for _ in range(2))  # more than a program takes
    gradients, correction = torch.randn(2, 5000, generator=generator), torch.tensor([0.01, 0.2])
    gathered = kernels.launch_gather(values, index, torch.float32, factor)
    assert torch.equal(gathered, gather_rows(values, index, torch.float32, factor))
    expected = values.clone(), moments.clone()
    settings = AdamSettings(0.1, 0.5, 0.99, 1e-10)
    adam_rows_(*expected, index, gradients, correction, settings, factor)
    kernels.launch_adam(values, moments, index, gradients, correction, *settings, factor)
    assert torch.allclose(moments, expected[1], rtol=1e-6, atol=0)
    assert torch.allclose(values, expected[0], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_scaled_adapter_is_taken_through_its_scale() -> None:
    index, gradients = torch.tensor([0]), torch.full((1, 3), 2.0)
    values, moments = torch.ones(1, 3), torch.zeros(1, 3)
    adam_rows_(values, moments, index, gradients, torch.tensor([1.0]), AdamSettings(0.0, 0.0, 0.5, 1e-10), 3.0)
    assert moments.tolist() == [[18.0] * 3]  # (1 - beta2) (3 x 2)^2
