"""Measuring processes: each measurement runs in a Python of its own, so that imports, caches and memory are fresh.

`Bench` is the parent's side: it starts them and gathers their samples. The child's side is jobs/bench/child.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jobs.bench.figures import Report
from runner.provenance import SOURCE_ROOT

CHILD_MODULE = "jobs.bench.child"
ERROR_TAIL_LINES = 20


class MeasurementFailed(Exception):
    """A measuring process died; what it said is on standard error."""


class Finished(NamedTuple):
    """A command that ended well: wall seconds of its process from start to end, and what it printed."""

    seconds: float
    stdout: str


@dataclass(slots=True)
class Bench:
    """One benchmark at work: what was asked for, a scratch folder, and the report that grows."""

    report: Report
    folder: Path
    repeats: int
    options: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Print one line of progress."""
        print(f"[bench {self.report.mode}] {text}", file=sys.stderr, flush=True)

    def measure(
        self,
        task: str,
        *,
        process: int = 0,
        prefix: str = "",
        num_ranks: int = 1,
        env: Mapping[str, str] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Run one task of jobs/bench/child.py, add its figures (names after prefix), and return its outcome.

        Raises ValueError for what the task found wrong with its input, MeasurementFailed if it died.
        """
        label = f"{prefix.rstrip(': ') or task} {process + 1}/{self.repeats}"
        self.say(label)
        outcome = self._run_child({**self.options, "task": task, "process": process, "label": label, **more},
                                  num_ranks, env or {})  # fmt: skip
        if "error" in outcome:
            raise ValueError(outcome["error"])
        for name, unit, values, wanted in outcome["figures"]:
            self.report.add(f"{prefix}{name}", unit, values, wanted=wanted)
        self.report.environment |= outcome["facts"]
        for text in outcome["notes"]:
            self.report.note(text)
        return outcome

    def _run_child(self, request: dict[str, Any], num_ranks: int, env: Mapping[str, str]) -> dict[str, Any]:
        """Start a measuring process (or a gang of them), wait, and return what it left."""
        asked, left = self.folder / "request.json", self.folder / "outcome.json"
        left.unlink(missing_ok=True)
        command = [sys.executable, "-m", CHILD_MODULE, str(asked), str(left)]
        if num_ranks > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
            command[1:2] = [*launch, "--nproc-per-node", str(num_ranks), "-m"]
        asked.write_text(json.dumps({**request, "spawned_at": time.time()}))
        code = self.execute(command, environment_of_children(env))
        if not left.is_file():
            raise MeasurementFailed(f"task {request['task']} ended with exit code {code}")
        outcome: dict[str, Any] = json.loads(left.read_text())
        return outcome

    def execute(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a measuring process to its end and return its exit code."""
        return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False).returncode

    def run_command(self, arguments: Sequence[str], *, accepted: Sequence[int] = (0,)) -> Finished:
        """Run Python with arguments in a fresh process. Raises MeasurementFailed on another exit code."""
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *arguments], env=environment_of_children({}), capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        if done.returncode not in accepted:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_TAIL_LINES:])
            raise MeasurementFailed(f"{' '.join(arguments)} ended with exit code {done.returncode}:\n{tail}")
        return Finished(seconds, done.stdout)


def environment_of_children(more: Mapping[str, str]) -> dict[str, str]:
    """Return this process's environment in which our packages come before whatever a folder has."""
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1", **more}
