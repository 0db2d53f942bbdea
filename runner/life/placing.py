"""Which node a gang should best go to: seeds of a sweep on one model of GPU, repeats of a seed on different nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from runner.life.capacity import Node, count_slots, gangs_on
from runner.life.states import Run
from runner.spec.gang import Gang


def best_node(
    run: Run, runs: Sequence[Run], nodes: Sequence[Node], gang: Gang, *, busy: Mapping[str, int], has_repeats: bool
) -> str:
    """Return the id of the node where a gang would best be, or nothing where one is as good as another.

    Of several models of GPU that on which the run began, else the sweep's; then away from its seed's other repeats.
    busy: node id -> gangs of this sweep that are there, or would best be.
    """
    is_mixed = gang.gpus > 0 and len({node.accelerator for node in nodes}) > 1
    if not (is_mixed or has_repeats):
        return ""
    if is_mixed:
        names = (run.accelerator, accelerator_of_sweep(runs, nodes, gang))
        alike = next((found for name in names if name and (found := named(name, nodes))), [])
        roomy = [node for node in alike if busy.get(node.node_id, 0) < gangs_on(node, gang)]
        nodes = roomy or alike
    if has_repeats:
        same = (run.key.variant, run.key.seed)
        siblings = {
            other.node_id for other in runs if (other.key.variant, other.key.seed) == same and other.key != run.key
        }
        apart = [node for node in nodes if node.node_id not in siblings]
        nodes = apart or (nodes if is_mixed else [])
    return min(nodes, key=lambda node: busy.get(node.node_id, 0)).node_id if nodes else ""


def accelerator_of_sweep(runs: Iterable[Run], nodes: Sequence[Node], gang: Gang) -> str:
    """Return Ray's name for the GPUs that a sweep is on: those of the gang that was placed first.

    Before there is one, those on which the most gangs find room. "" on CPUs, and where Ray names none.
    """
    if not gang.gpus:
        return ""
    placed = min((run for run in runs if run.accelerator), key=lambda run: run.placed_at, default=None)
    if placed is not None:
        return placed.accelerator
    kinds = sorted({node.accelerator for node in nodes} - {""})
    return max(kinds, key=lambda kind: count_slots(named(kind, nodes), gang), default="")


def named(accelerator: str, nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes whose GPUs Ray calls so."""
    return [node for node in nodes if node.accelerator == accelerator]


def gang_now(gang: Gang, runs: Iterable[Run], nodes: Sequence[Node]) -> Gang:
    """Return the gang that is asked for: with gang.same_gpu only on GPUs of the sweep's model."""
    return gang.on_gpus(accelerator_of_sweep(runs, nodes, gang)) if gang.same_gpu else gang
