"""The processes of one seed, and how long to wait for what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from runner.spec.keys import check_keys, update_fields
from runner.spec.labels import ACCELERATOR_LABEL, parse_require, words

MAX_RANKS = 8  # on one host


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """The processes of one seed. gpus > 0: that many ranks with one GPU each; gpus = 0: `ranks` CPU ranks.

    They share out evenly over `hosts` nodes, in the order of their ranks.
    """

    gpus: int = 0  # on all hosts together
    cpus: int = 1  # of each rank; also its number of threads
    ranks: int | None = None  # CPU gangs only; 1 where left out
    hosts: int = 1
    require: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # label -> values, one of which a node has
    same_gpu: bool = False  # all gangs of the sweep on one model of GPU, waiting for it where need be

    def __post_init__(self) -> None:
        if self.hosts < 1:
            raise ValueError(f"gang.hosts={self.hosts} must be at least 1")
        if self.same_gpu and not self.gpus:
            raise ValueError("gang.same_gpu=true is for gangs with gang.gpus; leave it out on CPUs")
        most = MAX_RANKS * self.hosts
        more = f" ({MAX_RANKS} on each of gang.hosts={self.hosts}; more hosts hold more)"
        if not 0 <= self.gpus <= most:
            raise ValueError(f"gang.gpus={self.gpus} must be between 0 and {most}{more}")
        if self.cpus < 1:
            raise ValueError(f"gang.cpus={self.cpus} must be at least 1 (CPUs of each rank)")
        if self.ranks is not None and not 1 <= self.ranks <= most:
            raise ValueError(f"gang.ranks={self.ranks} must be between 1 and {most}{more}")
        if self.gpus and self.ranks not in (None, self.gpus):
            raise ValueError(f"gang.ranks={self.ranks} must equal gang.gpus={self.gpus}, or be left out")
        if self.world_size % self.hosts:
            name = "gpus" if self.gpus else "ranks"
            raise ValueError(
                f"gang.hosts={self.hosts} must divide gang.{name}={self.world_size}: every host has as many ranks"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.gpus or self.ranks or 1

    @property
    def ranks_per_host(self) -> int:
        """Number of ranks on each node."""
        return self.world_size // self.hosts

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank asks of its node, in Ray's words."""
        return {"CPU": float(self.cpus), "GPU": 1.0} if self.gpus else {"CPU": float(self.cpus)}

    @property
    def share(self) -> dict[str, float]:
        """What the gang asks of each of its nodes."""
        return {name: amount * self.ranks_per_host for name, amount in self.bundle.items()}

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether a node with these labels is one that the gang may go to."""
        return all(labels.get(label) in values for label, values in self.require.items())

    def on_gpus(self, accelerator: str) -> Gang:
        """Return the gang as one that takes only nodes with this value of Ray's label for GPUs."""
        return replace(self, require={**self.require, ACCELERATOR_LABEL: (accelerator,)})

    def describe(self) -> str:
        """Return the gang in words, as errors and the plan print it."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(self.bundle.items(), reverse=True))
        where = "on one node" if self.hosts == 1 else f"on {self.hosts} nodes, {self.ranks_per_host} on each"
        labels = f", with {words(self.require)}" if self.require else ""
        return f"{self.world_size} rank(s) {where}{labels}, {each} each"


def parse_gang(given: object) -> Gang:
    """Return the checked gang that a spec, or sweep.json, holds. Raises ValueError naming the key that does not fit."""
    values = dict(check_keys("gang", given, [item.name for item in dataclasses.fields(Gang)]))
    require = parse_require(values.pop("require", None) or {})
    return replace(update_fields(Gang(), values, "gang"), require=require)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long to wait for what, and how often to try again."""

    attempts: int = 3  # starts that may fail, the first included; preemptions do not count
    preemptions: int = 20  # starts lost to nodes that went away
    backoff_s: float = 5.0  # before the first retry; doubles with each further one
    backoff_max_s: float = 300.0
    start_s: float = 300.0  # from placed to all ranks ready, rendezvous and preflight included
    stall_s: float = 900.0  # without progress of one rank; that its peers go on does not help it
    heartbeat_s: float = 60.0  # without an answer from a rank's process
    seed_s: float | None = None  # of one attempt; None: no limit
    wait_s: float = 0.0  # for a node that can hold a gang
    max_gangs: int | None = None  # placed or asked for at once; None: as many as the nodes hold, and one more
    disk_s: float = 60.0  # for room on a full disk, at the start of an attempt and while a program runs
    log_bytes: int = 2 << 30  # of what one rank of a program prints, and of each file of program.log
    stop_grace_s: float | None = None  # from stop to kill; None: 2 under a Ray job, else 30
    restart: Literal["checkpoint", "scratch"] = "checkpoint"  # where a broken training starts again

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"limits.attempts={self.attempts} must be at least 1")
        if self.preemptions < 0:
            raise ValueError(f"limits.preemptions={self.preemptions} must not be negative")
        if self.max_gangs is not None and self.max_gangs < 1:
            raise ValueError(
                f"limits.max_gangs={self.max_gangs} must be at least 1; leave it out for as many as the nodes hold"
            )
        for name in ("start_s", "stall_s", "heartbeat_s", "seed_s", "log_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"limits.{name}={value} must be positive")
        for name in ("backoff_s", "backoff_max_s", "wait_s", "disk_s", "stop_grace_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"limits.{name}={value} must not be negative")
