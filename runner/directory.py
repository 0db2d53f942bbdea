"""A sweep's state on disk: what was announced, what happened, where everything stands, and who is driving.

    sweep.json      spec, hashes, provenance and the seeds announced before anything started
    events.jsonl    one line for each transition, appended
    state.json      the newest picture of every run, replaced
    heartbeat.json  the driver's last sign of life, replaced every few seconds
    lease.json      which driver owns the folder
    cancel/         requests of `seedsweep cancel`, one file each

Everything here can be read without Ray, while a driver is at work and after it died.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from runner.errors import DirectoryInUse, Failure, Kind
from runner.spec import RunKey
from runner.states import Run, State
from runner.storage import LocalStorage, ObjectStorage

FORMAT = 1
BEAT_EVERY_S = 3.0
UNSAVED = ("key", "facts", "idle")  # fields of a run that state.json spells otherwise, or leaves out
LEASE_TTL_S = 60.0  # a driver on another host that has been silent for longer is taken for dead


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """One driver process, named so that another process can tell whether it still lives."""

    host: str
    boot: str  # of the host; pids of another boot mean nothing
    pid: int
    started: float  # of the process, seconds since 1970; a pid alone may be used again
    token: str
    beat: float  # last sign of life, seconds since 1970

    @classmethod
    def me(cls) -> Owner:
        """Return this process."""
        return cls(
            host=socket.gethostname(), boot=boot_id(), pid=os.getpid(), started=psutil.Process().create_time(),
            token=secrets.token_hex(8), beat=time.time(),
        )  # fmt: skip

    def is_alive(self, now: float) -> bool:
        """Return whether the driver lives: by its process on this host, by its heartbeat elsewhere."""
        if self.host != socket.gethostname() or self.boot != boot_id():
            return now - self.beat < LEASE_TTL_S
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 2 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def describe(self, now: float) -> str:
        """Return the owner in words, with the age of its last sign of life."""
        return f"pid {self.pid} on {self.host}, last heard {max(0.0, now - self.beat):.0f} s ago"


@dataclass(slots=True)
class SweepDirectory:
    """Reads and writes the files above. One driver writes; anybody reads."""

    storage: LocalStorage | ObjectStorage
    owner: Owner | None = None
    last_beat: float = field(default=0.0)

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, None if it is not there. Raises ValueError if it is damaged."""
        try:
            return json.loads(self.storage.read(name))
        except FileNotFoundError:
            return None
        except ValueError:
            raise ValueError(f"{self.storage.shown}/{name} is damaged; remove it or restore it") from None

    def write_json(self, name: str, value: object) -> None:
        """Replace a JSON file."""
        self.storage.write(name, json.dumps(value, indent=1, default=str).encode() + b"\n")

    def acquire(self) -> None:
        """Become the driver of this folder.

        Raises DirectoryInUse, naming owner and age, while another driver lives.
        """
        other = self.read_owner()
        if other is not None and other.is_alive(time.time()):
            raise DirectoryInUse(
                f"{self.storage.shown} is driven by {other.describe(time.time())}; "
                f"wait for it, or end it with: seedsweep cancel {self.storage.shown}"
            )
        me = Owner.me()
        if isinstance(self.storage, LocalStorage) and other is None:
            self.create_lease(self.storage.root, me)
        else:
            self.write_json("lease.json", dataclasses.asdict(me))
            time.sleep(0.2)  # two that took over at the same moment: the later write stays
        winner = self.read_owner()
        if winner is None or winner.token != me.token:
            raise DirectoryInUse(
                f"{self.storage.shown} was taken by another driver just now; look with seedsweep status"
            )
        self.owner = me
        self.beat(force=True)

    def create_lease(self, root: Path, me: Owner) -> None:
        """Make lease.json if nobody has made it yet; whoever comes second finds it there."""
        aside = root / f".lease.{me.token}.tmp"
        root.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(dataclasses.asdict(me)))
        try:
            os.link(aside, root / "lease.json")
        except FileExistsError:
            pass
        finally:
            aside.unlink()

    def read_owner(self) -> Owner | None:
        """Return the driver named in the lease, with its newest heartbeat; None where there is none."""
        plain = self.read_json("lease.json")
        if plain is None:
            return None
        try:
            owner = Owner(**plain)
        except TypeError:
            raise ValueError(f"{self.storage.shown}/lease.json is damaged; remove it") from None
        beat = self.read_json("heartbeat.json")
        if isinstance(beat, Mapping) and beat.get("token") == owner.token:
            owner = dataclasses.replace(owner, beat=float(beat["beat"]))
        return owner

    def beat(self, *, force: bool = False) -> None:
        """Leave a sign of life, every few seconds.

        Raises DirectoryInUse if another driver has taken the folder over meanwhile.
        """
        now = time.time()
        if self.owner is None or (not force and now - self.last_beat < BEAT_EVERY_S):
            return
        self.last_beat = now
        lease = self.read_json("lease.json")
        if not isinstance(lease, Mapping) or lease.get("token") != self.owner.token:
            raise DirectoryInUse(f"{self.storage.shown} was taken over by another driver; this one stops")
        self.write_json("heartbeat.json", {"token": self.owner.token, "beat": now, "time": utc(now)})

    def release(self) -> None:
        """Give the folder up."""
        if self.owner is not None:
            self.storage.remove("lease.json")
            self.owner = None

    def driver_is_alive(self) -> bool:
        """Return whether a living driver owns the folder."""
        owner = self.read_owner()
        return owner is not None and owner.is_alive(time.time())

    def log_events(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append transitions to events.jsonl."""
        text = "".join(json.dumps(line, default=str) + "\n" for line in lines)
        if text:
            self.storage.append("events.jsonl", text.encode())

    def write_state(self, sweep: str, runs: Iterable[Run], offset: float, **more: object) -> None:
        """Replace state.json; offset turns the driver's clock into seconds since 1970."""
        now = time.time()
        rows = [run_to_json(run, offset) for run in runs]
        self.write_json("state.json", {"format": FORMAT, "sweep": sweep, "updated": now, **more, "runs": rows})

    def read_state(self) -> dict[str, Any]:
        """Return state.json, or {} if no driver has written one."""
        state = self.read_json("state.json")
        return state if isinstance(state, dict) else {}

    def ask_cancel(self, seed: int | None) -> None:
        """Leave a request to end one seed, or the sweep."""
        name = "all" if seed is None else f"seed={seed}"
        self.storage.write(f"cancel/{name}", utc(time.time()).encode() + b"\n")

    def cancel_requests(self) -> list[int | None]:
        """Return the seeds somebody wants to end; None stands for all of them."""
        names = self.storage.names("cancel")
        return [None if name == "all" else int(name.removeprefix("seed=")) for name in names]

    def clear_cancel_requests(self) -> None:
        """Forget requests that were meant for an earlier driver."""
        for name in self.storage.names("cancel"):
            self.storage.remove(f"cancel/{name}")


def run_to_json(run: Run, offset: float) -> dict[str, Any]:
    """Return one run for state.json; its times become seconds since 1970."""
    plain: dict[str, Any] = {
        item.name: getattr(run, item.name) for item in dataclasses.fields(run) if item.name not in UNSAVED
    }
    for name in ("since", "placed_at", "progress_at", "not_before", "stop_by"):
        plain[name] = plain[name] + offset if plain[name] else 0.0
    for name in ("failure", "previous"):
        plain[name] = plain[name].to_json() if plain[name] is not None else None
    return {"seed": run.key.seed, "repeat": run.key.repeat, **plain}


def run_from_json(plain: Mapping[str, Any]) -> Run:
    """Return a run as state.json shows it, times in seconds since 1970. Raises ValueError if a field is missing."""
    names = [item.name for item in dataclasses.fields(Run) if item.name not in UNSAVED]
    try:
        fields = {name: plain[name] for name in names}
        fields["state"] = State(fields["state"])
        fields["bad_nodes"] = tuple(fields["bad_nodes"])
        for name in ("failure", "previous"):
            fields[name] = failure_from_json(fields[name]) if fields[name] else None
        return Run(key=RunKey(seed=int(plain["seed"]), repeat=int(plain["repeat"])), **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"state.json does not fit this version ({error}); remove it, finished seeds are kept"
        ) from None


def failure_from_json(plain: Mapping[str, Any]) -> Failure:
    """Return the failure that state.json holds."""
    lists = {name: tuple(plain.get(name, ())) for name in ("others", "files")}
    return Failure(**{**plain, **lists, "kind": Kind(plain["kind"])})


def utc(seconds: float) -> str:
    """Return a time as ISO text in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def boot_id() -> str:
    """Return what names this boot of this host; nothing where the system does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""
