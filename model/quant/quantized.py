"""What a quantized model is: named integer matrices with one scale a row, and float16 for everything small.

The model keeps its weights in banks (all layers in one tensor); rounding and the artifact want single matrices.
This module is the one place that knows how banks split, and which parameters a configuration has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from model.banks import join_banks
from model.quant.low_rank import LowRank


class QuantizedWeight(NamedTuple):
    """One matrix in integers: weight = codes * scales[:, None], plus a low-rank correction where there is one."""

    codes: Tensor  # (out, in) int8
    scales: Tensor  # (out,) float16
    bits: int
    correction: LowRank | None = None

    def dequantize(self) -> Tensor:
        """Return the matrix (out, in) in float32."""
        rounded = self.codes.float() * self.scales.float()[:, None]
        return rounded if self.correction is None else rounded + self.correction.product()


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedState:
    """All parameters of a model: matrices by name (`layers.3.q`, `embedding`), the rest as float16 tensors."""

    matrices: dict[str, QuantizedWeight]
    floats: dict[str, Tensor]


def dequantize(quantized: QuantizedState) -> dict[str, Tensor]:
    """Return the model's state dict in float32, ready for load_state_dict."""
    tensors = {name: tensor.float() for name, tensor in quantized.floats.items()}
    tensors.update({name: weight.dequantize() for name, weight in quantized.matrices.items()})
    return join_banks(tensors)
