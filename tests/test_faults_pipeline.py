"""The real pipeline, broken on purpose: the figures of a retried seed are those of an undisturbed one, to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.spec.gang import Gang
from runner.sweep import run_sweep
from runner.work import Options
from tests.micro import FAULTY_PIPELINE, OVERRIDES, corpus, data_section
from tests.ray_tools import assert_nothing_is_left, start_cluster
from tests.sweep_tools import QUICK, make_spec, write_faults

pytestmark = pytest.mark.slow
__all__ = ["corpus"]
ONCE = replace(QUICK, attempts=1)


def run(out: Path, corpus: Path, *, limits: Any = QUICK, gang: Gang | None = None, address: str | None = None) -> int:
    """Run seed 7 of the smallest pipeline, in this process or on a cluster."""
    spec = make_spec(out, gang=gang, limits=limits, seeds=[7], overrides=OVERRIDES, data=data_section(corpus))
    options = Options(is_local=address is None, address=address, target=FAULTY_PIPELINE, progress="plain")
    return run_sweep(spec, options)


def figures(out: Path) -> dict[str, Any]:
    """Return what an undisturbed run must agree in, from the results."""
    from results.store.reader import read_runs

    frame = read_runs(out).frame
    (row,) = frame[frame["state"] == "DONE"].to_dict("records")
    names = ("live_nats", "post_ema_nats", "pre_ttt_nats", "ttt_lr0_nats", "post_ttt_nats", "model_bytes", "steps")
    return {name: row[name] for name in names}


def resumes(out: Path) -> list[int]:
    """Return the steps that training went on from."""
    record = json.loads((out / "seeds" / "seed=7-repeat=0" / "stages" / "train.json").read_text())
    return list(record["metrics"]["resumed_at_steps"])


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the figures of one process that nobody disturbed."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(out, corpus) == 0
    return figures(out)


@pytest.mark.parametrize(
    "fault",
    [{"stage": "train", "step": 5}, {"stage": "quantize", "step": 0}, {"stage": "ttt", "step": 0}],
    ids=["train", "quantize", "ttt"],
)
def test_a_seed_that_broke_ends_in_the_same_figures(
    fault: dict[str, Any], corpus: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    write_faults(tmp_path, {"attempt": 1, "do": "raise", **fault})
    assert run(tmp_path, corpus) == 0
    assert figures(tmp_path) == undisturbed
    assert len(resumes(tmp_path)) == (fault["stage"] == "train")


def test_a_truncated_checkpoint_is_noticed_and_the_one_before_is_used(
    corpus: Path, undisturbed: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_faults(tmp_path, {"attempt": 1, "stage": "train", "step": 6, "do": "raise"})
    assert run(tmp_path, corpus, limits=ONCE) == 1
    folder = tmp_path / "seeds" / "seed=7-repeat=0" / "checkpoints"
    older, newest = sorted(folder.rglob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, corpus) == 0
    assert "trying the one before" in caplog.text
    assert resumes(tmp_path) == [int(older.stem.removeprefix("step-"))]
    assert figures(tmp_path) == undisturbed


def test_an_altered_stage_output_is_noticed_and_its_stage_done_again(
    corpus: Path, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    write_faults(tmp_path, {"attempt": 1, "stage": "ttt", "step": 0, "do": "raise"})
    assert run(tmp_path, corpus, limits=ONCE) == 1
    artifact = tmp_path / "seeds" / "seed=7-repeat=0" / "model.ssq"
    content = bytearray(artifact.read_bytes())
    content[len(content) // 2] ^= 1
    artifact.write_bytes(content)
    assert run(tmp_path, corpus) == 0
    assert figures(tmp_path) == undisturbed
    assert "stage quantize is done again" in (artifact.parent / "logs" / "attempt=2-rank=0.log").read_text()


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A cluster with room for two gangs."""
    cluster = start_cluster(2)
    yield cluster
    cluster.shutdown()


def test_a_real_gang_that_lost_a_rank_twice_ends_in_the_same_figures(
    two_nodes: Any, corpus: Path, tmp_path: Path
) -> None:
    pair = Gang(cpus=1, ranks=2)
    assert run(tmp_path / "calm", corpus, gang=pair, address=two_nodes.address) == 0
    write_faults(
        tmp_path / "rough",
        {"attempt": 1, "stage": "asked", "step": 5, "rank": 1, "do": "kill"},
        {"attempt": 2, "stage": "ttt", "step": 0, "rank": 0, "do": "raise"},
    )
    assert run(tmp_path / "rough", corpus, gang=pair, address=two_nodes.address) == 0
    assert figures(tmp_path / "rough") == figures(tmp_path / "calm")
    assert resumes(tmp_path / "rough") != []
    assert_nothing_is_left(two_nodes.address)
