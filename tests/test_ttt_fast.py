"""model/ttt_graphs.py, ttt_schedule.py and the adapters' kernels: recorded steps and large batches change no score."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from model.config import TTTConfig
from model.kernels.adapter_update import AdamSettings, adam_rows_, gather_rows
from model.kernels.adapters import GradientBuffers, LowRank, adapted_product, add_low_rank_, reduce_inputs
from model.lora import Adapters, Layout
from model.score_ledger import SCORE, UPDATE, times_scored
from model.ttt_adapter import Adapter
from model.ttt_graphs import GraphAdapter, StepRecorder, rounded_rows
from model.ttt_schedule import Limits, Schedule
from model.ttt_slots import Slots
from model.ttt_windows import window_cost
from tests.micro_model import ignore, micro_ttt, micro_validation, random_model

LENGTHS = (70, 5, 33, 12, 2, 57, 9, 40)
DOCUMENTS = range(len(LENGTHS))


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The formula, one document at a time: (x A^T) B^T."""
    return torch.stack([x[i] @ a[i].T @ b[i].T for i in range(x.size(0))])


def run(kind: type[Adapter], config: TTTConfig, *, num_slots: int = 3, dtype: torch.dtype = torch.float64) -> Adapter:
    model, validation = random_model(dtype=dtype).requires_grad_(False), micro_validation(*LENGTHS)
    work = kind(model, validation, config, ignore, label="test")
    work.run_adapted(DOCUMENTS, Slots(model, config, 7, num_slots, num_spare=1))
    return work


@pytest.mark.parametrize("updates_per_chunk", [1, 2])
@pytest.mark.parametrize("kinds", [("q", "k", "v", "o", "mlp", "head"), ("v", "o"), ("mlp",), ("q", "head")])
def test_steps_of_fixed_size_score_what_steps_of_any_size_score(kinds: tuple[str, ...], updates_per_chunk: int) -> None:
    config = micro_ttt(adapter_kinds=kinds, updates_per_chunk=updates_per_chunk)
    plain, fixed = run(Adapter, config), run(GraphAdapter, config, num_slots=len(LENGTHS))
    assert float(plain.nll.abs().min()) > 0
    assert torch.allclose(fixed.nll, plain.nll, rtol=0, atol=1e-12)


def test_the_ledger_holds_every_target_once_and_an_update_after_each_chunk_but_the_last() -> None:
    for kind in (Adapter, GraphAdapter):
        work = run(kind, micro_ttt())
        events, validation = work.close_ledger(), work.validation
        assert (times_scored(events, validation.document_starts, validation.num_targets) == 1).all()
        chunks = Counter(events.of_kind(SCORE).column("document").tolist())
        updates = Counter(events.of_kind(UPDATE).column("document").tolist())
        assert all(updates[document] == count - 1 for document, count in chunks.items())


@pytest.mark.parametrize("num_slots", [1, 2, 8])
def test_scores_do_not_depend_on_the_number_of_slots(num_slots: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        first, second = (run(GraphAdapter, micro_ttt(), num_slots=n, dtype=dtype) for n in (3, num_slots))
        assert torch.allclose(first.nll, second.nll, rtol=0, atol=tolerance)


def test_the_spare_slot_stays_zero() -> None:
    model = random_model(dtype=torch.float64).requires_grad_(False)
    slots = Slots(model, micro_ttt(), 7, 2, num_spare=1)
    recorder = StepRecorder(model, micro_validation(40).tokens, micro_ttt(), slots, is_looped=True)
    recorder.prepare(4, 24)
    assert not slots.values[2].any()
    assert not slots.moments[2].any()
    assert not slots.values[:2].any()


def test_rows_are_rounded_up_by_less_than_a_quarter() -> None:
    rounded = np.array([rounded_rows(count) for count in range(1, 129)])
    counts = np.arange(1, 129)
    assert (rounded >= counts).all()
    assert ((rounded - counts) / counts <= 0.25).all()
    assert len(set(rounded.tolist())) < 40


# ---- what runs together ----------------------------------------------------------------------------------------------


def plan(lengths: list[int], config: TTTConfig, num_slots: int, limits: Limits) -> list[tuple[int, bool, int]]:
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


@pytest.mark.parametrize("num_slots", [1, 3, 50])
def test_every_chunk_runs_once_in_order_within_the_limits(num_slots: int) -> None:
    lengths = np.random.default_rng(3).integers(1, 90, 50).tolist()
    limits = Limits(rows=6, tokens=80, last_step=16)
    batches = plan(lengths, micro_ttt(), num_slots, limits)
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


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_buffers", [False, True])
def test_joined_adapters_have_the_values_and_gradients_of_their_formula(has_buffers: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, time, dim, rank = 3, 5, 6, 2
    widths = {"q": 4, "k": 2, "o": 4}
    x, weight, scale = draw(rows, time, dim), draw(6, dim), draw(4)
    a, b = draw(rows, 3 * rank, dim), {kind: draw(rows, width, rank) for kind, width in widths.items()}
    leaves = [x, a, *b.values()]
    grad, grad_out = draw(rows, time, 6), draw(rows, time, 4)

    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    parts = torch.split(inputs[1], rank, dim=1)
    expected = inputs[0] @ weight.T + torch.cat([low_rank(inputs[0], parts[i], inputs[2 + i]) for i in range(2)], dim=2)
    expected_out = scale * low_rank(inputs[0], parts[2], inputs[4])
    wanted = torch.autograd.grad((expected * grad).sum() + (expected_out * grad_out).sum(), inputs)

    ours = [leaf.clone().requires_grad_(not has_buffers or leaf is x) for leaf in leaves]
    zero = [torch.full_like(leaf, torch.nan) for leaf in leaves[1:]]
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    buffers = GradientBuffers(zero[0], dict(zip(b, zero[1:])), anchor) if has_buffers else None
    adapters = LowRank(ours[1], dict(zip(b, ours[2:])), buffers)
    y, reduced = adapted_product(ours[0], weight, adapters, {"q": (0, 4), "k": (4, 6)}, torch.nn.functional.linear)
    assert reduced is not None
    out = add_low_rank_(torch.zeros(rows, time, 4, dtype=torch.float64), reduced, adapters, "o", scale)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(out, expected_out, rtol=0, atol=1e-12)
    torch.autograd.backward((y * grad).sum() + (out * grad_out).sum())
    got = [ours[0].grad, *(zero if has_buffers else [leaf.grad for leaf in ours[1:]])]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


def test_an_adapter_of_its_own_input_reads_it() -> None:
    generator = torch.Generator().manual_seed(6)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (2, 2, 4), (2, 5, 2)))
    pair = LowRank(a, {"mlp": b})
    y = add_low_rank_(torch.zeros(2, 3, 5), reduce_inputs(x, pair), pair, "mlp", torch.ones(5))
    assert torch.allclose(y, low_rank(x, a, b), atol=1e-6)


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
