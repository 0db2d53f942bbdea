"""What a stage did and when: spans on the monotonic clock, and the files it opened."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Spans and reads of one stage on one rank; times count from the ledger's creation."""

    stage: str
    origin: float = field(default_factory=time.monotonic)
    spans: list[dict[str, Any]] = field(default_factory=list)
    reads: list[dict[str, Any]] = field(default_factory=list)
    phase: str = "setup"

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Note how long the block took, under this name; files opened inside belong to it."""
        outer, self.phase = self.phase, name
        started = time.monotonic()
        try:
            yield
        finally:
            ended = time.monotonic()
            self.spans.append({"name": name, "start_s": started - self.origin, "end_s": ended - self.origin})
            self.phase = outer

    def opened(self, path: Path) -> None:
        """Note that a data file was opened in the present phase."""
        self.reads.append({"phase": self.phase, "file": path.name, "path": str(path)})

    def seconds(self, name: str) -> float:
        """Return the total length of the spans of this name."""
        return float(sum(span["end_s"] - span["start_s"] for span in self.spans if span["name"] == name))

    def as_json(self) -> dict[str, Any]:
        """Return the ledger as plain values."""
        return {"stage": self.stage, "spans": self.spans, "reads": self.reads}
