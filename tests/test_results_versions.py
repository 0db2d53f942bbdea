"""Schema versions: the variant in every table and file name, reused stages, and files of older versions beside new."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from results.schema import TABLES, VERSION_KEY, absent_columns, column_names
from results.store import writer as store
from results.store.names import name_of_row
from results.store.reader import load_table, read_attempt, read_runs
from tests.fake_runs import commit_fake, fake_run, fake_stages, fake_sweep


def test_a_variant_is_a_column_and_part_of_the_file_name(tmp_path: Path) -> None:
    name = commit_fake(tmp_path, 42, variant="lr=0.001+rank=8")
    assert name == "variant=lr=0.001+rank=8-seed=42-repeat=0-attempt=1.parquet"
    for table in TABLES:
        frame = load_table(tmp_path, table)
        assert set(frame["variant"]) == {"lr=0.001+rank=8"}
        assert set(frame["run_id"]) == {name.removesuffix(".parquet")}
    run = load_table(tmp_path, "runs").iloc[0]
    assert name_of_row(run) == "variant=lr=0.001+rank=8-seed=42-repeat=0"
    assert len(read_attempt(tmp_path, "documents", run, ["tokens"])) == 40


def test_an_empty_variant_is_stored_as_base_under_a_plain_name(tmp_path: Path) -> None:
    assert commit_fake(tmp_path, 42, variant="") == "seed=42-repeat=0-attempt=1.parquet"
    assert commit_fake(tmp_path, 7) == "seed=7-repeat=0-attempt=1.parquet"
    assert commit_fake(tmp_path, 8, variant="base") == "variant=base-seed=8-repeat=0-attempt=1.parquet"
    runs = load_table(tmp_path, "runs")
    assert set(runs["variant"]) == {"base"}
    for _, run in runs.iterrows():
        assert len(read_attempt(tmp_path, "steps", run, ["step"]))


@pytest.mark.parametrize("variant", ["a/b", ".hidden", "-x", "a b", "x" * 81, "../../x"])
def test_a_variant_that_cannot_be_a_file_name_is_refused(tmp_path: Path, variant: str) -> None:
    with pytest.raises(ValueError, match="variant="):
        commit_fake(tmp_path, 42, variant=variant)
    assert not list(tmp_path.rglob("*.parquet"))


def test_reused_stages_are_named_in_both_tables(tmp_path: Path) -> None:
    stages = fake_stages(42)
    for record in stages:
        record["identity"] = record["stage"] * 8
    stages[0]["reused_from"] = stages[1]["reused_from"] = "variant=base-seed=42-repeat=0"
    store.commit_attempt(tmp_path, run=fake_run(42) | {"variant": "gate"}, stages=stages)
    store.commit_attempt(tmp_path, run=fake_run(42) | {"variant": "base"}, stages=fake_stages(42))
    runs = load_table(tmp_path, "runs").set_index("variant")
    assert runs.loc["gate", "reused_stages"] == "train,quantize"
    assert pd.isna(runs.loc["base", "reused_stages"])
    frame = load_table(tmp_path, "stages").set_index(["variant", "stage"])
    assert frame.loc[("gate", "train"), "reused_from"] == "variant=base-seed=42-repeat=0"
    assert frame.loc[("gate", "train"), "stage_identity"] == "train" * 8
    assert pd.isna(frame.loc[("gate", "ttt"), "reused_from"])
    assert pd.isna(frame.loc[("base", "train"), "stage_identity"])


def make_version(path: Path, version: int) -> None:
    """Write one file again as an older version had it."""
    content = pq.read_table(path).replace_schema_metadata({VERSION_KEY: str(version).encode()})
    index = content.schema.get_field_index("schema_version")
    same = pa.array([version] * content.num_rows, pa.int32())
    content = content.set_column(index, content.schema.field(index), same)
    kept = [name for name in content.column_names if name not in absent_columns(path.parent.name, version)]
    pq.write_table(content.select(kept), path, compression="zstd")


@pytest.mark.parametrize("which", [("42",), ("42", "7")])
def test_files_of_version_1_are_read_alone_and_beside_others(tmp_path: Path, which: tuple[str, ...]) -> None:
    commit_fake(tmp_path, 42)
    commit_fake(tmp_path, 7)
    for path in tmp_path.rglob("*.parquet"):
        if path.name.startswith(tuple(f"seed={seed}-" for seed in which)):
            make_version(path, 1)
    for table in TABLES:
        frame = load_table(tmp_path, table)
        assert list(frame.columns) == column_names(table)
        assert set(frame["variant"]) == {"base"}
        assert set(frame["seed"]) == {7, 42}
        assert set(frame.loc[frame["seed"] == 42, "schema_version"]) == {1}
    rows = read_runs(tmp_path, ["variant", "reused_stages"])
    assert rows.problems == []
    assert rows.frame["variant"].tolist() == ["base", "base"]


def test_files_of_version_2_are_read_without_the_seconds_of_sensitivity(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, sensitivity_s=1.5)
    commit_fake(tmp_path, 7, sensitivity_s=1.5, variant="fit")
    for path in tmp_path.rglob("*seed=7-*.parquet"):
        make_version(path, 2)
    rows = read_runs(tmp_path)
    assert rows.problems == []
    frame = rows.frame.set_index("seed")
    assert frame.loc[42, "sensitivity_s"] == 1.5
    assert pd.isna(frame.loc[7, "sensitivity_s"])
    assert frame.loc[7, "variant"] == "fit"
    assert set(load_table(tmp_path, "runs")["schema_version"]) == {2, 3}


def test_a_file_of_version_2_without_its_variant_is_left_out_by_name(tmp_path: Path) -> None:
    fake_sweep(tmp_path)
    path = tmp_path / "results" / "runs" / "seed=42-repeat=0-attempt=1.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["variant"]), path)
    rows = read_runs(tmp_path)
    assert "missing columns: variant; left out" in rows.problems[0]
    assert sorted(rows.frame["seed"]) == [0, 1337]
