"""results.store.writer, reader and location: committing attempts, reading them back, naming what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import results
from results.schema import SCHEMA_VERSION, TABLES, VERSION_KEY, column_names, describe
from results.store import writer as store
from results.store.reader import OtherVersionError, latest_attempts, read_attempt, read_runs
from tests.fake_runs import commit_failed, commit_fake, fake_run, fake_sweep
from tests.tutorial import run_tutorial

ROOT = Path(__file__).resolve().parent.parent


def file_of(out: Path, table: str = "runs", seed: int = 42, attempt: int = 1) -> Path:
    return out / "results" / table / f"seed={seed}-repeat=0-attempt={attempt}.parquet"


def test_pandas_reads_the_runs_folder_as_one_row_an_attempt(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    commit_failed(tmp_path, 5)
    frame = pd.read_parquet(tmp_path / "results" / "runs")
    assert len(frame) == 4
    assert list(frame.columns) == column_names("runs")
    assert set(frame["state"]) == {"DONE", "FAILED"}


def test_every_row_of_every_table_carries_the_keys(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, num_documents=7)
    for load, rows in ((results.load, 1), (results.stages, 4), (results.steps, 60), (results.documents, 7)):
        frame = load(tmp_path)
        assert len(frame) == rows
        assert set(frame["run_id"]) == {"seed=42-repeat=0-attempt=1"}
        assert frame[["seed", "repeat", "attempt", "config_hash"]].notna().all().all()


def test_stage_metrics_fill_the_runs_row_and_run_wins(tmp_path: Path) -> None:
    run = fake_run(42) | {"train_s": 500.0}
    stages = [{"stage": "train", "metrics": {"train_s": 588.1, "steps": 4820, "resumed_at_steps": [3, 9], "other": 1}}]
    store.commit_attempt(tmp_path, run=run, stages=stages)
    row = results.load(tmp_path).iloc[0]
    assert (row["train_s"], row["steps"], list(row["resumed_at_steps"])) == (500.0, 4820, [3, 9])
    assert row["torch_version"] == "2.13.0"
    assert row["post_ttt_nats_per_token"] == pytest.approx(row["post_ttt_nats"] / row["post_ttt_tokens"])
    assert '"other": 1' in results.stages(tmp_path).iloc[0]["metrics_json"]


def test_the_run_s_peak_memory_is_that_of_its_largest_stage(tmp_path: Path) -> None:
    peaks = {"train": 500, "quantize": 900, "evaluate": 100, "ttt": None}
    stages = [{"stage": stage, "metrics": {"peak_memory_bytes": peak}} for stage, peak in peaks.items()]
    store.commit_attempt(tmp_path, run=fake_run(42), stages=stages)
    assert results.load(tmp_path).iloc[0]["peak_memory_bytes"] == 900
    store.commit_attempt(tmp_path, run=fake_run(43), stages=[{"stage": "train", "metrics": {"steps": 3}}])
    assert results.load(tmp_path).set_index("seed").loc[43, "peak_memory_bytes"] != 0


def test_files_appear_in_commit_order_with_runs_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(store, "write_whole", lambda _location, path, _content: written.append(path.split("/")[-2]))
    commit_fake(tmp_path, 42)
    assert tuple(written) == TABLES == ("documents", "steps", "stages", "runs")


def test_a_commit_that_stops_before_runs_is_not_seen(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    file_of(tmp_path).unlink()
    assert set(results.documents(tmp_path)["seed"]) == {0, 1337}
    assert set(results.load(tmp_path)["seed"]) == {0, 1337}


def test_a_failing_rename_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit_fake(tmp_path, 42)
    before = file_of(tmp_path).read_bytes()

    def refuse(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("results.store.location.os.replace", refuse)
    with pytest.raises(OSError, match="No space"):
        commit_fake(tmp_path, 42, shift=0.1)
    monkeypatch.undo()
    assert file_of(tmp_path).read_bytes() == before
    assert len(results.load(tmp_path)) == 1


def test_an_unknown_column_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"runs has no column 'traine_s'; nearest: train_s"):
        store.commit_attempt(tmp_path, run=fake_run(42) | {"traine_s": 1.0})
    with pytest.raises(ValueError, match="documents has no column 'token'; nearest: tokens"):
        store.commit_attempt(tmp_path, run=fake_run(42), documents={"token": np.ones(2)})


def test_a_missing_key_is_refused(tmp_path: Path) -> None:
    run = fake_run(42)
    del run["config_hash"]
    with pytest.raises(ValueError, match=r"run\.config_hash is missing"):
        store.commit_attempt(tmp_path, run=run)


def test_arrays_of_different_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="arrays differ in length"):
        store.commit_attempt(tmp_path, run=fake_run(42), steps={"step": np.arange(3), "loss": np.zeros(2)})


def test_results_can_live_at_a_uri(tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/far away".replace(" ", "%20")
    commit_fake(uri, 42)
    assert len(results.load(uri)) == 1
    assert (tmp_path / "far away" / "results" / "runs").is_dir()


def test_a_uri_of_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="out=nowhere://x cannot be opened"):
        results.load("nowhere://x")


def test_a_half_written_file_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    damaged = file_of(tmp_path)
    damaged.write_bytes(damaged.read_bytes()[:400])
    rows = read_runs(tmp_path)
    assert sorted(rows.frame["seed"]) == [0, 1337]
    assert len(rows.problems) == 1
    assert "seed=42-repeat=0-attempt=1.parquet: not readable as Parquet" in rows.problems[0]
    with pytest.warns(UserWarning, match="not readable as Parquet"):
        assert len(results.load(tmp_path)) == 2


def test_another_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    path = file_of(tmp_path)
    content = pq.read_table(path).replace_schema_metadata({VERSION_KEY: "99"})
    index = content.schema.get_field_index("schema_version")
    pq.write_table(content.set_column(index, "schema_version", [[99]]), path)
    assert "has schema version 99; this program reads versions 1 and 2" in read_runs(tmp_path).problems[0]
    with pytest.raises(OtherVersionError, match=r"seed=42-repeat=0-attempt=1\.parquet: has schema version 99"):
        results.load(tmp_path)


def test_missing_columns_are_named(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    path = file_of(tmp_path)
    pq.write_table(pq.read_table(path).drop_columns(["steps", "post_ttt_bpb"]), path)
    rows = read_runs(tmp_path)
    assert "missing columns: steps, post_ttt_bpb" in rows.problems[0]
    assert len(rows.frame) == 2


def test_a_file_rewritten_by_pandas_still_counts(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    path = file_of(tmp_path)
    pd.read_parquet(path).to_parquet(path)
    rows = read_runs(tmp_path)
    assert rows.problems == []
    assert rows.frame["schema_version"].tolist() == [SCHEMA_VERSION]


def test_the_latest_finished_attempt_wins_and_it_is_said(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, attempt=1)
    commit_fake(tmp_path, 42, attempt=2)
    commit_failed(tmp_path, 42, attempt=3)
    rows = latest_attempts(read_runs(tmp_path))
    assert rows.frame["attempt"].tolist() == [2]
    assert rows.notes == ["seed=42 repeat=0: 2 finished attempts (1, 2); attempt 2, the latest, is used"]


def test_a_seed_that_never_finished_keeps_its_last_attempt(tmp_path: Path) -> None:
    commit_failed(tmp_path, 42, attempt=1)
    commit_failed(tmp_path, 42, attempt=2)
    assert latest_attempts(read_runs(tmp_path)).frame["attempt"].tolist() == [2]


def test_documents_of_one_attempt_read_only_the_columns_asked_for(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    run = results.load(tmp_path).iloc[0]
    frame = read_attempt(tmp_path, "documents", run, ["index", "nats_ttt"])
    assert list(frame.columns) == ["index", "nats_ttt"]
    os.remove(file_of(tmp_path, "documents", seed=int(run["seed"])))
    with pytest.raises(ValueError, match="missing, although the attempt is committed"):
        read_attempt(tmp_path, "documents", run, ["index"])


def test_a_folder_without_results_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no results here \(no results/runs folder\)"):
        results.load(tmp_path)


def test_the_schema_page_is_the_one_the_code_makes() -> None:
    assert (ROOT / "docs" / "schema.md").read_text() == describe()


def test_the_tutorial_prints_what_its_page_shows() -> None:
    assert run_tutorial() == (ROOT / "docs" / "tutorial.md").read_text()
