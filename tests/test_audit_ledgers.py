"""The ledgers that every run keeps: the score chain, the exactly-once count, spans and reads."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from model.audit.finished_run import RunFiles
from model.audit.records import find_misordered, probe_timing
from model.config import TTTConfig
from model.files.ledger import Ledger, join_ledgers
from model.ttt.ledger_reading import broken_chains, read_events, times_scored
from model.ttt.score_ledger import SCORE, UPDATE, Events, ScoreChain

STARTS, NUM_TARGETS = [0, 100], 149  # two documents of 100 and 49 predictions


def make_chain(rank: int = 0) -> ScoreChain:
    """Return the ledger of both documents, in chunks of 64."""
    chain = ScoreChain(rank)
    for document, ends in ((0, (64, 100)), (1, (49,))):
        first = 0
        for number, end in enumerate(ends):
            chain.add(SCORE, document, first, end, number, 1.5 * (end - first))
            if end != ends[-1]:
                chain.add(UPDATE, document, first, end, number, 0.0)
            first = end
    return chain


def join(*parts: Events) -> Events:
    """Return the ledgers of several ranks as one."""
    return Events(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def test_an_untouched_chain_leads_to_its_stored_end() -> None:
    events = join(make_chain(0).events(), make_chain(1).events())
    assert broken_chains(events) == []
    assert broken_chains(read_events(events.arrays())) == []


@pytest.mark.parametrize("column", range(6))
def test_changing_any_number_breaks_the_chain(column: int) -> None:
    events = make_chain().events()
    rows = events.rows.copy()
    rows[1, column] += 1
    assert broken_chains(events._replace(rows=rows)) != []


def test_changing_a_loss_dropping_or_swapping_events_breaks_the_chain() -> None:
    events = make_chain().events()
    loss_sum = events.loss_sum.copy()
    loss_sum[0] = np.nextafter(loss_sum[0], 0)
    order = [1, 0, 2, 3]
    assert broken_chains(events._replace(loss_sum=loss_sum)) == [0]
    assert broken_chains(events._replace(rows=events.rows[:-1], loss_sum=events.loss_sum[:-1])) == [0]
    assert broken_chains(events._replace(rows=events.rows[order], loss_sum=events.loss_sum[order])) == [0]


def test_every_target_is_counted_once_and_gaps_and_repeats_show() -> None:
    events = make_chain().events()
    assert (times_scored(events, STARTS, NUM_TARGETS) == 1).all()
    without_last = Events(events.rows[:-1], events.loss_sum[:-1], events.heads)
    assert (times_scored(without_last, STARTS, NUM_TARGETS) == 0).sum() == 49
    assert (times_scored(join(events, events), STARTS, NUM_TARGETS) == 2).all()


def test_targets_outside_the_stream_are_refused() -> None:
    with pytest.raises(ValueError, match="outside the validation stream"):
        times_scored(make_chain().events(), STARTS, NUM_TARGETS - 1)
    with pytest.raises(ValueError, match="names document 1, the stream has 1"):
        times_scored(make_chain().events(), STARTS[:1], NUM_TARGETS)


def test_a_damaged_score_log_is_refused_by_name() -> None:
    arrays = make_chain().events().arrays()
    with pytest.raises(ValueError, match="no loss_sum"):
        read_events({name: value for name, value in arrays.items() if name != "loss_sum"})
    with pytest.raises(ValueError, match="differ in length"):
        read_events({**arrays, "document": arrays["document"][:-1]})


def test_scores_and_updates_must_take_turns() -> None:
    events = make_chain().events()
    assert list(find_misordered(events, TTTConfig())) == []
    swapped = Events(events.rows[[1, 0, 2, 3]], events.loss_sum, events.heads)
    assert [document for document, _ in find_misordered(swapped, TTTConfig())] != []


def test_an_event_costs_microseconds() -> None:
    chain, started = ScoreChain(), time.process_time()
    for number in range(20_000):
        chain.add(SCORE, number, 0, 64, 0, 1.0)
    # at full size a rank of eight notes 160,000 events in 250 s: 1 % would be 15 microseconds each
    assert (time.process_time() - started) / 20_000 < 15e-6


def test_a_read_that_nobody_declared_is_in_the_ledger(tmp_path: Path) -> None:
    shard = tmp_path / "secret_val_000000.bin"
    shard.write_bytes(b"\0" * 64)
    ledger = Ledger("train")
    with ledger.listening():
        with ledger.span("warm_up"):
            np.fromfile(shard, dtype=np.uint8)
            np.memmap(shard, mode="r")
        (tmp_path / "made.bin").write_bytes(b"1")  # written, not read
        (tmp_path / "notes.md").write_text("no data file")
    shard.read_bytes()  # nobody listens any more
    assert [(r["phase"], r["file"], r["declared"], r["seen"]) for r in ledger.reads] == [
        ("warm_up", "secret_val_000000.bin", 0, 2)
    ]


def test_spans_add_up_by_name_and_carry_their_rank() -> None:
    ledger = Ledger("ttt", rank=3)
    ledger.add_span("compile", ledger.origin + 1.0, ledger.origin + 2.5)
    ledger.add_span("compile", ledger.origin + 4.0, ledger.origin + 4.5)
    assert ledger.seconds("compile") == pytest.approx(2.0)
    assert {span["rank"] for span in ledger.as_json()["spans"]} == {3}


def test_joined_ledgers_keep_every_rank_and_name_known_files() -> None:
    parts = []
    for rank in range(2):
        ledger = Ledger("train", rank)
        ledger.opened(Path("/data/a_train_000000.bin"))
        with ledger.span("steps"):
            pass
        parts.append(ledger.as_json())
    joined = join_ledgers(parts, {"/data/a_train_000000.bin": "ab"})
    assert [(read["rank"], read["sha256"]) for read in joined["reads"]] == [(0, "ab"), (1, "ab")]
    assert [span["rank"] for span in joined["spans"]] == [0, 1]


@pytest.mark.parametrize("has_spans", [True, False])
def test_what_fit_measures_on_training_text_counts_as_training(has_spans: bool) -> None:
    seconds = {"train": {"load": 1.0, "steps": 588.0}, "quantize": {"hessians": 2.0, "round": 20.0}, "ttt": {}}
    spans: dict[str, list[dict[str, Any]]] = {
        stage: [{"name": name, "rank": 0, "start_s": 0.0, "end_s": end} for name, end in named.items()]
        for stage, named in seconds.items()
    }
    stated: dict[str, dict[str, float]] = {stage: {} for stage in seconds}
    if has_spans:
        spans["quantize"] += [{"name": "sensitivity", "rank": 0, "start_s": 5.0, "end_s": 17.5}]
    else:
        stated["quantize"]["sensitivity_s"] = 12.5
    files = SimpleNamespace(
        ledgers={stage: {"spans": found} for stage, found in spans.items()},
        records={stage: {"metrics": metrics} for stage, metrics in stated.items()},
        run={"device": "NVIDIA H100", "world_size": 8},
    )
    result = probe_timing(cast("RunFiles", files))
    assert (result.result, result.measured) == ("fail", 603.5)
