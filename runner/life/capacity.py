"""Which gangs a set of nodes can hold: per node, because a sum over the cluster says yes where no host can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runner.spec.gang import Gang

HERE = "here"  # node id of this machine where no Ray gives it one


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One host of the cluster with everything it has, in use or not."""

    node_id: str
    name: str  # address
    resources: Mapping[str, float] = field(default_factory=dict)  # CPU, GPU, ...

    def describe(self) -> str:
        """Return the node in words: '10.0.0.4: 96 CPU, 8 GPU'."""
        amounts = (f"{self.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        return f"{self.name}: {', '.join(amounts)}"


def gangs_on(node: Node, gang: Gang) -> int:
    """Return how many gangs, or shares of gangs over several hosts, fit on one node at the same time."""
    return min(int(node.resources.get(name, 0.0) // amount) for name, amount in gang.share.items())


def count_slots(nodes: Sequence[Node], gang: Gang) -> int:
    """Return how many gangs the cluster holds at the same time; the shares of one gang lie on different nodes."""
    shares = [gangs_on(node, gang) for node in nodes]
    slots = sum(shares) // gang.hosts
    while sum(min(share, slots) for share in shares) < slots * gang.hosts:  # a node helps each gang once at most
        slots -= 1
    return slots


def why_infeasible(nodes: Sequence[Node], gang: Gang, *, waited_s: float = 0.0) -> str:
    """Return one line with what was asked and what each node has, or nothing if the nodes can hold a gang.

    waited_s: how long a node was waited for in vain; the line then says what to do about that.
    """
    if count_slots(nodes, gang):
        return ""
    has = "; ".join(node.describe() for node in nodes) or "no nodes"
    who = "no node can hold one gang" if gang.hosts == 1 else f"no {gang.hosts} nodes can hold one gang"
    here = "; --address names a cluster" if gang.hosts > 1 and [node.node_id for node in nodes] == [HERE] else ""
    line = f"{who}: asked for {gang.describe()}; nodes have {has}{here}"
    if not waited_s:
        return line
    shape = f"{gang.share}" + f" on each of {gang.hosts} nodes" * (gang.hosts > 1)
    return (
        f"{line}; none came in {waited_s:g} s: raise wait_s, or let the autoscaler have nodes of at least {shape} "
        f"(`ray status` shows what it was asked for)"
    )
