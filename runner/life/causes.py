"""Which rank of a gang is to blame: the one that failed first, or the one that all others wait for. Pure values."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from runner.errors import Failure, Kind
from runner.life.job import Beat, Outcome
from runner.life.states import Idle

# Words in errors of a rank whose peer is gone: a consequence, never the root cause.
PEER_WORDS = ("connection reset", "connection closed", "broken pipe", "socket", "gloo", "nccl", "peer", "tcpstore")
CRASH_MARKS = ("Fatal Python error:", "*** SIG")  # how faulthandler and Ray begin
# What a process still prints on its way out of an error: warnings of PyTorch's C++ part (of a process group that nobody
# destroyed, whichever error kept it from that) and of Python, the second line of which is the place they come from.
FAREWELLS = re.compile(r"(\[rank\d+\]: ?)?\[[IW]\d{3,4} [\d:.]+ \S+:\d+\]|\S+:\d+: \w*Warning: |warnings\.warn\(")
LAST_LINE_LENGTH = 160
MUTE_S = 5.0  # a healthy rank answers within a second
COLLECT_S = 1.0  # after a rank's first failure, for what else has failed already
BLAME_S = 10.0  # where all that failed say that a peer went away, for that peer to be heard


class Seen(NamedTuple):
    """A rank's newest answer, and for how long it has owed the next one."""

    beat: Beat
    unanswered_s: float = 0.0


def most_idle(
    seen: Mapping[int, Seen], now: float, *, met_at: float = -math.inf, are_told_apart: bool = True
) -> Idle | None:
    """Return for how long a gang has gone without progress, and because of which rank; None where none is at work.

    A rank is idle for as long as it says itself; one that says nothing is the heartbeat's affair, but it is the one to
    name. One that waits to meet the others is as well as they are: it counts only where all of them wait.
    are_told_apart: whether ranks get further one by one; else none is named unless it does not answer at all.
    met_at: when a rank last ended. All have met for that, so that whatever the others said before is out of date.
    """
    at_work = {rank: one for rank, one in seen.items() if not one.beat.waits}
    if not at_work:  # all wait, and nobody is missing: the last to come tells since when
        at_work = dict(sorted(seen.items(), key=lambda item: item[1].beat.idle_s)[:1])
    if not at_work:
        return None
    idle = max(at_work, key=lambda rank: at_work[rank].beat.idle_s)
    mute = max(at_work, key=lambda rank: at_work[rank].unanswered_s)
    is_mute = at_work[mute].unanswered_s > MUTE_S
    rank = mute if is_mute else idle
    return Idle(
        rank=rank if is_mute or are_told_apart else None, where=at_work[rank].beat.where,
        since=max(met_at, now - at_work[idle].beat.idle_s),
    )  # fmt: skip


def last_words(log_tail: str) -> str:
    """Return the last line of a log that has words, "" without one.

    What the handlers of a crash wrote is left out, and so are farewells, unless there is nothing else.
    """
    crash = min((place for mark in CRASH_MARKS if (place := log_tail.find(mark)) >= 0), default=-1)
    if crash >= 0:
        log_tail = log_tail[: log_tail.rfind("\n", 0, crash) + 1]
    lines = [line.strip() for line in reversed(log_tail.splitlines()) if re.search(r"\w", line)]
    told = [line for line in lines if not FAREWELLS.match(line)]
    return (told or lines or [""])[0][:LAST_LINE_LENGTH]


def choose_patience(outcomes: Iterable[Outcome]) -> float:
    """Return for how many seconds after a gang's first failure its other ranks are listened to, as things stand.

    On a busy node a rank can be heard before the one whose end it complains of: that one alone knows the cause.
    """
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    return BLAME_S if all(map(is_consequence, failures)) else COLLECT_S


def root_cause(failed: Mapping[int, Outcome], *, is_node_lost: bool) -> Failure:
    """Return the failure that came first, with those that only followed from it as further lines."""

    def order(rank: int) -> tuple[bool, float]:
        outcome = failed[rank]
        assert outcome.failure is not None, rank
        return is_consequence(outcome.failure), outcome.at

    ranks = sorted(failed, key=order)
    causes = [failure for rank in ranks if (failure := failed[rank].failure) is not None]
    first = causes[0]
    if is_node_lost:
        return Failure(kind=Kind.NODE_LOST, node=first.node, message="the node went away", log_tail=first.log_tail)
    plain = {name: getattr(first, name) for name in Failure.__dataclass_fields__}
    return Failure(**{**plain, "others": tuple(failure.one_line for failure in causes[1:])})


def is_consequence(failure: Failure) -> bool:
    """Return whether the error says that a peer went away, and nothing about this rank."""
    if failure.kind is Kind.DIED:
        return False
    text = f"{failure.error_type} {failure.message}".lower()
    return any(word in text for word in PEER_WORDS)
