"""What can go wrong in a sweep, as one small tree; everything here travels between processes unchanged.

    SweepError
      Infeasible        no node can ever hold one gang          (exit 2)
      DirectoryInUse    another driver owns the run directory   (exit 2)
        Superseded      it took the directory over meanwhile    (exit 3)
      Refused           the run directory belongs to another config, data set or code (exit 2)
    Failure             why one attempt of one seed ended; a value, not an exception

All but Failure are ValueErrors, because the person at the keyboard can mend them.
"""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = range(4)  # of every command
NO_ROOM = "NoRoomError"  # the name of the exception of a node that waited for room on its disk in vain


class SweepError(ValueError):
    """A sweep cannot start or go on; the message is one line that says what to change."""

    exit_code = EXIT_BAD_INPUT


class Infeasible(SweepError):
    """A gang asks for more than the nodes have, each for its share of the ranks."""


class DirectoryInUse(SweepError):
    """Another live driver holds the lease of the run directory."""


class Refused(SweepError):
    """The run directory was made by another configuration, data set or code."""


class Superseded(DirectoryInUse):
    """Another driver has taken the run directory over; this one, or its gang, stops."""

    exit_code = EXIT_INTERRUPTED


class Kind(StrEnum):
    """The nature of a failure; it decides who pays for the attempt and whether another one follows."""

    RAISED = "raised"  # a rank raised an exception
    USER = "user"  # a rank raised ValueError: the same input would fail again
    DIED = "died"  # a rank's process ended without a word
    STALLED = "stalled"  # no progress, or no heartbeat
    TIMEOUT = "timeout"  # a limit of the spec ran out
    NODE_LOST = "node_lost"  # the node went away: a preemption, not an attempt
    PREEMPTED = "preempted"  # it made way for a sweep of higher priority: a preemption, not an attempt
    START = "start"  # the gang never became ready
    PREFLIGHT = "preflight"  # the node is not fit: busy GPUs, other versions, no data
    COMMIT = "commit"  # results could not be written
    DISK = "disk"  # no room on a disk; tried again once, and the next attempt waits for room first


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The root cause of a failed attempt: which rank, where, what, what to do, and the end of its log."""

    kind: Kind
    message: str  # one line
    at: str = ""  # phase and step of the rank
    advice: str = ""  # what to do about it, where the message does not say so
    files: tuple[str, ...] = ()  # where to look, from the sweep's folder: the rank's log, its stacks
    rank: int | None = None
    node: str = ""
    node_id: str = ""  # of a node that went away
    error_type: str = ""
    traceback: str = ""
    log_tail: str = ""
    others: tuple[str, ...] = field(default=())  # one line per further rank that failed too

    def to_json(self) -> dict[str, Any]:
        """Return plain values for state.json and the events."""
        return dataclasses.asdict(self)

    @property
    def one_line(self) -> str:
        """Return the cause as a person wants to read it: rank, node, what happened where, what to do, where to look.

        The same line in the job's log, in `status`, in the events and in the table.
        """
        where = "" if self.rank is None else f"rank {self.rank}"
        if self.node:
            where = f"{where} on {self.node}" if where else f"node {self.node}"
        what = f"{self.error_type}: {self.message}" if self.error_type else self.message
        if self.at and self.kind is not Kind.USER:
            what = f"{what}, at {self.at}"
        parts = [
            f"{where}: {what}" if where else what,
            self.advice,
            f"look at {', '.join(self.files)}" * bool(self.files),
        ]
        return "; ".join(part for part in parts if part)

    def is_same_error(self, other: Failure | None) -> bool:
        """Return whether other is the same exception with the same message, or a disk that is full still."""
        if other is not None and self.kind is other.kind is Kind.DISK:
            return True
        if other is None or not self.error_type:
            return False
        return (self.kind, self.error_type, self.message) == (other.kind, other.error_type, other.message)


def is_full(error: BaseException) -> bool:
    """Return whether an error says that a disk, or the user's share of it, has no room."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def first_line(text: str, *, limit: int = 300) -> str:
    """Return the first non-empty line of text, cut to limit characters."""
    for line in text.splitlines():
        if line.strip():
            return line.strip()[:limit]
    return ""


class OutNotShared(ValueError):
    """The sweep's folder on this node is not the driver's."""


class PreflightError(RuntimeError):
    """This node is not fit for the gang; another one may be."""


class ProgramError(RuntimeError):
    """Somebody else's program did not do what it was started for."""

    def __init__(self, message: str, *, kind: Kind = Kind.RAISED, advice: str = "", at: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.advice, self.at = kind, advice, at  # at: seconds since 1970


class NoRoomError(PreflightError):
    """The run directory's disk is full, and nobody made room in time."""
