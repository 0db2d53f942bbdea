"""Hosts that are really apart, on this machine: namespaces of their own for network, pids, mounts and hostname.

A lab is one process, the first of its namespaces: everything in it is its descendant. It ends when its standard input
closes, and the kernel ends all the others with it, their interfaces and namespaces too: nothing has a name that could
be left behind, and a test that is killed leaves no more than one that passes. Addresses are known inside only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
NETWORK = "10.77.0"
SWITCH = f"{NETWORK}.254"  # where servers of nobody's stand
START_S = 20.0
APART = ["unshare", "--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc", "--"]
# Nobody answers questions for names here: each would cost ten seconds.
DEAF = "mount --bind /dev/null /etc/resolv.conf && "
REAP = "while :; do sleep 5 & wait; done"  # the first process of a host collects those whose parents have ended


def why_not() -> str:
    """Return why no lab can be made here, "" where one can."""
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no `{tool}` (Debian: apt-get install iproute2 util-linux)"
    script = (
        "ip link add veth0 type veth peer name veth1 && ip link add br0 type bridge && ip link set veth0 master br0"
    )
    done = subprocess.run([*APART, "sh", "-c", script], capture_output=True, text=True, timeout=START_S)
    return f"namespaces cannot be made here ({done.stderr.strip()})" if done.returncode else ""


class Host:
    """One host of a lab; pid is that of its first process, as seen from here."""

    def __init__(self, lab: Lab, name: str, number: int, *, hidden: Sequence[Path] = ()) -> None:
        self.lab, self.name, self.address, self.port = lab, name, f"{NETWORK}.{number}", f"port{number}"
        binds = "".join(f"mount -t tmpfs none {path} && " for path in hidden)  # folders that are this host's own
        script = f"hostname {name} && {DEAF}{binds}echo ready && {{ {REAP}; }}"
        process = lab.start([*APART, "bash", "-c", script], stdout=subprocess.PIPE)
        wait_for_ready(process)
        self.pid = innermost(process.pid).pid
        lab.ip("link", "add", self.port, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid))
        lab.ip("link", "set", self.port, "master", "br0", "up")
        self.ip("link", "set", "lo", "up")
        self.ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("link", "set", "eth0", "up")
        self.ip("route", "add", "default", "via", SWITCH)

    def ip(self, *words: str) -> None:
        """Run `ip` in this host's network."""
        subprocess.run(["nsenter", "-t", str(self.pid), "-n", "--", "ip", *words], check=True, timeout=START_S)

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a program on this host."""
        enter = ["nsenter", "-t", str(self.pid), "--net", "--pid", "--mount", "--uts", "--wd=" + str(ROOT), "--"]
        return self.lab.popen([*enter, *command], **options)

    def cut(self) -> None:
        """Pull the host's plug."""
        self.lab.ip("link", "set", self.port, "down")

    def mend(self) -> None:
        """Put it back."""
        self.lab.ip("link", "set", self.port, "up")

    def processes(self) -> list[psutil.Process]:
        """Return what runs on this host besides its first process and that one's sleep."""
        found = [p for p in psutil.Process(self.pid).children(recursive=True) if p.name() != "sleep"]
        return [p for p in found if p.status() != psutil.STATUS_ZOMBIE]


class Lab:
    """A switch with hosts on it; close() ends everything."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = {**ours, **environment}  # other tests keep their Ray on loopback
        script = (
            f"{DEAF}ip link set lo up && ip link add br0 type bridge && ip address add {SWITCH}/24 dev br0 && "
            "ip link set br0 up && echo ready && exec cat"
        )
        self.started: list[subprocess.Popen[bytes]] = []
        self.process = self.popen([*APART, "bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        wait_for_ready(self.process)
        self.first = innermost(self.process.pid)

    def popen(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a program from here, with the lab's environment."""
        process = subprocess.Popen(command, env=self.environment, cwd=ROOT, **options)  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def start(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a program at the switch."""
        enter = ["nsenter", "-t", str(self.first.pid), "--net", "--pid", "--mount", "--uts", "--wd=" + str(ROOT), "--"]
        return self.popen([*enter, *command], **options)

    def ip(self, *words: str) -> None:
        """Run `ip` in the switch's network; a pid in words is as seen from here."""
        subprocess.run(["nsenter", "-t", str(self.first.pid), "-n", "--", "ip", *words], check=True, timeout=START_S)

    def close(self) -> None:
        """End the lab and wait until nothing of it is left."""
        family = [member for process in self.started for member in descendants(process.pid)]
        inside = networks(family) - networks([psutil.Process()])
        assert self.process.stdin is not None
        self.process.stdin.close()
        for process in self.started:
            process.wait(timeout=START_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        _, alive = psutil.wait_procs(family, timeout=START_S)
        assert not alive, f"left in the lab: {alive}"
        assert not inside & networks(psutil.process_iter()), "a network of the lab is left"


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes below one, none where it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def networks(processes: Iterable[psutil.Process]) -> set[str]:
    """Return the networks that processes live in."""
    found = set()
    for process in processes:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{process.pid}/ns/net"))
    return found


def wait_for_ready(process: subprocess.Popen[bytes]) -> None:
    """Wait until a program says that it is ready."""
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", f"not ready: {process.args}"


def innermost(pid: int) -> psutil.Process:
    """Return the program that others were started for: what nsenter and unshare run."""
    found, begun = psutil.Process(pid), time.monotonic()
    while found.name() in ("nsenter", "unshare") and time.monotonic() - begun < START_S:
        found = next(iter(found.children()), found)
    return found


def python(*arguments: str) -> list[str]:
    """Return the command of a Python program."""
    return [sys.executable, *arguments]
