"""Second moments of every projection's inputs, gathered by forward pre-hooks while calibration batches run."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.banks import EMBEDDING, matrix_name
from model.kernels.dispatch import uses_triton


def hessian_name(projection: str) -> str:
    """Return the Hessian's name of a key of GPT.projections: layers_3_qkv -> layers.3.qkv, head -> embedding."""
    if projection == "head":
        return EMBEDDING
    _, layer, kind = projection.split("_")
    return matrix_name(int(layer), kind)


def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Add sum over tokens of x x^T to total (in, in) float32, in place; x (..., in), products summed in float32.

    TRAP: on CUDA what lies above the diagonal may be anything afterwards; mirror_lower puts it right at the end.
    """
    rows = x.detach().reshape(-1, x.shape[-1])  # (tokens, in)
    if uses_triton(rows) and rows.dtype == torch.bfloat16:
        from model.quant.hessians_triton import fits_half, half_moment

        # bf16 inputs straight into float32 sums
        total += half_moment(rows) if fits_half(rows) else torch.mm(rows.T, rows, out_dtype=torch.float32)
    else:
        rows = rows.float()
        total.addmm_(rows.T, rows)


def mirror_lower(total: Tensor) -> Tensor:
    """Return the symmetric matrix that has the lower half of total."""
    return total.tril() + total.tril(-1).mT


class HessianCollector:
    """Listens to model.projections inside a `with` block; finish() turns the sums into Hessians.

    A layer that is visited three times in a forward pass adds three inputs. Sums live on the inputs' device.
    """

    def __init__(self, model: nn.Module) -> None:
        projections = model.projections
        assert isinstance(projections, nn.ModuleDict), f"model.projections is a {type(projections).__name__}"
        self._projections = projections
        self._sums: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> HessianCollector:
        for key, module in self._projections.items():
            self._handles.append(module.register_forward_pre_hook(self._listener(hessian_name(key))))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _listener(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def listen(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name not in self._sums:
                size = x.shape[-1]
                self._sums[name] = torch.zeros(size, size, dtype=torch.float32, device=x.device)
            add_second_moment(self._sums[name], x)

        return listen

    def finish(self, num_batches: int, all_reduce: Callable[[Tensor], object] | None = None) -> dict[str, Tensor]:
        """Return name -> (in, in) float32 sums divided by num_batches.

        all_reduce sums a tensor over ranks in place; num_batches then counts the batches of all ranks together.
        """
        assert num_batches >= 1, num_batches
        names = sorted(self._sums)  # the same order on every rank
        if all_reduce is not None:
            for name in names:
                all_reduce(self._sums[name])
        sums = {name: mirror_lower(x) if x.is_cuda else x for name, x in self._sums.items()}
        return {name: sums[name] / num_batches for name in names}
