"""Driving the fuzz workers: one child a loader, a time limit a file, a new child after every crash or hang."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.bench.process import environment_of_children

LOADERS = ("artifact", "shard", "manifest", "checkpoint", "spec", "parquet", "tokenizer")
GUIDED = ("artifact", "shard", "manifest", "checkpoint", "spec")  # parsers of our own
THIRD_PARTY = ("parquet", "tokenizer")  # parsers that are not ours run guarded, and on fewer files
THIRD_PARTY_FILES = 1000
START_TIMEOUT_S = 300.0
FILE_TIMEOUT_S = 20.0
SEED_STRIDE = 1_000_000_007  # between the files of one --seed and those of the next


@dataclass(slots=True)
class Outcome:
    """What came of one loader: how many files were refused or loaded, and every fault by the seed of its file."""

    loader: str
    num_files: int = 0
    num_refused: int = 0
    seconds: float = 0.0
    faults: dict[int, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the outcome as plain values."""
        return {
            "loader": self.loader, "files": self.num_files, "refused": self.num_refused,
            "loaded": self.num_files - self.num_refused - len(self.faults), "seconds": round(self.seconds, 1),
            "faults": {str(seed): reason for seed, reason in self.faults.items()},
        }  # fmt: skip


class WorkerDied(Exception):
    """The child process ended, or was ended because it took too long."""


class Worker:
    """One child process that loads files of one loader."""

    def __init__(self, loader: str, folder: Path, *, module: str = "tests.fuzz.worker") -> None:
        environment = environment_of_children({"OMP_NUM_THREADS": "1"})
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, loader, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=Path(__file__).resolve().parents[2],
        )  # fmt: skip
        assert self.process.stdout is not None
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)
        self.waiting = b""
        try:
            self._line(START_TIMEOUT_S)
        except WorkerDied as error:
            self.close()
            raise ValueError(f"the {loader} worker did not start: {error}") from None

    def load(self, seed: int) -> dict[str, Any]:
        """Let the child load one file. Raises WorkerDied if it crashes or hangs over it."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{seed}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerDied(self._ending()) from None
        return self._line(FILE_TIMEOUT_S)

    def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self.waiting:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                self.process.kill()
                raise WorkerDied(f"hung: no answer in {timeout_s:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 1 << 16)
            if not piece:
                raise WorkerDied(self._ending())
            self.waiting += piece
        line, _, self.waiting = self.waiting.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def _ending(self) -> str:
        code = self.process.wait()
        return f"crashed: signal {-code}" if code < 0 else f"crashed: exit code {code}"

    def close(self) -> None:
        """End the child."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.selector.close()
        with contextlib.suppress(BrokenPipeError):  # what was not yet sent to a child that died
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def file_seeds(seed: int, count: int) -> Iterator[int]:
    """Yield the seed of every file of a run."""
    yield from range(seed * SEED_STRIDE, seed * SEED_STRIDE + count)


def fuzz_loader(
    loader: str,
    folder: Path,
    *,
    seed: int,
    count: int,
    report: Callable[[Outcome], None] = lambda _outcome: None,
    module: str = "tests.fuzz.worker",
) -> Outcome:
    """Load count mutated files of one loader and return what came of them.

    report hears every 1,000 files. module is the program of the child.
    """
    outcome, started = Outcome(loader), time.monotonic()
    worker = Worker(loader, folder / loader, module=module)
    try:
        for file_seed in file_seeds(seed, count):
            try:
                reply = worker.load(file_seed)
            except WorkerDied as error:
                reply = {"fault": str(error)}
                worker.close()
                worker = Worker(loader, folder / loader, module=module)
            outcome.num_files += 1
            if "fault" in reply:
                outcome.faults[file_seed] = reply["fault"]
            elif reply["refusal"]:
                outcome.num_refused += 1
            outcome.seconds = time.monotonic() - started
            if outcome.num_files % 1000 == 0:
                report(outcome)
    finally:
        worker.close()
    return outcome


def fuzz_guided(loader: str, folder: Path, *, seed: int, count: int) -> Outcome:
    """Let atheris mutate files of one loader towards new branches; its process ends at the first fault.

    Raises ValueError where atheris is not installed.
    """
    if importlib.util.find_spec("atheris") is None:
        raise ValueError("--guided needs atheris, which is not installed: pip install atheris")
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.coverage", loader, str(folder / loader), str(count), str(seed)],
        env=environment_of_children({"OMP_NUM_THREADS": "1"}), cwd=Path(__file__).resolve().parents[2],
        capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    outcome = Outcome(loader, num_files=count, seconds=time.monotonic() - started)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "ERROR" in line]
        outcome.faults[seed] = (lines or [f"exit code {done.returncode}"])[-1][:300]
    return outcome
