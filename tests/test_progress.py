"""What a sweep looks like while it runs: plain lines, JSON lines, the live table, and the time that is left."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rich.console import Console

from runner.errors import Failure, Kind
from runner.life.states import Run, State
from runner.spec.sweep import RunKey
from runner.view.progress import JsonView, Paces, PlainView, duration, make_cells, rich_table, row_of

TRAINING = Run(
    key=RunKey(seed=42), state=State.TRAIN, attempt=1, node="10.0.0.4", phase="train", step=50, total=150, since=100.0,
    progress_at=200.0, metrics={"loss": 3.25, "tokens_per_s": 12_345.6},
)  # fmt: skip
QUEUED = Run(key=RunKey(seed=1337), state=State.QUEUED)


def test_a_training_seed_is_one_line_with_everything() -> None:
    stream = io.StringIO()
    PlainView(stream).update({TRAINING.key: TRAINING}, [TRAINING], 200.0)
    assert stream.getvalue() == (
        "seed=42 TRAIN step=50/150 loss=3.2500 tokens/s=12,346 eta=3m20s attempt=1 node=10.0.0.4\n"
    )


def test_changes_are_shown_at_once_and_the_rest_every_thirty_seconds() -> None:
    stream = io.StringIO()
    view = PlainView(stream)
    for now in range(100):
        view.update({TRAINING.key: TRAINING}, [], float(now))
    assert stream.getvalue().count("\n") == 3
    view.update({QUEUED.key: QUEUED}, [QUEUED], 100.0)
    assert "seed=1337 QUEUED" in stream.getvalue()


def test_a_report_of_the_time_left_counts_down() -> None:
    told = replace(TRAINING, metrics={"eta_s": 60.0})
    assert Paces().eta_s(told, 210.0) == 50.0


def test_json_lines_hold_the_same() -> None:
    stream = io.StringIO()
    JsonView(stream).update({TRAINING.key: TRAINING}, [TRAINING], 200.0)
    line = json.loads(stream.getvalue())
    assert (line["seed"], line["state"], line["step"], line["total"], line["eta_s"]) == (42, "TRAIN", 50, 150, 200.0)


def test_the_table_has_a_row_for_seeds_that_wait() -> None:
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(rich_table("demo", [row_of(run, Paces(), 200.0) for run in (TRAINING, QUEUED)]))
    text = console.export_text()
    assert "50/150" in text
    assert "waits for a free place" in text


def test_a_seed_that_is_tried_again_says_why_and_when() -> None:
    failure = Failure(kind=Kind.DIED, message="process died", rank=3, node="10.0.0.4")
    waiting = replace(TRAINING, state=State.RETRY_WAIT, failure=failure, not_before=230.0)
    assert make_cells(row_of(waiting, Paces(), 200.0))[-1] == "again in 30s: rank 3 on 10.0.0.4: process died"


def test_time_spans_are_short() -> None:
    assert [duration(seconds) for seconds in (None, 0.4, 59, 61, 7500)] == ["", "0s", "59s", "1m01s", "2h05m"]
