"""Questions to the nodes of a gang, each answered by the node itself and in its own time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from runner.gang.rank import this_host
from runner.life.job import Job
from runner.machine.gpus import query_gpus
from runner.spec.gang import Gang


@functools.cache
def as_remote(called: Callable[..., Any]) -> Any:
    """Return a function as Ray's task, or a class as Ray's actor; made anew for each use, a driver would keep all."""
    return ray.remote(called)


class Gpus(NamedTuple):
    """A gang's GPUs on one host: their ids for Ray, and their model where the driver there tells it, else ""."""

    ids: tuple[str, ...]
    model: str


class Answer(NamedTuple):
    """What nodes answer: whether all have, and what those that could have said."""

    is_there: Callable[[], bool]
    get: Callable[[], list[Any]]


def ask_nodes(question: Callable[..., object], job: Job | None, ranks: Sequence[Mapping[str, Any]]) -> Answer:
    """Ask question(job, ranks of the node) of every node that has some of ranks, which are as hello described them."""
    by_node: dict[str, list[Mapping[str, Any]]] = {}
    for facts in ranks:
        by_node.setdefault(facts["node_id"], []).append(facts)
    answers = [ask_node(question, job, node_id, found) for node_id, found in by_node.items()]
    return Answer(lambda: all(is_there() for is_there, _ in answers), lambda: collect(answers))


def ask_node(
    question: Callable[..., object], job: Job | None, node_id: str, facts: Sequence[Mapping[str, Any]]
) -> tuple[Callable[[], bool], Callable[[], Any]]:
    """Ask something of one node, here if it is this one, else in a process of its own there."""
    if facts[0]["host"] == this_host():
        future = do_aside(question, job, facts)
        return future.done, future.result
    where = NodeAffinitySchedulingStrategy(node_id, soft=False)
    ref = as_remote(question).options(num_cpus=0, scheduling_strategy=where).remote(job, facts)
    return lambda: bool(ray.wait([ref], timeout=0)[0]), lambda: ray.get(ref)


def ask_gpus(group: Any, host: int, shape: Gang) -> Any:
    """Ask, in the bundle of a gang's host, which GPUs are the gang's there; return the reference to them."""
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=host, placement_group_capture_child_tasks=False
    )
    question = as_remote(gpus_here).options(
        num_cpus=0, num_gpus=shape.share["GPU"], max_retries=0, scheduling_strategy=strategy
    )
    return question.remote()


def gpus_here() -> Gpus:
    """Return the GPUs that Ray has given to the task that calls this."""
    ids = tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", ()))
    models = [gpu.model for gpu in query_gpus(list(ids))] if ids else []
    return Gpus(ids, models[0] if models else "")


def do_aside(function: Callable[..., Any], *arguments: object) -> Future[Any]:
    """Call function in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


class Lookout:
    """Looks, aside, whether some node of a gang is gone while a rank owes its answer; lost is the id of such a node."""

    def __init__(self, find_lost: Callable[[], str]) -> None:
        self.find_lost = find_lost
        self.asked: Future[str] | None = None
        self.lost = ""

    def look(self, *, is_silent: bool) -> None:
        """Take in what the last look saw, and look again."""
        if not is_silent:
            self.lost, self.asked = "", None
        elif self.asked is None:
            self.asked = do_aside(self.find_lost)
        elif self.asked.done():
            self.lost, self.asked = self.asked.result(), None


def collect(answers: Sequence[tuple[Callable[[], bool], Callable[[], Any]]]) -> list[Any]:
    """Return the answers that are there; a node that cannot say is left out."""
    found = []
    for is_there, get in answers:
        if is_there():
            try:
                found.append(get())
            except (RayError, OSError):
                continue
    return found
