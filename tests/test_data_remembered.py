"""Readings of large files, remembered on a node: used while the file is the same, forgotten when it is not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from model.corpus.shard_file import write_shard
from model.data import manifest, remembered
from model.data.manifest import scan_shard


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a shard that counts as large, in the home of a fresh user."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 0)
    path = tmp_path / "a_train_000000.bin"
    write_shard(path, np.array([1, 5, 6, 1, 7], dtype=np.uint16))
    return path


def fresh_process() -> None:
    """Forget what this process remembers."""
    manifest._scan_shard.cache_clear()


def test_a_second_process_of_a_node_does_not_read_again(shard: Path) -> None:
    fresh_process()
    facts = scan_shard(shard)
    fresh_process()
    place = remembered.place_of(shard)
    assert place is not None
    assert remembered.recall(place) == {"sha256": facts.sha256, "counts": [0, 2, 0, 0, 0, 1, 1, 1]}
    remembered.remember(place, {"sha256": "a" * 64, "counts": [0, 2, 0, 0, 0, 1, 1, 1]})
    told = scan_shard(shard)
    assert (told.sha256, told.num_tokens, told.num_documents, told.max_token) == ("a" * 64, 5, 2, 7)
    fresh_process()


@pytest.mark.parametrize(
    "content",
    [
        {"sha256": "a" * 64, "num_tokens": 5, "num_documents": 2, "max_token": 7},  # as an earlier version kept it
        {"sha256": "a" * 64, "counts": "5"},
        {"sha256": "a" * 64, "counts": [0.5]},
        {"sha256": "a" * 64, "counts": [[1]]},
        {"sha256": "a" * 64, "counts": [1] * 65_537},
    ],
)
def test_an_answer_of_another_kind_is_read_again(shard: Path, content: dict[str, object]) -> None:
    fresh_process()
    remembered.remember(remembered.place_of(shard), content)
    assert scan_shard(shard).counts.tolist() == [0, 2, 0, 0, 0, 1, 1, 1]
    fresh_process()


def test_a_changed_file_is_read_again_even_with_its_old_times(shard: Path) -> None:
    fresh_process()
    before = scan_shard(shard)
    info = shard.stat()
    write_shard(shard, np.array([1, 5, 6, 1, 8], dtype=np.uint16))
    os.utime(shard, ns=(info.st_atime_ns, info.st_mtime_ns))
    fresh_process()
    assert scan_shard(shard).sha256 != before.sha256
    fresh_process()


def test_what_cannot_be_read_or_kept_costs_a_reading_only(shard: Path, tmp_path: Path) -> None:
    fresh_process()
    (tmp_path / "home").write_text("a file where a folder should be")
    assert scan_shard(shard).num_tokens == 5
    fresh_process()
    assert remembered.recall(tmp_path / "home") is None


def test_small_files_are_not_remembered(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "LEAST_BYTES", 32 << 20)
    assert remembered.place_of(shard) is None
