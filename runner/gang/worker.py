"""What a rank does with torch: threads and device, rendezvous, and the pipeline of one seed.

The only module of the runner that knows torch. It is imported inside a rank's process (or by `--local`), never by
the driver of a gang.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._C._distributed_c10d import TCPStore

from model.distributed import Dist, pick_device
from model.kernels.pace import ticking
from runner.errors import PreflightError
from runner.folder.storage import LocalStorage, open_storage
from runner.gang.attempt import GPU_SAMPLES, ignore, note_attempt, save_samples, wait_for_room
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.gpus import GpuWatch, query_gpus
from runner.machine.route import interface_to
from runner.provenance import data_hash, different_versions, machine, package_versions, settings

if TYPE_CHECKING:
    from model.pipeline.run import Donor

logger = logging.getLogger(__name__)

# what a rank imports at its first use: a process that waits for its job does so ahead
IMPORTS = ("model.pipeline.run", "model.pipeline.seed", "model.corpus.fineweb", "model.data.manifest")
GPU_FILES = ("/dev/nvidia", "/dev/kfd")  # open in a process that has so much as counted GPUs
LOOPBACK = "127.0.0.1"  # the ranks of a gang on one host meet here, where nobody else can
RENDEZVOUS_S = 120.0
MAX_USED_BYTES = 4 << 30  # of a GPU that counts as idle; the gang's own contexts take about half a GB each


def run_pipeline(rank: Rank) -> None:
    """Run every stage of the seed that is not finished yet. Raises what the stages raise."""
    from model.pipeline.records import HASHES
    from model.pipeline.run import Orders
    from model.pipeline.seed import OtherHashes, run_seed

    job = rank.job
    torch.set_num_threads(job.threads)
    rank.report("start", 0, None, {})
    on_write = rank.mirror.put if rank.mirror is not None else ignore
    dist = join_gang(rank)
    bandwidth = all_reduce_bytes_per_s(dist)
    facts: dict[str, Any] = {}
    if job.place_of(rank.rank)[1] == 0:  # one for each host
        facts = preflight(rank)
        rank.report("check", 0, None, {})  # what comes now depends on the network, and not on limits.start_s
        with ticking(rank.tick):
            if rank.mirror is not None and rank.rank == 0:  # other hosts are told what to fetch, and when
                rank.mirror.fetch_all()
            check_node_data(rank)
    if job.hosts > 1:
        check_hosts_agree(rank, dist, facts)
    if rank.rank == 0:
        facts["hardware"]["all_reduce_bytes_per_s"] = bandwidth
        note_attempt(job, facts)
        on_write(Path(job.workdir) / "attempt.json")
    dist.barrier()
    with watched_gpus(rank, on_write) as attach:
        try:
            run_seed(
                job.config, dist, Path(job.workdir), rank.report, should_stop=rank.should_stop, restart=job.restart,
                allow_code_change=job.allow_code_change, on_write=on_write, tick=rank.tick,
                orders=Orders(
                    repeat=job.key.repeat, hashes={name: job.record.get(name) for name in HASHES},
                    donors=open_donors(job), attach=attach,
                    fetch=rank.mirror.fetch_same if rank.mirror is not None and job.is_apart else None,
                ),
            )  # fmt: skip
        except OtherHashes as error:
            raise PreflightError(f"node {rank.node}: {error}") from None
    dist.barrier()
    # Not after an error or a stop: leaving an NCCL group may wait for ranks that never come, and nobody would know.
    # The gang's processes are ended then anyway.
    dist.close()


def find_traces() -> str:
    """Return what imports have left in this process besides modules, in words; "" if only modules.

    One that holds a GPU would take memory from whoever works on it, and would not see the GPUs that its gang gets.
    """
    unused = torch.Generator().manual_seed(torch.initial_seed())
    files = [os.readlink(path) for path in Path("/proc/self/fd").glob("*") if path.is_symlink()]
    found = {
        "opened a GPU": any(file.startswith(GPU_FILES) for file in files),
        "initialized CUDA": torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
        "drawn random numbers": not torch.equal(torch.get_rng_state(), unused.get_state()),
        "joined a process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }
    return ", ".join(words for words, is_so in found.items() if is_so)


def open_donors(job: Job) -> dict[str, Donor]:
    """Return by stage the run of the same sweep from which it may be taken over."""
    from model.pipeline.run import Donor

    storage = open_storage(job.out)
    root = storage.root if isinstance(storage, LocalStorage) else None  # where files need not be read to be had
    return {
        stage: Donor(
            name=name,
            read=lambda file, folder=f"seeds/{name}": storage.read(f"{folder}/{file}"),  # type: ignore[misc]
            folder=root / "seeds" / name if root is not None else None,
        )
        for stage, name in job.donors.items()
    }


@contextmanager
def watched_gpus(rank: Rank, on_write: Callable[[Path], None]) -> Iterator[Callable[[str], list[str]]]:
    """Sample clocks, power and throttle reasons of the gang's GPUs during training; rank 0 leaves them in gpu.npz.

    Yields what makes the file an output of training at its end. Where training is stopped, or fails, what was seen so
    far is kept for the next attempt.
    """
    if rank.rank != 0 or not rank.job.uses_gpus or not torch.cuda.is_available():
        yield lambda _stage: []
        return
    watch = GpuWatch(gpu_ids(rank.job), lambda: rank.newest.step if rank.newest.phase == "train" else None)
    watch.thread.start()
    path = Path(rank.job.workdir) / GPU_SAMPLES

    def attach(stage: str) -> list[str]:
        if stage != "train":
            return []
        save_samples(watch, path)
        return [path.name] if path.exists() else []

    try:
        yield attach
    finally:
        if not watch.is_over.is_set() and save_samples(watch, path):
            on_write(path)


def join_gang(rank: Rank) -> Dist:
    """Return this rank's place in its gang, after rendezvous over the store that rank 0 holds."""
    job = rank.job
    host, local_rank = job.place_of(rank.rank)
    if rank.visible_gpus:
        # every rank sees all GPUs of the gang on its host: without that NCCL cannot use peer-to-peer
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(rank.visible_gpus)
    wanted = job.config.runtime.device
    device = pick_device(
        "cuda" if wanted == "auto" and job.uses_gpus else "cpu" if wanted == "auto" else wanted, local_rank
    )
    logger.info("rank=%d world_size=%d device=%s gpus=%s", rank.rank, job.world_size, device, rank.visible_gpus)
    if job.world_size == 1:
        dist = Dist.single(device)
        dist.on_wait = rank.wait
        return dist
    if rank.port is None:
        raise RuntimeError(f"rank {rank.rank} of {job.world_size} was given no rendezvous port")
    if rank.addresses:
        use_interface_to(rank.addresses[0 if host else 1])
    store = rank.store or TCPStore(
        (rank.addresses or (LOOPBACK,))[0],
        rank.port,
        job.world_size,
        is_master=False,
        timeout=timedelta(seconds=RENDEZVOUS_S),
    )
    dist = Dist.join(store, rank=rank.rank, world_size=job.world_size, local_rank=local_rank, device=device)
    dist.on_wait = rank.wait
    return dist


