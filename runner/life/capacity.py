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
    """Return how many gangs fit on one node at the same time."""
    return min(int(node.resources.get(name, 0.0) // amount) for name, amount in gang.total.items())


def count_slots(nodes: Sequence[Node], gang: Gang) -> int:
    """Return how many gangs the cluster holds at the same time."""
    return sum(gangs_on(node, gang) for node in nodes)


def why_infeasible(nodes: Sequence[Node], gang: Gang) -> str:
    """Return one line with what was asked and what each node has, or nothing if some node can hold a gang."""
    if count_slots(nodes, gang):
        return ""
    has = "; ".join(node.describe() for node in nodes) or "no nodes"
    return f"no node can hold one gang: asked for {gang.describe()}; nodes have {has}"
