"""Stands over one process of a program and everything that it starts: `python keeper.py`, the standard library alone.

Whoever starts this writes one JSON line to its input: {"argv", "env", "cwd", "output"}. Orphans of the program come to
this process, so that none can hide: not in a session of its own, not behind a parent that has ended. When the program
ends, when "stop SECONDS" is asked for, or when the input closes because the asker is gone, all that lives below gets
SIGTERM, and SIGKILL soon after. Answers are JSON lines: {"pid"}, {"started"} or {"error"}, {"ended", "at"},
{"status", "left", "stuck"}.

It leaves the process that started it at once: whoever kills that one's children must not get this one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time

SET_PDEATHSIG, SET_SUBREAPER = 1, 36  # <linux/prctl.h>
GONE_GRACE_S = 1.0  # from SIGTERM to SIGKILL where nobody is there to wait for
GIVE_UP_S = 60.0  # for killed processes to vanish: a driver may hold one for ever
LOOK_S = 0.05
SETTLE_S = 0.5  # after the program's end, for helpers that end by themselves


def say(**answer: object) -> None:
    """Write one answer; nobody may be there to read it."""
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(answer).encode() + b"\n")


def prctl(option: int, value: int) -> None:
    """Ask the kernel for something, where it is Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the living processes below pid, as /proc shows them."""
    children: dict[int, list[int]] = {}
    try:
        names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    for name in names:
        try:
            with open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":  # the children of one that has ended are somebody else's by now
            children.setdefault(int(fields[1]), []).append(int(name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def alive_below() -> list[int]:
    """Return the living processes below this one."""
    return descendants(os.getpid())


class Keeper:
    """One program process, from its start until nothing below it is left."""

    def __init__(self) -> None:
        self.main = 0
        self.status: int | None = None
        self.buffer = b""
        self.has_asker = True
        self.wake = os.pipe()
        for end in self.wake:
            os.set_blocking(end, False)
        # heard, not ignored: what is ignored here would be ignored by the program
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self.wake[1])

    def read_lines(self, timeout_s: float) -> list[str]:
        """Return the lines that arrived, waiting for one, or for a child's end, up to timeout_s."""
        watched = [self.wake[0], *([0] if self.has_asker else [])]
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if self.wake[0] in ready:
            with contextlib.suppress(OSError):
                os.read(self.wake[0], 4096)
        if 0 in ready:
            content = os.read(0, 1 << 16)
            self.has_asker = bool(content)
            self.buffer += content
        *lines, self.buffer = self.buffer.split(b"\n")
        return [line.decode() for line in lines]

    def collect(self) -> None:
        """Take the status of every child that has ended, adopted ones included."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self.main:
                    self.status = status

    def start(self, order: dict[str, object]) -> bool:
        """Start the program; return whether that was possible."""
        try:
            output = os.open(str(order["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            process = subprocess.Popen(
                order["argv"], cwd=order["cwd"], env=order["env"], stdin=subprocess.DEVNULL, stdout=output,  # type: ignore[call-overload]
                stderr=output, start_new_session=True, preexec_fn=lambda: prctl(SET_PDEATHSIG, signal.SIGKILL),
            )  # fmt: skip
        except OSError as error:
            say(error=f"{error.filename or order['argv']}: {error.strerror}")
            return False
        os.close(output)
        self.main = process.pid
        process.returncode = 0  # its status is taken here, not there
        say(started=self.main)
        return True

    def work(self, lines: list[str]) -> None:
        """Wait for the program's end, or for somebody who wants it; then leave nothing behind."""
        grace_s: float | None = None
        while self.status is None and self.has_asker and grace_s is None:
            grace_s = next((float(line.split()[1]) for line in lines if line.startswith("stop ")), None)
            self.collect()
            if self.status is None and grace_s is None:
                lines = self.read_lines(1.0)
        has_ended = grace_s is None and self.has_asker
        say(ended=self.status, at=time.time())
        begun = time.monotonic()
        while has_ended and self.has_asker and alive_below() and time.monotonic() - begun < SETTLE_S:
            self.read_lines(LOOK_S)
            self.collect()
        left = self.clear(GONE_GRACE_S if grace_s is None else grace_s)
        say(status=self.status, left=len(left) if has_ended else 0, stuck=alive_below())

    def clear(self, grace_s: float) -> set[int]:
        """End everything below this process and return what there was."""
        seen: set[int] = set()
        begun = time.monotonic()
        while time.monotonic() - begun < grace_s + GIVE_UP_S:
            self.collect()
            alive = alive_below()
            if not alive:
                break
            if not self.has_asker:
                grace_s = min(grace_s, GONE_GRACE_S)
            is_over = time.monotonic() - begun >= grace_s
            for pid in alive:
                if is_over or pid not in seen:
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.kill(pid, signal.SIGKILL if is_over else signal.SIGTERM)
            seen.update(alive)
            self.read_lines(LOOK_S)
        self.collect()
        return seen


def main() -> None:
    """Leave the parent, take the order, keep the program."""
    if os.fork():
        os._exit(0)
    os.setsid()
    prctl(SET_SUBREAPER, 1)
    say(pid=os.getpid())
    keeper = Keeper()
    lines: list[str] = []
    while keeper.has_asker and not lines:
        lines = keeper.read_lines(1.0)
    if lines and keeper.start(json.loads(lines[0])):
        keeper.work(lines[1:])


if __name__ == "__main__":
    main()
