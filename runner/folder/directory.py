"""A sweep's state on disk: what was announced, what happened, where everything stands, and who is driving.

    sweep.json      spec, hashes, provenance and the seeds announced before anything started
    events.jsonl    one line for each transition, appended
    state.json      the newest picture of every run, replaced
    heartbeat.json  the driver's last sign of life, replaced every few seconds
    lease.json      which driver owns the folder; drivers/ holds the claim of the present one, or the last
    cancel/         requests of `seedsweep cancel`, one file each

Everything here can be read without Ray, while a driver is at work and after it died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from model.files.atomic import writing_aside_in
from runner.errors import Failure, Kind
from runner.folder.fence import retire, take_place
from runner.folder.lease import CLAIMS, Lease, Owner
from runner.folder.storage import LocalStorage, Storage
from runner.life.states import Run, State
from runner.spec.sweep import RunKey

FORMAT = 1
# fields of a run that state.json spells otherwise, or leaves out
UNSAVED = ("key", "facts", "idle", "lost", "leaves", "held_back", "asked_at", "prefer", "avoid", "yields")
# fields that earlier versions did not write
LATER = ("waits_for", "peers", "held_s", "asides", "accelerator", "device")


class CancelRequest(NamedTuple):
    """The runs that a person wants to end: of one seed, of one variant, of both, or all."""

    seed: int | None = None
    variant: str = ""

    @property
    def is_all(self) -> bool:
        """Whether the whole sweep is to end."""
        return self.seed is None and not self.variant

    @property
    def file_name(self) -> str:
        """The name of the request's file; the variant comes last, because it may contain anything that is before."""
        words = [f"seed={self.seed}"] if self.seed is not None else []
        return "-".join([*words, *([f"variant={self.variant}"] if self.variant else [])]) or "all"

    @classmethod
    def from_file_name(cls, name: str) -> CancelRequest | None:
        """Return the request that a file's name holds, None for a file that `seedsweep cancel` did not leave."""
        found = re.fullmatch(r"all|(?:seed=(\d+))?(?:(?:^|-)variant=(.+))?", name)
        if found is None:
            return None
        return cls(int(found[1]) if found[1] else None, found[2] or "")

    def means(self, key: RunKey) -> bool:
        """Return whether a run is among them."""
        return self.seed in (None, key.seed) and self.variant in ("", key.variant_name)


@dataclass(slots=True)
class SweepDirectory:
    """Reads and writes the files above. One driver writes; anybody reads."""

    storage: Storage
    lease: Lease = field(init=False)
    place: Path | None = None  # the driver's own folder for files being written

    def __post_init__(self) -> None:
        self.lease = Lease(self.storage)

    def read_json(self, name: str) -> Any:
        """Return a JSON file's content, None if it is not there. Raises ValueError if it is damaged."""
        return self.lease.read_json(name)

    def write_json(self, name: str, value: object) -> None:
        """Replace a JSON file."""
        self.lease.write_json(name, value)

    @property
    def owner(self) -> Owner | None:
        """This process as the owner, None while it is not."""
        return self.lease.owner

    def acquire(self) -> bool:
        """Become the driver of this folder; return whether gangs of an earlier one may still be at work.

        Raises DirectoryInUse, naming owner and age, while another driver lives.
        """
        may_be_at_work = self.lease.acquire()
        assert self.owner is not None
        if isinstance(self.storage, LocalStorage):
            self.place = take_place(self.storage.root / CLAIMS, self.owner.epoch)
            self.lease.check()  # a newer driver has taken away what was there before it, not what came since
        return may_be_at_work

    @contextlib.contextmanager
    def writing_fenced(self) -> Iterator[None]:
        """Let this thread write into the folder only while no newer driver has taken it over."""
        if self.place is None or not isinstance(self.storage, LocalStorage):
            yield
            return
        with writing_aside_in(self.place, self.storage.root):
            yield

    def read_owner(self) -> Owner | None:
        """Return the driver named in the lease, with its newest heartbeat; None where there is none."""
        return self.lease.read_owner()

    def beat(self, *, force: bool = False) -> None:
        """Leave a sign of life, every few seconds. Raises Superseded if another driver has taken the folder."""
        self.lease.beat(force=force)

    def release(self) -> None:
        """Give the folder up, if it is still this driver's."""
        self.lease.release()
        if self.place is not None:
            retire(self.place)
            self.place = None

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
        # a line a run: the library's indentation makes megabytes of small pieces out of a thousand runs, in Python code
        rows = ",\n".join(f"  {json.dumps(run_to_json(run, offset), default=str)}" for run in runs)
        head = json.dumps({"format": FORMAT, "sweep": sweep, "updated": now, **more}, default=str)
        self.storage.write("state.json", f'{head[:-1]},\n "runs": [\n{rows}\n ]}}\n'.encode())

    def read_state(self) -> dict[str, Any]:
        """Return state.json, or {} if no driver has written one."""
        state = self.read_json("state.json")
        return state if isinstance(state, dict) else {}

    def ask_cancel(self, seed: int | None = None, variant: str = "") -> None:
        """Leave a request to end one seed, one variant, one seed of one variant, or the sweep."""
        request = CancelRequest(seed, variant)
        self.storage.write(f"cancel/{request.file_name}", utc(time.time()).encode() + b"\n")

    def cancel_requests(self) -> list[CancelRequest]:
        """Return what somebody wants to end."""
        found = (CancelRequest.from_file_name(name) for name in self.storage.names("cancel"))
        return [request for request in found if request is not None]

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
    return {"variant": run.key.variant, "seed": run.key.seed, "repeat": run.key.repeat, **plain}


def run_from_json(plain: Mapping[str, Any]) -> Run:
    """Return a run as state.json shows it, times in seconds since 1970. Raises ValueError if a field is missing."""
    names = [item.name for item in dataclasses.fields(Run) if item.name not in UNSAVED]
    try:
        fields = {name: plain[name] for name in names if name in plain or name not in LATER}
        fields["state"] = State(fields["state"])
        for name in ("bad_nodes", "peers"):
            fields[name] = tuple(fields.get(name, ()))
        for name in ("failure", "previous"):
            fields[name] = failure_from_json(fields[name]) if fields[name] else None
        key = RunKey(variant=str(plain.get("variant", "")), seed=int(plain["seed"]), repeat=int(plain["repeat"]))
        return Run(key=key, **fields)
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
