"""Files that are complete or absent: written aside, synced, then moved into place.

Network and FUSE filesystems lack this or that of POSIX. What is only a courtesy (permissions, fsync) is left out where
the filesystem says that it has no such thing; what keeps a file whole (the rename) is not.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, cast

NOT_THERE = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTTY})
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # the disk, the user's share of it, the file

# (folder, root): files below root are written aside in folder. A rank of a sweep has a folder of its own for it, which
# the next driver of the sweep takes away: from then on nothing of that rank can reach its place any more.
_aside: ContextVar[tuple[Path, Path] | None] = ContextVar("aside", default=None)


@contextlib.contextmanager
def writing_aside_in(folder: Path, root: Path) -> Iterator[None]:
    """Let this thread write files below root aside in folder, which lies on the same filesystem."""
    token = _aside.set((folder, root))
    try:
        yield
    finally:
        _aside.reset(token)


@contextlib.contextmanager
def replace_file(path: Path, *, is_synced: bool = True) -> Iterator[BinaryIO]:
    """Open a file that appears under path when the block ends well, and leaves no trace when it does not.

    Raises OSError, naming path, where the place cannot be written, its filesystem cannot rename, or the folder for
    writing aside was taken away.
    """
    own_folder = aside_folder(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=own_folder or path.parent)
    except OSError as error:
        refuse_if_taken_away(own_folder, path)
        raise type(error)(error.errno, error.strerror, str(path)) from None
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            with tolerating_absence():
                os.fchmod(descriptor, 0o644)
            yield cast(BinaryIO, file)
            file.flush()
            if is_synced:
                sync_file(file.fileno())
        move_file(aside, path)
    except OSError as error:
        refuse_if_taken_away(own_folder, path)
        if error.errno in FULL and error.filename is None:  # writing to an open file does not say which
            raise type(error)(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()


def remove_file(path: Path) -> None:
    """Remove a file, if it is there. Raises OSError where the folder for writing aside was taken away."""
    own_folder = aside_folder(path)
    if own_folder is None:
        path.unlink(missing_ok=True)
        return
    try:
        removed = own_folder / f".{path.name}.removed"
        os.replace(path, removed)  # fails where the folder is gone, which looking first could not promise
        removed.unlink()
    except FileNotFoundError:
        refuse_if_taken_away(own_folder, path)


def aside_folder(path: Path) -> Path | None:
    """Return this thread's own folder for writing path aside, None where that happens beside it."""
    folder, root = _aside.get() or (None, path)
    return folder if folder is not None and path.is_relative_to(root) else None


def refuse_if_taken_away(folder: Path | None, path: Path) -> None:
    """Raise OSError if a thread's own folder is gone: somebody else works on its files now."""
    if folder is not None and not folder.is_dir():
        raise OSError(errno.ESTALE, "not written, another driver or attempt has taken this over", str(path))


def move_file(aside: Path, path: Path) -> None:
    """Rename aside to path, replacing it. Raises OSError, with the way out, where the filesystem has no rename."""
    try:
        os.replace(aside, path)
    except OSError as error:
        hint = ""
        if error.errno in NOT_THERE and not path.is_dir():
            hint = " (the filesystem may have no rename; choose a folder on another one, or a URI)"
        raise type(error)(error.errno, f"{error.strerror}{hint}", str(path)) from None


def sync_file(descriptor: int) -> None:
    """Ask for a file to be on the disk, where the filesystem knows that request."""
    with tolerating_absence():
        os.fsync(descriptor)


@contextlib.contextmanager
def tolerating_absence() -> Iterator[None]:
    """Pass over an operation that the filesystem does not have; any other error is one."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
