"""`seedsweep bench`: raw samples are kept, percentiles are right, input is checked, every mode runs (slow)."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from jobs.bench import child as bench_child
from jobs.bench import command as bench
from jobs.bench.figures import MIN_SPREAD, Report, number, spread, write_report
from jobs.bench.inputs import made_up_tokens
from jobs.bench.process import Bench
from jobs.bench.stages import sample_documents, validation_of, window_tokens
from jobs.cli import main
from model.data.shards import BOS_ID
from model.data.validation import ValidationSet
from model.score.bpb import DocumentScores
from model.ttt.documents import TTTResult
from model.ttt.score_ledger import SCORE, UPDATE, ScoreChain
from tests.bench.__main__ import main as run_own_bench
from tests.bench.results import write_store


def stream(num_tokens: int = 4000) -> ValidationSet:
    """Return a made-up validation stream."""
    tokens = made_up_tokens(num_tokens, 300, seed=3)
    return ValidationSet(tokens, np.flatnonzero(tokens == BOS_ID))


def sample_report() -> Report:
    """Return a report with two processes' samples of one figure."""
    report = Report("train", {"preset": "tiny"}, {"cpu_model": "some CPU", "config_hash": "c" * 64, "gpu_model": None})
    report.add("rate", "tokens/s", [1000.0, 3000.0], wanted="more")
    report.add("rate", "tokens/s", [2000.0])
    report.note("said once")
    report.note("said once")
    return report


