"""The scheduler's backend on Ray: joins or starts a cluster, and keeps one RayGang for each placement group."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from typing import Any

import ray
from ray.exceptions import RayError

from model.data.cpus import usable_cpus
from runner.errors import Kind, SweepError, first_line
from runner.gang.ray_facts import draining_nodes
from runner.gang.ray_gang import RayGang
from runner.gang.ray_rank import WaitingRanks
from runner.gang.ray_start import Cluster, check_address, start_cluster
from runner.life.capacity import Node
from runner.life.decisions import Release, Start, Stop, Submit
from runner.life.job import Job, Phase
from runner.life.states import Draining, Event
from runner.machine.head_watch import HeadWatch
from runner.provenance import SOURCE_ROOT
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey

logger = logging.getLogger(__name__)

QUIET = logging.CRITICAL  # what Ray has to say about dead workers, the gang says with rank and node
POLL_EVERY_S = 0.05
DRAINS_EVERY_S = 2.0


RUNNING: list[Cluster] = []  # the cluster that this process started, if it did
WATCHES: list[HeadWatch] = []  # of the head of a cluster that it joined


def connect(address: str | None) -> None:
    """Join the cluster at address, or start one on this machine that listens on loopback only.

    Raises SweepError if there is no cluster at address, or Ray does not start.
    """
    if address is None:
        RUNNING.append(start_cluster(usable_cpus()))
        join(RUNNING[-1].address, "Ray on this machine")
    else:
        check_address(address)
        join(address, f"--address {address}")
        WATCHES.append(HeadWatch(ray.get_runtime_context().gcs_address))


def join(address: str, words: str) -> None:
    """Connect this process. Raises SweepError, opening with words, if the cluster is gone meanwhile.

    Ray puts the current folder in front of the import path of every rank. It is ours for that moment: a user's folder
    with a model.py would otherwise stand before the package of that name.
    """
    try:
        with contextlib.chdir(SOURCE_ROOT):
            ray.init(address=address, log_to_driver=False, logging_level=QUIET)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        disconnect()
        raise SweepError(f"{words}: no Ray cluster answers there ({first_line(str(error))})") from None
    except BaseException:
        disconnect()
        raise


def disconnect() -> None:
    """Leave the cluster; one that `connect` started ends."""
    while WATCHES:
        WATCHES.pop().stop()
    ray.shutdown()
    while RUNNING:
        RUNNING.pop().close()


def living_nodes() -> tuple[Node, ...]:
    """Return every living node with its total resources; one that is being drained takes no more gangs."""
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    draining = draining_nodes()
    return tuple(
        Node(
            node_id=node["NodeID"],
            name=node["NodeManagerAddress"],
            resources=dict(node["Resources"]),
            labels=dict(node.get("Labels") or {}),
        )
        for node in found
        if node["Alive"] and node["NodeID"] not in draining
    )


class RayBackend:
    """Gangs as placement groups with one actor per rank."""

    def __init__(self, shape: Gang) -> None:
        self.shape = shape
        self.gangs: dict[tuple[RunKey, int], RayGang] = {}  # by run and serial of its group
        self.looked_at = -math.inf  # for nodes that are being drained
        self.waiting = WaitingRanks(shape)
        self.num_expected = 0

    def nodes(self) -> tuple[Node, ...]:
        """Return the living nodes."""
        return living_nodes()

    def submit(self, command: Submit) -> None:
        """Create the placement group."""
        gang = RayGang(
            command.key, command.group, self.shape, prefer=command.prefer, avoid=command.avoid, require=command.require
        )
        self.gangs[command.key, command.group] = gang

    def find(self, command: Start | Stop | Release) -> RayGang:
        """Return the gang that a command is for."""
        return self.gangs[command.key, command.group]

    def start(self, command: Start, job: Job) -> None:
        """Start the ranks."""
        self.find(command).start(job, self.waiting)

    def expect(self, num_runs: int) -> None:
        """Let as many processes wait as gangs of these runs could use."""
        self.num_expected = num_runs

    def stop(self, command: Stop) -> None:
        """Ask the ranks to stop."""
        self.find(command).stop()

    def release(self, command: Release) -> None:
        """Kill the ranks, after they wrote their stacks down where they had stalled, and remove the group."""
        is_stalled = command.failure is not None and command.failure.kind is Kind.STALLED
        self.find(command).release(with_stacks=is_stalled)

    def poll(self, timeout_s: float) -> list[Event]:
        """Return what happened to any gang, waiting up to timeout_s where nothing has."""
        deadline = time.monotonic() + timeout_s
        while True:
            events = [event for gang in self.gangs.values() for event in gang.poll()] + self.look_for_drains()
            self.gangs = {name: gang for name, gang in self.gangs.items() if gang.phase is not Phase.GONE}
            self.keep_waiting()
            if events or time.monotonic() >= deadline:
                return events
            time.sleep(POLL_EVERY_S)

    def keep_waiting(self) -> None:
        """Have processes wait for the next gangs where gangs are at work now."""
        at_work = [gang for gang in self.gangs.values() if gang.is_at_work]
        ranks = Counter(
            node_id for gang in at_work for node_id in gang.node_ids for _ in range(gang.shape.ranks_per_host)
        )
        job = at_work[0].job if at_work else None
        self.waiting.keep(ranks, job, num_needed=self.num_expected * self.shape.world_size)

    def look_for_drains(self) -> list[Event]:
        """Tell every gang, once in a while, of a node of it that is being drained."""
        if time.monotonic() - self.looked_at < DRAINS_EVERY_S:
            return []
        self.looked_at, draining = time.monotonic(), draining_nodes()
        return [
            Draining(key=gang.key, group=gang.serial, node_id=node_id)
            for gang in self.gangs.values()
            for node_id in gang.node_ids
            if node_id in draining
        ]

    def close(self) -> None:
        """Kill whatever is left."""
        self.waiting.close()
        for gang in self.gangs.values():
            gang.kill()
        self.gangs = {}
