"""What the sweeps of one cluster tell each other, and who goes first: pure values and rules.

Every second a driver leaves a Claim where the others find it: how important its sweep is, what it waits for, and what
it holds. Who is less important than a sweep that waits asks for no new place on nodes that could serve that one; and
gangs of a sweep that is preemptible make way. Each driver decides about its own gangs alone, all by the same rules.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from uuid import uuid4

from runner.errors import Kind
from runner.life.capacity import Node, count_slots, gangs_on
from runner.life.states import Run, State
from runner.spec.gang import Gang, parse_gang

FORMAT = 1
SILENT_S = 30.0  # without a new beat of a driver: its claim ends
PATIENCE_S = 3.0  # that a gang waits before others make way for it: free room is given in less
SETTLE_S = 5.0  # after a gang has made way, for whom it did so to take the place and to say so


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A gang that has its place."""

    run: str
    nodes: tuple[str, ...]  # ids
    age_s: float
    is_leaving: bool = False  # its place is about to be free


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What one sweep says of itself; times are seconds ago, so that no two clocks need to agree."""

    driver: str  # tells two drivers apart
    sweep: str
    priority: int
    preemptible: bool
    gang: Gang
    waits_s: tuple[float, ...] = ()  # for how long each gang that could be placed has asked for it
    held: tuple[Held, ...] = ()
    gave_s: float | None = None  # since a gang of it made way; None: none did, or it is placed again

    @property
    def words(self) -> str:
        """The sweep in a sentence."""
        return f"sweep {self.sweep} with priority {self.priority}"

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Claim:
        """Return the claim that another driver left. Raises ValueError, TypeError or KeyError if it is none of ours."""
        if plain["format"] != FORMAT:
            raise ValueError(f"format {plain['format']}")
        return cls(
            driver=str(plain["driver"]), sweep=str(plain["sweep"]), priority=int(plain["priority"]),
            preemptible=bool(plain["preemptible"]), gang=parse_gang(plain["gang"]),
            waits_s=tuple(float(seconds) for seconds in plain["waits_s"]),
            held=tuple(Held(**{**held, "nodes": tuple(held["nodes"])}) for held in plain["held"]),
            gave_s=None if plain["gave_s"] is None else float(plain["gave_s"]),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Return plain values from which `from_json` makes the same claim."""
        return {"format": FORMAT, **dataclasses.asdict(self)}


def claim_of(
    runs: Iterable[Run], gang: Gang, now: float, *, driver: str, sweep: str, priority: int, preemptible: bool
) -> Claim:
    """Return what a sweep says of itself: runs that are held back wait too, but nobody makes way for them yet."""
    waits, held, gave = [], [], []
    for run in runs:
        if run.state is State.QUEUED and not run.is_cancelled and not run.is_releasing:
            waits += [now - run.asked_at] if run.has_group else [0.0] * bool(run.held_back)
        if run.holds_place:
            is_leaving = run.is_stopping or run.is_releasing or run.state in (State.COMMITTING, State.TEARDOWN)
            held.append(
                Held(
                    run=run.key.name, nodes=(run.node_id, *run.peers), age_s=now - run.placed_at, is_leaving=is_leaving
                )
            )
        elif run.failure is not None and run.failure.kind is Kind.PREEMPTED and not run.is_final:
            gave.append(now - run.since)
    return Claim(
        driver=driver, sweep=sweep, priority=priority, preemptible=preemptible, gang=gang, waits_s=tuple(waits),
        held=tuple(held), gave_s=min(gave, default=None),
    )  # fmt: skip


def reserve(own: Claim, others: Iterable[Claim], nodes: Sequence[Node]) -> dict[str, Claim]:
    """Return node id -> the most important sweep that goes first there, because a gang of it waits for such a node."""
    found: dict[str, Claim] = {}
    for claim in by_priority(others):
        if claim.priority > own.priority and claim.waits_s and count_slots(nodes, claim.gang):
            for node in nodes:
                if gangs_on(node, claim.gang):
                    found.setdefault(node.node_id, claim)
    return found


def by_priority(claims: Iterable[Claim]) -> list[Claim]:
    """Return claims, the most important first, in an order that every driver sees alike."""
    return sorted(claims, key=lambda claim: (-claim.priority, claim.driver))


