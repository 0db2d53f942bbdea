"""What Ray and the system know of a gang's nodes and processes, and what its processes find around them."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from typing import Any

import psutil
import ray
from ray.exceptions import RayError

from runner.errors import first_line
from runner.gang.rank import this_host
from runner.spec.gang import Gang

PROBE_S = 0.5  # for a node's daemon to accept a connection

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def rank_environment(shape: Gang) -> dict[str, str]:
    """Return the environment of a rank: its threads, all GPUs of the gang visible later.

    The traffic of a gang on one host stays on loopback. Ranks of several look for their interface there.
    """
    threads = str(shape.cpus)
    loopback = {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        **(loopback if shape.hosts == 1 else {}),
    }


def ray_words(error: RayError) -> str:
    """Return what Ray knows of a process that ended; it takes everything but an exit code for a lost connection."""
    text = str(getattr(error, "cause", "") or error)
    detail = text.rpartition("Worker exit detail: ")[2] if "Worker exit detail: " in text else text.splitlines()[-1]
    known = "" if "connection error code" in detail else first_line(detail).rstrip(".")
    return f"ended ({known})" if known else "ended without a word, and nothing on its node says how"


def is_node_lost(node_id: str) -> bool:
    """Return whether a node's daemon no longer answers; Ray itself takes up to 14 s to notice."""
    node = find_node(node_id)
    if not node.get("Alive", False):
        return bool(node_id)
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_S):
            return False
    except OSError:
        return True


def find_node(node_id: str) -> dict[str, Any]:
    """Return what Ray knows of a node, {} if it knows none."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((node for node in nodes if node["NodeID"] == node_id), {})


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that are being drained: Ray gives them nothing new to do, and they may go soon."""
    return set(ray._private.state.state.get_draining_nodes())


def is_running(facts: Mapping[str, Any]) -> bool:
    """Return whether a rank's process, or who ends its program, is still there, as far as this host can see."""
    if facts["host"] != this_host():
        return False
    return any(is_alive(pid) for pid in (facts["pid"], facts.get("keeper")) if pid is not None)


def is_alive(pid: int) -> bool:
    """Return whether a process of this host has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
