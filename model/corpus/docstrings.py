"""The docstrings of installed packages, read from their sources without importing them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MIN_CHARACTERS = 300
# in the order in which they draw on the byte limit: what a small one leaves, the next ones share
PACKAGES = ("python", "pyarrow", "numpy", "pandas", "torch")
SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "testing", "site-packages", "dist-packages", "_vendor", "idlelib"}
# Cython has no parser here: a string that opens the line after a colon is the docstring of what the colon ended
CYTHON_DOCSTRING = re.compile(r':[ \t]*\n\s*[rR]?"""(.+?)"""', re.DOTALL)
SOURCE_SUFFIXES = (".py", ".pyx", ".pxi")


@dataclass(slots=True)
class Docstrings:
    """Texts in the order they were found, without repetition, and where they come from."""

    texts: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    bytes_by_package: dict[str, int] = field(default_factory=dict)
    unreadable_files: list[str] = field(default_factory=list)


def gather_docstrings(max_bytes: int) -> Iterator[Docstrings]:
    """Collect docstrings of at least 300 characters up to max_bytes of UTF-8, yielding the growing result.

    Packages, files and places in a file come in a fixed order; public modules go before private ones. Each package
    gets an equal share of what is left when its turn comes. Two that differ in white space only are one.
    Raises ValueError naming a package that is not installed.
    """
    found = Docstrings()
    seen: set[str] = set()
    left = max_bytes
    for number, package in enumerate(PACKAGES):
        root = _package_folder(package)
        found.versions[package] = _version(package)
        share, used = left // (len(PACKAGES) - number), 0
        for path in _source_files(root):
            for text in read_docstrings(path, found.unreadable_files):
                key, size = " ".join(text.split()), len(text.encode())
                if len(text) >= MIN_CHARACTERS and key not in seen and used + size <= share:
                    seen.add(key)
                    found.texts.append(text)
                    used += size
            found.bytes_by_package[package] = used
            if used + MIN_CHARACTERS > share:
                break
            yield found
        left -= used
        yield found


def _package_folder(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package {package} is not installed, and the built-in corpus is made of its docstrings")
    return Path(next(iter(spec.submodule_search_locations)))


def _version(package: str) -> str:
    return platform.python_version() if package == "python" else importlib.metadata.version(package)


def _source_files(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        files += [Path(folder, name) for name in names if name.endswith(SOURCE_SUFFIXES)]

    def order(path: Path) -> tuple[bool, tuple[str, ...]]:
        parts = path.relative_to(root).parts
        return any(part.startswith("_") and part != "__init__.py" for part in parts), parts

    return sorted(files, key=order)


def read_docstrings(path: Path, unreadable: list[str]) -> list[str]:
    """Return the docstrings of one source file, indentation removed; a file that cannot be parsed joins unreadable."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        if path.suffix != ".py":
            return [inspect.cleandoc(text) for text in CYTHON_DOCSTRING.findall(source.decode())]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's escape sequences
            tree = ast.parse(source)
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        return [text for text in texts if text and _is_encodable(text)]
    except (SyntaxError, ValueError, RecursionError):
        unreadable.append(path.name)
        return []


def _is_encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
