"""One rank of a gang, without Ray and without torch: it runs the work, says how far it is, and stops when told.

The gang wraps `Rank` in an actor; `--local` calls it in a thread. `run` never raises: it returns an Outcome, so that
a failure arrives with its rank, its exception and the end of its log.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model.report import Interrupted
from runner.errors import Failure, Kind, NoRoomError, OutNotShared, PreflightError, ProgramError, first_line, is_full
from runner.folder.fence import fenced
from runner.folder.lease import boot_id, namespaces
from runner.folder.mirror import Mirror, open_mirror
from runner.folder.storage import local_root
from runner.life.job import Beat, Job, Outcome
from runner.machine.kept import Keeper

logger = logging.getLogger(__name__)

LOG_TAIL_BYTES = 8192  # what a crash leaves at the end, and some lines before it
LOG_EVERY_S = 10.0  # progress in a rank's own log


class Rank:
    """One process of a gang. `run` blocks; the other methods may be called from other threads meanwhile."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job = job
        self.rank = rank
        self.newest = Beat()
        self.moved_at = time.monotonic()  # when it last got further
        self.waits = False
        self.logged_at = 0.0
        self.stop_event = threading.Event()
        self.port: int | None = None  # of the gang's rendezvous store
        self.visible_gpus: tuple[str, ...] = ()
        self.addresses: tuple[str, ...] = ()  # of the gang's hosts, where there are several
        self.node = socket.gethostname()  # as messages name it
        self.store: Any = None  # rank 0's rendezvous server; lives as long as the rank
        self.mirror: Mirror | None = None  # where finished files go beside this node's disk
        self.keeper: Keeper | None = None  # who stands over this rank's process of a program

    def report(self, phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        """Note progress; the driver fetches the newest note."""
        plain = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
        if phase != self.newest.phase or "note" in plain or time.monotonic() - self.logged_at >= LOG_EVERY_S:
            self.logged_at = time.monotonic()
            logger.info("%s step=%d total=%s %s", phase, step, total, " ".join(f"{k}={v}" for k, v in plain.items()))
        self.newest = Beat(serial=self.newest.serial + 1, phase=phase, step=step, total=total, metrics=plain)
        self.tick()

    def tick(self) -> None:
        """Note that this rank got further, though there is nothing to show."""
        self.moved_at = time.monotonic()

    def wait(self, is_waiting: bool) -> None:
        """Note that this rank begins to wait for the others, or that all have met."""
        if not is_waiting:
            self.tick()  # first: who asks in between must not see one that stood still and does not wait
        self.waits = is_waiting

    def should_stop(self) -> bool:
        """Return whether the driver asked for an early end."""
        return self.stop_event.is_set()

    def beat(self) -> Beat:
        """Return the newest progress."""
        waits = self.waits  # read first, for the same reason
        return dataclasses.replace(self.newest, idle_s=time.monotonic() - self.moved_at, waits=waits)

    def stop(self) -> None:
        """Ask the work to end at the next step, leaving a checkpoint."""
        self.stop_event.set()

    def hello(self) -> dict[str, Any]:
        """Return who and where this process is."""
        return {"pid": os.getpid(), "host": this_host(), "rank": self.rank}

    def run(
        self, *, port: int | None = None, visible_gpus: tuple[str, ...] = (), addresses: tuple[str, ...] = ()
    ) -> Outcome:
        """Do the work of this rank and return how it ended.

        port: of the gang's rendezvous; visible_gpus: all that the gang has on this node; addresses: of the gang's hosts
        where there are several.
        """
        self.port, self.visible_gpus, self.addresses = port, visible_gpus, addresses
        puts_logs = self.job.place_of(self.rank)[1] == 0  # one for each host
        try:
            self.check_out()
            self.work()
        except Interrupted:
            return Outcome(kind="interrupted", at=time.time())
        except (Exception, SystemExit) as error:
            if isinstance(error, ValueError | ProgramError | PreflightError):  # the traceback is in the events
                logger.error("rank %d failed: %s: %s", self.rank, type(error).__name__, error)
            else:
                logger.exception("rank %d failed", self.rank)
            puts_logs = True  # the one who does may be waiting for this one, and end without another word
            return Outcome(kind="failed", at=getattr(error, "at", None) or time.time(), failure=self.failure_of(error))
        finally:
            if self.mirror is not None and puts_logs:
                self.put_logs(self.mirror)
        return Outcome(kind="finished", at=time.time())

    def work(self) -> None:
        """Run the target, fenced off from other drivers and attempts."""
        job, workdir = self.job, Path(self.job.workdir)
        with fenced(
            job.out, workdir, epoch=job.epoch, attempt=job.attempt, is_writer=self.rank == 0,
            on_superseded=self.end_superseded,
        ):  # fmt: skip
            self.mirror = open_mirror(job.out, job.key.name, workdir, epoch=job.epoch)
            load_target(job.target)(self)

    def end_superseded(self) -> None:
        """End because another driver has come. In a thread of the driver: it sees the same and ends the process."""
        self.stop()

    def put_logs(self, mirror: Mirror) -> None:
        """Copy the logs to the object store; a store that refuses them must not hide how the rank ended."""
        try:
            mirror.put_logs()
        except Exception:
            logger.exception("rank %d could not store its logs", self.rank)

    def check_out(self) -> None:
        """Find the probe that the driver left. Raises OutNotShared if this node sees another folder."""
        root = local_root(self.job.out)
        if self.job.probe and root is not None and not (root / "probes" / self.job.probe).is_file():
            raise OutNotShared(
                f"out must be shared storage or a URI: node {self.node} does not see the driver's {root}"
            )

    def failure_of(self, error: BaseException) -> Failure:
        """Return error as plain values, with its traceback and the end of this rank's log."""
        kind = Kind.USER if isinstance(error, ValueError) else Kind.RAISED
        message = first_line(str(error)) or type(error).__name__
        if isinstance(error, PreflightError | ImportError):
            kind = Kind.PREFLIGHT
        if isinstance(error, NoRoomError) or is_full(error):
            kind = Kind.DISK
        if isinstance(error, ImportError):
            message = f"node {self.node} lacks a package: {message}; install it there as at the driver"
        if isinstance(error, ProgramError):
            kind = error.kind
        return Failure(
            kind=kind, rank=self.rank, node=self.node, message=self.job.redact(message),
            error_type="" if kind is Kind.DIED else type(error).__name__, at=self.newest.where,
            advice=getattr(error, "advice", ""), log_tail=self.log_tail(),
            traceback=self.job.redact("".join(traceback.format_exception(error))),
        )  # fmt: skip

    def log_tail(self) -> str:
        """Return the end of this rank's log."""
        path = self.job.log_path(self.rank)
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
            return self.job.redact(file.read().decode(errors="replace"))


def this_host() -> str:
    """Return what names this host and the numbering of its processes: hosts and containers may share a hostname."""
    return " ".join((socket.gethostname(), boot_id(), namespaces()))


def load_target(dotted: str) -> Callable[[Rank], object]:
    """Return the function named 'package.module:function'."""
    module, _, name = dotted.partition(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def import_ahead(target: str) -> None:
    """Import the module of a target, what it names in IMPORTS, and so on: what a rank imports once it has its job.

    Raises RuntimeError if that leaves more behind than modules, as far as `find_traces` of these modules can see.
    """
    names = [target.partition(":")[0]]
    for name in names:
        module = importlib.import_module(name)
        names += [further for further in getattr(module, "IMPORTS", ()) if further not in names]
    for module in map(sys.modules.__getitem__, names):
        traces = module.find_traces() if hasattr(module, "find_traces") else ""
        if traces:
            raise RuntimeError(f"imports alone have {traces}")


def redirect_output(path: Path) -> None:
    """Send everything this process prints, C code included, and its logging, to a file of its own.

    Ray's de-duplication of log lines would merge lines that differ only in numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(
        all_threads=False
    )  # a crash in compiled code leaves its signal and its stacks at the end of the file
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, force=True,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )  # fmt: skip
