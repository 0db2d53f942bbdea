"""What reading a whole large file told, remembered on this node while the file is unchanged.

Every seed of a sweep checks the same gigabytes of shards. The first process of a node reads them; the others find
its answer under the user's cache folder, named by everything that changes when a file does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.files.atomic import replace_file

LEAST_BYTES = 32 << 20  # smaller files are read faster than it is worth
FORMAT = 2


def place_of(path: Path) -> Path | None:
    """Return where the answer for a file's present contents is kept, None for a small file or a user without a home.

    Device, inode, size, and the times of the last change of contents and of the file itself name the contents.
    """
    info = path.stat()
    if info.st_size < LEAST_BYTES:
        return None
    facts = (FORMAT, str(path.resolve()), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
    return place_named(hashlib.sha256(repr(facts).encode()).hexdigest())


def place_named(name: str) -> Path | None:
    """Return where an answer is kept under a name that says all that it depends on; None for a user without a home."""
    try:
        return Path.home() / ".cache" / "seedsweep" / "scans" / f"{name}.json"
    except RuntimeError:
        return None


def recall(place: Path | None) -> dict[str, Any] | None:
    """Return what was remembered at a place, None where nothing was or it cannot be read."""
    if place is None:
        return None
    try:
        content = json.loads(place.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def remember(place: Path | None, facts: Mapping[str, Any]) -> None:
    """Keep facts at a place. A folder that takes no files costs only the next process's time."""
    if place is None:
        return
    with contextlib.suppress(OSError), replace_file(place) as file:
        file.write(json.dumps(facts).encode())
