"""CUDA graphs: recording a fixed piece of device work once, to replay it without the host's part.

What a recording reads must stay where it is: inputs are copied into the tensors it was recorded with.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.gpt import GPT
from model.kernels.dispatch import uses_triton


def fits_graphs(model: GPT) -> bool:
    """Return whether this model's work can be recorded: 16-bit floats on CUDA, where nothing waits for the host."""
    return uses_triton(torch.empty(0, dtype=model.compute_dtype, device=model.qo_bank.device))


class Recording(NamedTuple):
    """A graph, the tensors it reads, and the one it leaves its result in."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor

    def replay(self, *inputs: Tensor) -> Tensor:
        """Run on inputs, each shaped as it was recorded; the result is valid until the next replay."""
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.result


class Recorder:
    """Records graphs that share one pool of device memory: they must run one after the other."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.side: Any = None  # one stream for all recordings: memory is reused on its own stream only

    def record(self, call: Callable[..., Tensor], *inputs: Tensor) -> Recording:
        """Record call(*inputs), whose libraries and kernels must have been used before; recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        if self.side is None:
            self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        self.side.wait_stream(torch.cuda.current_stream())
        # torch.cuda.graph() would also wait for the device and empty the caches, at every recording.
        with torch.cuda.stream(self.side), _no_collection():
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = call(*inputs)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.side)
        return Recording(graph, inputs, result)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from freeing device memory in the middle of a recording."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
