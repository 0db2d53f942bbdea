"""Code bytes and code hash: depend on the sources and on nothing else."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from model.bundle.code_hash import PACKAGES, ROOT, code_hash, source_files
from model.bundle.program import code_program
from model.config import DataConfig
from model.presets import published, tiny


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with four small packages."""
    for package in PACKAGES:
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("")
        (tmp_path / package / "inner" / "rule.py").write_text(f"NAME = {package!r}\n")
    (tmp_path / "jobs" / "spec.yaml").write_text("name: demo\n")
    return tmp_path


def test_the_installed_packages_have_sources_and_a_size() -> None:
    names = {path.name for path in source_files()}
    assert {"gptq.py", "config.py", "cli.py"} <= names
    assert 10_000 < code_program(tiny()).num_bytes < 200_000
    assert len(code_hash()) == 64


def test_times_modes_and_compiled_files_change_nothing(root: Path) -> None:
    before = code_hash(root=root)
    (root / "model" / "__pycache__").mkdir()
    (root / "model" / "__pycache__" / "rule.py").write_text("left over")
    (root / "model" / "notes.txt").write_text("no source")
    os.utime(root / "model" / "inner" / "rule.py", (1, 1))
    (root / "model" / "inner" / "rule.py").chmod(0o600)
    assert code_hash(root=root) == before


@pytest.mark.parametrize("package", PACKAGES)
def test_an_edit_in_any_package_changes_the_hash(root: Path, package: str) -> None:
    before = code_hash(root=root)
    (root / package / "inner" / "rule.py").write_text("NAME = 1\n")
    assert code_hash(root=root) != before


def test_a_moved_or_a_data_file_changes_the_hash(root: Path) -> None:
    first = code_hash(root=root)
    (root / "jobs" / "spec.yaml").write_text("name: other\n")
    second = code_hash(root=root)
    (root / "model" / "inner" / "rule.py").rename(root / "model" / "inner" / "law.py")
    assert len({first, second, code_hash(root=root)}) == 3


@pytest.mark.slow
def test_code_bytes_are_those_of_the_modules_that_training_and_scoring_need(tmp_path: Path) -> None:
    sizes = []
    for number, file in enumerate(("", "gpt.py", "data/corpus.py")):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "0" if number else ROOT, root, ignore=lambda folder, names: {
            name for name in names if name == "__pycache__" or (folder == str(ROOT) and name != "model")
        })  # fmt: skip
        if file:
            with (root / "model" / file).open("a") as source:
                source.write(f'str("{os.urandom(400).hex()}")\n')  # a comment or an unused name would be taken out
        sizes.append(code_program(tiny(), root=root).num_bytes)
    assert sizes[1] > sizes[0] + 300
    assert sizes[2] == sizes[0]


def test_code_bytes_are_equal_for_all_seeds_and_places_of_data() -> None:
    moved = replace(published(), seed=7, data=DataConfig(train="a/*.bin", val="b/*.bin", tokenizer="c.model"))
    assert code_program(moved) == code_program(published())


def test_a_missing_package_is_named(root: Path) -> None:
    (root / "runner" / "__init__.py").unlink()
    with pytest.raises(FileNotFoundError, match="package runner has no sources"):
        code_hash(root=root)