@pytest.mark.parametrize("count", [3, 4, 11, 50])
def test_percentiles_interpolate_as_numpy_does(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    assert spread(values) == pytest.approx(np.percentile(values, [50, 10, 90]))


def test_fewer_than_three_samples_have_no_spread() -> None:
    assert spread([1.0, 2.0]) == (1.5, None, None)
    assert spread([1.0] * MIN_SPREAD).p90 == 1.0


def test_text_names_machine_figure_and_bar_and_cuts_hashes() -> None:
    text = sample_report().as_text()
    assert "cpu_model=some CPU, config_hash=cccccccccccc" in text
    assert "gpu_model" not in text
    assert "rate  tokens/s   2,000  1,200  2,800        3          2    more" in text
    assert text.count("said once") == 1


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.123456, "0.1235"), (1234567.8, "1,234,568")])
def test_numbers_have_four_digits_or_thousands(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_json_holds_every_raw_sample(tmp_path: Path) -> None:
    write_report(sample_report(), tmp_path / "out.json")
    [figure] = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert figure["samples"] == [[1000.0, 3000.0], [2000.0]]
    assert (figure["median"], figure["num_samples"], figure["num_processes"]) == (2000.0, 3, 2)


def test_parquet_has_one_row_a_sample_with_the_environment_beside_it(tmp_path: Path) -> None:
    write_report(sample_report(), tmp_path / "out.parquet")
    frame = pd.read_parquet(tmp_path / "out.parquet")
    assert list(zip(frame["process"], frame["sample"], frame["value"])) == [(0, 0, 1000), (0, 1, 3000), (1, 0, 2000)]
    assert statistics.median(frame["value"]) == frame["median"].iloc[0]
    assert json.loads(frame["environment_json"].iloc[0])["cpu_model"] == "some CPU"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "figures.csv"], "--out figures.csv must end in .json or .parquet"),
        (["--out", "nowhere/figures.json"], "folder nowhere does not exist"),
        (["--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--documents", "-3"], "--documents -3 must be at least 1"),
    ],
)
def test_bad_options_end_with_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "eval", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_measuring_process_hands_a_users_mistake_back(tmp_path: Path) -> None:
    request = {
        "task": "jobs.bench.stages:measure_eval", "process": 0, "folder": str(tmp_path), "preset": "tiny",
        "train": "", "tokenizer": "",
        "val": str(tmp_path / "none_*.bin"), "val_tokens": None, "attention": "auto", "weights": "",
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    assert bench_child.main(str(tmp_path / "request.json"), str(tmp_path / "outcome.json")) == 0
    assert "--val" in json.loads((tmp_path / "outcome.json").read_text())["error"]


def test_a_mistake_that_was_handed_back_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "_run_child", lambda *_: {"error": "data.val=none_*.bin matches no shard"})
    assert main(["bench", "eval", "--repeats", "1"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "seedsweep: error: data.val=none_*.bin matches no shard"


def test_a_measuring_process_that_dies_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.bench.process.CHILD_MODULE", "jobs.no_such_module")
    assert main(["bench", "eval", "--repeats", "1"]) == 1
    assert "task jobs.bench.stages:measure_eval ended with exit code 1" in capsys.readouterr().err


def test_the_sample_is_the_one_the_published_code_was_timed_on() -> None:
    validation = stream()
    chosen = sample_documents(validation, 3)
    assert chosen == sorted(random.Random(42).sample(range(validation.num_documents), 3))
    assert sample_documents(validation, 10**6) == list(range(validation.num_documents))


@pytest.mark.parametrize("count", [1, 3, 10**6])
def test_a_sampled_stream_keeps_every_targets_document(count: int) -> None:
    validation = stream()
    chosen = sample_documents(validation, count)
    sampled = validation_of(validation, chosen)
    for place, index in enumerate(chosen):
        assert sampled.document(place).tolist() == validation.document(index).tolist()
    assert sampled.num_targets == sum(validation.document(index).size - 1 for index in chosen)


def test_window_tokens_count_scores_only_and_no_window_beyond_its_length() -> None:
    chain = ScoreChain()
    for chunk, end in enumerate((64, 128, 150)):
        chain.add(SCORE, 0, 64 * chunk, end, chunk, 1.0)
        chain.add(UPDATE, 0, 64 * chunk, end, chunk, 0.0)
    scores = DocumentScores(np.zeros(1), np.zeros(1), np.zeros(1), 0.0)
    assert window_tokens(TTTResult(scores, np.zeros(1), chain.events()), 100) == 64 + 100 + 100


def test_made_up_runs_are_rows_that_the_table_adds_up(tmp_path: Path) -> None:
    from jobs.bench.figures import Probe
    from tests.fake_runs import seed_table

    probe = Probe("store")
    write_store({"out": str(tmp_path / "a"), "num_runs": 3, "num_documents": 20}, probe)
    table = seed_table(tmp_path / "a")
    assert [row["state"] for row in table.seeds] == ["DONE"] * 3
    assert not table.problems
    assert math.isclose(table.seeds[1]["post_ttt_bpb"] / table.seeds[0]["post_ttt_bpb"], 1 + 1e-4)
    assert probe.figures[0][:2] == ("writing a: 3 runs", "s")


def run_mode(tmp_path: Path, *arguments: str, is_ours: bool = False) -> dict[str, dict[str, Any]]:
    """Run one mode with raw samples to a file and return its figures by name; is_ours: one of tests.bench."""
    out = tmp_path / "figures.json"
    options = [*arguments, "--repeats", "1", "--out", str(out)]
    assert (run_own_bench(options) if is_ours else main(["bench", *options])) == 0
    written = json.loads(out.read_text())
    assert set(written["environment"]) >= {"cpu_model", "num_cpus", "torch", "triton", "git_commit", "code_hash"}
    return {figure["name"]: figure for figure in written["figures"]}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cold", "gptq", "eval", "ttt"])
def test_a_mode_on_a_model_runs_on_a_cpu(mode: str, tmp_path: Path) -> None:
    figures = run_mode(tmp_path, mode, "--preset", "tiny", "--documents", "2", "--val-tokens", "4000")
    wanted = {
        "cold": "empty caches: first step at", "gptq": "second pass: all four", "eval": "later pass: rate",
        "ttt": "one step of 16 windows of 256",
    }  # fmt: skip
    assert figures[wanted[mode]]["median"] > 0
    settings = json.loads((tmp_path / "figures.json").read_text())
    assert settings["settings"]["preset"] == "tiny"
    assert len(settings["environment"]["config_hash"]) == 64


@pytest.mark.slow
def test_two_ranks_train_in_one_gang(tmp_path: Path) -> None:
    figures = run_mode(tmp_path, "train", "--ranks", "2")
    assert figures["4 layers: rate"]["median"] > 0
    assert figures["6 visits: compiled while timed"]["median"] == 0
    assert json.loads((tmp_path / "figures.json").read_text())["environment"]["world_size"] == 2


@pytest.mark.slow
def test_the_laptop_mode_prints_every_figure_that_was_asked_for(tmp_path: Path) -> None:
    figures = run_mode(tmp_path, "laptop", is_ours=True)
    bars = {name: figure["wanted"] for name, figure in figures.items() if figure["wanted"]}
    assert sorted(bars.values()) == ["below 0.2", "below 0.5", "below 10", "below 50", "below 50"]


@pytest.mark.slow
def test_the_sweep_and_results_modes_run_small(tmp_path: Path) -> None:
    figures = run_mode(tmp_path, "sweep", "--runs", "8", is_ours=True)
    assert figures["decisions"]["median"] > 8
    assert {"status of 8 finished seeds", "table of 8 finished seeds", "Ray's overhead"} <= set(figures)
    figures = run_mode(tmp_path, "results", "--runs", "4", "--documents", "50", is_ours=True)
    wanted = {"seed table", "paired documents, two runs", "report of 4 runs", "table of 4 variants, 4 seeds"}
    assert wanted <= set(figures)


def test_every_mode_is_described() -> None:
    assert set(bench.TASKS) == set(bench.MODES)
