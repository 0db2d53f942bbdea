"""What a stage did and when: spans on the monotonic clock, and the data files it opened.

Files are noted twice over: by the code that opens them, and by an audit hook of the interpreter that sees every file
Python opens for reading, so that a read which nobody declared is in the ledger too. Files opened inside C++ or Rust
(safetensors) are only known from the code that opens them.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_SUFFIXES = frozenset({
    ".bin", ".model", ".ssq", ".safetensors", ".npz", ".npy", ".parquet", ".pt", ".arrow", ".jsonl", ".gz", ".txt",
})  # fmt: skip


@dataclass(slots=True)
class Ledger:
    """Spans and reads of one stage on one rank; times count from the ledger's creation.

    earlier: the spans of the attempts whose checkpoints this one goes on from, {"spans": [...]} each, the first first.
    """

    stage: str
    rank: int = 0
    origin: float = field(default_factory=time.monotonic)
    spans: list[dict[str, Any]] = field(default_factory=list)
    reads: list[dict[str, Any]] = field(default_factory=list)
    phase: str = "setup"
    earlier: list[dict[str, Any]] = field(default_factory=list)
    unfinished: list[tuple[str, float]] = field(default_factory=list)  # spans under way: name and start

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note how long the block took, under this name; files opened inside belong to it."""
        outer, self.phase = self.phase, name
        started = time.monotonic()
        self.unfinished.append((name, started))
        try:
            yield
        finally:
            self.unfinished.pop()
            self.add_span(name, started, time.monotonic())
            self.phase = outer

    def add_span(self, name: str, started: float, ended: float, **facts: str) -> None:
        """Note that something of this name lasted from started to ended, on the monotonic clock; facts about it."""
        self.spans.append(self._span(name, started, ended) | facts)

    def _span(self, name: str, started: float, ended: float) -> dict[str, Any]:
        return {"name": name, "rank": self.rank, "start_s": started - self.origin, "end_s": ended - self.origin}

    def attempts(self) -> list[dict[str, Any]]:
        """Return the spans of every attempt so far, this one's last; what is under way counts up to now."""
        now = time.monotonic()
        under_way = [self._span(name, started, now) for name, started in self.unfinished]
        return [*self.earlier, {"spans": [*self.spans, *under_way]}]

    def opened(self, path: Path, *, is_declared: bool = True) -> None:
        """Note that a data file was opened in the present phase; a file opened again only counts up."""
        phase, absolute = self.phase, os.path.abspath(path)
        for read in self.reads:
            if read["phase"] == phase and read["path"] == absolute:
                read["declared" if is_declared else "seen"] += 1
                return
        self.reads.append({
            "phase": phase, "rank": self.rank, "file": path.name, "path": absolute,
            "declared": int(is_declared), "seen": int(not is_declared),
        })  # fmt: skip

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of every data file that this process opens for reading inside the block."""
        _install_hook()
        _listeners.append(self)
        try:
            yield
        finally:
            _listeners.remove(self)

    def seconds(self, name: str) -> float:
        """Return how long anything of this name lasted; spans that overlap, as of threads, count once."""
        return covered_s(span for span in self.spans if span["name"] == name)

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as plain values."""
        earlier = {"earlier": self.earlier} if self.earlier else {}
        return {"stage": self.stage, "spans": self.spans, "reads": self.reads, **earlier}


def covered_s(spans: Iterable[Mapping[str, Any]]) -> float:
    """Return the seconds that lie in one span or more."""
    total, reached = 0.0, -math.inf
    for start, end in sorted((float(span["start_s"]), float(span["end_s"])) for span in spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def join_ledgers(parts: list[dict[str, Any]], sha256: Mapping[str, str]) -> dict[str, Any]:
    """Return the ledgers of all ranks as one, each read with the sha256 of its file where that is known by path.

    Of earlier attempts only rank 0's spans were kept, in its checkpoints.
    """
    reads = [
        {**read, "sha256": sha256[read["path"]]} if read["path"] in sha256 else read
        for part in parts
        for read in part["reads"]
    ]
    spans = [span for part in parts for span in part["spans"]]
    return {**parts[0], "spans": spans, "reads": reads}


_listeners: list[Ledger] = []
_is_hooked = False


def _install_hook() -> None:
    """Add the hook once: the interpreter offers no way to take one out again."""
    global _is_hooked
    if not _is_hooked:
        sys.addaudithook(_hear)
        _is_hooked = True


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _listeners:
        return
    path, mode, flags = arguments
    if not isinstance(path, str | bytes | os.PathLike) or not _is_reading(mode, flags):
        return
    name = os.fsdecode(path)
    if os.path.splitext(name)[1] in DATA_SUFFIXES:
        _listeners[-1].opened(Path(name), is_declared=False)


def _is_reading(mode: str | None, flags: int) -> bool:
    if mode is not None:
        return not set(mode) & set("wax")
    return (flags & (os.O_WRONLY | os.O_RDWR)) == 0
