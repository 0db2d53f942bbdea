"""GPTQ: weights rounded to integers so that a layer's outputs, not its weights, change least.

Rows of a matrix never mix, so all matrices that read the same kind of input are rounded together, as one batch with
their rows side by side. Only `_round_block` walks column by column; everything around it is batched matrix work, on
whichever device the weights are. Source: GPTQ, arXiv:2210.17323; row-sigma clipping as in the reference record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.banks import EMBEDDING, KINDS_OF_HESSIAN, matrix_name, split_banks
from model.config import QuantConfig
from model.quant.quantized import QuantizedState, QuantizedWeight

# Shapes: N matrices of one batch, R rows (out), C columns (in), K columns of one block
SMALLEST_HALF = 2.0**-24  # the least positive float16; smaller scales would round to 0
MAX_CLIP_GROWTH = 4.0  # fit_to_limit gives up beyond this many times the configured clip_sigmas
CLIP_TOLERANCE = 1e-3  # relative width at which its bisection stops; 0.1 % of k is about 6 kB at full size


class HessianFactor(NamedTuple):
    """What rounding needs of a batch of Hessians, columns in the order in which they are rounded."""

    upper: Tensor  # (N, C, C) float32, upper triangular, U^T U = H^-1 of the damped and reordered Hessian
    order: Tensor  # (N, C) int64, falling diagonal
    is_dead: Tensor  # (N, C) bool, in the original order: inputs that were always zero


class FittedState(NamedTuple):
    """Outcome of fit_to_limit."""

    state: QuantizedState
    matrix_clip_sigmas: float  # the one that was used
    artifact_bytes: int  # as measured
    num_tries: int


def largest_code(bits: int) -> int:
    """Return qmax, the largest magnitude of a signed code of that many bits; ValueError outside 2..8."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits} must be between 2 and 8")
    return (1 << (bits - 1)) - 1


def row_scales(weight: Tensor, *, qmax: int, clip_sigmas: float) -> Tensor:
    """Return clip_sigmas * std / qmax of each row, rounded to float16 and never zero.

    weight (..., R, C) float32, C at least 2 (std divides by C - 1). A row whose scale would round to zero, because it
    is constant or nearly so, takes the scale that just holds its largest entry. Returns (..., R) float16.
    """
    scales = (clip_sigmas * weight.std(dim=-1) / qmax).half()
    largest = (weight.abs().amax(dim=-1) / qmax).clamp_min(SMALLEST_HALF).half()
    return torch.where(scales > 0, scales, largest)


def factor_hessians(hessians: Tensor, *, damping_frac: float, names: Sequence[str] = ()) -> HessianFactor:
    """Damp, reorder and factor a batch of Hessians (N, C, C) float32.

    A zero on the diagonal (a dead input) becomes 1; then damping_frac of the mean diagonal is added to all of it.
    Raises ValueError naming the Hessian that is not positive definite or not finite.
    """
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)  # (N, C)
    is_dead = diagonal == 0
    diagonal = torch.where(is_dead, 1.0, diagonal)
    diagonal = diagonal + damping_frac * diagonal.mean(dim=-1, keepdim=True)
    order = diagonal.argsort(dim=-1, descending=True, stable=True)
    damped = hessians.clone()
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    damped = damped.take_along_dim(order[:, :, None], dim=1).take_along_dim(order[:, None, :], dim=2)
    # H = R R^T with R upper is a Cholesky factor of the matrix read backwards, and U = R^-1. One factorization,
    # and the inverse of H is never formed.
    lower, info = torch.linalg.cholesky_ex(damped.flip(-2, -1))
    failed = ((info != 0) | ~lower.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if failed:
        raise ValueError(
            f"hessian of {names[failed[0]] if names else failed[0]} is not positive definite: "
            f"check calibration for infinities or raise quant.damping_frac={damping_frac}"
        )
    identity = torch.eye(hessians.shape[-1], device=hessians.device, dtype=hessians.dtype)
    upper = torch.linalg.solve_triangular(lower.flip(-2, -1), identity.expand_as(lower), upper=True)
    return HessianFactor(upper, order, is_dead)


def _round_block(block: Tensor, upper: Tensor, scales: Tensor, qmax: int) -> Tensor:
    """Round one block column by column, each error leaving the block's later columns at once.

    block (N, K, R) float32, columns along the middle axis; holds the codes afterwards. upper (N, K, K); scales (N, R).
    Returns the errors (N, K, R), already divided by the factor's diagonal.
    """
    errors = torch.empty_like(block)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)  # (N, K)
    for j in range(block.shape[1]):
        column = block[:, j]  # (N, R)
        codes = (column / scales).round_().clamp_(-qmax, qmax)
        torch.div(column - codes * scales, diagonal[:, j, None], out=errors[:, j])
        block[:, j] = codes
        block[:, j + 1 :].addcmul_(upper[:, j, j + 1 :, None], errors[:, j, None], value=-1)
    return errors


