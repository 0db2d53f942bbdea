"""Watches, beside a driver, whether Ray's head still answers.

A driver whose network is cut off hangs in its next call to Ray, for minutes, while Ray gives its node up and ends its
gangs. Nothing can be done about that from inside the call, so this ends the process: what was done is on disk.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable

from runner.errors import EXIT_INTERRUPTED

KNOCK_EVERY_S = 5.0
KNOCK_S = 5.0  # for a connection to be accepted
KNOCKS = 12  # in vain, in a row: one to two minutes, no less than Ray's own patience with a head that starts again


class HeadWatch:
    """Knocks at the head's port from a thread of its own until stop(); ends the process if there is only silence."""

    def __init__(self, address: str, *, on_silence: Callable[[str], None] | None = None) -> None:
        self.address = address
        self.on_silence = on_silence or end_process
        self.is_over = threading.Event()
        threading.Thread(target=self.watch, name="head-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self.is_over.set()

    def watch(self) -> None:
        """Count knocks in vain: unlike seconds they do not pass while this process is suspended."""
        in_vain = 0
        while in_vain < KNOCKS:
            if self.is_over.wait(KNOCK_EVERY_S):
                return
            in_vain = 0 if is_answering(self.address) else in_vain + 1
        self.on_silence(self.address)


def is_answering(address: str) -> bool:
    """Return whether host:port accepts a connection, or refuses it: a head that died is no silence, Ray sees it too."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def end_process(address: str) -> None:
    """End this process with one line; its lease runs out, and its gangs end as Ray sees that it is gone."""
    print(
        f"seedsweep: error: Ray's head at {address} does not answer any more; the gangs of this sweep end, and the "
        f"same command goes on where they were",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(EXIT_INTERRUPTED)
