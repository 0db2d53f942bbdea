"""Which driver owns a sweep's folder: a lease with a heartbeat, and a number that only grows, the epoch.

    lease.json            the owner, for everybody to read
    heartbeat.json        its last sign of life, replaced every few seconds
    drivers/EPOCH.json    the claim of one driver; made exclusively, and changed only by whoever made it

A driver that was suspended for too long loses the folder to the next one and finds out before it acts again: the next
one's claim has a higher epoch. Giving up marks one's own claim, so that it can never take down a successor. The epoch
travels with every gang (see fence): that is how late work of an earlier driver is told from the present one's.

Wall clocks of hosts differ. What a heartbeat's age says is therefore checked, before a folder is taken from a driver
that nobody has seen dead, by watching whether the heartbeat moves.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runner.errors import DirectoryInUse, Superseded
from runner.folder.storage import Storage

logger = logging.getLogger(__name__)

BEAT_EVERY_S = 3.0
LEASE_TTL_S = 60.0  # a driver that has been silent for longer is taken for dead
WATCH_S = 10.0  # three heartbeats: how long a silent driver is watched before its folder is taken
SETTLE_S = 0.2  # two that write to an object store at the same moment: the later write stays
LEASE, HEARTBEAT, CLAIMS = "lease.json", "heartbeat.json", "drivers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """One driver process, named so that another process can tell whether it still lives."""

    host: str
    boot: str  # of the host; pids of another boot mean nothing
    pid: int
    started: int  # of the process, clock ticks since boot: unlike a date it does not move when the clock is set
    token: str
    beat: float  # last sign of life, seconds since 1970
    namespace: str = ""  # of pids and of time; pids of another container mean nothing
    epoch: int = 0
    is_heard: bool = False  # beat is from a heartbeat, not from the lease itself

    @classmethod
    def me(cls) -> Owner:
        """Return this process."""
        found = process_start(os.getpid())
        return cls(
            host=socket.gethostname(), boot=boot_id(), pid=os.getpid(), started=found or 0, namespace=namespaces(),
            token=secrets.token_hex(8), beat=time.time(),
        )  # fmt: skip

    def process_lives(self) -> bool | None:
        """Return whether the process is there, None where this process cannot know: another host or container."""
        here = (socket.gethostname(), boot_id(), namespaces())
        if (self.host, self.boot, self.namespace) != here or not (self.boot and self.namespace):
            return None
        return process_start(self.pid) == self.started

    def is_stopped(self) -> bool:
        """Return whether the process is seen to be there, and suspended."""
        return bool(self.process_lives()) and (process_state(self.pid) or "?")[0] in "Tt"

    def is_fresh(self, now: float) -> bool:
        """Return whether the last sign of life is younger than the lease's time."""
        return abs(now - self.beat) < LEASE_TTL_S

    def is_alive(self, now: float) -> bool:
        """Return whether the driver counts as living.

        A fresh heartbeat decides, whatever a pid seems to say. After that the process does, where it can be seen: one
        that is stopped, or cannot write, still lives.
        """
        if self.is_heard and self.is_fresh(now):
            return True
        lives = self.process_lives()
        return self.is_fresh(now) if lives is None else lives

    def describe(self, now: float) -> str:
        """Return the owner in words, with the age of its last sign of life."""
        return f"pid {self.pid} on {self.host}, last heard {max(0.0, now - self.beat):.0f} s ago"


