"""This machine as a node of a cluster, with what Ray would find on it."""

from __future__ import annotations

import os

import psutil

from model.data.cpus import usable_cpus
from runner.life.capacity import HERE, Node
from runner.machine.gpus import count_gpus


def this_machine() -> Node:
    """Return this machine as a node, with what Ray would find on it."""
    resources = {
        "CPU": float(usable_cpus()),
        "GPU": float(count_gpus()),
        "memory": float(psutil.virtual_memory().total),
    }
    return Node(node_id=HERE, name=os.uname().nodename, resources=resources)
