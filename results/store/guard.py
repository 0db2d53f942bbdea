"""Parquet files are parsed by a large C++ library, so only a known file is parsed at once: others are tried out first.

Known is what commit_attempt noted in results/SHA256SUMS. Any other local file (changed, imported, from a stranger) is
read whole by one child process with limited memory and time, which a damaged file may take down without harm; only what
it survives is parsed here. Files on object stores are not tried out: their store vouches for them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from results.store.location import Location

SUMS = "SHA256SUMS"
SUMS_LIMIT_BYTES = 64 << 20
FILE_LIMIT_BYTES = 1 << 30
READ_LIMIT_BYTES = 1 << 30  # that the columns of one file may take in memory, as its footer announces it
MEMORY_BYTES = 1 << 30  # that the child may take beyond what it holds when it starts
TIMEOUT_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


def note_sums(location: Location, contents: Mapping[str, bytes]) -> None:
    """Add the sha256 of files just written, by their path below results/; local folders only."""
    if location.filesystem.type_name == "local":
        lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents.items()]
        path = Path(location.path("results", SUMS))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:  # a full disk does not say which file it was
            raise type(error)(error.errno, error.strerror, str(path)) from None


def find_faults(location: Location, table: str, names: list[str]) -> dict[str, str]:
    """Return why a file cannot be read, by name, for those of a table that are not as noted and do not survive a try.

    location is the folder of the tables (results_location).
    """
    if location.filesystem.type_name != "local":
        return {}
    known = _read_sums(Path(location.path(SUMS)))
    faults = {}
    for name in names:
        path = Path(location.path(table, name))
        with contextlib.suppress(OSError):  # the reader will say what is wrong with it
            if path.stat().st_size > FILE_LIMIT_BYTES:
                faults[name] = f"{path.stat().st_size} bytes, over the limit of {FILE_LIMIT_BYTES}"
            elif file_sha256(path) not in known.get(f"{table}/{name}", ()):
                info = path.stat()
                fault = _tried(str(path), info.st_size, info.st_mtime_ns)
                if fault:
                    faults[name] = fault
    return faults


def _read_sums(path: Path) -> dict[str, set[str]]:
    """Return the noted sums by file; nothing where there is no such note, or it is no such file."""
    known: dict[str, set[str]] = {}
    with contextlib.suppress(OSError):
        if path.stat().st_size <= SUMS_LIMIT_BYTES:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                digest, _, name = line.partition("  ")
                known.setdefault(name, set()).add(digest)
    return known


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=65_536)
def _tried(path: str, _size: int, _mtime_ns: int) -> str:
    """Return why the child could not read a file, or an empty string; once for a file while it is unchanged."""
    return Child.current().try_out(path)


class Child:
    """The process that tries files out, started at the first need; a new one after a crash, or in a forked process."""

    running: Child | None = None

    def __init__(self) -> None:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from results.store.guard import serve; serve()"
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert self.process.stdout is not None
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    @classmethod
    def current(cls) -> Child:
        """Return the running child of this process."""
        if cls.running is None or cls.running.owner != os.getpid():
            cls.running = cls()
            atexit.register(cls.running.close)
        return cls.running

    def try_out(self, path: str) -> str:
        """Return why the child could not read a file, or an empty string."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(path).encode() + b"\n")
            self.process.stdin.flush()
        line = b""
        while not line.endswith(b"\n"):
            if not self.selector.select(TIMEOUT_S):
                self.close()
                return f"reading it took more than {TIMEOUT_S:.0f} s"
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                self.close()
                return f"reading it ended the process that tried, exit code {self.process.returncode}"
            line += piece
        return str(json.loads(line))

    def close(self) -> None:
        """End the child."""
        if self.owner != os.getpid() or self.process.stdin is None or self.process.stdout is None:
            return
        if Child.running is self:
            Child.running = None
        atexit.unregister(self.close)
        self.selector.close()
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    """Be the child: read the files named on stdin, one JSON line each way."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": [1.0], "b": ["x"]}), sink, compression="zstd")
    _read(pa.BufferReader(sink.getvalue()))  # reserves what is reserved at the first file, a GiB of addresses
    _limit_memory()
    for line in sys.stdin:
        print(json.dumps(_read(json.loads(line))), flush=True)


def _limit_memory() -> None:
    import resource

    with contextlib.suppress(OSError, ValueError):  # macOS keeps no such count; the time limit still holds
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, virtual + MEMORY_BYTES))


def _read(source: object) -> str:
    """Return what is wrong with a Parquet file (a path or an open file) after reading all of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
        footer = file.metadata
        announced = sum(footer.row_group(group).total_byte_size for group in range(footer.num_row_groups))
        if not 0 <= announced <= READ_LIMIT_BYTES:
            return f"its columns would take {announced} bytes, over the limit of {READ_LIMIT_BYTES}"
        for group in range(footer.num_row_groups):
            for place in range(footer.num_columns):
                _ = footer.row_group(group).column(place).statistics
        file.read(use_threads=False).validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError, TypeError, KeyError) as error:
        return first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 300 characters, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
