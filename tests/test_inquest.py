"""What is learned of a process from outside: how it ended, and where it stands though no Python code runs in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runner.gang.inquest import End, call_off, learn_ends, start_watch, write_stacks
from tests.ray_tools import wait_until
from tests.test_runner_worker import make_rank

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ROOT = Path(__file__).parent.parent
WATCH = ROOT / "runner" / "gang" / "watch.py"


@contextmanager
def child(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Python code in a process that ends with the block."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def watched(process: subprocess.Popen[bytes], note: Path) -> subprocess.Popen[bytes]:
    """Return a watch over a process, once it looks."""
    watch = subprocess.Popen(
        [sys.executable, "-I", "-S", str(WATCH), str(process.pid), str(note)], stdin=subprocess.PIPE
    )
    wait_until(lambda: looks(watch.pid), 20, "no look")
    return watch


def looks(pid: int) -> bool:
    """Return whether a process holds a descriptor of another one."""
    try:
        return any("pidfd" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:  # it closed a file in between
        return False


LIVES = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
print(flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "killed by SIGKILL"),
        (signal.SIGABRT, "killed by SIGABRT"),
        (signal.SIGTERM, "exited with code 3"),  # as LIVES does then
    ],
)
def test_a_watch_notes_how_a_process_ended(number: int, words: str, tmp_path: Path) -> None:
    rank = make_rank(tmp_path)
    rank.job.log_path(0).parent.mkdir(parents=True)
    rank.job.log_path(0).write_text("the last words\n")
    with child(LIVES) as process:
        assert process.stdout is not None
        process.stdout.readline()
        watch = watched(process, rank.job.end_path(0))
        process.send_signal(number)
        process.wait()
        watch.communicate(timeout=20)
    end = learn_ends(rank.job, [{"rank": 0}])[0]
    assert end.words == words
    assert end.advice
    assert end.log_tail == "the last words\n"


def test_a_watch_that_is_called_off_notes_nothing(tmp_path: Path) -> None:
    with child("import time; time.sleep(600)") as process:
        watch = watched(process, tmp_path / "end.json")
        watch.communicate(b"over", timeout=20)
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_calling_off_waits_for_no_slow_watch_and_is_heard_though_the_process_ended(tmp_path: Path) -> None:
    with child("import time; time.sleep(600)") as process:
        watch = watched(process, tmp_path / "end.json")
        watch.send_signal(signal.SIGSTOP)  # as on a machine that gives it no time
        call_off(watch)
        process.kill()
        process.wait()
        watch.send_signal(signal.SIGCONT)
        assert watch.wait(timeout=20) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_may_have_itself_watched(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "end.json").write_text("how another process ended")
    watch = start_watch(tmp_path / "logs" / "end.json")
    watch.communicate(b"over", timeout=20)
    assert watch.returncode == 0
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_death_without_a_note_says_that_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.gang.inquest.NOTE_S", 0.1)
    end = learn_ends(make_rank(tmp_path).job, [{"rank": 0}])[0]
    assert (end.words, end.log_tail) == ("", "")
    assert "log" in end.advice


def test_memory_that_ran_out_is_told_from_a_kill_by_hand() -> None:
    assert "ran out of memory" in End(status=9, num_oom_kills=1).advice
    assert "dmesg" in End(status=9).advice
    assert "compiled code crashed" in End(status=11).advice


# keeps the interpreter's lock, and no signal ends it
DEADLOCK = (
    "lock, mutex = ctypes.PyDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64); lock(mutex); lock(mutex)"
)
STUCK = """
import ctypes, sys, threading
from runner.gang.inquest import listen_for_stacks
stacks = listen_for_stacks()
def stand_here():
    print(stacks[0], flush=True)
    {how}
stand_here()
"""


@pytest.mark.parametrize("how", ["threading.Event().wait()", DEADLOCK, "signal.raise_signal"])
def test_stacks_are_written_from_outside_whatever_a_process_is_stuck_in(how: str, tmp_path: Path) -> None:
    rank = make_rank(tmp_path)
    if how == "signal.raise_signal":  # it was stopped
        how = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); threading.Event().wait()"
    with child(STUCK.format(how=how)) as process:
        assert process.stdout is not None
        facts: dict[str, Any] = {"rank": 0, "pid": process.pid, "stacks_fd": int(process.stdout.readline())}
        time.sleep(0.2)
        (path,) = write_stacks(rank.job, [facts])
        assert process.poll() is None  # asking alone ends nobody
    text = Path(path).read_text()
    assert text.startswith(f"rank 0 pid {process.pid} at ")
    assert "in stand_here" in text


def test_a_process_that_cannot_answer_is_described_as_the_system_sees_it(tmp_path: Path) -> None:
    with child("import time; time.sleep(600)") as process:  # it never listened
        (path,) = write_stacks(make_rank(tmp_path).job, [{"rank": 0, "pid": process.pid, "stacks_fd": None}])
        assert f"  {process.pid} python" in Path(path).read_text()
    (path,) = write_stacks(make_rank(tmp_path).job, [{"rank": 0, "pid": process.pid, "stacks_fd": 3}])
    assert "its process is gone" in Path(path).read_text()
