"""results.store.guard: files as they were committed are read at once, all others are tried out in a child first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.store import guard
from results.store.guard import Child
from results.store.reader import read_runs
from tests.fake_runs import fake_sweep


def no_child() -> Child:
    """Refuse to try anything out."""
    raise AssertionError("a committed file was tried out")


def test_committed_files_are_read_without_a_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = fake_sweep(tmp_path, (1, 2))
    monkeypatch.setattr(Child, "current", no_child)
    assert len(read_runs(str(out)).frame) == 2


def test_a_file_that_someone_else_wrote_is_tried_out_and_counts(tmp_path: Path) -> None:
    out = fake_sweep(tmp_path, (1, 2))
    path = next((out / "results" / "runs").glob("seed=1-*"))
    path.write_bytes(path.read_bytes()[:-9])
    rows = read_runs(str(out))
    assert len(rows.frame) == 1
    assert "half-written or damaged" in rows.problems[0]
    (out / "results" / guard.SUMS).unlink()
    assert len(read_runs(str(out)).frame) == 1


def test_a_file_that_ends_the_child_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    out = fake_sweep(tmp_path, (1,))
    (out / "results" / guard.SUMS).unlink()
    child = Child.current()
    child.process.kill()
    child.process.wait()
    rows = read_runs(str(out))
    assert "ended the process that tried, exit code -9" in rows.problems[0]
    assert Child.running is None


def test_columns_that_announce_too_much_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.parquet"
    pd.DataFrame({"a": np.zeros(100_000)}).to_parquet(path)
    monkeypatch.setattr(guard, "READ_LIMIT_BYTES", 100)
    assert "over the limit of 100" in guard._read(str(path))