def round_batch(
    weights: Tensor, factor: HessianFactor, *, qmax: int, clip_sigmas: float, block_columns: int
) -> tuple[Tensor, Tensor]:
    """Round a batch of matrices against factored Hessians.

    weights (N, R, C) float32, not changed. Returns codes (N, R, C) int8 and scales (N, R) float16.
    """
    scales = row_scales(weights, qmax=qmax, clip_sigmas=clip_sigmas)  # over the row as it was, dead columns included
    steps = scales.float()
    columns = weights.masked_fill(factor.is_dead[:, None, :], 0.0).transpose(1, 2)  # (N, C, R)
    columns = columns.take_along_dim(factor.order[:, :, None], dim=1).contiguous()
    num_columns = columns.shape[1]
    for start in range(0, num_columns, block_columns):
        stop = min(start + block_columns, num_columns)
        upper = factor.upper[:, start:stop]  # (N, K, C)
        errors = _round_block(columns[:, start:stop], upper[:, :, start:stop].contiguous(), steps, qmax)
        if stop < num_columns:
            columns[:, stop:].baddbmm_(upper[:, :, stop:].transpose(1, 2), errors, alpha=-1)
    inverse = factor.order.argsort(dim=-1)
    codes = columns.to(torch.int8).take_along_dim(inverse[:, :, None], dim=1)
    return codes.transpose(1, 2).contiguous(), scales


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


class _Group(NamedTuple):
    """Matrices that are rounded together: one batch entry a Hessian, rows of its matrices side by side."""

    names: list[list[str]]  # of the matrices of each batch entry, in the order of their rows
    num_rows: list[int]  # of each matrix of an entry
    weights: Tensor  # (N, R, C) float32
    factor: HessianFactor
    bits: int


def _group(
    names: list[list[str]],
    hessian_names: list[str],
    bits: int,
    tensors: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantConfig,
) -> _Group | None:
    """Stack the matrices above keep_float_numel and factor their Hessians; None if none is that large."""
    names = [[name for name in row if tensors[name].numel() > config.keep_float_numel] for row in names]
    if not names[0]:  # sizes depend on the kind only, so all layers agree
        return None
    missing = [name for name in hessian_names if name not in hessians]
    assert not missing, f"no hessian for {missing}, only {sorted(hessians)}"
    weights = torch.stack([torch.cat([tensors[name].float() for name in row]) for row in names])
    stacked = torch.stack([hessians[name].to(weights.device, torch.float32) for name in hessian_names])
    factor = factor_hessians(stacked, damping_frac=config.damping_frac, names=hessian_names)
    return _Group(names, [tensors[name].shape[0] for name in names[0]], weights, factor, bits)


def _groups(tensors: dict[str, Tensor], hessians: dict[str, Tensor], config: QuantConfig) -> list[_Group]:
    """Return the groups of a model's split tensors, the embedding last."""
    layers = range(sum(name.endswith(".up") for name in tensors))
    groups = [
        _group(
            [[matrix_name(i, kind) for kind in kinds] for i in layers],
            [matrix_name(i, shared) for i in layers],
            config.matrix_bits,
            tensors,
            hessians,
            config,
        )
        for shared, kinds in KINDS_OF_HESSIAN.items()
    ]
    groups.append(_group([[EMBEDDING]], [EMBEDDING], config.embedding_bits, tensors, hessians, config))
    return [group for group in groups if group is not None]


def _round_group(group: _Group, config: QuantConfig, clip_sigmas: float) -> dict[str, QuantizedWeight]:
    """Round one group and cut its rows back into matrices."""
    codes, scales = round_batch(
        group.weights,
        group.factor,
        qmax=largest_code(group.bits),
        clip_sigmas=clip_sigmas,
        block_columns=config.block_columns,
    )
    matrices = {}
    for index, names in enumerate(group.names):
        parts = zip(
            names, torch.split(codes[index], group.num_rows), torch.split(scales[index], group.num_rows), strict=True
        )
        matrices.update({name: QuantizedWeight(c, s, group.bits) for name, c, s in parts})
    return matrices


