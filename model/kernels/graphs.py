"""CUDA graphs: recording a fixed piece of device work once, to replay it without the host's part.

What a recording reads must stay where it is: inputs are copied into the tensors it was recorded with. Work that cannot
be recorded runs as it is, operation by operation: nothing but time depends on a recording.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MOST_RECORDINGS = 160  # of one recorder; the least recently used is dropped for another
RECORDINGS_FRAC = (
    0.05  # of the device's memory for the graphs themselves; a graph of an adaptation step takes megabytes
)
MOST_FAILURES = 3  # sizes that could not be recorded; after so many no other is tried


class Recording(NamedTuple):
    """A graph, the tensors it reads, the one it leaves its result in, and the device memory it takes by itself."""

    graph: Any  # torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    result: Tensor
    num_bytes: int = 0

    def replay(self, *inputs: Tensor) -> Tensor:
        """Run on inputs, each shaped as it was recorded; the result is valid until the next replay."""
        for static, value in zip(self.inputs, inputs, strict=True):
            static.copy_(value, non_blocking=True)
        self.graph.replay()
        return self.result


class Recorder:
    """Records and replays work by size. All graphs share one pool of device memory: they run one after the other.

    At most most_recordings are kept, and at most limit_bytes (None: a share of the device's memory) of graphs.
    """

    def __init__(self, *, most_recordings: int = MOST_RECORDINGS, limit_bytes: int | None = None) -> None:
        self.recorded: OrderedDict[Hashable, Recording] = OrderedDict()  # by size, the least recently used first
        self.failed: set[Hashable] = set()
        self.most_recordings, self.limit_bytes = most_recordings, limit_bytes
        self.pool: Any = None
        self.side: Any = None  # one stream for all recordings: memory is reused on its own stream only
        self.abandoned: list[Any] = []  # graphs that failed: the allocator may still ask them what they record

    def run(self, key: Hashable, call: Callable[..., Tensor], *inputs: Tensor, device: torch.device) -> Tensor:
        """Return call(*inputs on device), replayed where this key is recorded, else recorded first if that is possible.

        call, its libraries and kernels must have run before, at any size. The result is valid until the next run.
        """
        if key not in self.recorded and key not in self.failed and len(self.failed) < MOST_FAILURES:
            static = tuple(torch.empty_like(x, device=device).copy_(x, non_blocking=True) for x in inputs)
            self._keep(key, call, static)
        if key in self.recorded:
            self.recorded.move_to_end(key)
            return self.recorded[key].replay(*inputs)
        return call(*(x.to(device, non_blocking=True) for x in inputs))

    def _keep(self, key: Hashable, call: Callable[..., Tensor], static: tuple[Tensor, ...]) -> None:
        """Record call for this key, dropping others where there are too many; note a failure and go on without."""
        while len(self.recorded) >= self.most_recordings:
            self._drop()
        try:
            self.recorded[key] = self.record(call, *static)
        except (
            Exception
        ) as error:  # whatever it is: the same work runs next without a recording, and raises if it is ill
            self.failed.add(key)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rest = "" if len(self.failed) < MOST_FAILURES else "; no other size is tried"
            logger.warning("size=%s runs operation by operation: it could not be recorded: %s%s", key, reason, rest)
        if key in self.failed:  # outside the handler, whose traceback holds on to the tensors of the failure
            self._recover()
            return
        while len(self.recorded) > 1 and sum(each.num_bytes for each in self.recorded.values()) > self._limit():
            self._drop()

    def _drop(self) -> None:
        """Forget the least recently used recording; one that still runs on the device is freed when it has ended."""
        self.recorded.popitem(last=False)
        if not self.recorded:
            self.pool = None  # it goes with its last graph

    def _limit(self) -> int:
        if self.limit_bytes is None:
            self.limit_bytes = int(
                RECORDINGS_FRAC * torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
            )
        return self.limit_bytes

    def _recover(self) -> None:
        """Leave the device as if nothing had been recorded: all recordings share the failed one's memory.

        Raises what the device reports if it is beyond use.
        """
        torch.cuda.synchronize()
        self.recorded.clear()
        self.pool = self.side = None
        gc.collect()
        torch.cuda.empty_cache()

    def record(self, call: Callable[..., Tensor], *inputs: Tensor) -> Recording:
        """Record call(*inputs), whose libraries and kernels must have been used before; recording runs nothing.

        Raises what call raises; the stream and the allocator are out of the recording then.
        """
        graph = torch.cuda.CUDAGraph()
        if self.pool is None:
            self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        before = _memory_outside_allocator()
        self.side.wait_stream(torch.cuda.current_stream())
        # torch.cuda.graph() would also wait for the device and empty the caches, at every recording.
        with torch.cuda.stream(self.side), _no_collection():
            try:
                graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                result = call(*inputs)
                graph.capture_end()
            except BaseException:
                self._abandon(graph)
                raise
        torch.cuda.current_stream().wait_stream(self.side)
        return Recording(graph, inputs, result, max(0, _memory_outside_allocator() - before))

    def _abandon(self, graph: Any) -> None:
        """End a recording that failed."""
        self.abandoned.append(graph)
        with suppress(RuntimeError):  # it ends the stream's recording, then says that it is void
            graph.capture_end()
        # Where it said so, it left the allocator serving the pool; where it did not, there is nothing to end.
        with suppress(RuntimeError):
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, self.pool)
            torch._C._cuda_releasePool(device, self.pool)
        with suppress(RuntimeError):
            graph.reset()


def _memory_outside_allocator() -> int:
    """Return the bytes of the device that are taken, those of PyTorch's allocator left out."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


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
