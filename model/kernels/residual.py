"""What happens to the residual stream between two matrix products, as one function each.

Every function has a plain PyTorch form, which serves CPUs and the tests, and a Triton kernel that reads and writes each
tensor once (model.kernels.residual_triton), which serves 16-bit floats on CUDA.
"""

# B sequences, T tokens, D model_dim, P numbers of a packed gate, W columns that a gate reads

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.kernels.dispatch import uses_triton
from model.layers import merge_skip, rms_norm, smear, token_factor


class Stream(NamedTuple):
    """A residual stream whose last addition is still to be made: its value is x + delta.

    Whoever reads it next needs the sum's norm too, and one kernel makes both in one pass over memory. With a gate
    delta counts times a factor, one number a token, made from the first columns of x (model.layers.token_factor).
    """

    x: Tensor  # (B, T, D)
    delta: Tensor | None  # (B, T, D)
    gate: Tensor | None = None  # (P,)


class Skip(NamedTuple):
    """A skip connection to merge: source (B, T, D), weight and gate (D,)."""

    source: Tensor
    weight: Tensor
    gate: Tensor


class Mix(NamedTuple):
    """How the first state comes back into the stream: weights[0] * stream + weights[1] * first.

    shift: a vector to add to the stream before anything else, a skip included.
    """

    first: Tensor  # (B, T, D)
    weights: Tensor  # (2, D)
    shift: Tensor | None = None  # (D,)


class Mixed(NamedTuple):
    """What mix_norm returns."""

    y: Tensor  # (B, T, D): the stream, shifted and merged where there is a skip; else as it came, without the shift
    mixed: Tensor  # (B, T, D)
    normed: Tensor  # (B, T, D): the norm of mixed, scaled
    columns: Tensor | None  # (B, T, W): the first columns of normed once more, so that their gradient comes apart
    first: Tensor  # (B, T, D): the first state for the next mixture, whose share of its gradient comes back this way


class Smear(NamedTuple):
    """How much of the token before each embedded token takes up: see model.layers.smear."""

    gate: Tensor  # (W,)
    strength: Tensor  # scalar
    bos_id: int | None  # a token that takes nothing, for it opens a document; None: only a row's first takes nothing


def settle(stream: Stream) -> Tensor:
    """Return the value (B, T, D) of a stream, its addition made."""
    is_fused = stream.gate is not None and uses_triton(stream.x)
    return add_norm(stream)[0] if is_fused else plain_value(stream)


def add_norm(stream: Stream, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return (y, scale * rms(y)), y the stream's value, both (B, T, D)."""
    if uses_triton(stream.x):
        fused = _fused(stream, None, scale, None, 0)
        return fused.y, fused.normed
    y = plain_value(stream)
    return y, rms_norm(y, scale)


def mix_norm(stream: Stream, mix: Mix, scale: float, skip: Skip | None = None, num_columns: int = 0) -> Mixed:
    """Return the stream with its skip merged, its mixture m with the first state, and scale * rms(m).

    With num_columns the first columns of the last come once more. Whoever mixes next takes the first state from here:
    the kernels add up its gradient on the way back, and autograd would add whole tensors.
    """
    if uses_triton(stream.x):
        return _fused(stream, mix, scale, skip, num_columns)
    y = plain_value(stream)
    shifted = y if mix.shift is None else y + mix.shift.to(y.dtype)
    if skip is not None:
        y = shifted = merge_skip(shifted, *skip)
    a, b = mix.weights.to(y.dtype)
    mixed = a * shifted + b * mix.first
    normed = rms_norm(mixed, scale)
    return Mixed(y, mixed, normed, normed[..., :num_columns] if num_columns else None, mix.first)


def smear_norm(x: Tensor, tokens: Tensor, how: Smear, left_padding: Tensor | None) -> Tensor:
    """Return rms of the smeared embeddings x (B, T, D) of tokens (B, T), the first state of the stream.

    left_padding (B,) int64: tokens before it are nobody's neighbors.
    """
    if uses_triton(x):
        from model.kernels.residual_triton import SmearNorm

        flat = rows_of(x)
        ids = None if how.bos_id is None else tokens.reshape(-1).contiguous()
        padding = None if left_padding is None else left_padding.contiguous()  # it may be a column of a table
        y: Tensor = SmearNorm.apply(flat, ids, padding, how.gate, how.strength, how.bos_id, tokens.size(1))
        return y.view(x.shape)
    positions = torch.arange(tokens.size(1), device=tokens.device)
    has_neighbor = positions > (0 if left_padding is None else left_padding.unsqueeze(1))  # (T,) or (B, T)
    if how.bos_id is not None:
        has_neighbor = has_neighbor & (tokens != how.bos_id)
    return rms_norm(smear(x, how.gate, how.strength, has_neighbor.expand(tokens.shape)))


def plain_value(stream: Stream) -> Tensor:
    """Return the value of a stream by PyTorch's own operations."""
    x, delta, gate = stream
    if delta is None:
        return x
    return x + (delta if gate is None else token_factor(x, gate) * delta)


def rows_of(x: Tensor) -> Tensor:
    """Return x (..., D) as contiguous rows (N, D)."""
    return x.reshape(-1, x.size(-1)).contiguous()


def _fused(stream: Stream, mix: Mix | None, scale: float, skip: Skip | None, num_columns: int) -> Mixed:
    from model.kernels.residual_triton import MixNorm

    x = stream.x
    source, weight, gate = skip if skip is not None else (None, None, None)
    first, weights, shift = mix if mix is not None else (None, None, None)
    tensors = (None if t is None else rows_of(t) for t in (x, stream.delta, source, first))
    flat, delta, source, first = tensors
    outputs = MixNorm.apply(flat, delta, source, weight, gate, first, weights, scale, stream.gate, shift, num_columns)
    shaped: list[Any] = [None if y is None else y.view(*x.shape[:-1], y.size(-1)) for y in outputs]
    total = x if shaped[0] is None else shaped[0]
    return Mixed(total, total if shaped[1] is None else shaped[1], *shaped[2:])
