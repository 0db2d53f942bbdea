"""A cluster of four nodes with eight made-up GPUs each on this machine, and drivers as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner.gang.ray_start import LOOPBACK_VARIABLE, PRIORITY_VARIABLE
from runner.spec.gang import Gang
from runner.sweep import run_sweep
from runner.work import Options
from tests.stub_work import GANG_TARGET, TARGET
from tests.sweep_tools import make_spec

os.environ[LOOPBACK_VARIABLE] = "0"  # before Ray is imported: its servers listen on loopback
os.environ[PRIORITY_VARIABLE] = "0"  # as in a cluster of our own: tests of another process must not starve these

NUM_NODES = 4
NODE = {"num_cpus": 8, "num_gpus": 8, "node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000}
WHOLE_NODE = Gang(gpus=1, cpus=8)  # one process that fills a node; eight ranks would take eight times as long
DRIVERS: list[subprocess.Popen[bytes]] = []  # that `start_driver` started
ROOT = Path(__file__).parent.parent


def start_cluster(num_nodes: int) -> Any:
    """Start a head and its nodes; the caller ends it with shutdown()."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(num_nodes - 1):
        cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    return cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Four nodes for a whole module; afterwards no process of theirs may be left."""
    before = our_processes()
    cluster = start_cluster(NUM_NODES)
    yield cluster
    cluster.shutdown()
    wait_until(lambda: our_processes() <= before, 20, "processes of the cluster are left")


def our_processes() -> set[int]:
    """Return the pids of every Ray process and rank below this one."""
    return {
        child.pid for child in psutil.Process().children(recursive=True) if child.is_running() and not is_zombie(child)
    }


def listening() -> set[str]:
    """Return every address that a process below this one listens on."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        try:
            connections = child.net_connections(kind="inet")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        found |= {str(c.laddr.ip).removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN}
    return found


def is_zombie(process: psutil.Process) -> bool:
    """Return whether a process has ended and only waits to be collected."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def wait_until(is_reached: Callable[[], bool], seconds: float, otherwise: str) -> float:
    """Wait until something is so and return how long it took; fail after that many seconds."""
    begun = time.monotonic()
    while not is_reached():
        assert time.monotonic() - begun < seconds, otherwise
        time.sleep(0.05)
    return time.monotonic() - begun


def sweep(out: Path, address: str, *, target: str = TARGET, gang: Gang = WHOLE_NODE, **changes: Any) -> int:
    """Run a sweep in this process on the cluster and return its exit code."""
    spec = make_spec(out, gang=gang, **changes)
    return run_sweep(spec, Options(address=address, target=target, progress="plain"))


def start_driver(out: Path, address: str | None, **changes: Any) -> subprocess.Popen[bytes]:
    """Run a sweep in a process of its own, so that it can be killed."""
    arguments = json.dumps({"out": str(out), "address": address, **changes})
    DRIVERS.append(subprocess.Popen([sys.executable, "-m", "tests.drive_sweep", arguments], cwd=ROOT))
    return DRIVERS[-1]


def end_drivers() -> None:
    """End drivers that a failed test left behind, and collect them, lest the next test fails of them."""
    while DRIVERS:
        driver = DRIVERS.pop()
        if driver.poll() is None:
            driver.kill()
            driver.wait()


def end(process: subprocess.Popen[bytes], number: int = signal.SIGKILL, *, within_s: float = 30.0) -> int:
    """Send a signal and return the exit code."""
    process.send_signal(number)
    return process.wait(timeout=within_s)


def in_use(address: str) -> dict[str, float]:
    """Return the GPUs and CPUs of the cluster that somebody holds, and the groups and actors that live."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    try:
        total, free = ray.cluster_resources(), ray.available_resources()
        held = {name: total.get(name, 0) - free.get(name, 0) for name in ("GPU", "CPU")}
        groups = ray.util.placement_group_table().values()
        return {**held, "groups": sum(group["state"] != "REMOVED" for group in groups)}
    finally:
        ray.shutdown()


def ranks_below(process: psutil.Process) -> list[psutil.Process]:
    """Return the ranks below a process, at work or waiting, that have not ended."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RankActor" in " ".join([child.name(), *child.cmdline()]) and not is_zombie(child):
                found.append(child)
    return found


def assert_nothing_is_left(address: str, *, within_s: float = 10.0) -> None:
    """Assert that no GPU, CPU or group is held any more, and that no process of a rank is there, waiting ones too."""
    nothing = {"GPU": 0, "CPU": 0, "groups": 0}
    wait_until(lambda: in_use(address) == nothing, within_s, f"still held: {in_use(address)}")
    wait_until(lambda: not ranks_below(psutil.Process()), within_s, "ranks are left")


__all__ = ["GANG_TARGET", "TARGET", "cluster"]
