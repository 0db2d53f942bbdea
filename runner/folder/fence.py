"""What keeps late work out: of a driver that was ousted, of a gang whose node came back.

Every driver, and every attempt of a run, writes aside in a folder of its own and moves finished files from there into
place. Whoever comes next takes that folder away, which a filesystem does atomically: a move that has not happened by
then never will. Ranks also look for a newer driver's claim every few seconds and end on their own, because a driver
that is suspended cannot end them. On an object store, which has no rename, they look before each put.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from model.files.atomic import writing_aside_in
from runner.errors import Superseded
from runner.folder.lease import CLAIMS
from runner.folder.storage import LocalStorage, Storage, open_storage

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
LOOK_EVERY_URI_S = 10.0  # each look is a request that costs money
ASIDE = ".driver-"


def yield_s(storage: Storage) -> float:
    """Return how long a new driver leaves the ranks of an earlier one to notice it."""
    return (LOOK_EVERY_S if isinstance(storage, LocalStorage) else LOOK_EVERY_URI_S) * 1.5 + 1.0


def newest_epoch(storage: Storage) -> int:
    """Return the epoch of the newest driver's claim, 0 where there is none."""
    names = (name.removesuffix(".json") for name in storage.names(CLAIMS))
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_epoch(storage: Storage, epoch: int) -> None:
    """Raise Superseded if a newer driver than that of epoch has claimed the sweep. Epoch 0 belongs to no driver."""
    if epoch and newest_epoch(storage) > epoch:
        raise Superseded(f"{storage.shown} was taken over by another driver; this gang stops")


def take_place(root: Path, *numbers: int) -> Path:
    """Make the folder of a driver (or attempt) for files being written below root; take earlier ones' away."""
    place = root / (ASIDE + "-".join(map(str, numbers)))
    place.mkdir(parents=True, exist_ok=True)
    for other in root.glob(f"{ASIDE}*"):
        parts = other.name.removeprefix(ASIDE).split("-")
        if all(part.isdigit() for part in parts) and tuple(map(int, parts)) < numbers:
            retire(other)
    return place


def retire(place: Path) -> None:
    """Take a folder away at one stroke, then remove what is in it."""
    gone = place.with_name(f".gone-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(place, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def fenced(
    out: str, workdir: Path, *, epoch: int, attempt: int, is_writer: bool, on_superseded: Callable[[], None]
) -> Iterator[None]:
    """Let a rank work until a newer driver, or attempt, takes its run directory over; then call on_superseded.

    is_writer: rank 0, whose files go through its own folder. Raises Superseded if there is a newer driver already.
    """
    if not epoch:
        yield
        return
    storage = open_storage(out)
    place = take_place(workdir, epoch, attempt) if is_writer else None
    over = threading.Event()
    try:
        check_epoch(storage, epoch)  # after the folder was made: a newer driver's gang would have taken it away before
        watch = threading.Thread(
            target=look_out, args=(storage, epoch, place, over, on_superseded), name="fence", daemon=True
        )
        watch.start()
        with writing_aside_in(place, workdir) if place is not None else contextlib.nullcontext():
            yield
    finally:
        over.set()
        if place is not None:
            retire(place)


def watch_drivers(out: str, epoch: int, over: threading.Event, on_superseded: Callable[[], None]) -> None:
    """Look for a newer driver of the sweep in out, until over is set. Epoch 0 belongs to no driver: returns at once.

    Folders that cannot be opened are for whoever works in them to report; they are tried again here.
    """
    while epoch and not over.is_set():
        try:
            storage = open_storage(out)
        except (OSError, ValueError) as error:
            logger.warning("cannot see whether another driver has come: %s", error)
            over.wait(LOOK_EVERY_URI_S)
        else:
            look_out(storage, epoch, None, over, on_superseded)
            return


def look_out(
    storage: Storage, epoch: int, place: Path | None, over: threading.Event, on_superseded: Callable[[], None]
) -> None:
    """Look for a newer driver, or for the writer's folder being taken away, until over is set."""
    every_s = LOOK_EVERY_S if isinstance(storage, LocalStorage) else LOOK_EVERY_URI_S
    while not over.wait(every_s):
        try:
            is_newer = newest_epoch(storage) > epoch
        except OSError as error:
            logger.warning("cannot see whether another driver has come: %s", error)
            continue
        if (is_newer or (place is not None and not place.is_dir())) and not over.is_set():
            logger.error("another driver or attempt has taken this run over; this rank ends")
            on_superseded()
            return
