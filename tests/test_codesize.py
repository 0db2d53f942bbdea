"""Code bytes and code hash: depend on the sources and on nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from model.codesize import PACKAGES, code_bytes, code_hash, source_files


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
    assert 1_000 < code_bytes().num_bytes < 1_000_000
    assert code_bytes().convention == "model-package-tar-lzma"
    assert len(code_hash()) == 64


def test_times_modes_and_compiled_files_change_nothing(root: Path) -> None:
    before = code_hash(root=root), code_bytes(root=root)
    (root / "model" / "__pycache__").mkdir()
    (root / "model" / "__pycache__" / "rule.py").write_text("left over")
    (root / "model" / "notes.txt").write_text("no source")
    os.utime(root / "model" / "inner" / "rule.py", (1, 1))
    (root / "model" / "inner" / "rule.py").chmod(0o600)
    assert (code_hash(root=root), code_bytes(root=root)) == before


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


def test_only_the_model_package_counts_towards_the_size(root: Path) -> None:
    before = code_bytes(root=root)
    (root / "runner" / "inner" / "rule.py").write_text("x = 12345678901234567890\n" * 50)
    assert code_bytes(root=root) == before
    (root / "model" / "inner" / "rule.py").write_bytes(b"# " + os.urandom(400).hex().encode())
    assert code_bytes(root=root).num_bytes > before.num_bytes + 300


def test_a_missing_package_is_named(root: Path) -> None:
    (root / "runner" / "__init__.py").unlink()
    with pytest.raises(FileNotFoundError, match="package runner has no sources"):
        code_hash(root=root)
