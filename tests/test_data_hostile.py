"""Short fuzz runs over the loaders of data: refused in one line or loaded right, never anything else."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz_data import fuzz_manifest, fuzz_shard, fuzz_tokenizer


@pytest.mark.parametrize(("fuzz", "num_files"), [(fuzz_shard, 200), (fuzz_manifest, 200), (fuzz_tokenizer, 8)])
def test_mutated_files_are_refused_or_load_right(
    tmp_path: Path, fuzz: Callable[[int, Path], str], num_files: int
) -> None:
    outcomes = [fuzz(seed, tmp_path) for seed in range(num_files)]
    assert any(outcomes)
    assert not all(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(("fuzz", "num_files"), [(fuzz_shard, 2000), (fuzz_manifest, 2000), (fuzz_tokenizer, 60)])
def test_many_mutated_files_are_refused_or_load_right(
    tmp_path: Path, fuzz: Callable[[int, Path], str], num_files: int
) -> None:
    assert len([fuzz(seed, tmp_path) for seed in range(1_000_000, 1_000_000 + num_files)]) == num_files
