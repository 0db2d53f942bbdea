"""What a rank does with torch: threads and device, rendezvous, and the pipeline of one seed.

The only module of the runner that knows torch. It is imported inside a rank's process (or by `--local`), never by
the driver of a gang.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from model.distributed import Dist, pick_device
from runner.provenance import different_versions, machine, package_versions
from runner.rank import Job, PreflightError, Rank
from runner.storage import LocalStorage

LOOPBACK = "127.0.0.1"  # a gang never spans hosts, so its ranks meet here and nobody else can
RENDEZVOUS_S = 120.0
MIN_FREE_BYTES = 1 << 30


def run_pipeline(rank: Rank) -> None:
    """Run every stage of the seed that is not finished yet. Raises what the stages raise."""
    from model.pipeline import run_seed

    job = rank.job
    torch.set_num_threads(job.threads)
    rank.report("start", 0, None, {})
    dist = join_gang(rank)
    try:
        if rank.rank == 0:
            facts = preflight(job)
            check_node_data(rank)
            note_attempt(job, facts)
        dist.barrier()
        run_seed(
            job.config,
            dist,
            Path(job.workdir),
            rank.report,
            should_stop=rank.should_stop,
            restart=job.restart,
            allow_code_change=job.allow_code_change,
        )
        dist.barrier()
    finally:
        dist.close()


def join_gang(rank: Rank) -> Dist:
    """Return this rank's place in its gang, after rendezvous over the store that rank 0 holds."""
    job = rank.job
    if rank.visible_gpus:
        # every rank sees all GPUs of the gang: without that NCCL cannot use peer-to-peer
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(rank.visible_gpus)
    wanted = job.config.runtime.device
    device = pick_device(
        "cuda" if wanted == "auto" and job.uses_gpus else "cpu" if wanted == "auto" else wanted, rank.rank
    )
    if job.world_size == 1:
        return Dist.single(device)
    if rank.port is None:
        raise RuntimeError(f"rank {rank.rank} of {job.world_size} was given no rendezvous port")
    store = rank.store or TCPStore(
        LOOPBACK, rank.port, job.world_size, is_master=False, timeout=timedelta(seconds=RENDEZVOUS_S)
    )
    return Dist.join(store, rank=rank.rank, world_size=job.world_size, local_rank=rank.rank, device=device)


def open_store(world_size: int) -> TCPStore:
    """Open the rendezvous server of a gang on a port that the system picks, reachable from this host only.

    The socket is bound and listening before the store takes it over: no port can be lost in between.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((LOOPBACK, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK, port, world_size, is_master=True, timeout=timedelta(seconds=RENDEZVOUS_S), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def preflight(job: Job) -> dict[str, Any]:
    """Return what this node is. Raises PreflightError if it is not fit for the attempt."""
    versions = package_versions()
    differing = different_versions(job.record.get("versions", versions), versions)
    if differing:
        raise PreflightError(f"node {socket.gethostname()} has other package versions: {differing}")
    Path(job.workdir).mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(job.workdir).free
    if free < MIN_FREE_BYTES:
        raise PreflightError(
            f"node {socket.gethostname()} has {free / 1e9:.1f} GB free at {job.workdir}; 1 GB is needed"
        )
    return {"versions": versions, "hardware": {**machine(), **gpu_facts(job), "free_disk_bytes": free}}


def check_node_data(rank: Rank) -> None:
    """Check that this node has what the seed reads, and fetch what is missing where the spec says how.

    Raises PreflightError, naming the node, if data is missing or damaged.
    """
    from model.data.fineweb import FetchOptions, fetch_fineweb
    from model.data.manifest import check_data

    data, fetch = rank.job.config.data, rank.job.fetch
    problems = check_data(data)
    if problems and fetch is not None:
        options = {**fetch}
        num_shards = options.pop("shards", None)
        # one process of a node fetches into the folder, the others wait for its lock
        fetch_fineweb(Path(data.train).parent, FetchOptions(**options, num_shards=num_shards), rank.report)
        problems = check_data(data)
    if problems:
        raise PreflightError(f"node {socket.gethostname()} lacks data: {problems[0]}")


def gpu_facts(job: Job) -> dict[str, Any]:
    """Return model, memory and versions of this process's GPUs, {} on CPU. Raises PreflightError if they differ."""
    if not job.uses_gpus or not torch.cuda.is_available():
        return {}
    models = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if len(set(models)) > 1:
        raise PreflightError(f"node {socket.gethostname()} has GPUs of different kinds: {', '.join(models)}")
    return {
        "gpu_model": models[0],
        "num_gpus": len(models),
        "cuda_version": torch.version.cuda,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
    }


def note_attempt(job: Job, facts: Mapping[str, Any]) -> None:
    """Write attempt.json: which attempt is at work, since when, and on what machine."""
    record = {**job.record, **facts, "attempt": job.attempt, "started_at": time.time()}
    LocalStorage(Path(job.workdir)).write("attempt.json", json.dumps(record, indent=1, default=str).encode() + b"\n")
