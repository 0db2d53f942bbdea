"""A driver whose cluster's head does not answer any more ends; one whose head comes back goes on."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import EXIT_INTERRUPTED
from runner.machine import head_watch
from runner.machine.head_watch import HeadWatch, is_answering

REFUSED = "127.0.0.1:1"  # nobody listens there
SILENT = "[::ffff:0.0.0.0:0]:1"  # no address


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Knock often."""
    monkeypatch.setattr(head_watch, "KNOCK_EVERY_S", 0.01)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A port that accepts connections."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_only_silence_in_a_row_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    few, enough = head_watch.KNOCKS - 1, head_watch.KNOCKS
    script = [*[False] * few, True, *[False] * few, True, *[False] * enough]
    heard, is_silent = list(script), threading.Event()
    monkeypatch.setattr(head_watch, "is_answering", lambda _address: heard.pop(0))
    HeadWatch(SILENT, on_silence=lambda _address: is_silent.set())
    assert is_silent.wait(20)
    assert heard == []


def test_a_head_that_answers_is_left_alone(listener: socket.socket) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    assert is_answering(address)
    assert is_answering(REFUSED)
    assert not is_answering(SILENT)
    is_silent = threading.Event()
    watch = HeadWatch(address, on_silence=lambda _address: is_silent.set())
    for _ in range(2 * head_watch.KNOCKS):
        listener.accept()[0].close()
    watch.stop()
    assert not is_silent.is_set()


def test_the_process_ends_with_one_line_whatever_it_hangs_in() -> None:
    code = (
        "import threading; from runner.machine import head_watch as w; w.KNOCK_EVERY_S = 0.01; "
        f"w.HeadWatch({SILENT!r}); threading.Lock().acquire(); lock = threading.Lock(); lock.acquire(); lock.acquire()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == EXIT_INTERRUPTED
    assert done.stderr.splitlines() == [
        f"seedsweep: error: Ray's head at {SILENT} does not answer any more; the gangs of this sweep end, and the same "
        "command goes on where they were"
    ]
