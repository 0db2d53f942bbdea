"""One call a matrix and a state for GPTQ, as tests want them, and plain rounding, which GPTQ must beat."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from model.config import QuantConfig
from model.quant.gptq import factor_hessians, largest_code, round_batch, row_scales
from model.quant.quantized import QuantizedState, QuantizedWeight
from model.quant.state import StateQuantizer, configured_clips


def round_to_nearest(weight: Tensor, *, bits: int, clip_sigmas: float) -> QuantizedWeight:
    """Round every weight on its own, with the same row scales as GPTQ: the baseline that GPTQ must beat.

    weight (out, in) float32. Returns codes (out, in) int8 and scales (out,) float16.
    """
    qmax = largest_code(bits)
    scales = row_scales(weight, qmax=qmax, clip_sigmas=clip_sigmas)
    codes = (weight / scales.float()[:, None]).round().clamp(-qmax, qmax)
    return QuantizedWeight(codes.to(torch.int8), scales, bits)


def quantize_weights(
    weights: Tensor, hessians: Tensor, *, bits: int, clip_sigmas: float, damping_frac: float, block_columns: int
) -> list[QuantizedWeight]:
    """Round matrices of one shape together: quantize_weight for weights (N, out, in) and hessians (N, in, in)."""
    assert hessians.shape == (weights.shape[0], weights.shape[2], weights.shape[2]), (weights.shape, hessians.shape)
    qmax = largest_code(bits)
    factor = factor_hessians(hessians.float(), damping_frac=damping_frac)
    codes, scales = round_batch(
        weights.float(), factor, qmax=qmax, clip_sigmas=clip_sigmas, block_columns=block_columns
    )
    return [QuantizedWeight(codes[i], scales[i], bits) for i in range(weights.shape[0])]


def quantize_weight(
    weight: Tensor, hessian: Tensor, *, bits: int, clip_sigmas: float, damping_frac: float, block_columns: int
) -> QuantizedWeight:
    """Round weight to integers column by column, pushing each error onto the columns still to come.

    weight (out, in) float32; hessian (in, in), sum of x x^T over calibration tokens.
    Returns codes (out, in) int8 and scales (out,) float16.
    Raises ValueError if bits is outside 2..8 or the damped hessian is not positive definite.
    Source: GPTQ, arXiv:2210.17323; row-sigma clipping as in the reference record.
    """
    [quantized] = quantize_weights(
        weight[None],
        hessian[None],
        bits=bits,
        clip_sigmas=clip_sigmas,
        damping_frac=damping_frac,
        block_columns=block_columns,
    )
    return quantized


def quantize_state(
    state: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantConfig,
    *,
    looped: Collection[int] = (),
    clips: Mapping[str, float] | None = None,
) -> QuantizedState:
    """Quantize a model's state dict: large matrices by GPTQ, everything else to float16.

    hessians: `layers.<i>.<qkv|o|up|down>` and `embedding` -> (in, in) float32, as HessianCollector gives them.
    looped: layers of the repeated block. clips: clip_sigmas by group, in place of config's. A matrix of at most
    config.keep_float_numel numbers stays float16.
    Raises ValueError naming a tensor with infinities, or a Hessian that cannot be factored.
    """
    quantizer = StateQuantizer(state, hessians, config, looped=looped)
    return quantizer.quantize(configured_clips(config) if clips is None else clips)
