"""What a check says, and the reading and comparing that every check of a submission folder shares."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from results.store.guard import first_line

if TYPE_CHECKING:
    import numpy as np


AGREES, DIFFERS, UNCHECKED = "agrees", "differs", "not checked"

MAX_JSON_BYTES = 64 << 20

MAX_ARRAY_BYTES = 1 << 30  # of one npz member, before memory is taken

# what reading damaged JSON, zip and npz files ends in
UNREADABLE = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, OSError, EOFError, ArithmeticError, MemoryError,
    RuntimeError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


class Check(NamedTuple):
    """One statement: where it stands, whether the other files agree, and what they say."""

    where: str
    state: str
    detail: str


class Formulas(NamedTuple):
    """What the package that made the run computes. Each may raise ValueError for content that makes no sense."""

    config_hash: Callable[[Mapping[str, Any], int], str]  # resolved configuration, ranks
    data_hash: Callable[[Mapping[str, Any]], str]  # content of run.json
    check_score_ledger: Callable[[Mapping[str, np.ndarray], np.ndarray], list[str]]  # arrays, targets a document
    is_twin: Callable[[str, bytes], bool | None]  # readable program, packed one; None: cannot be told here


def run_checks(where: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """Return the checks of a part; content that cannot be read is a disagreement, not the end of the report."""
    found: list[Check] = []
    try:
        for entry in check():
            found.append(entry)
    except UNREADABLE as error:
        found.append(Check(where, DIFFERS, f"cannot be read: {type(error).__name__}: {first_line(error)}"))
    return found


def compare(where: str, stated: object, derived: object, source: str) -> Check:
    """Return whether a stated value is the derived one, to the last digit."""
    if stated == derived or (stated != stated and derived != derived):
        return Check(where, AGREES, f"{_shown(stated)}, as {source}")
    return Check(where, DIFFERS, f"states {_shown(stated)}, {source} gives {_shown(derived)}")


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def read_json(path: Path) -> Any:
    """Return the content of a JSON file of bounded size. Raises ValueError naming it if it is damaged."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, over the limit of {MAX_JSON_BYTES}")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({first_line(error)})") from None


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file, sizes checked before memory is taken. Nothing in it is unpickled."""
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.file_size > MAX_ARRAY_BYTES:
                raise ValueError(f"{path}: {member.filename} would take {member.file_size} bytes")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def counts(checks: list[Check]) -> dict[str, int]:
    """Return how many checks ended how."""
    return {state: sum(check.state == state for check in checks) for state in (AGREES, DIFFERS, UNCHECKED)}
