"""A lock that is waited for, and somebody told meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock, Timeout

LOOK_S = 0.5  # between two calls of tick


def lock_beside(place: Path, tick: Callable[[], None]) -> AbstractContextManager[object]:
    """Return the lock file beside place, held until the end of a with statement.

    tick is called while another process has it. The folder is made. Raises OSError where no lock can be made.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place.with_name(f"{place.name}.lock"))
    while True:
        try:
            return lock.acquire(timeout=LOOK_S)
        except Timeout:
            tick()
