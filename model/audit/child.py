"""Runs a program where it can see little else: started by an audit in a fresh process, with the standard library only.

Usage: python -I audit_child.py SPEC.json. The program runs behind an audit hook that refuses to read files outside the
allowed folders and to use the network. Where the process was put into a mount namespace of its own, the files to hide
are covered first, so that C code cannot read them either. What happened is written to the spec's report.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import Any

MS_BIND = 4096
NETWORK_EVENTS = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"})
SYSTEM_FOLDERS = ("/proc", "/sys", "/dev", "/usr", "/lib", "/lib64", "/etc", "/opt/nvidia")


def cover(paths: list[str]) -> str:
    """Put /dev/null over each file in this mount namespace; return why that failed, or an empty string."""
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        if libc.mount(b"/dev/null", os.fsencode(path), None, MS_BIND, None) != 0:
            return f"cannot cover {path}: {os.strerror(ctypes.get_errno())}"
    return ""


def list_readable(paths: list[str]) -> list[str]:
    """Return the paths behind which there is still something to read."""
    found = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                if file.read(1):
                    found.append(path)
        except OSError:
            continue
    return found


class Guard:
    """The hook: refuses and notes what a program that stands alone has no need for."""

    def __init__(self, allowed: list[str], hidden: list[str]) -> None:
        self.hidden = frozenset(map(os.path.realpath, hidden))  # a covered file is none any more, yet not to be opened
        self.allowed = tuple(os.path.join(os.path.realpath(folder), "") for folder in allowed)
        self.refused: list[str] = []
        self.is_awake = True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Raise PermissionError for network use and for reads outside the allowed folders."""
        if not self.is_awake:
            return
        if event in NETWORK_EVENTS:
            self.refuse(f"network: {event}")
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if path in self.hidden or (not path.startswith(self.allowed) and os.path.isfile(path)):
                self.refuse(f"file: {path}")

    def refuse(self, what: str) -> None:
        """Note what was tried and stop it."""
        self.refused.append(what)
        raise PermissionError(f"the audit allows no {what}")


def main(spec_path: str) -> int:
    """Run the program of the spec and write the report; return 0 whatever the program did."""
    spec = json.loads(Path(spec_path).read_text())
    problem = cover(spec["hidden"]) if spec["is_isolated"] else ""
    report: dict[str, Any] = {
        "cover_problem": problem,
        "readable": list_readable(spec["hidden"]),
        "interfaces": [name for _, name in socket.if_nameindex()],
    }
    own = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
    sys.path[:] = [path for path in own if "site-packages" in path or "lib" in Path(path).parts]
    guard = Guard([*spec["allowed"], *SYSTEM_FOLDERS, sys.base_prefix, *own], spec["hidden"])
    sys.addaudithook(guard)
    sys.argv = [spec["program"], *spec["arguments"]]
    try:
        runpy.run_path(spec["program"], run_name="__main__")
        code: object = 0
    except SystemExit as end:
        code = end.code or 0
    except PermissionError as error:
        code = str(error)
    finally:
        guard.is_awake = False
    report |= {"exit": code, "refused": guard.refused}
    Path(spec["report"]).write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
