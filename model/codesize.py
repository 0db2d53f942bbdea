"""How many bytes the code counts for, and the hash that names its version.

Both read the installed sources as files; nothing here imports the other packages.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("jobs", "model", "results", "runner")
SOURCE_SUFFIXES = frozenset({".py", ".yaml", ".yml", ".json", ".html", ".css", ".js"})
ROOT = Path(__file__).resolve().parents[1]  # the four packages lie side by side, in a checkout as when installed


class CodeBytes(NamedTuple):
    """Bytes that the code adds to the artifact, and by which convention they were counted."""

    num_bytes: int
    convention: str


def source_files(packages: Sequence[str] = PACKAGES, *, root: Path = ROOT) -> list[Path]:
    """Return the sources and data files of packages, sorted by path; FileNotFoundError if a package is not there."""
    files: list[Path] = []
    for package in sorted(packages):
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


def code_bytes(*, root: Path = ROOT) -> CodeBytes:
    """Return the LZMA size of the model package's sources in one tar without times, owners or modes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in source_files(("model",), root=root):
            content = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(root).as_posix())  # all its other fields are zero or constant
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    packed = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    return CodeBytes(len(packed), "model-package-tar-lzma")
