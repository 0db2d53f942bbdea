"""model/ttt/documents.py: a chunk is scored before it is learned from, and a score depends on its own document only."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.banks import visit_plan
from model.config import TTTConfig
from model.data.shards import find_documents
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT
from model.lora import Layout, initial_a
from model.ttt.documents import TTTResult, score_documents
from model.ttt.ledger_reading import choose_events, times_scored
from model.ttt.score_ledger import SCORE, UPDATE
from model.ttt.windows import chunk_length, chunk_window, share_documents, unadapted_windows, window_cost
from tests.micro_model import VOCAB_SIZE, LoneRank, ignore, micro_bytes, micro_ttt, micro_validation, random_model

LENGTHS = (30, 5, 61, 2, 17, 44, 9)
BY_LENGTH = ((9, 3), (31, 5), (50, 11))  # chunks that do not divide each other, nor the window
CHUNKS = [{}, {"chunk_by_length": BY_LENGTH}]
FLOAT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def score(
    validation: ValidationSet, config: TTTConfig, *, dtype: torch.dtype = torch.float64, **options: Any
) -> TTTResult:
    model = options.pop("model", None) or random_model(dtype=dtype)
    return score_documents(model, validation, micro_bytes(), config, Dist.single(), ignore, **{"seed": 1, **options})


def by_document(validation: ValidationSet, nll: np.ndarray) -> list[np.ndarray]:
    return [nll[start : end - 1] for start, end in validation.document_ranges]


def reordered(validation: ValidationSet, order: list[int]) -> ValidationSet:
    """Return the same documents in another order; only the target after each one's end is the same BOS as before."""
    starts = [*validation.document_starts.tolist(), validation.tokens.size]
    tokens = np.concatenate([validation.tokens[starts[i] : starts[i + 1]] for i in order])
    return ValidationSet(tokens, find_documents(tokens))


