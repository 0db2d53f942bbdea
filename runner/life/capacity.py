"""Which gangs a set of nodes can hold: per node, because a sum over the cluster says yes where no host can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runner.spec.gang import Gang
from runner.spec.labels import ACCELERATOR_LABEL, NODE_ID_LABEL, shown, words

SHOWN_VALUES = 8  # of a label, in one line
HERE = "here"  # node id of this machine where no Ray gives it one


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One host of the cluster with everything it has, in use or not."""

    node_id: str
    name: str  # address
    resources: Mapping[str, float] = field(default_factory=dict)  # CPU, GPU, ...
    labels: Mapping[str, str] = field(default_factory=dict)  # as Ray has them

    @property
    def accelerator(self) -> str:
        """What Ray calls its GPUs; "" where it does not say."""
        return self.labels.get(ACCELERATOR_LABEL, "")

    def describe(self) -> str:
        """Return the node in words: '10.0.0.4: 96 CPU, 8 GPU'."""
        amounts = (f"{self.resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
        return f"{self.name}: {', '.join(amounts)}"


def gangs_on(node: Node, gang: Gang) -> int:
    """Return how many gangs, or shares of gangs over several hosts, fit on one node at the same time."""
    if not gang.matches(node.labels):
        return 0
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
    able = [node for node in nodes if gang.matches(node.labels)]
    has = "; ".join(node.describe() for node in able) or "no nodes"
    who = "no node can hold one gang" if gang.hosts == 1 else f"no {gang.hosts} nodes can hold one gang"
    others = f" ({len(nodes) - len(able)} without the labels of gang.require left out)" * (len(nodes) > len(able))
    here = "; --address names a cluster" if gang.hosts > 1 and [node.node_id for node in nodes] == [HERE] else ""
    line = f"{who}: asked for {gang.describe()}; nodes have {has}{others}{here}"
    if nodes and not able:
        line = why_no_match(nodes, gang)
    if not waited_s:
        return line
    shape = f"{gang.share}" + f" on each of {gang.hosts} nodes" * (gang.hosts > 1)
    return (
        f"{line}; none came in {waited_s:g} s: raise wait_s, or let the autoscaler have nodes of at least {shape} "
        f"(`ray status` shows what it was asked for)"
    )


def why_no_match(nodes: Sequence[Node], gang: Gang) -> str:
    """Return one line with the labels that gang.require names and no node has, and those that there are."""
    for label, values in gang.require.items():
        known = values_of(nodes, label)
        is_chosen = gang.same_gpu and label == ACCELERATOR_LABEL  # by the sweep, not by the spec
        if is_chosen and not known:
            return f"gang.same_gpu=true needs nodes with Ray's label {label}, and none has it; leave it out"
        if not known:
            has = describe_labels(nodes)
            start = f", or start nodes with `ray start --labels {label}={values[0]}`" * (
                not label.startswith("ray.io/")
            )
            fix = f"the nodes have {has}; name one of these" if has else "the nodes have no labels; leave it out"
            return f"no node has the label {shown(label)} that gang.require names: {fix}{start}"
        if not {*known} & {*values}:
            asked, have = words({label: values}), f"the nodes have {shown(label)}={', '.join(known)}"
            wait = "or set wait_s if such a node is to come"
            if is_chosen:
                return f"no node has {asked} as gang.same_gpu needs: {have}; leave it out, {wait}"
            return f"no node has {asked} as gang.require has it: {have}; ask for one of these, {wait}"
    each = "; ".join(f"{node.name} has {labels_on(node, gang)}" for node in nodes)
    return f"no node has all of gang.require ({words(gang.require)}): {each}; leave one out"


def labels_on(node: Node, gang: Gang) -> str:
    """Return what a node has of the labels that a gang requires, in words."""
    return ", ".join(f"{shown(label)}={node.labels.get(label, 'nothing')}" for label in gang.require)


def values_of(nodes: Sequence[Node], label: str) -> list[str]:
    """Return the values that nodes have for a label, sorted."""
    return sorted({node.labels[label] for node in nodes if label in node.labels})


def describe_labels(nodes: Sequence[Node]) -> str:
    """Return the labels of nodes with their values: 'accelerator=A100, H100; zone=eu'. Ids tell nothing."""
    names = sorted({label for node in nodes for label in node.labels} - {NODE_ID_LABEL}, key=shown)
    return "; ".join(f"{shown(label)}={', '.join(values_of(nodes, label)[:SHOWN_VALUES])}" for label in names)
