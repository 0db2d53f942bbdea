"""What one rank of a test gang computes (`python -m tests.gang_work RANK WORLD PORT FOLDER PLAN`), and who starts it.

A gang meets over a store that the test holds. Each rank writes its figures to FOLDER/rank-R.npz; compute does the same
in this process for a gang of one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as collective
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from model.config import EvalConfig, QuantConfig, RuntimeConfig
from model.distributed import Dist, Pending
from model.files.checkpoint import CheckpointStore
from model.gpt import GPT
from model.quant.calibrate import collect_hessians
from model.report import Interrupted
from model.score.plain import evaluate_plain
from model.train.gradients import collect_gradients
from model.train.optim import Optimizers, muon_scale, muon_update
from model.train.resumable import ResumableTrainer
from model.train.trainer import Trainer
from model.ttt.documents import score_documents
from runner.gang.worker import open_store
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
    """Return the figures of one rank by name; plan "all", "train" (three steps) or "optimizer"."""
    torch.set_num_threads(1)
    if plan == "optimizer":
        return optimizer(dist) | waits(dist)
    if plan == "train":
        return train(dist, folder, clip="per_micro_batch", max_steps=3, num_micro_batches=8)
    figures: dict[str, np.ndarray] = {}
    for clip in CLIPS:
        max_steps, num_micro_batches = (3 if clip == "per_rank" else 20), (2 if clip == "global" else 4)
        figures |= train(dist, folder, clip=clip, max_steps=max_steps, num_micro_batches=num_micro_batches)
    return (
        figures
        | horizons(dist, folder)
        | collectives(dist)
        | scores(dist)
        | hessians(dist, folder)
        | resumes(dist, folder)
        | differences(dist)
    )


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


def horizons(dist: Dist, folder: Path) -> dict[str, np.ndarray]:
    """Return what a wall-clock run makes whose horizons are parts of the budget, each rank with a clock of its own."""
    config = micro_train(
        max_steps=100, budget_s=10.0, reserve_s=0.0, ema_horizon_frac=0.3, muon_momentum_warmup_frac=0.5
    )
    model, now = random_model(THREE_LAYERS, seed=3), [0.0]
    trainer = Trainer(model, micro_loader(folder, config=config), config, dist, ignore, clock=lambda: now[0])

    def pass_time(*_arguments: Any) -> None:  # a second a step on rank 0, ever less on the next rank
        now[0] += 1.0 / trainer.micro_batches / (1 + dist.rank * trainer.step)

    model.register_forward_hook(pass_time)
    result = trainer.run()
    averages = torch.cat([value.flatten() for value in result.ema.values()])
    return {"horizons/ema": averages.numpy(), "horizons/momentum": result.steps["momentum"]}


def collectives(dist: Dist) -> dict[str, np.ndarray]:
    """Return what each collective gives this rank."""
    world_size, mine = dist.world_size, float(dist.rank + 1)
    table = torch.arange(world_size * 2 * 3, dtype=torch.float32).reshape(world_size * 2, 3) * mine
    share = dist.start_reduce_scatter_mean(table.clone()).wait()
    rows = np.full((dist.rank * 2 + 1, 2), dist.rank, dtype=np.int64)
    figures = {
        "share": share.numpy(),
        "gathered": dist.all_gather(torch.full((1, 2), mine, dtype=torch.bfloat16)).float().numpy(),
        "sum": dist.all_reduce_(torch.full((2,), mine)).numpy(),
        "mean": dist.mean_(torch.full((2,), mine, dtype=torch.bfloat16)).float().numpy(),
        "floats": np.array(dist.broadcast_floats([mine, 0.1 * mine])),
        "rows": dist.gather_rows(rows),
        "is_main": np.array(dist.is_main),
    }
    dist.barrier()
    return figures


class NotedDist(Dist):
    """A rank that notes which messages it starts, in order."""

    def start_mean_(self, *tensors: torch.Tensor) -> Pending:
        """Note the message and start it."""
        NOTED.append(f"mean {sum(tensor.numel() for tensor in tensors)}")
        return super().start_mean_(*tensors)

    def start_all_gather(self, share: torch.Tensor) -> Pending:
        """Note the message and start it."""
        NOTED.append(f"gather {share.numel()}")
        return super().start_all_gather(share)


NOTED: list[str] = []


def optimizer(dist: Dist) -> dict[str, np.ndarray]:
    """Return the weights after three steps by Optimizers.step and by blocking_step, in each type of the update."""
    figures = {}
    for dtype in ("float32", "bfloat16"):
        config = micro_train(newton_schulz_dtype=dtype, matrix_weight_decay=0.1)
        for is_blocking in (False, True):
            NOTED.clear()
            own = NotedDist(dist.rank, dist.world_size, dist.local_rank, dist.device)
            model = random_model(THREE_LAYERS, seed=3)
            optimizers = Optimizers(model, config, own)
            for step in range(3):
                draw_gradients(model, seed=10 * step + dist.rank)
                if is_blocking:
                    blocking_step(optimizers, lr_factor=0.5, momentum=0.9)
                else:
                    optimizers.step(lr_factor=0.5, momentum=0.9)
            name = "blocking" if is_blocking else "own"
            parts = [parameter.detach().flatten() for parameter in model.parameters()]
            figures[f"{dtype}/{name}"] = torch.cat(parts).numpy()
            if not is_blocking:
                figures[f"{dtype}/order"] = np.array(NOTED)
    return figures


def draw_gradients(model: GPT, *, seed: int) -> None:
    """Give every parameter a random gradient; on odd seeds nothing used one of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name == "skip_gates" and seed % 2 else grad


