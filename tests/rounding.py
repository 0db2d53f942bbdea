"""Plain rounding, which GPTQ must beat."""

from __future__ import annotations

import torch
from torch import Tensor

from model.quant.gptq import largest_code, row_scales
from model.quant.quantized import QuantizedWeight


def round_to_nearest(weight: Tensor, *, bits: int, clip_sigmas: float) -> QuantizedWeight:
    """Round every weight on its own, with the same row scales as GPTQ: the baseline that GPTQ must beat.

    weight (out, in) float32. Returns codes (out, in) int8 and scales (out,) float16.
    """
    qmax = largest_code(bits)
    scales = row_scales(weight, qmax=qmax, clip_sigmas=clip_sigmas)
    codes = (weight / scales.float()[:, None]).round().clamp(-qmax, qmax)
    return QuantizedWeight(codes.to(torch.int8), scales, bits)
