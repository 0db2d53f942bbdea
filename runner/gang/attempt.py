"""What every attempt does on its node, whatever it computes: room on the disk, its record, samples of its GPUs."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.report import Interrupted
from runner.errors import NoRoomError
from runner.folder.storage import LocalStorage
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.gpus import GpuWatch

WATCH_END_S = 20.0  # for the watch of the GPUs to take its last sample
MIN_FREE_BYTES = 1 << 30
ROOM_EVERY_S = 5.0  # between looks at a full disk
GPU_SAMPLES = "gpu.npz"


def wait_for_room(rank: Rank) -> int:
    """Return the free bytes of the run directory's disk once they are enough to begin with.

    Raises NoRoomError, naming path and need, if they are not within limits.disk_s.
    """
    room = Room(rank)
    while room.is_short():
        if rank.should_stop():
            raise Interrupted("stopped while waiting for room on the disk")
        rank.report("start", 0, None, {"note": f"waits for room: {room.words}"})
        time.sleep(min(ROOM_EVERY_S, rank.job.disk_s))
    return room.free_bytes


class Room:
    """What a rank sees of its run directory's disk: how much is free, and for how long that was not enough."""

    def __init__(self, rank: Rank) -> None:
        self.rank, self.free_bytes, self.since = rank, 0, 0.0

    def is_short(self) -> bool:
        """Return whether there is not enough room. Raises NoRoomError once that was so for limits.disk_s."""
        job, now = self.rank.job, time.monotonic()
        self.free_bytes = shutil.disk_usage(job.workdir).free
        if self.free_bytes >= MIN_FREE_BYTES:
            self.since = 0.0
            return False
        self.since = self.since or now
        if now - self.since >= job.disk_s:
            raise NoRoomError(f"{self.words} (waited {now - self.since:.0f} s, limits.disk_s={job.disk_s:g})")
        return True

    @property
    def words(self) -> str:
        """What is free, where, and what is needed."""
        free, needed = (f"{count / 1e9:.1f} GB" for count in (self.free_bytes, MIN_FREE_BYTES))
        return f"node {self.rank.node} has {free} free at {self.rank.job.workdir}; {needed} are needed"


def name_shortage(rank: Rank) -> str:
    """Return what the disk lacks, as a hint at why something failed there, or nothing."""
    room = Room(rank)
    try:
        return room.words if room.is_short() else ""
    except NoRoomError:
        return room.words
    except OSError:
        return ""


def note_attempt(job: Job, facts: Mapping[str, Any]) -> None:
    """Write attempt.json: which attempt is at work, since when, and on what machine."""
    record = {**job.record, **facts, "attempt": job.attempt, "started_at": time.time()}
    LocalStorage(Path(job.workdir)).write("attempt.json", json.dumps(record, indent=1, default=str).encode() + b"\n")


def save_samples(watch: GpuWatch, path: Path) -> bool:
    """End the watch and add what it saw to that of earlier attempts; return whether it saw anything."""
    watch.is_over.set()
    watch.thread.join(WATCH_END_S)  # a sick driver may never answer
    arrays: dict[str, Any] = {name: np.asarray(values) for name, values in watch.arrays().items()}
    if not len(arrays["step"]):
        return False
    if path.exists():  # what earlier attempts saw stays, up to where this one began
        with np.load(path, allow_pickle=False) as before:
            is_kept = before["step"] < arrays["step"].min()
            arrays = {name: np.concatenate([before[name][is_kept], values]) for name, values in arrays.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    LocalStorage(path.parent).write(path.name, buffer.getvalue())
    return True


def ignore(_path: Path) -> None:
    """Do nothing with a finished file: it is where it belongs."""