def blocking_step(optimizers: Optimizers, *, lr_factor: float, momentum: float) -> None:
    """Do what Optimizers.step does, one message after the other, nothing beside them."""
    world_size, rank, config = optimizers.dist.world_size, optimizers.dist.rank, optimizers.config
    embedding, vectors = optimizers.embedding.grad, collect_gradients(optimizers.vectors)
    collective.all_reduce(embedding)
    embedding /= world_size
    flat = torch.cat([grad.flatten() for grad in vectors])  # with three ranks the order of a sum depends on the length
    collective.all_reduce(flat)
    for grad, mean in zip(vectors, (flat / world_size).split([grad.numel() for grad in vectors]), strict=True):
        grad.copy_(mean.view_as(grad))
    for group, base_lr in zip(optimizers.adamw.param_groups, optimizers.base_lrs, strict=True):
        group["lr"] = base_lr * lr_factor
    optimizers.adamw.step()
    lr = config.matrix_lr * lr_factor
    for name, bank in optimizers.muon.banks.items():
        buffer = optimizers.muon.buffers[name]
        padded = torch.zeros(len(buffer) * world_size, *bank.shape[1:], dtype=buffer.dtype)
        padded[: len(bank)] = bank.grad
        collective.all_reduce(padded)
        share = (padded / world_size)[rank * len(buffer) : (rank + 1) * len(buffer)]
        update = muon_update(share, buffer, momentum=momentum, steps=config.newton_schulz_steps).contiguous()
        updates = [torch.empty_like(update) for _ in range(world_size)]
        collective.all_gather(updates, update)
        with torch.no_grad():
            bank.mul_(1 - lr * config.matrix_weight_decay)
            whole = torch.cat(updates)[: len(bank)].to(bank.dtype)
            bank.add_(whole, alpha=-lr * muon_scale(bank.size(-2), bank.size(-1)))


def waits(dist: Dist) -> dict[str, np.ndarray]:
    """Return what messages bring that all ranks start in one order and each rank awaits in another."""
    mine = float(dist.rank + 1)
    pending = {}
    for place in range(4):
        size = 1000 * 4**place
        pending[f"mean {place}"] = dist.start_mean_(torch.full((size,), mine))
        pending[f"share {place}"] = dist.start_reduce_scatter_mean(torch.full((dist.world_size, size), mine))
        pending[f"gather {place}"] = dist.start_all_gather(torch.full((1, size), mine))
    names = list(pending) if dist.rank == 0 else list(pending)[:: -dist.rank] + list(pending)
    for name in names:  # rank 0 in order, rank 1 backwards, rank 2 every other one first; waiting twice is allowed
        pending[name].wait()
    return {f"wait/{name}": figure.wait().mean(dim=-1).numpy() for name, figure in pending.items()}


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


class DeafStore(CheckpointStore):
    """Checkpoints of which this rank cannot read the newest."""

    def load(self, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Load a checkpoint that is not the newest. Raises OSError for that one."""
        if step == self.steps()[-1]:
            raise OSError(5, "Input/output error")
        return CheckpointStore.load(self, step)


def resumes(dist: Dist, folder: Path) -> dict[str, np.ndarray]:
    """Return where training goes on, and with which weights, where all ranks can read the newest checkpoint or not."""
    config, figures = micro_train(max_steps=6), {}
    for name in ("calm", "deaf 0", "deaf 1"):
        places = folder / f"world-{dist.world_size}-{name.replace(' ', '-')}"

        def trainer(store: CheckpointStore, **options: Any) -> Trainer:
            model = random_model(THREE_LAYERS, seed=3)
            return ResumableTrainer(
                model, micro_loader(folder, config=config), config, dist, ignore, checkpoints=store, **options
            )

        with suppress(Interrupted):  # checkpoints at steps 3 and 4
            every_step = RuntimeConfig(device="cpu", checkpoint_every_s=1e-9)
            answers = iter([False] * 4 + [True])
            trainer(CheckpointStore(places), runtime=every_step, should_stop=partial(next, answers)).run()
        dist.barrier()
        is_deaf = name == f"deaf {dist.rank}"
        again = trainer(DeafStore(places) if is_deaf else CheckpointStore(places))
        try:
            result = again.run()
            figures[f"{name}/at"] = np.array(result.metrics["resumed_at_steps"])
            figures[f"{name}/weights"] = torch.cat([p.detach().flatten() for p in again.model.parameters()]).numpy()
        except RuntimeError as error:
            figures[f"{name}/error"] = np.array(str(error))
    return figures


def differences(dist: Dist) -> dict[str, np.ndarray]:
    """Return what is said of weights that differ between the ranks in one bit."""
    tensors = {"same": torch.ones(3), "other": torch.ones(4, dtype=torch.bfloat16)}
    dist.require_same(tensors, "equal weights")
    tensors["other"].view(torch.int16)[2] ^= dist.rank & 1
    try:
        dist.require_same(tensors, "the ranks' weights differ")
    except RuntimeError as error:
        return {"difference": np.array(str(error))}
    return {}


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
