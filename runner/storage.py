"""A sweep's folder, wherever it lies: a local (or shared) filesystem, or any URI that pyarrow.fs opens.

Object stores have no rename and no append. There every file is one put, which readers see whole or not at all; a
log that grows is put again as a whole. The file in `results/runs` commits an attempt, here as on a disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlparse

from runner.spec import is_uri


class Storage(Protocol):
    """Files under one root, by relative path with forward slashes. Errors are OSErrors."""

    shown: str

    def read(self, path: str) -> bytes:
        """Return a file's bytes; FileNotFoundError if there is none."""

    def write(self, path: str, content: bytes) -> None:
        """Put a file, whole or not at all."""

    def append(self, path: str, content: bytes) -> None:
        """Add to the end of a file."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, sorted; none for a folder that is not there."""

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""


class LocalStorage:
    """Storage on a filesystem."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.shown = str(root)

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return (self.root / path).read_bytes()

    def write(self, path: str, content: bytes) -> None:
        """Write aside, sync, rename."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        try:
            os.fchmod(descriptor, 0o644)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise

    def append(self, path: str, content: bytes) -> None:
        """Append and sync."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

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
    """Storage behind a URI: s3://bucket/prefix, gs://bucket/prefix."""

    def __init__(self, uri: str) -> None:
        import pyarrow.fs as pafs

        try:
            filesystem, root = pafs.FileSystem.from_uri(uri)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"out={uri} cannot be opened: {error}") from None
        self.filesystem: Any = filesystem
        self.root = str(root).rstrip("/")
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


def open_storage(out: str) -> LocalStorage | ObjectStorage:
    """Return the storage at a path or URI. Raises ValueError for a URI that pyarrow cannot open."""
    local = local_root(out)
    return LocalStorage(local) if local is not None else ObjectStorage(out)


def local_root(out: str) -> Path | None:
    """Return the folder that out names on a filesystem (file:// included), or None for an object store."""
    if not is_uri(out):
        return Path(out).absolute()
    return Path(unquote(urlparse(out).path)) if out.startswith("file://") else None


def check_writable(storage: LocalStorage | ObjectStorage) -> None:
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
