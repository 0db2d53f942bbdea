"""The residual stream in two lanes, one that attention reads and one that the MLPs read, and how they meet at the end.

Two kinds of lanes: apart (Lanes), where each takes only what its own reader makes, and crossed (CrossedLanes), where
both take from both. Plain PyTorch forms, and Triton kernels (model.kernels.lanes_triton) for 16-bit floats on CUDA.
"""

# B sequences, T tokens, D model_dim, P numbers of a packed gate

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.kernels.residual import Mix, Skip, Stream, plain_value, rows_of
from model.layers import merge_skip, rms_norm, token_factor


class Lanes(NamedTuple):
    """The second half's residual streams: one until parallel_start_layer, then one for attention and one for the MLPs.

    From there on an MLP does not see what attention has just added, nor attention what MLPs add; they meet at the end.
    """

    attention: Stream  # skips and the first state are mixed into this one only
    mlp: Stream | None  # None while there is one lane


class CrossedLanes(NamedTuple):
    """Two lanes, with what attention and the MLP have made of them and both are still to take.

    routes: keep of lane 0 and 1, then what each takes of attention's, then of the MLP's (source by lane).
    With a gate the MLP's counts times a factor, one number a token, from the first columns of the MLPs' lane.
    """

    attention: Tensor  # (B, T, D) lane 0, which attention reads and skips are merged into
    mlp: Tensor  # (B, T, D) lane 1, which MLPs read
    from_attention: Tensor  # (B, T, D)
    from_mlp: Tensor  # (B, T, D)
    routes: Tensor  # (8,), of which six count: whole pieces of 16 bytes for the kernels
    gate: Tensor | None = None  # (P,)


class Crossed(NamedTuple):
    """The lanes after both have taken, ready for the next visit: (B, T, D) each, columns (B, T, W)."""

    attention: Tensor  # with its skip merged
    mlp: Tensor
    attention_normed: Tensor  # the norm of lane 0 mixed with the first state, scaled
    mlp_normed: Tensor  # the norm of lane 1, scaled
    columns: Tensor | None  # the first ones of attention_normed once more, so that their gradient comes apart
    first: Tensor  # the first state for the next mixture: see model.kernels.residual.Mixed


def cross_norm(lanes: CrossedLanes, mix: Mix, scale: float, skip: Skip | None = None, num_columns: int = 0) -> Crossed:
    """Return the lanes after both took what was made, and what attention and the MLP of the next visit read."""
    if uses_triton(lanes.attention):
        return _fused_cross(lanes, mix, scale, skip, num_columns)
    x, y = _take(lanes)
    if skip is not None:
        x = merge_skip(x, *skip)
    a, b = mix.weights.to(x.dtype)
    normed = rms_norm(a * x + b * mix.first, scale)
    columns = normed[..., :num_columns] if num_columns else None
    return Crossed(x, y, normed, rms_norm(y, scale), columns, mix.first)


def mean_norm(lanes: CrossedLanes) -> Tensor:
    """Return rms of the mean of both lanes (B, T, D), after they took what was made: the end of crossed lanes."""
    if uses_triton(lanes.attention):
        from model.kernels.lanes_triton import MeanNorm

        y: Tensor = MeanNorm.apply(*(rows_of(x) for x in lanes[:4]), lanes.routes, lanes.gate)
        return y.view(lanes.attention.shape)
    x, y = _take(lanes)
    return rms_norm((x + y) / 2)


def merge_norm(a: Stream, b: Stream, share: Tensor) -> Tensor:
    """Return rms(share * a + (1 - share) * b), the end of lanes that were apart; share a scalar tensor."""
    assert a.delta is not None
    assert b.delta is not None
    assert a.gate is None, "attention's output has no factor a token"
    if uses_triton(a.x) and b.gate is not None:
        kept, other, nothing = 2 * share, 2 - 2 * share, torch.zeros_like(share)
        routes = torch.stack((kept, other, kept, nothing, nothing, other, nothing, nothing))
        return mean_norm(CrossedLanes(a.x, b.x, a.delta, b.delta, routes, b.gate))
    if uses_triton(a.x):
        from model.kernels.lanes_triton import MergeNorm

        y: Tensor = MergeNorm.apply(*(rows_of(x) for x in (a.x, a.delta, b.x, b.delta)), share)
        return y.view(a.x.shape)
    share = share.to(a.x.dtype)
    return rms_norm(share * plain_value(a) + (1 - share) * plain_value(b))


def _take(lanes: CrossedLanes) -> tuple[Tensor, Tensor]:
    """Return both lanes after they took what was made, by PyTorch's own operations."""
    x, y, attention, mlp, routes, gate = lanes
    keep_x, keep_y, attention_x, attention_y, mlp_x, mlp_y = routes[:6].to(x.dtype)
    if gate is not None:
        mlp = token_factor(y, gate) * mlp
    return keep_x * x + attention_x * attention + mlp_x * mlp, keep_y * y + attention_y * attention + mlp_y * mlp


def _fused_cross(lanes: CrossedLanes, mix: Mix, scale: float, skip: Skip | None, num_columns: int) -> Crossed:
    from model.kernels.lanes_triton import CrossNorm

    assert mix.shift is None, "a shift belongs to visits before the lanes part"
    source, weight, gate = skip if skip is not None else (None, None, None)
    source = None if source is None else rows_of(source)
    outputs = CrossNorm.apply(
        *(rows_of(x) for x in lanes[:4]), lanes.routes, lanes.gate,
        source, weight, gate, rows_of(mix.first), mix.weights, scale, num_columns,
    )  # fmt: skip
    shape = lanes.attention.shape[:-1]
    shaped: list[Any] = [None if y is None else y.view(*shape, y.size(-1)) for y in outputs]
    return Crossed(*shaped)
