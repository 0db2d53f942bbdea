"""What a gang is to do, the signs of life it gives, and how each of its ranks ended: plain values that travel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from secrets import token_hex
from typing import Any

from model.config import RunConfig
from runner.errors import Failure
from runner.spec.places import is_object_store
from runner.spec.program import Program
from runner.spec.sweep import RunKey

PIPELINE = "runner.gang.worker:run_pipeline"
PROGRAM = "runner.gang.program:run_program"
PROGRAM_GRACE_S = 10.0  # from SIGTERM to SIGKILL, of a program that is asked to stop


class Phase(StrEnum):
    """How far a gang is."""

    WAITING = "waiting"
    PLACED = "placed"
    GREETING = "greeting"
    OPENING = "opening"
    WORKING = "working"
    FAILING = "failing"
    OVER = "over"
    DUMPING = "dumping"
    RELEASING = "releasing"
    GONE = "gone"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything a gang needs to know about the attempt it runs; plain values, sent to every rank."""

    key: RunKey
    attempt: int
    config: RunConfig
    world_size: int
    threads: int  # of each rank
    uses_gpus: bool
    workdir: str  # local folder of the run
    out: str  # the sweep's folder or URI
    restart: str = "checkpoint"
    allow_code_change: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)  # what attempt.json says besides the node
    fetch: Mapping[str, Any] | None = None
    target: str = PIPELINE
    probe: str = ""  # a file that the driver left in OUT/probes, to be seen from every node
    disk_s: float = 0.0  # how long to wait for room on the disk
    log_bytes: int = 2 << 30  # that one log of a program may have
    donors: Mapping[str, str] = field(default_factory=dict)  # stage -> the run that has finished it for this one
    epoch: int = 0  # of the driver, its fencing number; 0: nobody else can come
    program: Program | None = None  # what to run in place of the pipeline; record has its folder's hash as code_hash
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables of the program, in no record
    grace_s: float = PROGRAM_GRACE_S
    hosts: int = 1  # over which the ranks share out evenly, in their order
    # Names this gang. Attempts are counted anew in a sweep whose folder was emptied, and nodes still have what those of
    # the same number left.
    token: str = field(default_factory=lambda: token_hex(16))

    @property
    def ranks_per_host(self) -> int:
        """Number of ranks on each host."""
        return self.world_size // self.hosts

    @property
    def is_apart(self) -> bool:
        """Whether the hosts of the gang work on disks of their own."""
        return self.hosts > 1 and is_object_store(self.out)

    def place_of(self, rank: int) -> tuple[int, int]:
        """Return on which host a rank is, and which of that host's ranks it is."""
        return divmod(rank, self.ranks_per_host)

    def log_path(self, rank: int) -> Path:
        """Return the log of one rank of this attempt; with a program, what that printed and nothing else."""
        return Path(self.workdir) / "logs" / f"attempt={self.attempt}-rank={rank}.log"

    def own_log_path(self, rank: int) -> Path:
        """Return where a rank's process says what it does; with a program, beside what that prints."""
        path = self.log_path(rank)
        return path if self.program is None else path.with_suffix(".runner.log")

    def redact(self, text: str) -> str:
        """Return text without the values of secret variables."""
        for value in self.secrets.values():
            text = text.replace(value, "***") if value else text
        return text

    def stacks_path(self, rank: int) -> Path:
        """Return where the stacks of a stalled rank go."""
        return self.log_path(rank).with_suffix(".stacks.txt")

    def end_path(self, rank: int) -> Path:
        """Return where it is noted how the process of a rank ended, if it ended before its work."""
        return self.log_path(rank).with_suffix(".end.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A sign of life: the newest progress, numbered so that the driver sees whether it is new."""

    serial: int = 0
    phase: str = ""
    step: int = 0
    total: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    idle_s: float = 0.0  # since it last got further, by its own clock: a driver that slept cannot mistake it
    waits: bool = False  # it is where it meets the other ranks, and one of them is not there yet

    @property
    def where(self) -> str:
        """The place in words."""
        return f"{self.phase or 'start'} step {self.step}"

    @property
    def excused(self) -> Beat:
        """This beat, one from before the ranks met without the time in which it got no further."""
        return replace(self, idle_s=0.0) if self.is_starting else self

    @property
    def is_starting(self) -> bool:
        """Whether the ranks have not met yet."""
        return self.phase in ("", "start")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a rank's work ended: "finished", "interrupted" or "failed"."""

    kind: str
    at: float  # seconds since 1970; the earliest failure of a gang is its root cause
    failure: Failure | None = None
