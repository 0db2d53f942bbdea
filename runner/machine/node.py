"""This machine as a node of a cluster, with what Ray would find on it."""

from __future__ import annotations

import os

import psutil

from model.data.cpus import usable_cpus
from runner.life.capacity import HERE, Node
from runner.machine.gpus import count_gpus, query_gpus
from runner.spec.labels import ACCELERATOR_LABEL, accelerator_type


def this_machine() -> Node:
    """Return this machine as a node, with what Ray would find on it."""
    resources = {
        "CPU": float(usable_cpus()),
        "GPU": float(count_gpus()),
        "memory": float(psutil.virtual_memory().total),
    }
    models = [gpu.model for gpu in query_gpus([])] if resources["GPU"] else []
    labels = {ACCELERATOR_LABEL: accelerator_type(models[0])} if models else {}
    return Node(node_id=HERE, name=os.uname().nodename, resources=resources, labels=labels)
