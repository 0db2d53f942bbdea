"""What the stages of one seed share: configuration, gang, run directory and the callbacks of whoever started it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.config import RunConfig
from model.distributed import Dist
from model.files.atomic import replace_file
from model.kernels.pace import LONG_CALL_S, ticking
from model.report import Report


@dataclass(slots=True)
class Run:
    """One seed at work: what every stage needs. What is known of the run directory is so on rank 0, which alone writes.

    attention: the kernel that an earlier attempt trained with. is_changed: code or surroundings are not those of the
    attempt before, and that was allowed. is_listed: run.json names this attempt.
    """

    config: RunConfig
    dist: Dist
    workdir: Path
    report: Report
    should_stop: Callable[[], bool] = lambda: False
    on_write: Callable[[Path], None] = lambda _path: None
    uses_checkpoints: bool = True
    tick: Callable[[], None] = lambda: None  # hears that this rank got further, with nothing to show
    hashes: dict[str, str] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    is_changed: bool = False
    is_listed: bool = False
    file_hashes: dict[str, str] = field(default_factory=dict)  # sha256 by absolute path, as far as known

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints inside training."""
        return self.workdir / "checkpoints"

    def long_call(self, at_most_s: float = LONG_CALL_S) -> AbstractContextManager[None]:
        """Tick while the block runs, for so long at most."""
        return ticking(self.tick, at_most_s)

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write arrays as an npz file of the run directory."""
        with replace_file(self.workdir / name) as file:
            np.savez(file, allow_pickle=False, **arrays)
