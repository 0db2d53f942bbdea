"""Stands beside one process and notes how it ended: `python watch.py PID FILE`, with the standard library alone.

A process that is killed cannot say so, and its parent, Ray's daemon, tells nobody. This one waits for the end on a
file descriptor of the process and reads the status that the system keeps. A line on standard input means that the work
is over: how the process ends from then on is nobody's concern, and nothing is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import struct
import sys
import time
from pathlib import Path

PIDFD_GET_INFO = 0xC040FF0B  # <linux/pidfd.h>: _IOWR(0xFF, 11, 64 bytes), Linux 6.15 and newer
PIDFD_INFO_EXIT = 1 << 3
INFO_LAYOUT = "=QQ11Ii"  # mask, control group, pids and user ids, exit status
STAT_EXIT_CODE = 49  # place of exit_code behind the name in /proc/PID/stat


def zombie_status(pid: int) -> int | None:
    """Return the wait status of a process that has ended and was not collected, else None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[STAT_EXIT_CODE]) if fields[0] in "ZX" else None


def kept_status(pidfd: int) -> int | None:
    """Return the wait status that a newer system keeps of a process that was collected too, else None."""
    info = bytearray(struct.pack(INFO_LAYOUT, PIDFD_INFO_EXIT, *[0] * 13))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, *_, status = struct.unpack(INFO_LAYOUT, info)
    return int(status) if mask & PIDFD_INFO_EXIT else None


def num_oom_kills() -> int:
    """Return how many processes the kernel of this machine has killed for lack of memory."""
    try:
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def main(pid: int, path: Path) -> None:
    """Wait for the end of pid and write what is known of it."""
    try:
        pidfd = os.pidfd_open(pid)
    except (AttributeError, OSError):
        return  # not Linux, or gone already
    before = num_oom_kills()
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        ready = dict(poll.poll())
        if 0 in ready and os.read(0, 1):
            return  # asked first: a process may end before this one has read the line
        if pidfd in ready:
            break
        poll.unregister(0)  # its pipe ended with it
    status = zombie_status(pid)
    if status is None:
        status = kept_status(pidfd)
    note = {"status": status, "num_oom_kills": num_oom_kills() - before, "at": time.time()}
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(note))
    os.replace(aside, path)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
