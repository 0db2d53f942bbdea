"""What Ray and the system know of gangs and their nodes, and what their processes, and other sweeps, leave there."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil
import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayError
from ray.experimental import internal_kv as kv

from runner.errors import first_line
from runner.gang.rank import this_host
from runner.gang.ray_start import PRIORITY_VARIABLE
from runner.spec.gang import Gang
from runner.spec.labels import NODE_ID_LABEL

logger = logging.getLogger(__name__)

CLAIM_SPACE, CLAIM_PREFIX = "seedsweep", "claim/"
REFUSALS: list[type] = []  # the first of Ray, when it was asked for other sweeps
PROBE_S = 0.5  # for a node's daemon to accept a connection

LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


def rank_environment(shape: Gang) -> dict[str, str]:
    """Return the environment of a rank: its threads, the priority of any program, all GPUs of the gang visible later.

    Ray gives its workers the lowest priority but four (nice 15), so that anything else on a host would take their time:
    training's clock runs on. The traffic of a gang on one host stays on loopback. Ranks of several look for their
    interface there.
    """
    threads = str(shape.cpus)
    loopback = {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        PRIORITY_VARIABLE: "0",
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


def select_nodes(require: Mapping[str, Sequence[str]], avoid: Sequence[str]) -> dict[str, str]:
    """Return Ray's selector of a bundle: nodes that have one of the values of each label, and are none of avoid."""
    require = dict(require)
    if NODE_ID_LABEL in require:  # a selector holds each label once
        require[NODE_ID_LABEL] = [node_id for node_id in require[NODE_ID_LABEL] if node_id not in avoid]
    elif avoid:
        return {**select_nodes(require, ()), NODE_ID_LABEL: f"!in({','.join(avoid)})"}
    return {label: f"in({','.join(values)})" for label, values in require.items()}


class RayStore:
    """Where drivers leave what others of the cluster are to know: the table of Ray's head. No process keeps it."""

    def put(self, name: str, content: bytes) -> None:
        """Leave content under name; a cluster that does not take it leaves this sweep to itself."""
        with telling_once():
            kv._internal_kv_put(CLAIM_PREFIX + name, content, overwrite=True, namespace=CLAIM_SPACE)

    def read(self) -> dict[str, bytes]:
        """Return everything that was left, by name; {} where the cluster does not tell."""
        with telling_once():
            keys = [key.decode() for key in kv._internal_kv_list(CLAIM_PREFIX, namespace=CLAIM_SPACE)]
            found = {key: kv._internal_kv_get(key, namespace=CLAIM_SPACE) for key in keys}
            return {key.removeprefix(CLAIM_PREFIX): content for key, content in found.items() if content is not None}
        return {}

    def remove(self, name: str) -> None:
        """Take away what was left under name."""
        with telling_once():
            kv._internal_kv_del(CLAIM_PREFIX + name, namespace=CLAIM_SPACE)

    def free(self) -> dict[str, dict[str, float]]:
        """Return what nobody holds, by node id; {} where the cluster does not tell."""
        with telling_once():
            amounts: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
            return amounts
        return {}


@contextlib.contextmanager
def telling_once() -> Iterator[None]:
    """Go on where Ray refuses, saying so the first time: a sweep can do without the others."""
    try:
        yield
    except (RayError, RuntimeError, AssertionError) as error:
        if not REFUSALS:
            logger.warning("other sweeps of the cluster are not seen: %s", first_line(str(error)))
            REFUSALS.append(type(error))


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