def _require_finite(tensors: dict[str, Tensor], problem: str) -> None:
    """Raise ValueError naming the first tensor that holds an infinity or NaN (one look at the device for all)."""
    if not tensors:
        return
    is_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    broken = [name for name, fine in zip(tensors, is_finite, strict=True) if not fine]
    if broken:
        raise ValueError(f"cannot quantize {broken[0]}: {problem}")


class StateQuantizer:
    """A model's tensors beside their factored Hessians: rounds at any clip_sigmas without factoring again."""

    def __init__(self, state: dict[str, Tensor], hessians: dict[str, Tensor], config: QuantConfig) -> None:
        tensors = split_banks(state)
        _require_finite(tensors, "it holds infinities or NaN, training diverged")
        groups = _groups(tensors, hessians, config)
        self._config = config
        self._matrix_groups = [group for group in groups if group.names != [[EMBEDDING]]]
        self._embedding: dict[str, QuantizedWeight] = {}
        for group in groups[len(self._matrix_groups) :]:  # the embedding comes last, if it is large enough
            self._embedding = _round_group(group, config, config.embedding_clip_sigmas)
        rounded = {name for group in groups for row in group.names for name in row}
        self._floats = {name: tensor.half() for name, tensor in tensors.items() if name not in rounded}
        _require_finite(self._floats, "its values do not fit float16")

    def quantize(self, matrix_clip_sigmas: float) -> QuantizedState:
        """Round every matrix with that clip; the embedding keeps its own. Shares tensors with earlier results."""
        matrices: dict[str, QuantizedWeight] = {}
        for group in self._matrix_groups:
            matrices.update(_round_group(group, self._config, matrix_clip_sigmas))
        matrices.update(self._embedding)
        _require_finite({name: weight.scales for name, weight in matrices.items()}, "its scales do not fit float16")
        return QuantizedState(matrices=matrices, floats=self._floats)


def quantize_state(
    state: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantConfig,
    *,
    matrix_clip_sigmas: float | None = None,
) -> QuantizedState:
    """Quantize a model's state dict: large matrices by GPTQ, everything else to float16.

    hessians: `layers.<i>.<qkv|o|up|down>` and `embedding` -> (in, in) float32, as HessianCollector gives them.
    matrix_clip_sigmas: in place of config's. A matrix of at most config.keep_float_numel numbers stays float16.
    Raises ValueError naming a tensor with infinities, or a Hessian that cannot be factored.
    """
    clip_sigmas = config.matrix_clip_sigmas if matrix_clip_sigmas is None else matrix_clip_sigmas
    return StateQuantizer(state, hessians, config).quantize(clip_sigmas)


def fit_to_limit(
    state: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantConfig,
    measure: Callable[[QuantizedState], int],
) -> FittedState:
    """Quantize with the smallest clip_sigmas, at least config's, whose artifact fits config.size_limit_bytes.

    measure returns the artifact's bytes, code included. A larger clip means coarser steps and fewer bytes; the clip
    grows until it fits, then bisected to CLIP_TOLERANCE. Raises ValueError if MAX_CLIP_GROWTH does not suffice.
    """
    quantizer = StateQuantizer(state, hessians, config)

    def attempt(clip_sigmas: float, num_tries: int) -> FittedState:
        quantized = quantizer.quantize(clip_sigmas)
        return FittedState(quantized, clip_sigmas, measure(quantized), num_tries)

    limit = config.size_limit_bytes
    too_fine = config.matrix_clip_sigmas
    best = attempt(too_fine, 1)
    while best.artifact_bytes > limit:
        too_fine, clip_sigmas = best.matrix_clip_sigmas, 1.25 * best.matrix_clip_sigmas
        if clip_sigmas > MAX_CLIP_GROWTH * config.matrix_clip_sigmas:
            raise ValueError(
                f"quant.size_limit_bytes={limit} cannot be met: {best.artifact_bytes} bytes are left at "
                f"matrix_clip_sigmas={too_fine:.2f}; raise the limit or lower quant.matrix_bits"
            )
        best = attempt(clip_sigmas, best.num_tries + 1)
    num_tries = best.num_tries
    while best.matrix_clip_sigmas - too_fine > CLIP_TOLERANCE * too_fine:
        num_tries += 1
        trial = attempt((too_fine + best.matrix_clip_sigmas) / 2, num_tries)
        if trial.artifact_bytes > limit:
            too_fine = trial.matrix_clip_sigmas
        else:
            best = trial
    return best._replace(num_tries=num_tries)
