"""What the stages of one seed share: configuration, gang, run directory and the callbacks of whoever started it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.config import RunConfig
from model.distributed import Dist
from model.files.atomic import FULL, replace_file
from model.kernels.pace import LONG_CALL_S, ticking
from model.pipeline.records import StageRecord
from model.quant.artifact import ArtifactReader
from model.report import Report

FINE = "fine"


class Donor(NamedTuple):
    """A run whose finished stage may be taken over.

    read(name) returns the bytes of a file of its run directory. folder is that directory, None where it lies on an
    object store.
    """

    name: str
    read: Callable[[str], bytes]
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What a driver adds when it sends a gang to a seed.

    repeat: which of several runs of the seed this is. hashes: config_hash, data_hash and code_hash as the driver has
    them, as far as it does; every rank must agree. donors: by stage, a run that may have finished the same computation.
    attach(stage) is called on rank 0 at a stage's end, and returns the names of further files of the run directory that
    become outputs of the stage. fetch(name, sha256): where each host has a run directory of its own, brings a file of
    rank 0's into this host's, or raises OSError or ValueError; None on every rank where all of them see one directory.
    """

    repeat: int = 0
    hashes: Mapping[str, str | None] = field(default_factory=dict)
    donors: Mapping[str, Donor] = field(default_factory=dict)
    attach: Callable[[str], Sequence[str]] = lambda _stage: ()
    fetch: Callable[[str, str], None] | None = None


NO_ORDERS = Orders()


@dataclass(slots=True)
class Run:
    """One seed at work: what every stage needs. What is known of the run directory is so on rank 0, which alone writes.

    attention: the kernel that an earlier attempt trained with. is_changed: code or surroundings are not those of the
    attempt before, and that was allowed; is_mixed: that was so once. is_listed: run.json names this attempt.
    records: the stages that are finished.
    """

    config: RunConfig
    dist: Dist
    workdir: Path
    report: Report
    should_stop: Callable[[], bool] = lambda: False
    on_write: Callable[[Path], None] = lambda _path: None
    uses_checkpoints: bool = True
    tick: Callable[[], None] = lambda: None  # hears that this rank got further, with nothing to show
    orders: Orders = NO_ORDERS
    hashes: dict[str, str] = field(default_factory=dict)
    surroundings: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    is_changed: bool = False
    is_mixed: bool = False
    is_listed: bool = False
    records: dict[str, StageRecord] = field(default_factory=dict)
    file_hashes: dict[str, str] = field(default_factory=dict)  # sha256 by absolute path, as far as known
    written: dict[str, str] = field(default_factory=dict)  # sha256 of new outputs by name, where writing them told
    artifacts: ArtifactReader = field(default_factory=ArtifactReader)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints inside training."""
        return self.workdir / "checkpoints"

    def long_call(self, at_most_s: float = LONG_CALL_S) -> AbstractContextManager[None]:
        """Tick while the block runs, for so long at most."""
        return ticking(self.tick, at_most_s)

    @property
    def is_fetching(self) -> bool:
        """Whether this rank brings rank 0's files to its host: the first on each further host with a directory."""
        return self.orders.fetch is not None and self.dist.local_rank == 0 and not self.dist.is_main

    def bring(self, files: Mapping[str, str]) -> None:
        """Let every host have these files before its ranks read them; all ranks call it.

        files: sha256 by name in the run directory, of files that rank 0 has told of; only rank 0's are looked at.
        Raises RuntimeError on every rank if one of them cannot have a file; a disk that is full says so itself.
        """
        if self.orders.fetch is None:
            return
        wanted: dict[str, str] = json.loads(self.dist.gather_text(json.dumps(files))[0])
        error = self._fetch_all(self.orders.fetch, wanted) if self.is_fetching else None
        problem = f"rank {self.dist.rank} cannot have what rank 0 has written: {error_line(error)}" if error else FINE
        problems = [text for text in self.dist.gather_text(problem) if text != FINE]
        if isinstance(error, OSError) and error.errno in FULL:
            raise error
        if problems:
            raise RuntimeError(problem if error else f"a peer cannot go on: {problems[0]}")

    def _fetch_all(self, fetch: Callable[[str, str], None], wanted: Mapping[str, str]) -> Exception | None:
        """Fetch files by their sha256; return what went wrong with the first that cannot be had."""
        with self.long_call():
            for name, sha256 in wanted.items():
                try:
                    fetch(name, sha256)
                except (OSError, ValueError) as error:
                    return error
        return None

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Write arrays as an npz file of the run directory."""
        with replace_file(self.workdir / name) as file:
            np.savez(file, allow_pickle=False, **arrays)


def error_line(error: Exception) -> str:
    """Return an error in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
