"""The hash that names the version of the code: the installed sources of all four packages, read as files."""

from __future__ import annotations

import hashlib
from pathlib import Path

PACKAGES = ("jobs", "model", "results", "runner")
SOURCE_SUFFIXES = frozenset({".py", ".yaml", ".yml", ".json", ".html", ".css", ".js"})
ROOT = Path(__file__).resolve().parents[2]  # the four packages lie side by side, in a checkout as when installed


def source_files(*, root: Path = ROOT) -> list[Path]:
    """Return the sources and data files of all four packages, sorted by path; FileNotFoundError if one is not there."""
    files: list[Path] = []
    for package in PACKAGES:
        if not (root / package / "__init__.py").is_file():
            raise FileNotFoundError(f"package {package} has no sources in {root}: install seedsweep from its folder")
        files += [
            path
            for path in (root / package).rglob("*")
            if path.suffix in SOURCE_SUFFIXES and "__pycache__" not in path.parts and path.is_file()
        ]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def code_hash(*, root: Path = ROOT) -> str:
    """Return the sha256 (hex) over relative paths and contents of all sources of the four packages."""
    digest = hashlib.sha256()
    for path in source_files(root=root):
        name, content = path.relative_to(root).as_posix().encode(), path.read_bytes()
        # lengths first, so that no two sets of files read as the same bytes
        digest.update(len(name).to_bytes(8, "big") + len(content).to_bytes(8, "big") + name + content)
    return digest.hexdigest()
