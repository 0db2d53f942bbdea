"""Where results lie: a local folder or any URI that pyarrow.fs understands, and whole-or-nothing writes to it."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import queue
import threading
from pathlib import Path
from typing import Any, NamedTuple

PATIENCE_S = 8.0  # with a store that may ask for credentials in places that do not answer
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) and the region, or use s3://anonymous@...",
    "gs": "run gcloud auth application-default login, set GOOGLE_APPLICATION_CREDENTIALS, or use gs://anonymous@...",
    "gcs": "run gcloud auth application-default login, set GOOGLE_APPLICATION_CREDENTIALS, or use gcs://anonymous@...",
    "abfs": "run az login, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    "abfss": "run az login, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    "az": "Azure is abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH here",
}  # what to do when a store of this scheme does not let us in
OBJECT_STORES = ("s3", "gcs", "abfs")  # have no folders to make


class Location(NamedTuple):
    """A folder on a filesystem; `shown` is what the user typed."""

    filesystem: Any  # pyarrow.fs.FileSystem
    root: str
    shown: str
    aside: str = ""  # where files are written before they are moved into place; "": beside their place

    def path(self, *parts: str) -> str:
        """Return a path below the root."""
        return "/".join((self.root.rstrip("/"), *parts))


def open_location(out: object) -> Location:
    """Return the location named by a path or a URI.

    Raises ValueError for a URI that pyarrow does not know, ConnectionError for a store that does not answer or does
    not let us in; both name the way out.
    """
    import pyarrow as pa
    import pyarrow.fs as pafs

    shown = os.fspath(out) if isinstance(out, os.PathLike) else str(out)
    if "://" not in shown:
        return Location(pafs.LocalFileSystem(), str(Path(shown).absolute()), shown)
    try:
        filesystem, root = _open_store(shown)
    except (ValueError, OSError, pa.ArrowException) as error:  # NotImplementedError is one of Arrow's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = CREDENTIALS.get(shown.partition("://")[0], "")
        kind = ValueError if isinstance(error, ValueError | NotImplementedError) else ConnectionError
        raise kind(f"out={shown} cannot be opened: {reason}{hint and f'; {hint}'}") from None
    return Location(filesystem, root, shown)


@functools.lru_cache(maxsize=64)
def _open_store(uri: str) -> tuple[Any, str]:
    """Return filesystem and root of a URI after one look at it; stores retry for minutes without a word, we do not.

    Raises TimeoutError where nothing comes of it in PATIENCE_S.
    """
    import pyarrow.fs as pafs

    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look() -> None:
        try:
            filesystem, root = pafs.FileSystem.from_uri(uri)
            if filesystem.type_name != "local":
                filesystem.get_file_info(root)
            answers.put((filesystem, root))
        except Exception as error:  # raised again below
            answers.put(error)

    # pyarrow's call cannot be ended; jobs.cli ends the process under it
    threading.Thread(target=look, name="seedsweep-store", daemon=True).start()
    try:
        answer = answers.get(timeout=PATIENCE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {PATIENCE_S:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer  # type: ignore[no-any-return]


def results_location(out: object) -> Location:
    """Return the folder that holds runs/, steps/ and so on, given a run directory or its `results` folder.

    Raises FileNotFoundError when neither holds a `runs` folder.
    """
    import pyarrow.fs as pafs

    location = open_location(out)
    for root in (location.path("results"), location.root):
        if location.filesystem.get_file_info(f"{root}/runs").type == pafs.FileType.Directory:
            return location._replace(root=root)
    raise FileNotFoundError(f"{location.shown}: no results here (no results/runs folder); give a sweep's run directory")


def list_parquet(location: Location, table: str) -> list[str]:
    """Return the file names of one table, sorted; files being written are not among them."""
    import pyarrow.fs as pafs

    selector = pafs.FileSelector(location.path(table), allow_not_found=True)
    names = [info.base_name for info in location.filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    return sorted(name for name in names if name.endswith(".parquet") and not name.startswith((".", "_")))


def write_whole(location: Location, path: str, content: bytes) -> None:
    """Write content aside, in the same folder or in location.aside, then rename: a reader sees the whole file or none.

    Raises OSError when the place cannot be written.
    """
    folder, _, name = path.rpartition("/")
    aside = f"{folder}/.{name}.{os.getpid()}.tmp"
    if location.filesystem.type_name == "local":
        os.makedirs(folder, exist_ok=True)
        _write_local(Path(path), content, Path(location.aside or folder))
        return
    if location.filesystem.type_name in OBJECT_STORES:
        with location.filesystem.open_output_stream(path) as stream:  # one put: whole or absent without a rename
            stream.write(content)
        return
    location.filesystem.create_dir(folder, recursive=True)
    with location.filesystem.open_output_stream(aside) as stream:
        stream.write(content)
    location.filesystem.move(aside, path)


def _write_local(path: Path, content: bytes, folder: Path) -> None:
    """Write aside in folder, sync, rename; nothing is left of what failed. Raises OSError naming path."""
    aside = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            _sync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise type(error)(error.errno, error.strerror, str(path)) from None


def _sync(descriptor: int) -> None:
    """Ask for a file to be on the disk; a network filesystem may not know that request."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
