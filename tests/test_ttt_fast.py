"""model.ttt.recorded_pass: recorded steps and large batches change no score."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.attention.bounds import window_bounds
from model.config import TTTConfig
from model.kernels.graphs import MOST_FAILURES
from model.ttt.document_pass import DocumentPass
from model.ttt.learning_step import LearningStep
from model.ttt.ledger_reading import choose_events, times_scored
from model.ttt.recorded_pass import RecordedPass, RecordedStep, learn_step
from model.ttt.score_ledger import SCORE, UPDATE
from model.ttt.slots import Slots
from model.ttt.windows import longest_chunk
from tests.fake_recorder import FakeRecorder
from tests.micro_model import FRONTIER_PARTS, ignore, micro_model, micro_ttt, micro_validation, random_model

LENGTHS = (70, 5, 33, 12, 2, 57, 9, 40)
DOCUMENTS = range(len(LENGTHS))


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
