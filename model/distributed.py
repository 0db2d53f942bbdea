"""The process group of one gang: who am I, and the few collectives that the stages use.

One process is a group of its own and communicates with nobody. This is the only module that reads torchrun's
environment variables.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that runtime.device ("auto", "cpu" or "cuda") means for this rank.

    Raises ValueError if "cuda" is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device='cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


@dataclass(slots=True)
class Dist:
    """This process's place in its gang. With world_size 1 every collective returns its input."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Make CPUs take numbers below 1e-38 for zero, as GPUs do: computing with them is ten times slower."""
        if self.device.type == "cpu":
            torch.set_flush_denormal(True)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Dist:
        """Return a group of one process."""
        return cls(device=torch.device(device))

    @classmethod
    def join(
        cls,
        store: TCPStore,
        *,
        rank: int,
        world_size: int,
        local_rank: int,
        device: torch.device,
        timeout_s: float = 1800.0,
    ) -> Dist:
        """Form the gang's process group over a store that every rank can reach (gloo, and NCCL on CUDA)."""
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        return cls(rank, world_size, local_rank, device)

    @classmethod
    def from_environment(cls, device_name: str = "auto") -> Dist:
        """Join the gang that torchrun describes in RANK, WORLD_SIZE and LOCAL_RANK; alone where they are not set."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = pick_device(device_name, local_rank)
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls.single(device)
        host, port, rank = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["RANK"])
        use_agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(host, port, world_size, is_master=rank == 0 and not use_agent_store)
        return cls.join(store, rank=rank, world_size=world_size, local_rank=local_rank, device=device)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that reports and writes."""
        return self.rank == 0

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum tensor over the ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average tensor over the ranks in place and return it."""
        return self.all_reduce_(tensor).div_(self.world_size) if self.world_size > 1 else tensor

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Overwrite tensor with rank 0's and return it."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def broadcast_floats(self, values: list[float]) -> list[float]:
        """Return rank 0's values on every rank, over the CPU group, without waiting for a GPU."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor]

    def reduce_scatter_mean(self, tensor: Tensor) -> Tensor:
        """Average tensor over the ranks and return this rank's equal share of its first axis.

        The first axis must be a multiple of world_size.
        """
        if self.world_size == 1:
            return tensor
        share = tensor.size(0) // self.world_size
        if tensor.is_cuda:
            out = tensor.new_empty(share, *tensor.shape[1:])
            dist.reduce_scatter_tensor(out, tensor, op=dist.ReduceOp.AVG)
            return out
        self.mean_(tensor)
        return tensor[self.rank * share : (self.rank + 1) * share]

    def all_gather(self, share: Tensor) -> Tensor:
        """Return every rank's share joined along the first axis."""
        if self.world_size == 1:
            return share
        shares = [torch.empty_like(share) for _ in range(self.world_size)]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return every rank's rows (n, c) int64 joined in rank order; n may differ."""
        if self.world_size == 1:
            return rows
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        padded = torch.zeros(int(counts.max()), rows.shape[1], dtype=torch.int64)
        padded[: len(rows)] = torch.from_numpy(rows)
        shares = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(shares, padded)
        return np.concatenate([share[:count].numpy() for share, count in zip(shares, counts.tolist(), strict=True)])

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text in rank order."""
        if self.world_size == 1:
            return [text]
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)[:, None]
        sizes = self.gather_rows(np.array([[len(data)]]))[:, 0]
        joined = self.gather_rows(data)[:, 0].astype(np.uint8)
        return [part.tobytes().decode() for part in np.split(joined, np.cumsum(sizes)[:-1])]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            self.broadcast_floats([0.0])
            dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
