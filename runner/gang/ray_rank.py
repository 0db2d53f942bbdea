"""A rank as a Ray actor, the processes that wait to become one, and what others need to see how a rank fares.

A process that waits has imported what a rank needs and done nothing else; it becomes the rank of one job and of no
second one. Beside each rank stands a small process that notes how it ended, and a signal makes it write its stacks.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from runner.errors import first_line
from runner.folder.fence import watch_drivers
from runner.gang.inquest import call_off, listen_for_stacks, start_watch
from runner.gang.rank import Rank, import_ahead, redirect_output
from runner.gang.ray_ask import as_remote
from runner.gang.ray_facts import rank_environment
from runner.life.job import Job, Outcome
from runner.machine.kept import Keeper
from runner.machine.route import is_loopback
from runner.provenance import code_hash
from runner.spec.gang import Gang

logger = logging.getLogger(__name__)

EXIT_SUPERSEDED = 3
MAX_FAULTS = 3  # of processes that were to wait; then no more are made
KEEP_S = 60.0  # for a gang to come to a node where none is any more


class RankActor(Rank):
    """A rank inside an actor, which is made before the rank has its job: begin gives it one."""

    def __init__(self, out: str, epoch: int, target: str = "") -> None:
        """Wait for a job of the sweep in out; with a target, import what that needs meanwhile.

        Raises what the imports raise, and RuntimeError if they leave more behind than modules.
        """
        self.out, self.epoch = out, epoch
        self.has_work = self.watch_drivers()
        self.code_hash: str | None = None
        if target:
            import_ahead(target)
            self.code_hash = code_hash()

    def begin(self, job: Job, rank: int, address: str) -> dict[str, Any]:
        """Become a rank and return who and where this process is; its output goes to a file of its own from now on.

        Raises RuntimeError if the sources were others when this process imported them.
        """
        recorded = job.record.get("code_hash") if job.program is None else None
        if self.code_hash is not None and recorded not in (None, self.code_hash):
            raise RuntimeError("it has imported other sources than the sweep's")
        redirect_output(job.own_log_path(rank))
        super().__init__(job, rank)
        if not is_loopback(address):
            self.node = address
        if job.program is not None:
            self.keeper = Keeper(job.workdir)
        self.watch = start_watch(job.end_path(rank))
        self.stacks = listen_for_stacks()
        if self.code_hash is not None:
            logger.info("this process has waited for its job, with all that imports need")
        return self.hello()

    def watch_drivers(self) -> threading.Event:
        """End this process if a newer driver comes, until the event returned is set.

        Before its work and after it a rank waits for its driver, which may be suspended by then and never come back.
        """
        over = threading.Event()
        watch = threading.Thread(
            target=watch_drivers, args=(self.out, self.epoch, over, self.end_superseded), daemon=True
        )
        watch.start()
        return over

    def run(
        self, *, port: int | None = None, visible_gpus: tuple[str, ...] = (), addresses: tuple[str, ...] = ()
    ) -> Outcome:
        """Do the work of this rank and return how it ended; how its process ends from then on is of no interest."""
        self.has_work.set()  # which looks for a newer driver itself
        outcome = super().run(port=port, visible_gpus=visible_gpus, addresses=addresses)
        call_off(self.watch)
        self.has_work = self.watch_drivers()
        return outcome

    def hello(self) -> dict[str, Any]:
        """Return who and where this process is."""
        context = ray.get_runtime_context()
        stacks_fd = self.stacks[0] if self.stacks is not None else None
        keeper = self.keeper.pid if self.keeper is not None else None
        return {
            **super().hello(), "keeper": keeper, "node_id": context.get_node_id(), "stacks_fd": stacks_fd,
        }  # fmt: skip

    def end_superseded(self) -> None:
        """End this process at once: its driver may be suspended and unable to, and its peers hold GPUs."""
        os._exit(EXIT_SUPERSEDED)

    def open_store(self, *addresses: str) -> int:
        """Open the gang's rendezvous server, on the first of its hosts where there are several; return its port."""
        from runner.gang.worker import open_store

        self.store = open_store(self.job.world_size, *addresses[:1])
        return int(self.store.port)


def make_actor(node_id: str, shape: Gang, job: Job, *, target: str = "") -> Any:
    """Return the handle of a new RankActor on one node; target: what it imports before it is asked for anything.

    It asks nothing of Ray but the node: what its rank uses is held by the placement group of the gang.
    """
    return as_remote(RankActor).options(
        num_cpus=0, max_concurrency=4, max_restarts=0, runtime_env={"env_vars": rank_environment(shape)},
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(job.out, job.epoch, target)  # fmt: skip


class WaitingRanks:
    """The processes of a sweep that wait to become ranks, on nodes where gangs of it are at work.

    They hold neither CPUs nor GPUs. There are never more on a node than the ranks at work there, nor more than the
    runs that still wait for a place need.
    """

    def __init__(self, shape: Gang) -> None:
        self.shape = shape
        self.actors: dict[str, list[Any]] = {}  # by node id, the oldest first
        self.used_at: dict[str, float] = {}  # when a gang was last at work on a node
        self.faults: list[str] = []

    def take(self, node_id: str, job: Job) -> tuple[Any, bool]:
        """Return an actor for a rank on a node, and whether it was made ahead; it may still import."""
        if self.actors.get(node_id):
            return self.actors[node_id].pop(0), True
        return make_actor(node_id, self.shape, job), False

    def replace(self, actor: Any, node_id: str, job: Job, error: RayError) -> tuple[Any, str]:
        """Return a fresh actor for one that could not begin, and why it could not: "" where that was said before."""
        ray.kill(actor, no_restart=True)
        text = str(getattr(error, "cause", "") or error)
        words = f"a process that waited could not be used ({first_line(text.splitlines()[-1])}); a fresh one starts"
        is_new = words not in self.faults
        self.faults.append(words)
        if is_new:
            logger.warning("%s", words)
        return make_actor(node_id, self.shape, job), words if is_new else ""

    def keep(self, at_work: Mapping[str, int], job: Job | None, *, num_needed: int) -> None:
        """Make and end processes so that as many wait as there are ranks at work on each node.

        at_work: node id -> its ranks at work; job: of one of them; num_needed: ranks of all runs without a place.
        """
        now = time.monotonic()
        self.used_at |= dict.fromkeys(at_work, now)
        allowed = num_needed
        for node_id in list(self.used_at):
            is_left = now - self.used_at[node_id] > KEEP_S
            waiting = self.actors.setdefault(node_id, [])
            wanted = 0 if is_left else min(allowed, at_work.get(node_id, len(waiting)))
            while len(waiting) > wanted:
                ray.kill(waiting.pop(), no_restart=True)
            while len(waiting) < wanted and job is not None and len(self.faults) < MAX_FAULTS:
                waiting.append(make_actor(node_id, self.shape, job, target=job.target))
            allowed -= len(waiting)
            if is_left:
                del self.actors[node_id], self.used_at[node_id]

    def close(self) -> None:
        """End all."""
        for waiting in self.actors.values():
            while waiting:
                ray.kill(waiting.pop(), no_restart=True)
