"""A recorder for machines without CUDA: what it records runs again at every replay, as a graph would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels.graphs import Recorder, Recording


class FakeRecorder(Recorder):
    """Records on a CPU; a call whose inputs are broken fails half-way, as forbidden work inside a recording does.

    shape: that of a call's result, by its inputs; recording runs nothing.
    """

    def __init__(
        self, shape: Callable[..., tuple[int, ...]], is_broken: Callable[..., bool] = lambda *_: False, **options: Any
    ) -> None:
        super().__init__(limit_bytes=1 << 60, **options)
        self.shape, self.is_broken = shape, is_broken
        self.num_made = self.num_recovered = 0

    def record(self, call: Callable[..., Tensor], *inputs: Tensor) -> Recording:
        """Record a call, or fail."""
        if self.is_broken(*inputs):
            raise RuntimeError("operation not permitted when stream is capturing\nand a line more")
        self.num_made += 1
        result = torch.empty(self.shape(*inputs), dtype=torch.float64)
        return Recording(FakeGraph(call, inputs, result), inputs, result)

    def _recover(self) -> None:
        self.num_recovered += 1
        self.recorded.clear()


class FakeGraph:
    """Runs a call again on the tensors it was recorded with."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], result: Tensor) -> None:
        self.call, self.inputs, self.result = call, inputs, result

    def replay(self) -> None:
        """Run."""
        self.result.copy_(self.call(*self.inputs))
