"""model/score/plain.py: every target scored once, bytes counted by the rule, nats turned into bits per byte."""

import math

import numpy as np
import pytest
import torch

from model.config import EvalConfig
from model.data.tokenizer import ByteTable, target_bytes
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.pipeline.stage_evaluate import order0_bpb
from model.score.bpb import bits_per_byte, document_sums
from model.score.plain import RowScorer, evaluate_plain, row_bounds, score_rows
from tests.fake_recorder import FakeRecorder
from tests.micro_model import VOCAB_SIZE, LoneRank, ignore, micro_bytes, micro_validation, random_model

ROWS = EvalConfig(row_tokens=64, seq_len=16)
LENGTHS = (30, 5, 61, 2, 17, 44, 9)


class Table(torch.nn.Module):
    """A model whose loss on a target is that target's place in its row, so that sums can be foretold."""

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor, **_options: object) -> torch.Tensor:
        return torch.arange(targets.size(1), dtype=torch.float32).expand(targets.shape)


class Unweighted(RowScorer):
    """Of a model without weights."""

    def refresh(self) -> None:
        """Do nothing."""


def score(validation: ValidationSet, config: EvalConfig = ROWS) -> np.ndarray:
    return score_rows(random_model(), validation, config, Dist.single(), ignore)


def test_a_leading_space_counts_unless_a_boundary_stands_before_it() -> None:
    table = ByteTable(
        np.array([0, 1, 3, 2], np.int16), np.array([False, False, True, True]), np.array([True, False, False, False])
    )
    assert target_bytes(table, np.array([0, 2, 2, 1, 3, 0, 3])).tolist() == [3, 4, 1, 3, 0, 2]


def test_bits_per_byte_is_nats_over_ln_2_over_bytes() -> None:
    assert bits_per_byte(12 * math.log(2), 4) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)


@pytest.mark.parametrize("num_targets", [1, 63, 64, 65, 200])
def test_rows_cover_every_target_once_and_dropping_leaves_whole_rows(num_targets: int) -> None:
    covered = [place for a, b in row_bounds(num_targets, ROWS) for place in range(a, b)]
    assert covered == list(range(num_targets))
    dropped = EvalConfig(row_tokens=64, seq_len=16, tail="dropped")
    assert sum(b - a for a, b in row_bounds(num_targets, dropped)) == num_targets // 64 * 64


def test_every_target_gets_its_score_whatever_the_row_size() -> None:
    validation = micro_validation(*LENGTHS)
    for row_tokens in (64, 128, 1024):
        nll = score(validation, EvalConfig(row_tokens=row_tokens, seq_len=16))
        assert nll.shape == (validation.num_targets,)
        assert np.isfinite(nll).all()
        assert (nll > 0).all()


def test_documents_that_a_row_holds_whole_score_the_same_in_any_row() -> None:
    validation = micro_validation(*LENGTHS)
    wide, narrow = score(validation, EvalConfig(row_tokens=1024, seq_len=16)), score(validation)
    starts = [validation.document_starts[index] for index in (1, 4, 6)]
    for start, length in zip(starts, (5, 17, 9)):
        if start // 64 == (start + length - 1) // 64:
            inside = slice(start, start + length - 1)
            assert np.allclose(wide[inside], narrow[inside], rtol=0, atol=1e-5)


def test_a_row_edge_starts_a_document_afresh_and_a_segment_edge_too() -> None:
    validation = micro_validation(40)
    rows = score(validation, EvalConfig(row_tokens=16, seq_len=16))
    segments = score(validation, EvalConfig(row_tokens=64, seq_len=16))
    whole = score(validation, EvalConfig(row_tokens=64, seq_len=64))
    assert np.allclose(rows, segments, rtol=0, atol=1e-5)
    assert np.allclose(rows[:16], whole[:16], rtol=0, atol=1e-5)
    assert np.abs(rows[16:] - whole[16:]).max() > 1e-3


def test_a_dropped_tail_has_no_score_and_does_not_count() -> None:
    validation, config = micro_validation(*LENGTHS), EvalConfig(row_tokens=64, seq_len=16, tail="dropped")
    nll = score(validation, config)
    assert np.isnan(nll).tolist() == [False] * 128 + [True] * (validation.num_targets - 128)
    scores = evaluate_plain(random_model(), validation, micro_bytes(), config, Dist.single(), ignore)
    assert int(scores.tokens.sum()) == 128
    assert float(scores.nats.sum()) == pytest.approx(float(nll[:128].sum()), rel=1e-6)
    with pytest.raises(ValueError, match=r"evaluation\.tail='dropped' scores nothing: 29 targets"):
        evaluate_plain(random_model(), micro_validation(30), micro_bytes(), config, Dist.single(), ignore)


