"""A process of a program as its rank sees it: the keeper that stands over it, how it ended, what it has printed."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

GANG_VARIABLE = "SEEDSWEEP_GANG"  # in the environment of a program's processes: finds those that nobody keeps any more
NEWEST_BYTES = 1 << 16  # of what was printed since the last look, enough to see how far it is
NEWEST_LINES = 200
HELLO_S = 60.0


class Keeper:
    """The process beside this one that starts a program and leaves nothing of it behind, whatever happens here.

    Its input is the life-line: the kernel closes it when this process ends, also by SIGKILL.
    """

    def __init__(self, workdir: str = "") -> None:
        """Start it; the run directory is there for whoever looks at a list of processes."""
        script = Path(__file__).with_name("keeper.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(script), workdir], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.answers: list[dict[str, Any]] = []
        self.pid = int(json.loads(self.process.stdout.readline())["pid"])
        self.process.wait(HELLO_S)  # the keeper has left it
        self.token = ""
        self.has_ended = threading.Event()  # the program; what it left behind may still be there
        self.is_over = threading.Event()
        threading.Thread(target=self.listen, name="keeper", daemon=True).start()

    def listen(self) -> None:
        """Take the keeper's answers until it is gone."""
        assert self.process.stdout is not None
        with self.process.stdout as answers:
            for line in answers:
                self.answers.append(json.loads(line))
                if "ended" in self.answers[-1] or "error" in self.answers[-1]:
                    self.has_ended.set()
        self.has_ended.set()
        self.is_over.set()

    def start(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, output: Path) -> None:
        """Let the program be started; what it prints is added to the file output."""
        self.token = env.get(GANG_VARIABLE, "")
        self.tell(json.dumps({"argv": list(argv), "env": dict(env), "cwd": str(cwd), "output": str(output)}))

    def stop(self, grace_s: float) -> None:
        """Let everything be ended, with so long between SIGTERM and SIGKILL."""
        self.tell(f"stop {grace_s:g}")

    def tell(self, line: str) -> None:
        """Send a line; a keeper that is gone shows by its silence."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, name: str) -> Any:
        """Return what the keeper has said under a name, None where it has said nothing of it."""
        return next((answer[name] for answer in self.answers if name in answer), None)

    def close(self) -> None:
        """Let go: what still lives is ended at once. What a keeper that was killed left is ended from here."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()
        if self.is_over.is_set() and self.answer("status") is None and self.answer("error") is None and self.token:
            kill_marked(self.token)


def kill_marked(token: str) -> None:
    """End every process whose environment holds a gang's token."""
    for _ in range(20):
        marked = [process for process in psutil.process_iter() if is_marked(process, token)]
        if not marked:
            return
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def is_marked(process: psutil.Process, token: str) -> bool:
    """Return whether a living process has the token of a gang."""
    try:
        return process.environ().get(GANG_VARIABLE) == token and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


class Output:
    """What a gang's processes have printed or written to logs so far: whether it grows, and its newest lines."""

    def __init__(self, own: Path, others: Iterable[Path] = ()) -> None:
        self.own, self.others = own, tuple(others)
        self.further: tuple[Path, ...] = ()
        self.sizes: dict[Path, int] = {}
        self.offsets: dict[Path, int] = {}

    def skip(self, further: Iterable[Path]) -> None:
        """Take what stands in further logs already as no news: they came with the program."""
        self.sizes = {path: size_of(path) for path in further}
        self.offsets = dict(self.sizes)

    def has_grown(self, further: Iterable[Path] = ()) -> bool:
        """Return whether any rank has printed something, or written to a further log, since the last call."""
        self.further = tuple(further)
        sizes = {path: size_of(path) for path in (self.own, *self.others, *self.further)}
        has_grown = any(size != self.sizes.get(path, 0) for path, size in sizes.items())
        self.sizes = sizes
        return has_grown

    def longer_than(self, limit: int) -> Path | None:
        """Return what this rank has printed, or a further log as of the last call, if it has more bytes than limit."""
        return next((path for path in (self.own, *self.further) if size_of(path) > limit), None)

    def new_lines(self) -> list[str]:
        """Return the newest whole lines of this rank and of the further logs since the last call, the logs' last.

        Of many lines of one file only the last ones.
        """
        return [line for path in (self.own, *self.further) for line in self.lines_of(path)]

    def lines_of(self, path: Path) -> list[str]:
        """Return the newest whole lines of one file since the last call."""
        size, offset = size_of(path), self.offsets.get(path, 0)
        if size == offset:
            return []
        offset = offset if size > offset else 0  # it was begun anew
        with contextlib.suppress(OSError), path.open("rb") as file:
            file.seek(max(offset, size - NEWEST_BYTES))
            content = file.read(NEWEST_BYTES)
            whole, mark, rest = content.rpartition(b"\n")
            self.offsets[path] = size - (len(rest) if mark else 0)
            return whole.decode(errors="replace").splitlines()[-NEWEST_LINES:]
        return []


def size_of(path: Path) -> int:
    """Return a file's size, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
