"""Signals that end a sweep in order: SIGTERM, Ctrl-C, and the hangup of a terminal that is closed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def raise_interrupt() -> None:
    """End what is going on as Ctrl-C does, before there is a scheduler that ends runs in order."""
    raise KeyboardInterrupt


@contextmanager
def signals_end(interrupt: Callable[[], None]) -> Iterator[None]:
    """Let SIGTERM, SIGHUP and Ctrl-C call interrupt; a second Ctrl-C ends the process the usual way.

    A hangup that is ignored already, as under nohup, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt()

    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal() -> None:
    """Send what is still printed nowhere: the terminal is gone, and writing to it would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if os.isatty(descriptor):
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
