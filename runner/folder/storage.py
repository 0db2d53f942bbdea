"""A sweep's folder, wherever it lies: a local (or shared) filesystem, or any URI that pyarrow.fs opens.

Object stores have no rename and no append. There every file is one put, which readers see whole or not at all; a
log that grows is put again as a whole. The file in `results/runs` commits an attempt, here as on a disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from io import RawIOBase
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from model.files.atomic import NOT_THERE, replace_file, sync_file
from results.store.location import open_location
from runner.spec.places import is_uri


class LocalStorage:
    """Files under one root on a filesystem, by relative path with forward slashes. Errors are OSErrors."""

    is_exclusive = True  # create lets exactly one of several through

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = str(root)

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return (self.root / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        """Write aside, sync, rename."""
        with replace_file(self.root / path) as file:
            file.write(content)

    def create(self, path: str, content: bytes) -> bool:
        """Link a finished file to its name; without hard links make it under its name, exclusively, and fill it."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                sync_file(file.fileno())
            os.link(aside, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NOT_THERE | {errno.EMLINK, errno.EXDEV, errno.EACCES}:
                raise type(error)(error.errno, error.strerror, str(target)) from None
            return create_filled(target, content)
        finally:
            os.unlink(aside)
        return True

    def append(self, path: str, content: bytes) -> None:
        """Append and sync; of what does not fit nothing is left. Raises OSError naming the file."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with target.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    write_all(file, content)
                    sync_file(file.fileno())
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(target)) from None

    def names(self, folder: str) -> list[str]:
        """Return file names, those being written left out."""
        place = self.root / folder
        if not place.is_dir():
            return []
        return sorted(item.name for item in place.iterdir() if item.is_file() and not item.name.startswith("."))

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""
        (self.root / path).unlink(missing_ok=True)


class ObjectStorage:
    """The same behind a URI: s3://bucket/prefix, gs://bucket/prefix."""

    is_exclusive = False  # pyarrow has no put that fails where there is an object

    def __init__(self, uri: str) -> None:
        location = open_location(uri)
        self.filesystem: Any = location.filesystem
        self.root = location.root.rstrip("/")
        self.shown = uri
        self.logs: dict[str, bytes] = {}  # what append has put so far

    def read(self, path: str) -> bytes:
        """Return an object's bytes."""
        with self.filesystem.open_input_stream(f"{self.root}/{path}") as stream:
            return bytes(stream.read())

    def write(self, path: str, content: bytes) -> None:
        """Put one object."""
        with self.filesystem.open_output_stream(f"{self.root}/{path}") as stream:
            stream.write(content)

    def create(self, path: str, content: bytes) -> bool:
        """Put one object where none is; of two that do so at once the later one stays, so look again afterwards."""
        folder, _, name = path.rpartition("/")
        if name in self.names(folder):
            return False
        self.write(path, content)
        return True

    def append(self, path: str, content: bytes) -> None:
        """Put the whole log again with content at its end."""
        if path not in self.logs:
            try:
                self.logs[path] = self.read(path)
            except FileNotFoundError:
                self.logs[path] = b""
        self.logs[path] += content
        self.write(path, self.logs[path])

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly under a prefix."""
        import pyarrow.fs as pafs

        selector = pafs.FileSelector(f"{self.root}/{folder}", allow_not_found=True)
        listed = self.filesystem.get_file_info(selector)
        return sorted(info.base_name for info in listed if info.type == pafs.FileType.File)

    def remove(self, path: str) -> None:
        """Delete an object, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.root}/{path}")


Storage = LocalStorage | ObjectStorage


def write_all(file: RawIOBase, content: bytes) -> None:
    """Write all of content to an unbuffered file."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) or 0 :]


def create_filled(path: Path, content: bytes) -> bool:
    """Make a file under its name and fill it; return False if there is one. A reader may see it before it is full."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            sync_file(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def open_storage(out: str) -> Storage:
    """Return the storage at a path or URI. Raises ValueError for a URI that pyarrow cannot open."""
    local = local_root(out)
    return LocalStorage(local) if local is not None else ObjectStorage(out)


def local_root(out: str) -> Path | None:
    """Return the folder that out names on a filesystem (file:// included), or None for an object store."""
    if not is_uri(out):
        return Path(out).absolute()
    return Path(unquote(urlparse(out).path)) if out.startswith("file://") else None


def check_writable(storage: Storage) -> None:
    """Write and remove a probe. Raises ValueError, one line, if the place takes no files."""
    probe = f"probes/writable-{os.getpid()}"
    try:
        storage.write(probe, b"ok\n")
        storage.remove(probe)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise ValueError(f"out={storage.shown} is not writable ({reason}); choose another with --out") from None
    if isinstance(storage, LocalStorage):
        with contextlib.suppress(OSError):
            (storage.root / "probes").rmdir()


def remove_tree(path: Path) -> None:
    """Remove a local folder and everything in it, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
