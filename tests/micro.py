"""The real pipeline at its smallest: a corpus of docstrings, a model of three layers, eight steps of training."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from runner.gang.rank import Rank
from tests.smallest import smallest
from tests.stub_work import misbehave

FAULTY_PIPELINE = "tests.micro:faulty_pipeline"
TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
NUM_VALIDATION = 5

OVERRIDES = smallest(vocab_size=8192, checkpoint_every_s=0.001, report_every_s=0.0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with shards and tokenizer, a few dozen documents."""
    from model.corpus.text import TextOptions, build_text

    folder = tmp_path_factory.mktemp("micro")
    texts = [inspect.getdoc(value) or "" for value in (json, functools, inspect, pytest, str, dict, list, int, bytes)]
    texts += [inspect.getdoc(getattr(str, name)) or "" for name in dir(str)] * 3
    source = folder / "documents.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if len(text) > 30))
    options = TextOptions(
        tokenizer=TOKENIZER, vocab_size=None, column="text", val_documents=NUM_VALIDATION, val_frac=None, name="micro"
    )
    build_text([source], folder / "corpus", options, lambda *_: None)
    return folder / "corpus"


def data_section(corpus: Path) -> dict[str, str]:
    """Return the data section of a spec over the corpus."""
    return {
        "train": str(corpus / "*_train_*.bin"),
        "val": str(corpus / "*_val_*.bin"),
        "tokenizer": str(next(corpus.glob("*.model"))),
    }


def faulty_pipeline(rank: Rank) -> None:
    """Run the real pipeline; OUT/faults.json names faults by phase and step.

    A rank meets them where it reports, and in training also where it asks whether to stop, at that step.
    """
    from runner.gang.worker import run_pipeline

    report, should_stop = rank.report, rank.should_stop
    asked = iter(range(10**6))

    def reporting(phase: str, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        report(phase, step, total, metrics)
        misbehave(rank, phase, step)

    def stopping() -> bool:
        misbehave(rank, "asked", next(asked))
        return should_stop()

    rank.report, rank.should_stop = reporting, stopping  # type: ignore[method-assign, assignment]
    run_pipeline(rank)
