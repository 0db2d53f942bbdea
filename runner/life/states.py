"""The life of one run as pure values: states, what can happen to it, and what an event makes of it.

    PLANNED -> QUEUED -> PLACED -> STARTING -> TRAIN -> QUANTIZE -> EVALUATE -> TTT -> COMMITTING -> DONE
    any state that holds a gang -> TEARDOWN -> RETRY_WAIT -> QUEUED    (attempts left)
                                            -> FAILED | CANCELLED
    QUEUED -> INFEASIBLE

Nothing here waits, reads a clock or knows Ray. `apply_event(run, event, now)` is the whole transition function; every
event carries the serial number of the group it speaks of, so that the last words of a dead gang change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from runner.errors import NO_ROOM, Failure, Kind
from runner.spec.gang import Limits
from runner.spec.sweep import RunKey


class State(StrEnum):
    """Where a run stands."""

    PLANNED = "PLANNED"  # announced
    QUEUED = "QUEUED"  # waits for a gang's place
    PLACED = "PLACED"  # a node holds its bundles
    STARTING = "STARTING"  # ranks are being started
    TRAIN = "TRAIN"
    QUANTIZE = "QUANTIZE"
    EVALUATE = "EVALUATE"
    TTT = "TTT"
    COMMITTING = "COMMITTING"  # stages finished; results are being written
    TEARDOWN = "TEARDOWN"  # the gang is being killed
    RETRY_WAIT = "RETRY_WAIT"  # waits before the next attempt
    DONE = "DONE"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    INFEASIBLE = "INFEASIBLE"


WORKING = frozenset({State.TRAIN, State.QUANTIZE, State.EVALUATE, State.TTT})
ALIVE = frozenset({State.PLACED, State.STARTING, *WORKING})  # a gang is, or should be, at work
FINAL = frozenset({State.DONE, State.FAILED, State.CANCELLED, State.INFEASIBLE})

# Where a phase reported by the pipeline belongs. Unknown phases leave the state as it is.
PHASES = {
    "warmup": State.TRAIN,
    "train": State.TRAIN,
    "calibrate": State.QUANTIZE,
    "quantize": State.QUANTIZE,
    "compress": State.QUANTIZE,
    "evaluate": State.EVALUATE,
    "ttt": State.TTT,
}

# Failures that may be the node's fault; the next attempt goes elsewhere where there is an elsewhere.
NODE_FAULTS = frozenset({Kind.NODE_LOST, Kind.PREFLIGHT, Kind.START, Kind.STALLED, Kind.DIED, Kind.DISK})

CPU = "CPU"  # the device of a gang without GPUs
BACKOFF_DOUBLINGS = 16  # enough for any backoff_max_s; keeps 2**n small


@dataclass(frozen=True, kw_only=True, slots=True)
class Idle:
    """The rank of a gang that has gone without progress for longest, those left out that only wait for it."""

    rank: int | None  # None: it cannot be told which one, as no rank of somebody else's program speaks for itself
    where: str  # phase and step
    since: float  # when it last got further


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of a sweep (variant, seed, repeat), as the scheduler sees it. Times are seconds of the driver's clock."""

    key: RunKey
    state: State = State.PLANNED
    since: float = 0.0  # when it entered this state
    attempt: int = 0  # number of the latest attempt; counts every gang that got a place
    failures: int = 0  # attempts that failed for reasons of their own
    preemptions: int = 0  # attempts lost with their node, or because they made way
    asides: int = 0  # of them, those that made way for a sweep of higher priority
    group: int = 0  # serial of the placement group; 0: never had one
    has_group: bool = False
    is_releasing: bool = False  # its group is being removed
    is_committing: bool = False  # its results are being written
    is_stopping: bool = False  # its ranks were asked to stop
    is_cancelled: bool = False  # a person wants it to end
    waits_for: str = ""  # what keeps it QUEUED, besides room: a stage of another run, a sweep of higher priority
    held_back: bool = False  # it would ask for a place, but a sweep of higher priority goes first
    asked_at: float = 0.0  # when its group was asked for
    prefer: str = ""  # the id of the node where its group would best be
    yields: str = ""  # for whom its gang is to make way
    not_before: float = 0.0  # earliest time of the next attempt
    stop_by: float = 0.0  # when ranks that were asked to stop are killed
    placed_at: float = 0.0
    held_s: float = 0.0  # seconds that gangs of its earlier attempts held their places
    progress_at: float = 0.0  # when rank 0 last reported
    idle: Idle | None = None  # None until the ranks are heard of
    silent_s: float = 0.0  # longest time without an answer among its ranks
    silent_rank: int | None = None
    lost: str = ""  # the id of a node of its gang that does not answer
    leaves: str = ""  # the id of a node of its gang that is being drained
    phase: str = ""
    step: int = 0
    total: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    node: str = ""
    node_id: str = ""  # where rank 0 is
    peers: tuple[str, ...] = ()  # ids of the other nodes of a gang over several hosts
    bad_nodes: tuple[str, ...] = ()  # node ids where it was lost or failed
    avoid: tuple[str, ...] = ()  # ids of the nodes where its group may not be
    facts: Mapping[str, Any] = field(default_factory=dict)  # what the ranks said about their node
    accelerator: str = ""  # what Ray calls the GPUs of the node of its newest gang; "" where it does not say
    device: str = ""  # what its newest gang computes on: the model of its GPUs, or CPU; "" where nobody knows
    failure: Failure | None = None  # of the latest attempt
    previous: Failure | None = None  # of the attempt before

    @property
    def is_final(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.state in FINAL

    @property
    def holds_place(self) -> bool:
        """Whether a gang of it has a place on a node, at work or being removed."""
        return self.has_group and self.state is not State.QUEUED

    def gang_s(self, now: float) -> float:
        """Return the seconds that all its gangs together have held a place until now."""
        return self.held_s + (max(0.0, now - self.placed_at) if self.holds_place else 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to the group with this serial."""

    key: RunKey
    group: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed(Event):
    """All bundles of the gang have their place: on one node, or on node_id and peers."""

    node: str = ""
    node_id: str = ""
    peers: tuple[str, ...] = ()
    accelerator: str = ""  # as Ray calls the GPUs there


@dataclass(frozen=True, kw_only=True, slots=True)
class Started(Event):
    """Every rank answered; work began."""

    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(Event):
    """The newest report of a gang, and how long its quietest rank has not answered."""

    phase: str = ""
    step: int = 0
    total: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    is_news: bool = True  # rank 0 reported since the last event
    idle: Idle | None = None
    silent_s: float = 0.0
    silent_rank: int | None = None
    lost: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished(Event):
    """Every rank returned: all stages are on disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interrupted(Event):
    """The ranks stopped because they were asked to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draining(Event):
    """A node of the gang is about to go away."""

    node_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failed(Event):
    """The gang failed; or its results could not be committed."""

    failure: Failure


@dataclass(frozen=True, kw_only=True, slots=True)
class Gone(Event):
    """The group is removed; none of its processes is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed(Event):
    """The attempt's file in `runs` exists."""


def newest(metrics: Mapping[str, Any], word: str) -> tuple[str, float] | None:
    """Return name and value of the figure in a report that word, such as loss or bpb, means; None if it has none."""
    for name, value in metrics.items():
        if (name == word or name.endswith(f"_{word}")) and isinstance(value, int | float):
            return name, float(value)
    return None


def apply_event(run: Run, event: Event, now: float, limits: Limits) -> Run:
    """Return what event makes of run. Events of an older group, or of a run that is over, change nothing."""
    if event.key != run.key or event.group != run.group or run.is_final:
        return run
    match event:
        case Placed() if run.state is State.QUEUED and not run.is_releasing:
            return replace(
                enter(run, State.PLACED, now), attempt=run.attempt + 1, node=event.node, node_id=event.node_id,
                peers=event.peers, accelerator=event.accelerator, placed_at=now, progress_at=now, silent_s=0.0,
                silent_rank=None, idle=None, lost="", leaves="", yields="", phase="", step=0, total=None, metrics={},
                facts={}, previous=run.failure, failure=None,
            )  # fmt: skip
        case Started() if run.state is State.STARTING:
            return replace(run, facts=event.facts, progress_at=now, idle=None, device=event.facts.get("device", ""))
        case Progress() if run.state in WORKING or run.state is State.STARTING:
            return apply_progress(run, event, now)
        case Finished() if run.state in WORKING or run.state is State.STARTING:
            return enter(run, State.COMMITTING, now)
        case Draining() if run.state in ALIVE:
            return replace(run, leaves=event.node_id)
        case Interrupted() if run.state in ALIVE and run.leaves and not run.is_cancelled:
            return replace(enter(run, State.TEARDOWN, now), failure=drained(run))
        case Interrupted() if run.state in ALIVE and run.yields and not run.is_cancelled:
            return replace(enter(run, State.TEARDOWN, now), failure=made_way(run.yields))
        case Interrupted() if run.state in ALIVE:
            return replace(enter(run, State.TEARDOWN, now), is_cancelled=True)
        case Failed() if run.state in ALIVE or run.state is State.COMMITTING:
            return apply_fault(run, event.failure, now, limits)
        case Gone():
            return apply_gone(run, now, limits)
        case Committed() if run.state is State.COMMITTING:
            return replace(enter(run, State.DONE, now), is_cancelled=False)
    return run


def apply_progress(run: Run, event: Progress, now: float) -> Run:
    """Return run with the newest report."""
    run = replace(run, silent_s=event.silent_s, silent_rank=event.silent_rank, idle=event.idle, lost=event.lost)
    if not event.is_news:
        return run
    state = PHASES.get(event.phase, run.state)
    if state is not run.state:
        run = enter(run, state, now)
    return replace(run, phase=event.phase, step=event.step, total=event.total, metrics=event.metrics, progress_at=now)


def apply_fault(run: Run, failure: Failure, now: float, limits: Limits) -> Run:
    """Return run once its gang failed: it is judged when its group is gone, at once if it has none any more."""
    run = replace(enter(run, State.TEARDOWN, now), failure=with_files(run, failure), is_committing=False)
    return run if run.has_group else judge_attempt(run, now, limits)


def drained(run: Run) -> Failure:
    """Return why a gang leaves a node that is being drained."""
    return Failure(kind=Kind.NODE_LOST, node=run.node, node_id=run.leaves, message="a node is being drained")


def made_way(words: str) -> Failure:
    """Return why a gang ends before its work does, though nothing is wrong with it."""
    return Failure(kind=Kind.PREEMPTED, message=f"made way for {words}")


def with_files(run: Run, failure: Failure) -> Failure:
    """Return failure with the files that tell more: the log of the rank in question, the stacks if it stalled."""
    if (
        failure.files
        or failure.kind in (Kind.COMMIT, Kind.START, Kind.PREFLIGHT, Kind.PREEMPTED)
        or (not run.facts and failure.rank is None)
    ):
        return failure
    stem = f"seeds/{run.key.name}/logs/attempt={run.attempt}-rank={failure.rank or 0}"
    stacks = (f"{stem.rpartition('=')[0]}=*.stacks.txt",) if failure.kind is Kind.STALLED else ()
    return replace(failure, files=(f"{stem}.log", *stacks))


def apply_gone(run: Run, now: float, limits: Limits) -> Run:
    """Return run once its group is removed: committing goes on, a failed attempt is judged, the rest waits again."""
    run = replace(run, held_s=run.gang_s(now), has_group=False, is_releasing=False, is_stopping=False)
    if run.state is State.COMMITTING:
        return run
    if run.is_cancelled:
        return enter(run, State.CANCELLED, now)
    if run.state is State.QUEUED:  # its group went before it was placed
        return run
    failure = run.failure or Failure(kind=Kind.DIED, message="the group was removed from outside", node=run.node)
    return judge_attempt(replace(run, failure=failure), now, limits)


def judge_attempt(run: Run, now: float, limits: Limits) -> Run:
    """Return run after a failed attempt: RETRY_WAIT with its earliest time, or FAILED."""
    failure = run.failure
    assert failure is not None, run.key
    is_aside = failure.kind is Kind.PREEMPTED
    is_preemption = failure.kind is Kind.NODE_LOST or is_aside
    run = replace(
        run,
        failures=run.failures + (not is_preemption),
        preemptions=run.preemptions + is_preemption,
        asides=run.asides + is_aside,
    )
    if failure.kind in NODE_FAULTS:
        run = replace(run, bad_nodes=tuple(dict.fromkeys((*run.bad_nodes, *nodes_at_fault(run, failure)))))
    if why_give_up(run, limits):
        return enter(run, State.FAILED, now)
    tries = max(1, run.preemptions - run.asides if is_preemption else run.failures)
    wait_s = 0.0 if is_aside else min(limits.backoff_max_s, limits.backoff_s * 2 ** min(tries - 1, BACKOFF_DOUBLINGS))
    return replace(enter(run, State.RETRY_WAIT, now), not_before=now + wait_s)


def nodes_at_fault(run: Run, failure: Failure) -> tuple[str, ...]:
    """Return the ids of the nodes that a failure may be the fault of: all of the gang's where nothing says which."""
    known = failure.node_id or node_id_of(run, failure.rank)
    return (known,) if known else tuple(node_id for node_id in (run.node_id, *run.peers) if node_id)


def node_id_of(run: Run, rank: int | None) -> str:
    """Return the id of the node of one rank of a gang over several, "" where that is not known."""
    ranks = run.facts.get("ranks", ())
    return str(ranks[rank]["node_id"]) if run.peers and rank is not None and rank < len(ranks) else ""


def why_give_up(run: Run, limits: Limits) -> str:
    """Return why a failed run gets no further attempt, or nothing if it does."""
    failure = run.failure
    if failure is None or failure.kind is Kind.PREEMPTED:
        return ""
    if failure.kind is Kind.USER:
        return "the same input would fail again"
    if failure.kind is Kind.NODE_LOST:
        lost = run.preemptions - run.asides
        return f"{lost} nodes were lost" if lost > limits.preemptions else ""
    if failure.error_type == NO_ROOM:
        return "the disk is full, and room was waited for"
    if failure.is_same_error(run.previous):
        return "the same error came twice"
    return f"{run.failures} of {limits.attempts} attempts failed" if run.failures >= limits.attempts else ""


def enter(run: Run, state: State, now: float) -> Run:
    """Return run in another state, from now on."""
    return replace(run, state=state, since=now)