def choose_leavers(
    claims: Sequence[Claim], nodes: Sequence[Node], free: Mapping[str, Mapping[str, float]]
) -> dict[tuple[str, str], Claim]:
    """Return (driver, run) of each gang that is to make way -> for whom: no more than help, the newest first.

    claims: of all sweeps. free: node id -> what nobody holds. A gang that waits and finds free room needs nobody's.
    """
    is_settling = any(claim.gave_s is not None and claim.gave_s < SETTLE_S for claim in claims)
    if is_settling or not free:  # who waits may have got that place, and not said so yet; or the cluster cannot tell
        return {}
    left = {node.node_id: dict(free.get(node.node_id, {})) for node in nodes}
    for claim in claims:
        for held in claim.held:
            if held.is_leaving:
                add_share(left, claim.gang, held.nodes)
    found: dict[tuple[str, str], Claim] = {}
    for claim in by_priority(claims):
        for _ in [waited_s for waited_s in claim.waits_s if waited_s >= PATIENCE_S]:
            victims = [
                (other, held)
                for other in claims
                for held in other.held
                if other.preemptible and other.priority < claim.priority and not held.is_leaving
                and (other.driver, held.run) not in found
            ]  # fmt: skip
            victims.sort(key=lambda victim: (victim[0].priority, victim[1].age_s))
            place = find_place(claim.gang, nodes, left, victims)
            if place is None:
                break
            chosen, where = place
            for other, held in chosen:
                found[other.driver, held.run] = claim
                add_share(left, other.gang, held.nodes)
            add_share(left, claim.gang, where, times=-1)
    return found


Victim = tuple[Claim, Held]


def find_place(
    gang: Gang, nodes: Sequence[Node], left: Mapping[str, Mapping[str, float]], victims: Sequence[Victim]
) -> tuple[list[Victim], list[str]] | None:
    """Return who must go for a gang to fit, and on which nodes it then fits; None where nothing helps.

    victims: in the order in which they go.
    """
    options: list[tuple[int, int, str, list[Victim]]] = []
    for order, node in enumerate(nodes):
        if not gangs_on(node, gang):
            continue
        here = {node.node_id: dict(left.get(node.node_id, {}))}
        chosen: list[Victim] = []
        on_node = (victim for victim in victims if node.node_id in victim[1].nodes)
        while not fits(here[node.node_id], gang) and (victim := next(on_node, None)) is not None:
            chosen.append(victim)
            add_share(here, victim[0].gang, (node.node_id,))
        if fits(here[node.node_id], gang):
            last = max((victims.index(victim) for victim in chosen), default=-1)
            options.append((len(chosen), last * len(nodes) + order, node.node_id, chosen))
    options.sort(key=lambda option: option[:2])
    if len(options) < gang.hosts:
        return None
    taken = options[: gang.hosts]
    whole = {(victim[0].driver, victim[1].run): victim for *_, chosen in taken for victim in chosen}
    return list(whole.values()), [node_id for _, _, node_id, _ in taken]


def fits(left: Mapping[str, float], gang: Gang) -> bool:
    """Return whether a share of a gang fits into what is left on a node."""
    return all(left.get(name, 0.0) >= amount for name, amount in gang.share.items())


def add_share(left: dict[str, dict[str, float]], gang: Gang, nodes: Iterable[str], *, times: int = 1) -> None:
    """Add what a gang holds on each of nodes to what is left there."""
    for node_id in nodes:
        if node_id in left:
            for name, amount in gang.share.items():
                left[node_id][name] = left[node_id].get(name, 0.0) + times * amount


class Store(Protocol):
    """Where claims are left: something of the cluster's that every driver reaches and that keeps no process alive."""

    def put(self, name: str, content: bytes) -> None:
        """Leave content under name, replacing what was there."""

    def read(self) -> Mapping[str, bytes]:
        """Return everything that was left, by name."""

    def remove(self, name: str) -> None:
        """Take away what was left under name."""

    def free(self) -> Mapping[str, Mapping[str, float]]:
        """Return what nobody holds, by node id."""


class Board:
    """A driver's view of the other drivers' claims; one whose beat stands still for SILENT_S is dead and taken away."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.store, self.clock = store, clock
        self.name, self.beat = uuid4().hex, 0
        self.heard: dict[str, tuple[object, float]] = {}  # driver -> its newest beat, and when that was first seen

    def exchange(self, claim: Claim) -> tuple[Claim, ...]:
        """Leave this sweep's claim and return those of the others that live; what does not fit is nobody's claim."""
        self.beat += 1
        self.store.put(self.name, json.dumps({**claim.to_json(), "beat": self.beat}).encode())
        found, heard = [], {}
        for name, content in self.store.read().items():
            if name == self.name:
                continue
            try:
                plain = json.loads(content)
                other, beat = Claim.from_json(plain), plain["beat"]
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # of another version, or somebody else's
            now = self.clock()
            before = self.heard.get(name)
            heard[name] = before if before is not None and before[0] == beat else (beat, now)
            if now - heard[name][1] > SILENT_S:
                self.store.remove(name)  # a driver that was only suspended leaves it again
            else:
                found.append(other)
        self.heard = heard
        return tuple(found)

    def free(self) -> Mapping[str, Mapping[str, float]]:
        """Return what nobody holds, by node id."""
        return self.store.free()

    def close(self) -> None:
        """Take this sweep's claim away."""
        self.store.remove(self.name)
