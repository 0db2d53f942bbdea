"""The process group of one gang: who am I, and the few collectives that the stages use.

One process is a group of its own and communicates with nobody. This is the only module that reads torchrun's
environment variables.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# Newer releases of torch warn of the older names, older ones have no others.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device that runtime.device ("auto", "cpu" or "cuda") means for this rank.

    Raises ValueError if "cuda" is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("runtime.device='cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank)


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size of an element


@torch.no_grad()
def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's elements read as integers, an int64 scalar on its device that may wrap round."""
    return tensor.detach().contiguous().view(BITS[tensor.element_size()]).sum(dtype=torch.int64)


@dataclass(slots=True)
class Pending:
    """A collective under way, or what one process has at once.

    What the collective reads or writes is to be left alone until wait. All ranks start their collectives in the same
    order; the order of their waits is free.
    """

    result: Tensor
    work: dist.Work | None = None
    finish: Callable[[], object] | None = None  # what is left to do on result when the message is there

    def wait(self) -> Tensor:
        """Return the result, once it may be used: on a GPU the present stream waits for it, with gloo the host."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.finish is not None:
                self.finish()
        return self.result


@dataclass(slots=True)
class Dist:
    """This process's place in its gang. With world_size 1 every collective returns its input."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_wait: Callable[[bool], None] | None = None  # hears when this rank begins to wait for the others, and of its end

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

    def tick(self) -> None:
        """Say that this rank got further."""
        if self.on_wait is not None:
            self.on_wait(False)

    @contextmanager
    def _meeting(self) -> Iterator[None]:
        """Say that this rank waits, while the block does; that all have met is progress, alone too."""
        if self.on_wait is not None:
            self.on_wait(True)
        try:
            yield
        finally:
            self.tick()

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sum tensor over the ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def meet(self) -> None:
        """Wait until every rank's host is here and its device has done its work, where shares of work differ."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.world_size > 1:
            with self._meeting():
                self.all_reduce_(torch.zeros(1))

    def mean_(self, tensor: Tensor) -> Tensor:
        """Average tensor over the ranks in place and return it."""
        return self.start_mean_(tensor).wait()

    def start_mean_(self, *tensors: Tensor) -> Pending:
        """Start averaging tensors of one type over the ranks, in one message; wait leaves each mean in its place."""
        if self.world_size == 1:
            return Pending(tensors[0])
        is_alone = len(tensors) == 1
        flat = tensors[0] if is_alone else torch.cat([tensor.flatten() for tensor in tensors])

        def finish() -> None:
            flat.div_(self.world_size)
            if not is_alone:
                means = flat.split([tensor.numel() for tensor in tensors])
                torch._foreach_copy_(tensors, [mean.view_as(tensor) for mean, tensor in zip(means, tensors)])

        return Pending(flat, dist.all_reduce(flat, async_op=True), finish)

    def broadcast_floats(self, values: list[float]) -> list[float]:
        """Return rank 0's values on every rank, over the CPU group, without waiting for a GPU."""
        with self._meeting():
            if self.world_size == 1:
                return values
            tensor = torch.tensor(values, dtype=torch.float64)
            dist.broadcast(tensor, src=0)
        return [float(value) for value in tensor]

    def start_reduce_scatter_mean(self, tensor: Tensor) -> Pending:
        """Start averaging tensor over the ranks; wait returns this rank's equal share of its first axis.

        The first axis must be a multiple of world_size. On CPU tensor is overwritten.
        """
        if self.world_size == 1:
            return Pending(tensor)
        share = tensor.size(0) // self.world_size
        if tensor.is_cuda:
            out = tensor.new_empty(share, *tensor.shape[1:])
            return Pending(out, _reduce_scatter(out, tensor, op=dist.ReduceOp.AVG, async_op=True))
        mean = self.start_mean_(tensor)  # gloo neither averages nor scatters
        mean.result = tensor[self.rank * share : (self.rank + 1) * share]
        return mean

    def all_gather(self, share: Tensor) -> Tensor:
        """Return every rank's share joined along the first axis."""
        return self.start_all_gather(share).wait()

    def start_all_gather(self, share: Tensor) -> Pending:
        """Start collecting every rank's share; wait returns them joined along the first axis."""
        if self.world_size == 1:
            return Pending(share)
        whole = share.new_empty(self.world_size * share.size(0), *share.shape[1:])
        return Pending(whole, _all_gather(whole, share.contiguous(), async_op=True))

    def gather_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return every rank's rows (n, c) int64 joined in rank order; n may differ."""
        if self.world_size == 1:
            return rows
        counts = torch.zeros(self.world_size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        with self._meeting():
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

    def require_same(self, tensors: dict[str, Tensor], what: str) -> None:
        """Raise RuntimeError, on every rank, naming the first tensor of which the ranks do not hold the same bits.

        Compares a sum over each tensor's bits; one look at the device for all of them.
        """
        if self.world_size == 1:
            return
        sums = torch.stack([bit_sum(tensor) for tensor in tensors.values()]).cpu().numpy()  # (tensors,)
        rows = self.gather_rows(sums[None])  # (ranks, tensors)
        differing = (rows != rows[0]).nonzero()
        if differing[0].size:
            rank, place = int(differing[0][0]), int(differing[1][0])
            raise RuntimeError(f"{what}: rank {rank} holds other bits than rank 0 in {list(tensors)[place]}")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            with self._meeting():
                dist.all_reduce(torch.zeros(1))
                dist.barrier()

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # what cycles still hold of the group must end before the interpreter: gloo's threads abort it