class Lease:
    """The lease of one folder as one process sees it. Clocks, sleep and the look at processes can be replaced."""

    def __init__(
        self, storage: Storage, *, me: Callable[[], Owner] = Owner.me, wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
        lives: Callable[[Owner], bool | None] = Owner.process_lives,
    ) -> None:  # fmt: skip
        self.storage, self.me, self.wall, self.clock, self.sleep, self.lives = storage, me, wall, clock, sleep, lives
        self.owner: Owner | None = None
        self.last_wall = self.last_clock = 0.0

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, None if it is not there. Raises ValueError if it is damaged."""
        for is_last in (False, False, True):
            try:
                return json.loads(self.storage.read(name))
            except FileNotFoundError:
                return None
            except ValueError:
                if is_last:
                    raise ValueError(f"{self.storage.shown}/{name} is damaged; remove it, or restore it") from None
                self.sleep(SETTLE_S)  # where files appear before their content does
        raise AssertionError(name)

    def write_json(self, name: str, value: object) -> None:
        """Replace a JSON file."""
        self.storage.write(name, to_bytes(value))

    def epochs(self) -> list[int]:
        """Return the epochs of all claims, in order."""
        names = (name.removesuffix(".json") for name in self.storage.names(CLAIMS))
        return sorted(int(name) for name in names if name.isdigit())

    def read_owner(self) -> Owner | None:
        """Return the driver that owns the folder, with its newest heartbeat; None where there is none."""
        plain, newest = self.read_json(LEASE), max(self.epochs(), default=0)
        owner = self.parse(LEASE, plain)
        if newest > (owner.epoch if owner is not None else 0):
            claim = self.read_json(claim_name(newest))
            if isinstance(claim, Mapping) and not claim.get("is_released"):
                owner = self.parse(claim_name(newest), claim)  # its lease is about to be written
        if owner is None:
            return None
        beat = self.read_json(HEARTBEAT)
        if isinstance(beat, Mapping) and beat.get("token") == owner.token:
            owner = replace(owner, beat=float(beat["beat"]), is_heard=True)
        return owner

    def parse(self, name: str, plain: Any) -> Owner | None:
        """Return the owner in a file's content. Raises ValueError if it is none."""
        if plain is None:
            return None
        known = {item.name for item in dataclasses.fields(Owner)}
        try:
            return Owner(**{key: value for key, value in plain.items() if key in known})
        except (TypeError, AttributeError):
            raise ValueError(f"{self.storage.shown}/{name} is damaged; remove it") from None

    def acquire(self) -> bool:
        """Become the owner; return whether an earlier one that nobody saw dead may still have gangs at work.

        Raises DirectoryInUse, naming owner and age, while another driver lives.
        """
        newest, other = max(self.epochs(), default=0), self.read_owner()  # in this order: who comes later is seen below
        if other is not None:
            newest = max(newest, other.epoch)
            self.outlast(other)
        me = replace(self.me(), epoch=newest + 1, beat=self.wall())
        taken = f"{self.storage.shown} was taken by another driver just now; look with seedsweep status"
        if not self.storage.create(claim_name(me.epoch), to_bytes(dataclasses.asdict(me))):
            raise DirectoryInUse(taken)
        if not self.storage.is_exclusive:
            self.sleep(SETTLE_S)
        winner = self.parse(claim_name(me.epoch), self.read_json(claim_name(me.epoch)))
        if winner is None or winner.token != me.token or max(self.epochs(), default=0) > me.epoch:
            raise DirectoryInUse(taken)
        self.write_json(LEASE, dataclasses.asdict(me))
        self.owner = me
        try:
            self.beat(force=True)
        except Superseded:
            self.owner = None
            raise DirectoryInUse(taken) from None
        for epoch in self.epochs():
            if epoch < me.epoch:
                self.storage.remove(claim_name(epoch))
        return other is not None and self.lives(other) is not False

    def outlast(self, other: Owner) -> None:
        """Return once another driver is known to be dead. Raises DirectoryInUse if it lives."""
        now = self.wall()
        is_fresh, lives = other.is_heard and other.is_fresh(now), self.lives(other)
        if lives and not is_fresh and other.is_stopped():
            lives = None  # nobody knows whether it will ever be woken; it has had its lease's time, as anywhere else
        if lives or (lives is None and (is_fresh or other.is_fresh(now))):
            raise self.in_use(other)
        if (lives is None or is_fresh) and other.is_heard:
            logger.warning(
                "%s: its driver (%s) does not answer; looking for %.0f s whether its heartbeat moves",
                self.storage.shown, other.describe(now), WATCH_S,
            )  # fmt: skip
            if self.moves(other, WATCH_S):
                raise self.in_use(other)

    def in_use(self, other: Owner) -> DirectoryInUse:
        """Return the refusal that names the living owner."""
        return DirectoryInUse(
            f"{self.storage.shown} is driven by {other.describe(self.wall())}; "
            f"wait for it, or end it with: seedsweep cancel {self.storage.shown}"
        )

    def moves(self, other: Owner, seconds: float) -> bool:
        """Return whether an owner gives a new sign of life, or another one comes, within seconds."""
        begun = self.clock()
        while self.clock() - begun < seconds:
            self.sleep(1.0)
            newest = self.read_owner()
            if newest is None:
                return False  # it gave the folder up
            if (newest.token, newest.beat) != (other.token, other.beat):
                return True
        return False

    def check(self) -> None:
        """Return if this process still owns the folder. Raises Superseded if another driver has taken it."""
        assert self.owner is not None
        lease, epochs, mine = self.parse(LEASE, self.read_json(LEASE)), self.epochs(), self.owner
        if lease is not None and lease.token == mine.token and max(epochs, default=0) <= mine.epoch:
            return
        # an ousted driver may have taken the file along as it left, or put its own there with its last breath
        is_late_word = lease is None or 0 < lease.epoch < mine.epoch
        if not is_late_word or max(epochs, default=0) > mine.epoch:
            raise Superseded(f"{self.storage.shown} was taken over by another driver; this one stops")
        if mine.epoch not in epochs:
            raise Superseded(f"{self.storage.shown} was cleared while it was driven; this driver stops")
        self.write_json(LEASE, dataclasses.asdict(mine))

    def beat(self, *, force: bool = False) -> None:
        """Leave a sign of life, every few seconds. Raises Superseded if another driver has taken the folder."""
        wall, clock = self.wall(), self.clock()
        # either clock may stand still or jump: one in a suspended machine, the other when it is set
        is_due = abs(wall - self.last_wall) >= BEAT_EVERY_S or clock - self.last_clock >= BEAT_EVERY_S
        if self.owner is None or not (force or is_due):
            return
        self.check()
        self.write_json(HEARTBEAT, {"token": self.owner.token, "beat": wall, "time": time.strftime(
            "%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))})  # fmt: skip
        self.last_wall, self.last_clock = wall, clock

    def release(self) -> None:
        """Give the folder up, if it is still one's own; a successor's lease stays."""
        if self.owner is None:
            return
        me, self.owner = self.owner, None
        try:
            if max(self.epochs(), default=0) > me.epoch:
                return  # its claim is in nobody's way
            self.write_json(claim_name(me.epoch), {**dataclasses.asdict(me), "is_released": True})
            lease = self.read_json(LEASE)
            if isinstance(lease, Mapping) and lease.get("token") == me.token:
                self.storage.remove(LEASE)
        except (OSError, ValueError) as error:
            logger.warning("the lease of %s could not be given up: %s", self.storage.shown, error)


def claim_name(epoch: int) -> str:
    """Return the file of a driver's claim."""
    return f"{CLAIMS}/{epoch}.json"


def to_bytes(value: object) -> bytes:
    """Return a value as the bytes of a JSON file."""
    return json.dumps(value, indent=1, default=str).encode() + b"\n"


def boot_id() -> str:
    """Return what names this boot of this host; nothing where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def namespaces() -> str:
    """Return what names the numbering of processes, and the clock, that this process sees; nothing if unknown."""
    try:
        found = [os.readlink("/proc/self/ns/pid")]
    except OSError:
        return ""
    if os.path.lexists("/proc/self/ns/time"):
        found.append(os.readlink("/proc/self/ns/time"))
    return " ".join(found)


def process_start(pid: int) -> int | None:
    """Return when a process of this host was started, in clock ticks since boot; None if there is none, or a zombie."""
    state, *fields = process_state(pid) or ["X"]
    return None if state in ("Z", "X") else int(fields[18])


def process_state(pid: int) -> list[str] | None:
    """Return what the system says of a process behind its name, its state first; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
