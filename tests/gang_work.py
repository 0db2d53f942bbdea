"""What one rank of a test gang computes (`python -m tests.gang_work RANK WORLD PORT FOLDER PLAN`), and who starts it.

A gang meets over a store that the test holds. Each rank writes its figures to FOLDER/rank-R.npz; compute does the same
in this process for a gang of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model.calibrate import collect_hessians
from model.config import EvalConfig, QuantConfig
from model.distributed import Dist
from model.evaluate import evaluate_plain
from model.train import Trainer
from model.ttt import score_documents
from runner.worker import open_store
from tests.micro_model import (
    ignore,
    micro_bytes,
    micro_loader,
    micro_model,
    micro_train,
    micro_ttt,
    micro_validation,
    random_model,
)

TIMEOUT_S = 280.0  # below the suite's 300 s a test, so that a gang that hangs shows what its ranks said
CLIPS = ("per_micro_batch", "global", "per_rank")
THREE_LAYERS = micro_model(num_layers=3, xsa_last_n=3, parallel_start_layer=2)  # odd: two ranks get unequal shares
LENGTHS = (30, 5, 61, 2, 17, 44, 9)


def run_gang(world_size: int, folder: Path, plan: str) -> list[dict[str, np.ndarray]]:
    """Start world_size processes on loopback, wait for them and return what each rank wrote."""
    store = open_store(world_size)  # on loopback only
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gang_work", str(rank), str(world_size), str(store.port), str(folder), plan],
            env=environment, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    try:
        for process in ranks:
            output, _ = process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0, output.decode()
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return [dict(np.load(folder / f"rank-{rank}.npz")) for rank in range(world_size)]


def compute(dist: Dist, folder: Path, plan: str) -> dict[str, np.ndarray]:
    """Return the figures of one rank by name; plan "all" or "train" (three steps)."""
    torch.set_num_threads(1)
    if plan == "train":
        return train(dist, folder, clip="per_micro_batch", max_steps=3, num_micro_batches=8)
    figures: dict[str, np.ndarray] = {}
    for clip in CLIPS:
        max_steps, num_micro_batches = (3 if clip == "per_rank" else 20), (2 if clip == "global" else 4)
        figures |= train(dist, folder, clip=clip, max_steps=max_steps, num_micro_batches=num_micro_batches)
    return figures | collectives(dist) | scores(dist) | hessians(dist, folder)


def train(dist: Dist, folder: Path, *, clip: str, max_steps: int, num_micro_batches: int) -> dict[str, np.ndarray]:
    """Train a micro model and return its losses, its weights and their average."""
    config = micro_train(max_steps=max_steps, clip=clip, batch_tokens=64 * num_micro_batches)
    model = random_model(THREE_LAYERS, seed=3)
    result = Trainer(model, micro_loader(folder, config=config), config, dist, ignore).run()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    averages = torch.cat([value.flatten() for value in result.ema.values()])
    return {
        f"{clip}/loss": result.steps["loss"],
        f"{clip}/norm": result.steps["grad_norm"],
        f"{clip}/weights": weights.numpy(),
        f"{clip}/ema": averages.numpy(),
    }


def collectives(dist: Dist) -> dict[str, np.ndarray]:
    """Return what each collective gives this rank."""
    world_size, mine = dist.world_size, float(dist.rank + 1)
    table = torch.arange(world_size * 2 * 3, dtype=torch.float32).reshape(world_size * 2, 3) * mine
    share = dist.reduce_scatter_mean(table.clone())
    rows = np.full((dist.rank * 2 + 1, 2), dist.rank, dtype=np.int64)
    figures = {
        "share": share.numpy(),
        "gathered": dist.all_gather(torch.full((1, 2), mine, dtype=torch.bfloat16)).float().numpy(),
        "sum": dist.all_reduce_(torch.full((2,), mine)).numpy(),
        "mean": dist.mean_(torch.full((2,), mine, dtype=torch.bfloat16)).float().numpy(),
        "first": dist.broadcast_(torch.full((2,), mine)).numpy(),
        "floats": np.array(dist.broadcast_floats([mine, 0.1 * mine])),
        "rows": dist.gather_rows(rows),
        "is_main": np.array(dist.is_main),
    }
    dist.barrier()
    return figures


def scores(dist: Dist) -> dict[str, np.ndarray]:
    """Return the sums per document of plain evaluation and of test-time training with and without adaptation."""
    validation, table = micro_validation(*LENGTHS), micro_bytes()
    rows = EvalConfig(row_tokens=32, seq_len=16)
    figures = {"plain": evaluate_plain(random_model(), validation, table, rows, dist, ignore).nats}
    for key in ("seed", "document"):
        for is_adapting in (False, True):
            model, config = random_model(dtype=torch.float64), micro_ttt(adapter_key=key)
            result = score_documents(model, validation, table, config, dist, ignore, seed=1, is_adapting=is_adapting)
            figures[f"ttt/{key}/{is_adapting}"] = result.nll
    return figures


def hessians(dist: Dist, folder: Path) -> dict[str, np.ndarray]:
    """Return the Hessians of masked calibration by name."""
    config = QuantConfig(num_calibration_batches=3, calibration_windows=2, calibration_seq_len=48)
    loader = micro_loader(folder, config=replace(micro_train(), micro_batch_tokens=64))
    found = collect_hessians(random_model(), loader, config, dist, ignore, seed=9)
    return {f"hessian/{name}": value.numpy() for name, value in found.items()}


def main() -> None:
    """Join the gang that run_gang started, compute, write."""
    rank, world_size, port = (int(value) for value in sys.argv[1:4])
    folder, plan = Path(sys.argv[4]), sys.argv[5]
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_S))
    dist = Dist.join(
        store, rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"), timeout_s=TIMEOUT_S
    )
    figures = compute(dist, folder, plan)
    dist.close()
    np.savez(folder / f"rank-{rank}.npz", allow_pickle=False, **figures)


if __name__ == "__main__":
    main()