def use_interface_to(address: str) -> None:
    """Let gloo and NCCL talk by the interface that leads to address, unless this node's environment names another."""
    name = interface_to(address)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign it would mean eth0 and eth01
    logger.info("interface to %s: %s", address, name)


def open_store(world_size: int, address: str = LOOPBACK) -> TCPStore:
    """Open the rendezvous server of a gang at address, on a port that the system picks; reachable there only.

    The socket is bound and listening before the store takes it over: no port can be lost in between.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return TCPStore(
        address, port, world_size, is_master=True, timeout=timedelta(seconds=RENDEZVOUS_S), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def preflight(rank: Rank) -> dict[str, Any]:
    """Return what this node is. Raises PreflightError if it is not fit for the attempt."""
    job = rank.job
    versions = package_versions()
    differing = different_versions(job.record.get("versions", versions), versions)
    if differing:
        raise PreflightError(f"node {rank.node} has other package versions: {differing}")
    Path(job.workdir).mkdir(parents=True, exist_ok=True)
    free = wait_for_room(rank)
    return {
        "versions": versions,
        "hardware": {**machine(), **gpu_facts(rank), "free_disk_bytes": free, "settings": settings()},
    }


def check_node_data(rank: Rank) -> None:
    """Check that this node has what the seed reads, and fetch what is missing where the spec says how.

    Raises PreflightError, naming the node, if data is missing or damaged.
    """
    from model.corpus.fineweb import FetchOptions, fetch_fineweb
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
        raise PreflightError(f"node {rank.node} lacks data: {problems[0]}")


def check_hosts_agree(rank: Rank, dist: Dist, facts: Mapping[str, Any]) -> None:
    """Check that all hosts of a gang have the same data and compute alike: the same GPU, or the CPU's instructions.

    facts: what preflight found. Only the first rank of each host looks. Raises PreflightError, on every rank, naming
    two hosts that differ.
    """
    seen: dict[str, str] = {}
    if facts:
        data, model = rank.job.config.data, rank.job.config.model
        with ticking(rank.tick):
            hashed = data_hash(data, vocab_size=model.vocab_size)  # remembered: rank 0 reads its shards once
        device = (
            {"GPU": facts["hardware"]["gpu_model"]}
            if dist.device.type == "cuda"
            else {"CPU": torch.backends.cpu.get_cpu_capability()}
        )
        seen = {"node": rank.node, "data": hashed, **device}
    found = [json.loads(text) for text in dist.gather_text(json.dumps(seen))]
    first, *others = [host for host in found if host]
    for other in others:
        for what in first.keys() - {"node"}:
            if other.get(what) != first[what]:
                raise PreflightError(
                    f"node {other['node']} has other {what} than node {first['node']} ({str(other.get(what))[:24]}, "
                    f"not {first[what][:24]}); the hosts of a gang need the same"
                )


def gpu_facts(rank: Rank) -> dict[str, Any]:
    """Return model, memory, driver and CUDA version of the gang's GPUs, {} on CPU.

    Raises PreflightError if they are of different kinds, or if somebody else works on one of them.
    """
    if not rank.job.uses_gpus or not torch.cuda.is_available():
        return {}
    release_gpu_memory()
    gpus = query_gpus(gpu_ids(rank.job))
    models = sorted({gpu.model for gpu in gpus})
    if len(models) > 1:
        raise PreflightError(f"node {rank.node} has GPUs of different kinds: {', '.join(models)}")
    for gpu in gpus:
        if gpu.used_bytes > MAX_USED_BYTES + own_gpu_bytes():
            raise PreflightError(
                f"GPU {gpu.number} of node {rank.node} is not idle: {gpu.used_bytes / 1e9:.1f} GB are in use"
            )
    return {
        "gpu_model": models[0] if models else torch.cuda.get_device_name(0),
        "num_gpus": torch.cuda.device_count(),
        "driver_version": gpus[0].driver if gpus else None,
        "cuda_version": torch.version.cuda,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory,
    }


def gpu_ids(job: Job) -> list[str]:
    """Return the names by which the driver knows the gang's GPUs of this host, whatever this process sees them as."""
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(job.ranks_per_host)]


def release_gpu_memory() -> None:
    """Give back what an earlier seed of this process left in torch's cache (`--local` runs seeds in one process)."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


def own_gpu_bytes() -> int:
    """Return what torch holds on this process's GPU, 0 before its first use."""
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.memory_reserved() if is_used else 0


def all_reduce_bytes_per_s(dist: Dist) -> float | None:
    """Return the bandwidth of summing 64 MB (4 MB on CPU) over the gang, the best of three; None for one rank."""
    if dist.world_size == 1:
        return None
    tensor = torch.zeros((1 << 24) if dist.device.type == "cuda" else (1 << 20), device=dist.device)
    best_s = float("inf")
    for _ in range(4):  # the first one connects
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce_(tensor)
        if dist.device.type == "cuda":
            torch.cuda.synchronize(dist.device)
        best_s = min(best_s, time.perf_counter() - begun)
    return tensor.numel() * tensor.element_size() / best_s
