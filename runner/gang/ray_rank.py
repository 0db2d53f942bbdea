"""A rank as a Ray actor: its output in a file of its own, and what others need to see how it fares.

Beside each rank stands a small process that notes how it ended, and a signal makes it write its stacks.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import ray

from runner.folder.fence import watch_drivers
from runner.gang.inquest import call_off, listen_for_stacks, start_watch
from runner.gang.rank import Rank, redirect_output
from runner.life.job import Job, Outcome
from runner.machine.gpus import query_gpus
from runner.machine.kept import Keeper
from runner.machine.route import is_loopback

EXIT_SUPERSEDED = 3


class RankActor(Rank):
    """A rank inside an actor: its output goes to a file of its own, and Ray says which GPUs it holds."""

    def __init__(self, job: Job, rank: int, address: str) -> None:
        redirect_output(job.own_log_path(rank))
        super().__init__(job, rank)
        if not is_loopback(address):
            self.node = address
        if job.program is not None:
            self.keeper = Keeper(job.workdir)
        self.watch = start_watch(job.end_path(rank))
        self.stacks = listen_for_stacks()
        self.has_work = self.watch_drivers()

    def watch_drivers(self) -> threading.Event:
        """End this process if a newer driver comes, until the event returned is set.

        Before its work and after it a rank waits for its driver, which may be suspended by then and never come back.
        """
        over = threading.Event()
        watch = threading.Thread(
            target=watch_drivers, args=(self.job.out, self.job.epoch, over, self.end_superseded), daemon=True
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
        """Return who and where this process is, and its GPUs: their ids, and the model where their driver tells."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        stacks_fd = self.stacks[0] if self.stacks is not None else None
        keeper = self.keeper.pid if self.keeper is not None else None
        models = [gpu.model for gpu in query_gpus([str(gpu) for gpu in gpus])] if gpus else []
        return {
            **super().hello(), "keeper": keeper, "gpus": [str(gpu) for gpu in gpus], "node_id": context.get_node_id(),
            "stacks_fd": stacks_fd, "gpu_model": models[0] if models else "",
        }  # fmt: skip

    def end_superseded(self) -> None:
        """End this process at once: its driver may be suspended and unable to, and its peers hold GPUs."""
        os._exit(EXIT_SUPERSEDED)

    def open_store(self, *addresses: str) -> int:
        """Open the gang's rendezvous server, on the first of its hosts where there are several; return its port."""
        from runner.gang.worker import open_store

        self.store = open_store(self.job.world_size, *addresses[:1])
        return int(self.store.port)
