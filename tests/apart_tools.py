"""Ray on the hosts of a lab, and drivers of sweeps there: what tests of nodes that are really apart stand on."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from model.corpus.shard_file import write_shard
from tests.netlab import Host, Lab, python
from tests.ray_tools import wait_until
from tests.small_run import TOKENIZER

CPUS = 2  # of each node that works: room for one gang
GCS_PORT = 6379
# Ray gives a node up after about 9 s without an answer
ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "3",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5eed" * 16, "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
DATA, UNSHARED = "data", "unshared"


class Cluster:
    """A lab with Ray on its hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a short path: sockets lie there
        self.address = ""
        self.hosts: dict[str, Host] = {}
        self.scratch = folder / "scratch"  # where a node works whose sweep is behind a URI
        self.scratch.mkdir()
        self.lab = Lab({**ENVIRONMENT, "HF_HOME": str(folder / "hub"), "TMPDIR": str(self.scratch)})

    def add(self, name: str, *, cpus: int = 0, hidden: tuple[Path, ...] = ()) -> None:
        """Add a host and start Ray on it; the first one becomes the head."""
        host = self.hosts[name] = Host(
            self.lab, name, len(self.hosts) + 1, hidden=(*hidden, self.sessions, self.scratch)
        )
        role = ["--address", self.address] if self.address else ["--head", "--port", str(GCS_PORT),
                "--include-dashboard", "false", "--no-monitor", "--temp-dir", str(self.sessions)]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            host.start(
                python("-m", "ray.scripts.scripts", "start", *role, "--node-ip-address", host.address, "--block",
                       "--num-cpus", str(cpus), "--object-store-memory", "80000000"),
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if not self.address:
            self.address = f"{host.address}:{GCS_PORT}"
            knock = python("-c", f"import socket; socket.create_connection(('{host.address}', {GCS_PORT}), 1)")
            wait_until(lambda: not host.start(knock, stderr=subprocess.DEVNULL).wait(), 60, "the head did not start")

    def close(self) -> None:
        """End everything; the folder of sessions is empty outside of the hosts."""
        self.lab.close()
        self.sessions.rmdir()

    def wait_for_nodes(self, *names: str) -> None:
        """Wait until Ray knows these hosts."""
        wanted = [self.hosts[name].address for name in names]
        code = f"""
import ray, time
while not ray.is_initialized():
    try: ray.init("{self.address}", log_to_driver=False, logging_level="CRITICAL")
    except ConnectionError: time.sleep(0.5)
while not set({wanted}) <= {{node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}}: time.sleep(0.2)
"""
        ask(self.hosts["head"], code)

    def drive(self, *arguments: str, on: str = "desk", log: str = "driver") -> Driver:
        """Start a driver on a host."""
        return Driver(self.hosts[on], arguments, self.folder / f"{log}.log")

    def drive_stub(self, out: Path, *, on: str = "desk", **given: Any) -> Driver:
        """Start the driver of stub work on a host."""
        given |= {"out": str(out), "address": self.address, "on_loopback": False}
        return self.drive("-m", "tests.drive_sweep", json.dumps(given), on=on, log=out.name)


class Driver:
    """A driver on a host, and what it says."""

    def __init__(self, host: Host, arguments: tuple[str, ...], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = host.start(python(*arguments), stdout=file, stderr=subprocess.STDOUT)

    def wait(self, within_s: float) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end within {within_s} s:\n{self.text()}") from None

    def text(self) -> str:
        """Return what it has said so far."""
        return self.log.read_text()


def ask(host: Host, code: str) -> str:
    """Run Python code on a host and return what it prints."""
    done = host.start(python("-c", code), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = done.communicate(timeout=120)
    assert done.returncode == 0, error.decode()
    return out.decode()


def interfaces() -> set[str]:
    """Return the network interfaces of this machine."""
    return set(psutil.net_if_addrs())


def write_corpus(folder: Path) -> None:
    """Write made-up shards and their tokenizer, as the hub has them."""
    folder.mkdir()
    generator = np.random.Generator(np.random.PCG64(1))
    for name, num_documents in (("val_000000", 6), ("train_000000", 60)):
        documents = [np.append([1], 300 + generator.zipf(1.3, size=120) % 7000) for _ in range(num_documents)]
        write_shard(folder / f"fineweb_{name}.bin", np.concatenate(documents))
    (folder / TOKENIZER.name).write_bytes(TOKENIZER.read_bytes())
