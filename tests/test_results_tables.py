"""results.tables and `seedsweep table`: the seed table, its JSON, its marks and its exit codes."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path

import pytest

from jobs.cli import main
from results.table_text import as_json, render
from results.tables import SEED_KEYS
from tests.fake_runs import commit_failed, commit_fake, fake_sweep, seed_table


def test_the_json_has_exactly_the_keys_of_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_sweep(tmp_path)
    assert main(["table", str(tmp_path), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content) == ["schema_version", "sweep", "data_hash", "seeds", "summary"]
    assert [list(row) for row in content["seeds"]] == [list(SEED_KEYS)] * 3
    assert [row["seed"] for row in content["seeds"]] == [0, 42, 1337]
    assert set(content["summary"]["post_ttt_bpb"]) == {"n", "mean", "std_ddof1"}


def test_the_summary_is_mean_and_sample_std_over_seeds(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    content = as_json(seed_table(tmp_path))
    values = [row["post_ttt_bpb"] for row in content["seeds"]]
    summary = content["summary"]["post_ttt_bpb"]
    assert summary["n"] == 3
    assert summary["mean"] == pytest.approx(statistics.mean(values), abs=1e-15)
    assert summary["std_ddof1"] == pytest.approx(statistics.stdev(values), rel=1e-12)


def test_a_failed_seed_has_every_key_with_null_and_the_exit_code_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_sweep(tmp_path)
    commit_failed(tmp_path, 5)
    assert main(["table", str(tmp_path), "--format", "json"]) == 1
    content = json.loads(capsys.readouterr().out)
    failed = next(row for row in content["seeds"] if row["seed"] == 5)
    assert failed["state"] == "FAILED"
    assert {failed[key] for key in SEED_KEYS if key not in ("seed", "repeat", "state", "attempts")} == {None}
    assert content["summary"]["post_ttt_bpb"]["n"] == 3


def test_gain_splits_into_context_and_adaptation(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    row = seed_table(tmp_path).seeds[0]
    assert row["context_gain_bpb"] == row["ttt_lr0_bpb"] - row["pre_ttt_bpb"] < 0
    assert row["adaptation_gain_bpb"] == row["post_ttt_bpb"] - row["ttt_lr0_bpb"] < 0
    total = row["context_gain_bpb"] + row["adaptation_gain_bpb"]
    assert total == pytest.approx(row["post_ttt_bpb"] - row["pre_ttt_bpb"])


def test_repeats_count_once_and_their_spread_stands_apart(tmp_path: Path) -> None:
    for seed in (0, 42, 1337):
        commit_fake(tmp_path, seed, repeat=0)
    commit_fake(tmp_path, 42, repeat=1, shift=0.002)
    table = seed_table(tmp_path)
    values = {(row["seed"], row["repeat"]): row["post_ttt_bpb"] for row in table.seeds}
    per_seed = [values[0, 0], (values[42, 0] + values[42, 1]) / 2, values[1337, 0]]
    assert table.summary["post_ttt_bpb"].n == 3
    assert table.summary["post_ttt_bpb"].mean == pytest.approx(statistics.mean(per_seed), abs=1e-14)
    assert table.same_seed["post_ttt_bpb"].std_ddof1 == pytest.approx(statistics.stdev([values[42, 0], values[42, 1]]))
    assert as_json(table)["same_seed_spread"]["post_ttt_bpb"]["degrees_of_freedom"] == 1
    assert "same-seed spread of post-TTT" in render(table, "text")


def test_one_seed_has_no_spread_and_the_table_says_so(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    table = seed_table(tmp_path)
    assert as_json(table)["summary"]["post_ttt_bpb"] == {
        "n": 1,
        "mean": table.seeds[0]["post_ttt_bpb"],
        "std_ddof1": None,
    }
    assert "no spread" in render(table, "text")


def test_marks_name_what_must_be_known_beside_the_figures(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, within_limit=False, code_changed=True, num_resumes=2, is_slow=True, attempt=3)
    assert seed_table(tmp_path).seeds[0]["marks"] == [
        "over limit",
        "code changed",
        "resumed x2",
        "slow",
        "3 attempts",
    ]


def test_the_foot_shows_the_order_0_score_and_the_conventions(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    text = render(seed_table(tmp_path), "text")
    assert "2.92310 bpb" in text
    assert "ddof=1" in text
    assert "lzma of the model package" in text


def test_a_nan_score_is_left_out_said_and_null_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_sweep(tmp_path)
    commit_fake(tmp_path, 7, post_ttt_bpb=float("nan"))
    assert main(["table", str(tmp_path), "--format", "json"]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["summary"]["post_ttt_bpb"]["n"] == 3
    assert next(row for row in content["seeds"] if row["seed"] == 7)["post_ttt_bpb"] is None
    assert "seed=7 repeat=0: DONE, but post_ttt_bpb is missing or not a number" in captured.err


def test_rows_of_two_configurations_are_called_a_mixture(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    commit_fake(tmp_path, 0, config_hash="9" * 64)
    assert any(note.startswith("config_hash differs between rows") for note in seed_table(tmp_path).notes)


def test_csv_and_markdown_carry_the_same_rows(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    table = seed_table(tmp_path)
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert [float(row["post_ttt_bpb"]) for row in rows] == [row["post_ttt_bpb"] for row in table.seeds]
    assert render(table, "markdown").count("\n| ") == 1 + len(table.seeds) + 3


def test_an_unreadable_file_is_named_and_the_rest_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_sweep(tmp_path)
    (tmp_path / "results" / "runs" / "seed=42-repeat=0-attempt=1.parquet").write_bytes(b"PAR1 half")
    assert main(["table", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "1337" in captured.out
    assert "seed=42-repeat=0-attempt=1.parquet: not readable as Parquet" in captured.err


def test_nothing_to_show_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path / "absent")]) == 2
    assert "no results here" in capsys.readouterr().err
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "results" / "runs" / "seed=1-repeat=0-attempt=1.parquet").write_bytes(b"")
    assert main(["table", str(tmp_path)]) == 2
    assert "nothing to show" in capsys.readouterr().err


def test_the_population_std_is_shown_on_request_under_its_own_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(fake_sweep(tmp_path))
    assert main(["table", out]) == 0
    assert "population" not in capsys.readouterr().out
    assert main(["table", out, "--population-std"]) == 0
    assert "population std" in capsys.readouterr().out
    assert main(["table", out, "--population-std", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    values = [row["post_ttt_bpb"] for row in content["seeds"]]
    assert content["summary"]["post_ttt_bpb"]["std_ddof0"] == pytest.approx(statistics.pstdev(values))