def test_sums_belong_to_the_document_of_the_input() -> None:
    validation, table = micro_validation(3, 4, 2), micro_bytes()
    scores = document_sums(validation, table, np.arange(8.0), num_scored=8, seconds=0.0)
    assert scores.tokens.tolist() == [3, 4, 1]  # the next document's BOS is a target of the one before
    assert scores.nats.tolist() == [0 + 1 + 2, 3 + 4 + 5 + 6, 7]
    counts = target_bytes(table, validation.tokens)
    assert scores.bytes.tolist() == [counts[:3].sum(), counts[3:7].sum(), counts[7:].sum()]
    assert counts[[2, 6]].tolist() == [0, 0]  # a BOS target is scored, with no bytes


def test_a_lone_bos_at_the_end_is_scored_by_the_document_before() -> None:
    validation = micro_validation(6, 1)
    scores = evaluate_plain(random_model(), validation, micro_bytes(), ROWS, Dist.single(), ignore)
    assert scores.tokens.tolist() == [6, 0]
    assert scores.bytes.tolist()[1] == 0
    assert scores.nats.tolist()[1] == 0.0


def test_totals_are_flat_metrics() -> None:
    validation = micro_validation(*LENGTHS)
    scores = evaluate_plain(random_model(), validation, micro_bytes(), ROWS, Dist.single(), ignore)
    metrics = scores.metrics("live")
    assert set(metrics) == {f"live_{name}" for name in ("nats", "tokens", "bytes", "bpb", "s")}
    assert metrics["live_tokens"] == validation.num_targets
    assert metrics["live_bpb"] == bits_per_byte(metrics["live_nats"], int(metrics["live_bytes"]))


def test_the_order_0_figure_is_the_entropy_of_the_counts() -> None:
    validation, table, counts = micro_validation(20, 30), micro_bytes(), np.arange(VOCAB_SIZE)
    shares = (counts + 1) / (counts + 1).sum()
    nats = -np.log(shares[validation.tokens[1:]]).sum()
    num_bytes = int(target_bytes(table, validation.tokens).sum())
    assert order0_bpb(counts, validation, table) == pytest.approx(bits_per_byte(nats, num_bytes), rel=1e-12)


def test_each_row_is_scored_by_one_rank() -> None:
    validation = micro_validation(*LENGTHS)
    heard: list[int] = []
    for rank in range(3):
        dist = LoneRank(rank=rank, world_size=3)
        scorer = Unweighted(Table())  # type: ignore[arg-type]
        score_rows(scorer.model, validation, ROWS, dist, lambda _p, row, _t, _m: heard.append(row), scorer=scorer)
    assert sorted(heard) == [1, 2, 3]


def test_a_scorer_takes_the_weights_as_they_are_when_a_pass_begins() -> None:
    """Also where recordings read them: those of the pass before are overwritten, not replaced."""
    validation, model = micro_validation(*LENGTHS), random_model()
    recorder = FakeRecorder(lambda inputs, *_: (inputs.size(1),), lambda *_inputs: False)
    scorer, scores, places = RowScorer(model, recorder=recorder), [], []
    for _ in range(3):
        scores.append(score_rows(model, validation, ROWS, Dist.single(), ignore, scorer=scorer))
        assert np.array_equal(scores[-1], score_rows(model, validation, ROWS, Dist.single(), ignore))
        assert scorer.weights is not None
        places.append([weight.qkv.data_ptr() for weight in scorer.weights])
        with torch.no_grad():
            model.qo_bank.mul_(1.5)
    assert recorder.num_made
    assert places[2] == places[1]
    assert np.abs(scores[2] - scores[1]).max() > 1e-3


def test_rows_that_cannot_be_recorded_score_the_same(caplog: pytest.LogCaptureFixture) -> None:
    validation, model = micro_validation(*LENGTHS), random_model(dtype=torch.float64)
    expected = score_rows(model, validation, ROWS, Dist.single(), ignore)
    for is_broken in (False, True):
        recorder = FakeRecorder(lambda inputs, *_: (inputs.size(1),), lambda *_inputs, broken=is_broken: broken)
        scorer = RowScorer(model, recorder=recorder)
        for _ in range(2):
            scored = score_rows(model, validation, ROWS, Dist.single(), ignore, scorer=scorer)
            assert np.array_equal(scored, expected)
        assert bool(recorder.num_made) != is_broken
        assert bool(recorder.failed) == is_broken
    assert "runs operation by operation: it could not be recorded" in caplog.text
