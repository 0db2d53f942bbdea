"""What to do next: pure decisions over all runs of a sweep.

`decide` reads the runs and the situation and returns commands; `apply_command` is what giving a command makes of a run.
The scheduler's loop applies events (states.apply_event), asks here, and hands the commands to a backend.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from runner.errors import Failure, Kind
from runner.life.capacity import Node, count_slots, gangs_on
from runner.life.placing import best_node
from runner.life.sharing import Sharing
from runner.life.states import ALIVE, FINAL, Idle, Run, State, drained, enter, made_way, node_id_of, with_files
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey

MOVE_S = 30.0  # for a checkpoint before a node goes; under a Ray job too, which ends no sooner for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """Everything outside the runs that a decision depends on."""

    now: float
    gang: Gang
    limits: Limits
    slots: int  # gangs that fit on the cluster as it is
    nodes: tuple[Node, ...] = ()
    grace_s: float = 30.0  # from stop to kill
    has_repeats: bool = False
    infeasible: str = ""  # no node can hold a gang, and the time to wait for one is over
    cancelled: frozenset[RunKey] = field(default_factory=frozenset)  # runs that a person wants to end
    sharing: Sharing = field(default_factory=Sharing)
    reserved: Mapping[str, str] = field(default_factory=dict)  # node id -> the sweep that goes first there, in words
    leavers: Mapping[RunKey, str] = field(default_factory=dict)  # runs that make way -> for which sweep, in words
    has_news: bool = True  # what runs wait for may have changed since the last decisions


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """Something the backend is to do for one run."""

    key: RunKey
    group: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit(Command):
    """Ask for a place for a gang."""

    prefer: str = ""  # node id
    avoid: tuple[str, ...] = ()  # node ids
    require: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> values, one of which its nodes have


@dataclass(frozen=True, kw_only=True, slots=True)
class Start(Command):
    """Start the ranks of a placed gang."""

    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop(Command):
    """Ask the ranks to stop at the next step and to leave a checkpoint; is_move: to go on elsewhere, or later."""

    is_move: bool = False
    yields: str = ""  # for whom


@dataclass(frozen=True, kw_only=True, slots=True)
class Release(Command):
    """Kill the ranks and remove the group; failure, if any, is why."""

    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Commit(Command):
    """Write the results of a finished attempt; its group is gone already."""

    attempt: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Give(Command):
    """Change a run that has no group, without the backend: requeue it, cancel it, call it infeasible."""

    state: State


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait(Command):
    """Change what a run that holds nothing is said to wait for, "" for a place."""

    words: str
    held_back: bool = False  # by a sweep of higher priority


def decide(runs: Mapping[RunKey, Run], situation: Situation) -> list[Command]:
    """Return the commands that the situation calls for, runs in the order of the spec, new gangs last."""
    commands: list[Command] = []
    waiting: list[Run] = []
    for run in runs.values():
        if run.state in FINAL:
            continue
        is_waiting = wants_group(run, situation)
        # only room decides about a run that merely waits, and a sweep may have a thousand of them
        command = None if is_waiting and not situation.cancelled else decide_one(run, situation)
        if command is not None:
            commands.append(command)
        elif is_waiting:
            waiting.append(run)
    return commands + decide_places(waiting, runs, situation)


def decide_places(waiting: list[Run], runs: Mapping[RunKey, Run], situation: Situation) -> list[Command]:
    """Return a request for a place for as many runs as there is room for, and what the others wait for.

    Runs that need a stage which another gang is computing leave the room to those behind them.
    """
    sharing = situation.sharing
    room = most_groups(situation.slots, situation.limits) - sum(run.has_group for run in runs.values())
    if not sharing:
        room = max(0, room)
        unheld = [Wait(key=run.key, group=run.group, words="") for run in waiting[room:] if run.held_back]
        return [*unheld, *ask(waiting[:room], runs, situation)]
    if room <= 0 and not situation.has_news:
        return []
    commands: list[Command] = []
    chosen: list[Run] = []
    claims = sharing.claims(runs.values())
    for run in sharing.in_order(waiting):
        blocker = sharing.blocker(run.key, claims)
        words = blocker.words if blocker is not None else ""
        if blocker is None and room > 0:
            room -= 1
            sharing.claim(run.key, claims)
            chosen.append(run)
        elif words != run.waits_for:
            commands.append(Wait(key=run.key, group=run.group, words=words))
    return commands + ask(chosen, runs, situation)


def ask(chosen: Sequence[Run], runs: Mapping[RunKey, Run], situation: Situation) -> list[Command]:
    """Return a request for a place for each of chosen, or what holds it back."""
    words = held_back(situation) if chosen else ""
    if words:
        waits = (Wait(key=run.key, group=run.group, words=words, held_back=True) for run in chosen)
        return [wait for wait, run in zip(waits, chosen) if run.waits_for != words]
    busy = Counter(run.node_id or run.prefer for run in runs.values() if run.has_group) if chosen else Counter()
    commands: list[Command] = []
    for run in chosen:
        command = place(run, runs.values(), situation, busy)
        busy[command.prefer] += 1
        commands.append(command)
    return commands


def most_groups(slots: int, limits: Limits) -> int:
    """Return how many gangs may have a place, or have asked for one, at once.

    Without max_gangs one more than there are slots: it is placed as soon as something is free, and shows an autoscaler
    what is missing. Where nodes may still come (wait_s), max_gangs alone decides how many are asked for.
    """
    if limits.max_gangs is None:
        return slots + 1
    return limits.max_gangs if limits.wait_s else min(limits.max_gangs, slots + 1)


def held_back(situation: Situation) -> str:
    """Return why no gang may ask for a place though nodes could hold it: a sweep goes first on all of them."""
    if not situation.reserved or not situation.slots:
        return ""
    able = [node for node in situation.nodes if gangs_on(node, situation.gang)]
    if count_slots([node for node in able if node.node_id not in situation.reserved], situation.gang):
        return ""
    first = next(situation.reserved[node.node_id] for node in able if node.node_id in situation.reserved)
    return f"waits: {first} waits for a place"


def decide_one(run: Run, situation: Situation) -> Command | None:
    """Return the command for one run that needs no look at the others."""
    is_cancelled = run.is_cancelled or run.key in situation.cancelled
    if not run.has_group:
        return decide_without_group(run, is_cancelled, situation)
    if run.is_releasing:
        return None
    if run.state in (State.COMMITTING, State.TEARDOWN):
        return Release(key=run.key, group=run.group, failure=run.failure)
    if run.state is State.QUEUED:  # its group waits for room; no limit runs before it has some
        is_late = is_kept_out(run, situation) or is_outdated(run, situation)
        is_withdrawn = is_cancelled or situation.infeasible or is_late
        return Release(key=run.key, group=run.group) if is_withdrawn else None
    if is_cancelled and run.state in ALIVE:
        return decide_stop(run, situation)
    if run.yields or run.key in situation.leavers:
        return decide_yield(run, run.yields or situation.leavers[run.key], situation)
    if run.state is State.PLACED:
        return Start(key=run.key, group=run.group, attempt=run.attempt)
    failure = overdue(run, situation)
    if failure is not None:
        return Release(key=run.key, group=run.group, failure=failure)
    return decide_move(run, situation) if run.leaves else None


def is_kept_out(run: Run, situation: Situation) -> bool:
    """Return whether a waiting group was told to avoid every node that could hold it: the others are gone."""
    if not run.avoid:
        return False
    left = {node.node_id for node in situation.nodes if gangs_on(node, situation.gang)} - {*run.avoid}
    return len(left) < situation.gang.hosts and {*nodes_to_avoid(run, situation)} < {*run.avoid}


def is_outdated(run: Run, situation: Situation) -> bool:
    """Return whether a waiting group avoids other nodes than it should by now, and is to be asked for anew."""
    reserved = {*situation.reserved}
    return not reserved <= {*run.avoid} <= {*reserved, *run.bad_nodes}


def decide_without_group(run: Run, is_cancelled: bool, situation: Situation) -> Command | None:
    """Return the command for a run that holds nothing, apart from asking for a place."""
    if run.state is State.COMMITTING:
        return None if run.is_committing else Commit(key=run.key, group=run.group, attempt=run.attempt)
    if is_cancelled:
        return Give(key=run.key, group=run.group, state=State.CANCELLED)
    if run.state is State.RETRY_WAIT and situation.now >= run.not_before:
        return Give(key=run.key, group=run.group, state=State.QUEUED)
    if situation.infeasible and run.state in (State.PLANNED, State.QUEUED):
        return Give(key=run.key, group=run.group, state=State.INFEASIBLE)
    return Give(key=run.key, group=run.group, state=State.QUEUED) if run.state is State.PLANNED else None


def decide_stop(run: Run, situation: Situation) -> Command | None:
    """Return the command for a gang that is to end: training may leave a checkpoint, nothing else has one to leave."""
    if run.state is not State.TRAIN:
        return Release(key=run.key, group=run.group)
    if not run.is_stopping:
        return Stop(key=run.key, group=run.group)
    return Release(key=run.key, group=run.group) if situation.now >= run.stop_by else None


def decide_move(run: Run, situation: Situation) -> Command | None:
    """Return the command for a gang whose node is being drained: what has no checkpoint to leave goes on to its end."""
    if run.state is not State.TRAIN or situation.limits.restart != "checkpoint":
        return None
    if not run.is_stopping:
        return Stop(key=run.key, group=run.group, is_move=True)
    return Release(key=run.key, group=run.group, failure=drained(run)) if situation.now >= run.stop_by else None


def decide_yield(run: Run, words: str, situation: Situation) -> Command | None:
    """Return the command for a gang that makes way for another sweep: training may leave a checkpoint first."""
    failure = made_way(words)
    if run.state is not State.TRAIN:  # finished stages are kept; the one at work has nothing to leave
        return Release(key=run.key, group=run.group, failure=failure)
    if not run.is_stopping:
        return Stop(key=run.key, group=run.group, is_move=True, yields=words)
    return Release(key=run.key, group=run.group, failure=failure) if situation.now >= run.stop_by else None


def overdue(run: Run, situation: Situation) -> Failure | None:
    """Return the failure of a gang that has taken too long for something, or None."""
    limits, now = situation.limits, situation.now
    if limits.seed_s is not None and now - run.placed_at > limits.seed_s:
        return Failure(
            kind=Kind.TIMEOUT, message=f"attempt took longer than limits.seed_s={limits.seed_s:g}", node=run.node
        )
    if run.state is State.STARTING and run.phase in ("", "start"):  # rendezvous and preflight included
        if now - run.placed_at <= limits.start_s:
            return None
        return Failure(
            kind=Kind.START, message=f"not ready after limits.start_s={limits.start_s:g}", node=run.node,
            advice="raise it if imports or the network are slow there",
        )  # fmt: skip
    if run.silent_s > limits.heartbeat_s and run.lost:
        return Failure(
            kind=Kind.NODE_LOST, node=node_name(run, run.lost, situation), node_id=run.lost,
            message=f"the node went away: no heartbeat for {run.silent_s:.0f} s, and nothing answers there",
        )  # fmt: skip
    if run.silent_s > limits.heartbeat_s:
        is_named = run.idle is not None and run.idle.rank == run.silent_rank
        return Failure(
            kind=Kind.STALLED, rank=run.silent_rank,
            node=node_name(run, node_id_of(run, run.silent_rank), situation),
            at=run.idle.where if run.idle is not None and is_named else "",
            message=f"no heartbeat for {run.silent_s:.0f} s (limits.heartbeat_s={limits.heartbeat_s:g})",
            advice="its process is stopped, or its node too busy to answer",
        )  # fmt: skip
    idle = run.idle or Idle(rank=0, where=f"{run.phase or 'start'} step {run.step}", since=run.progress_at)
    if now - idle.since > limits.stall_s:
        rank = idle.rank if run.idle is not None else None
        return Failure(
            kind=Kind.STALLED, rank=rank, node=node_name(run, node_id_of(run, rank), situation), at=idle.where,
            message=f"no progress for {now - idle.since:.0f} s (limits.stall_s={limits.stall_s:g})",
            advice="the stacks say where each rank stood; raise limits.stall_s if it was only slow",
        )  # fmt: skip
    return None


def node_name(run: Run, node_id: str, situation: Situation) -> str:
    """Return the name of one node of a gang, of all where that is not known."""
    return next((node.name for node in situation.nodes if node.node_id == node_id), run.node)


def wants_group(run: Run, situation: Situation) -> bool:
    """Return whether a run waits for a place and has not asked for one."""
    return run.state is State.QUEUED and not (run.has_group or run.is_cancelled or situation.infeasible)


def place(run: Run, runs: Iterable[Run], situation: Situation, busy: Mapping[str, int] | None = None) -> Submit:
    """Return the request for a place: away from nodes that failed it, and from its seed's other repeats; alike GPUs.

    busy: node id -> gangs of this sweep that are there, or would best be.
    """
    gang, avoid = situation.gang, nodes_to_avoid(run, situation)
    good = [node for node in situation.nodes if gangs_on(node, gang) and node.node_id not in avoid]
    best = best_node(run, list(runs), good, gang, busy=busy or {}, has_repeats=situation.has_repeats)
    prefer = best if gang.hosts == 1 else ""  # Ray takes a wish for gangs on one node alone
    return Submit(key=run.key, group=run.group + 1, prefer=prefer, avoid=avoid, require=gang.require)


def nodes_to_avoid(run: Run, situation: Situation) -> tuple[str, ...]:
    """Return the ids of the nodes that have failed a run, and of those where other sweeps go first.

    Where too few nodes are left, those that failed it are taken again: any is better than none.
    """
    gang, reserved = situation.gang, situation.reserved
    able = [node.node_id for node in situation.nodes if gangs_on(node, gang) and node.node_id not in reserved]
    failed = tuple(node_id for node_id in able if node_id in run.bad_nodes)
    return (*(failed if len(able) - len(failed) >= gang.hosts else ()), *reserved)


def apply_command(run: Run, command: Command, situation: Situation) -> Run:
    """Return run once command was given."""
    now = situation.now
    match command:
        case Submit():
            return replace(
                run, has_group=True, group=command.group, is_releasing=False, node="", node_id="", waits_for="",
                held_back=False, asked_at=now, prefer=command.prefer, avoid=command.avoid,
            )  # fmt: skip
        case Start():
            return enter(run, State.STARTING, now)
        case Stop():
            grace_s = max(situation.grace_s, MOVE_S) if command.is_move else situation.grace_s
            is_cancelled = not command.is_move
            return replace(
                run, is_stopping=True, is_cancelled=is_cancelled, stop_by=now + grace_s, yields=command.yields
            )
        case Release():
            is_cancelled = run.is_cancelled or run.key in situation.cancelled
            run = replace(run, is_releasing=True, is_cancelled=is_cancelled)
            if run.state in ALIVE:
                failure = with_files(run, command.failure) if command.failure is not None else run.failure
                run = replace(enter(run, State.TEARDOWN, now), failure=failure)
            return run
        case Commit():
            return replace(run, is_committing=True)
        case Give():
            return replace(enter(run, command.state, now), not_before=0.0, waits_for="", held_back=False)
        case Wait():
            return replace(run, waits_for=command.words, held_back=command.held_back)
    return run