# ---- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_predictions", [1, 7, 8, 9, 24, 25, 63, 64, 65])
@pytest.mark.parametrize("window_tokens", [8, 20, 24, 100])
@pytest.mark.parametrize(("by_length", "size"), [((), 8), (((8, 2), (64, 7)), None)])
def test_chunks_cover_every_prediction_once_in_windows_of_the_stated_size(
    num_predictions: int, window_tokens: int, by_length: tuple[tuple[int, int], ...], size: int | None
) -> None:
    config = micro_ttt(window_tokens=window_tokens, chunk_by_length=by_length)
    size = size or (2 if num_predictions < 8 else 7 if num_predictions < 64 else 8)
    chunks = [chunk_window(0, num_predictions, c, config) for c in range(-(-num_predictions // size))]
    covered = [p for w in chunks for p in range(w.end - w.num_scored, w.end)]
    assert covered == list(range(num_predictions))
    assert [w.start for w in chunks] == [max(0, w.end - window_tokens) for w in chunks]
    assert [w.is_last for w in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [w.num_updates for w in chunks] == list(range(len(chunks)))
    assert window_cost(num_predictions, config) == sum(w.end - w.start for w in chunks)


@pytest.mark.parametrize("num_predictions", [1, 8, 23, 24, 25, 40, 64, 65])
@pytest.mark.parametrize("window_tokens", [8, 20, 24, 100])
@pytest.mark.parametrize("by_length", [(), ((41, 7),)])
def test_without_adaptation_every_prediction_sees_the_same_context(
    num_predictions: int, window_tokens: int, by_length: tuple[tuple[int, int], ...]
) -> None:
    config = micro_ttt(window_tokens=window_tokens, chunk_by_length=by_length)
    size = chunk_length(num_predictions, config)

    def contexts(windows: list[Any]) -> dict[int, int]:
        return {p: w.start for w in windows for p in range(w.end - w.num_scored, w.end)}

    chunks = [chunk_window(0, num_predictions, c, config) for c in range(-(-num_predictions // size))]
    assert contexts(list(unadapted_windows(0, num_predictions, config))) == contexts(chunks)


@pytest.mark.parametrize(
    ("num_tokens", "size"), [(2, 3), (9, 3), (10, 5), (31, 5), (32, 11), (50, 11), (51, 8), (9000, 8)]
)
def test_the_first_limit_that_a_document_keeps_decides_its_chunk(num_tokens: int, size: int) -> None:
    assert chunk_length(num_tokens - 1, micro_ttt(chunk_by_length=BY_LENGTH)) == size  # the next BOS is counted
    assert chunk_length(num_tokens - 1, micro_ttt()) == 8


def test_each_document_is_learned_from_in_chunks_of_its_own_length() -> None:
    validation = micro_validation(*LENGTHS)
    events = choose_events(score(validation, micro_ttt(chunk_by_length=BY_LENGTH)).events, UPDATE)
    sizes = events.column("end_prediction") - events.column("first_prediction")
    found = {int(document): set(sizes[events.column("document") == document].tolist()) for document in range(7)}
    assert found == {0: {5}, 1: {3}, 2: {8}, 3: set(), 4: {5}, 5: {11}, 6: {3}}


# ---- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_adapting", [False, True])
def test_every_target_is_scored_once(is_adapting: bool) -> None:
    validation = micro_validation(*LENGTHS)
    result = score(validation, micro_ttt(), is_adapting=is_adapting)
    counts = times_scored(result.events, validation.document_starts, validation.num_targets)
    assert counts.tolist() == [1] * validation.num_targets
    assert int(result.scores.tokens.sum()) == validation.num_targets
    assert float(result.scores.nats.sum()) == pytest.approx(float(result.nll.sum()), rel=1e-12)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_batching_and_order_of_work_change_nothing(dtype: torch.dtype, chunks: dict[str, Any]) -> None:
    validation = micro_validation(*LENGTHS)
    expected = score(validation, micro_ttt(**chunks), dtype=dtype).nll
    for changes in ({"batch_documents": 1}, {"batch_documents": 50}, {"order": "sorted"}):
        nll = score(validation, micro_ttt(**changes, **chunks), dtype=dtype).nll
        assert np.abs(nll - expected).max() < FLOAT_TOLERANCE[dtype], changes


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("dtype", FLOAT_TOLERANCE)
def test_the_order_of_documents_changes_nothing(dtype: torch.dtype, chunks: dict[str, Any]) -> None:
    validation, order = micro_validation(*LENGTHS), [3, 5, 0, 1, 4, 2, 6]  # the last stays last: it has no next BOS
    config = micro_ttt(**chunks)
    expected = by_document(validation, score(validation, config, dtype=dtype).nll)
    other = reordered(validation, order)
    found = by_document(other, score(other, config, dtype=dtype).nll)
    for place, document in enumerate(order):
        assert np.abs(found[place] - expected[document]).max() < FLOAT_TOLERANCE[dtype]


def test_adapters_drawn_by_document_change_the_scores_but_not_with_the_batch() -> None:
    validation = micro_validation(*LENGTHS)
    by_seed = score(validation, micro_ttt()).nll
    by_index = score(validation, micro_ttt(adapter_key="document")).nll
    again = score(validation, micro_ttt(adapter_key="document", batch_documents=1, order="sorted")).nll
    assert np.abs(by_index - again).max() < 1e-12
    assert np.abs(by_index - by_seed).max() > 1e-6
    assert np.abs(score(validation, micro_ttt(), seed=2).nll - by_seed).max() > 1e-6


@pytest.mark.parametrize("changes", [*CHUNKS, {"lora_alpha": 7.0}])
def test_a_learning_rate_of_zero_equals_the_unadapted_path(changes: dict[str, Any]) -> None:
    validation = micro_validation(*LENGTHS)
    unadapted = score(validation, micro_ttt(**changes), is_adapting=False)
    frozen = score(validation, micro_ttt(lr=0.0, **changes))
    adapted = score(validation, micro_ttt(**changes))
    assert np.abs(unadapted.nll - frozen.nll).max() < 1e-12
    assert np.abs(unadapted.nll - adapted.nll).max() > 1e-3


def test_a_document_within_the_window_scores_as_it_does_alone() -> None:
    validation, model = micro_validation(20, 24, 9), random_model(dtype=torch.float64)
    result = score(validation, micro_ttt(), model=model, is_adapting=False)
    for start, end in validation.document_ranges:
        tokens = torch.from_numpy(validation.tokens[start:end].astype(np.int64)).unsqueeze(0)
        alone = model(tokens[:, :-1], tokens[:, 1:], is_looped=True, reduction="none")[0]
        assert np.abs(result.nll[start : end - 1] - alone.detach().numpy()).max() < 1e-12


def test_adaptation_helps_where_a_document_repeats_itself() -> None:
    rng = np.random.default_rng(5)
    tokens = np.concatenate([np.append(1, np.tile(rng.integers(4, VOCAB_SIZE, 4), 15)) for _ in range(4)])
    validation = ValidationSet(tokens.astype(np.uint16), find_documents(tokens))
    plain = score(validation, micro_ttt(), is_adapting=False, dtype=torch.float32)
    adapted = score(validation, micro_ttt(), dtype=torch.float32)
    assert adapted.scores.bpb < plain.scores.bpb - 0.1


def adapt_by_hand(model: GPT, tokens: Tensor, config: TTTConfig) -> np.ndarray:
    """Return the nll of one document (1, N + 1), by what PyTorch brings: no slots, batches, buffers or kernels."""
    scale = 1.0 if config.lora_alpha is None else config.lora_alpha / config.lora_rank
    limits = [*config.chunk_by_length, (math.inf, config.chunk_tokens)]
    size = next(chunk for limit, chunk in limits if tokens.size(1) <= limit)
    num_visits = visit_plan(model.config, is_looped=True).num_visits
    layout = Layout(model.config, num_visits, config.lora_rank, config.adapter_kinds)
    drawn = initial_a(
        model.config, num_visits=num_visits, lora_rank=config.lora_rank, kinds=config.adapter_kinds, seed=1
    )
    row = torch.nn.Parameter(torch.zeros(1, layout.num_parameters, dtype=torch.float64))
    for kind, value in layout.view(row.data).a.items():
        value[0] = drawn[kind]
    betas, weight_decay = (0.0, config.beta2), config.weight_decay
    adamw = torch.optim.AdamW([row], lr=config.lr, betas=betas, eps=config.eps, weight_decay=weight_decay)
    found, num_predictions = [], tokens.size(1) - 1
    for first in range(0, num_predictions, size):
        end = min(first + size, num_predictions)
        window = tokens[:, max(0, end - config.window_tokens) : end + 1]
        for update in range(1 if end == num_predictions else config.updates_per_chunk):
            adapters = layout.view(row)
            adapters = replace(adapters, b={kind: scale * b for kind, b in adapters.b.items()})
            nll = model(window[:, :-1], window[:, 1:], is_looped=True, adapters=adapters, reduction="none")
            chunk = nll[0, first - end :]
            if update == 0:
                found.append(chunk.detach().numpy())
            if end < num_predictions:
                adamw.zero_grad()
                chunk.mean().backward()
                adamw.step()
    return np.concatenate(found)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"updates_per_chunk": 2}, {"lora_alpha": 5.0}, {"chunk_by_length": BY_LENGTH},
        {"chunk_by_length": BY_LENGTH, "lora_alpha": 0.5, "updates_per_chunk": 2, "adapter_kinds": ("q", "o", "head")},
    ],
)  # fmt: skip
def test_adaptation_is_autograd_and_adamw_on_each_document_alone(changes: dict[str, Any]) -> None:
    validation, config = micro_validation(*LENGTHS), micro_ttt(**changes)
    model = random_model(dtype=torch.float64).requires_grad_(False)
    found = by_document(validation, score(validation, config, model=model).nll)
    for (start, end), nll in zip(validation.document_ranges, found, strict=True):
        tokens = torch.from_numpy(validation.tokens[start:end].astype(np.int64)).unsqueeze(0)
        assert np.abs(nll - adapt_by_hand(model, tokens, config)).max() < 1e-12


# ---- score first -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [3, 9, 17, 25, 40])
def test_a_score_depends_on_nothing_behind_it(place: int) -> None:
    validation = micro_validation(50, 8)
    tokens = validation.tokens.copy()
    tokens[place] = 4 + (tokens[place] - 3) % (VOCAB_SIZE - 4)
    before = score(validation, micro_ttt()).nll
    after = score(ValidationSet(tokens, validation.document_starts), micro_ttt()).nll
    assert np.array_equal(before[: place - 1], after[: place - 1])  # target p is token p + 1
    assert abs(before[place - 1] - after[place - 1]) > 1e-6
    assert np.array_equal(before[50:], after[50:])  # the next document knows nothing of it


def test_each_chunk_but_the_last_is_learned_from_after_it_was_scored() -> None:
    result = score(micro_validation(27, 8), micro_ttt(batch_documents=1))
    columns = ("kind", "document", "first_prediction", "end_prediction", "num_updates_before")
    events = list(zip(*(result.events.column(name).tolist() for name in columns)))
    assert events == [
        (SCORE, 0, 0, 8, 0), (UPDATE, 0, 0, 8, 0), (SCORE, 0, 8, 16, 1), (UPDATE, 0, 8, 16, 1),
        (SCORE, 0, 16, 24, 2), (UPDATE, 0, 16, 24, 2), (SCORE, 0, 24, 27, 3), (SCORE, 1, 0, 7, 0),
    ]  # fmt: skip


def test_two_updates_a_chunk_change_later_chunks_only() -> None:
    validation = micro_validation(40)
    once, twice = (score(validation, micro_ttt(updates_per_chunk=count)).nll for count in (1, 2))
    assert np.array_equal(once[:8], twice[:8])
    assert np.abs(once[8:] - twice[8:]).max() > 1e-6


def test_the_base_weights_stay_as_they_are() -> None:
    model = random_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    score(micro_validation(*LENGTHS), micro_ttt(), model=model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.grad is None


# ---- who does what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["stream", "sorted"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_every_document_has_one_rank_and_the_work_is_even(world_size: int, order: str) -> None:
    validation, config = micro_validation(*LENGTHS), micro_ttt(order=order)
    shares = [share_documents(validation, config, Dist(rank=r, world_size=world_size)) for r in range(world_size)]
    assert sorted(document for share in shares for document in share) == list(range(len(LENGTHS)))
    if order == "sorted":
        lengths = [[len(validation.document(document)) for document in share] for share in shares]
        assert all(share == sorted(share, reverse=True) for share in lengths)


def test_a_lone_bos_at_the_end_has_nothing_to_score() -> None:
    validation = micro_validation(9, 6, 1)
    result = score(validation, micro_ttt())
    assert result.scores.tokens.tolist() == [9, 6, 0]
    assert result.scores.nats[2] == 0.0
    assert share_documents(validation, micro_ttt(), Dist.single()) == [0, 1]


def test_a_rank_without_a_document_says_so(caplog: pytest.LogCaptureFixture) -> None:
    validation, dist = micro_validation(9), LoneRank(rank=1, world_size=2)
    result = score_documents(random_model(), validation, micro_bytes(), micro_ttt(), dist, ignore, seed=1)
    assert not result.nll.any()
    assert "rank=1 has no document: 1 for 2 ranks" in caplog.text


def test_fewer_adapter_kinds_still_adapt() -> None:
    validation = micro_validation(40)
    results = [
        score(validation, replace(micro_ttt(), adapter_kinds=kinds)).nll for kinds in (("head",), ("q", "v"), ("o",))
    ]
    plain = score(validation, micro_ttt(), is_adapting=False).nll
    for nll in results:
        assert np.array_equal(nll[:8], plain[:8]) or np.abs(nll[:8] - plain[:8]).max() < 1e-12
        assert np.abs(nll[8:] - plain[8:]).max() > 1e-6
