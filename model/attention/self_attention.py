"""From the joined projections of a block to what enters its output projection, as one function.

Plain PyTorch on CPUs and for wide floats. On CUDA in 16 bits: Triton kernels around a variable-length attention kernel,
in one autograd node that keeps neither the raw projections nor any copy of the heads.
"""

# B rows, T tokens of a row, n queries of a row, H query heads, K kv heads, E head_dim, N = B T tokens
# W columns that the heads' gate reads

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention.backends import VARLEN_KERNELS, attention, resolve_backend
from model.attention.bounds import Bounds, segment_bounds, window_bounds
from model.attention.window import window_attention
from model.data.packing import Packing
from model.kernels.dispatch import uses_triton
from model.layers import exclude_own_value, gate_heads, normalize_and_rotate


class Rows(NamedTuple):
    """How the tokens of a batch see each other.

    Rows (B, T) are causal sequences; packing cuts a single one into segments; left_padding (B,) int64 counts leading
    tokens that belong to nobody; num_queries: only the last so many positions are wanted (None: all). tables: where
    visits keep what they can share, bounds by (num_queries,) and what Bounds has there.
    """

    packing: Packing | None = None
    left_padding: Tensor | None = None
    num_queries: int | None = None
    tables: dict[tuple[int, ...], Any] | None = None


class HeadGate(NamedTuple):
    """What decides a factor on each head's output, for each token: see model.layers.gate_heads."""

    columns: Tensor  # (B, n, W): the first ones of what queries, keys and values were made of
    weights: Tensor  # (H, W)


class Factors(NamedTuple):
    """What joined projections are made of: the kernel that makes them can do what follows too."""

    x: Tensor  # (B, T, D)
    weight: Tensor  # ((H + 2 K) E, D)
    apply: Callable[..., Any]  # (x, weight[, function]) -> x weight^T, or what the function makes of both: a module,
    # so that calibration can hook its input


def join(qkv: Tensor | Factors) -> Tensor:
    """Return the joined projections themselves."""
    return qkv if isinstance(qkv, Tensor) else qkv.apply(qkv.x, qkv.weight)


def self_attention(
    qkv: Tensor | Factors, cos: Tensor, sin: Tensor, q_gain: Tensor, rows: Rows, *, num_kv_heads: int,
    is_value_excluded: bool, gate: HeadGate | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Return the attention output (B, n, H E) of joined projections qkv (B, T, (H + 2 K) E), or of their factors.

    Queries and keys are normed and turned by cos and sin (T or B x T, rope_dims / 2), queries multiplied by q_gain
    (H,); is_value_excluded removes from each head's output its component along the token's own value; gate multiplies
    what is left. TRAP: 16-bit qkv on CUDA may be overwritten.
    """
    x, width = (qkv, qkv.size(-1)) if isinstance(qkv, Tensor) else (qkv.x, qkv.weight.size(0))
    batch, time, _ = x.shape
    num_heads = q_gain.numel()
    head_dim = width // (num_heads + 2 * num_kv_heads)
    if backend != "sdpa" and uses_triton(x, head_dim, num_kv_heads, num_heads // num_kv_heads):
        shape = _Shape(batch, time, rows.num_queries or time, num_heads, num_kv_heads, head_dim)
        return _fused(qkv, cos, sin, q_gain, rows, shape, is_value_excluded, gate, backend)
    qkv, n = join(qkv), rows.num_queries or time
    sizes = [heads * head_dim for heads in (num_heads, num_kv_heads, num_kv_heads)]
    q, k, v = torch.split(qkv, sizes, dim=-1)
    q, k, v = (x.view(batch, time, -1, head_dim) for x in (q, k, v))
    q = normalize_and_rotate(q[:, -n:], cos[..., -n:, :], sin[..., -n:, :], q_gain)
    k = normalize_and_rotate(k, cos, sin)
    if rows.left_padding is None and n == time:
        y = attention(q, k, v, rows.packing, backend=backend)  # (B, T, H, E)
    else:
        y = window_attention(q, k, v, rows.left_padding)  # (B, n, H, E)
    if is_value_excluded:
        y = exclude_own_value(y, v[:, -n:])
    if gate is not None:
        y = gate_heads(y, *gate)
    return y.reshape(batch, n, num_heads * head_dim)


class _Shape(NamedTuple):
    batch: int
    time: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    head_dim: int


def _fused(
    qkv: Tensor | Factors,
    cos: Tensor,
    sin: Tensor,
    gain: Tensor,
    rows: Rows,
    shape: _Shape,
    is_value_excluded: bool,
    gate: HeadGate | None,
    backend: str,
) -> Tensor:
    from model.attention.heads_product_triton import fits_heads

    x, weight, apply = (qkv, None, None) if isinstance(qkv, Tensor) else qkv
    name = resolve_backend(backend, x.new_empty(0, shape.head_dim), is_packed=True)
    if weight is not None and not (name == "triton" and fits_heads(x.flatten(0, 1), shape.head_dim, cos.size(-1))):
        x, weight = join(qkv), None
    made, key = {} if rows.tables is None else rows.tables, (shape.num_queries,)
    if key not in made and (rows.left_padding is not None or shape.num_queries < shape.time):
        made[key] = window_bounds(rows.left_padding, shape.batch, shape.time, shape.num_queries, x.device)
    elif key not in made:
        made[key] = segment_bounds(rows.packing, shape.batch, shape.time, x.device)
    flat = x.reshape(-1, x.size(-1)).contiguous()
    tables = [x.reshape(-1, x.size(-1)).float().contiguous() for x in (cos, sin)]
    columns, weights = (None, None) if gate is None else (gate.columns.flatten(0, 1).contiguous(), gate.weights)
    inputs = (x for x in (flat, weight, gain, columns, weights) if x is not None)
    is_recording = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    z: Tensor = _SelfAttention.apply(
        flat, *tables, gain, columns, weights, made[key]._replace(tables=rows.tables), shape, is_value_excluded, name,
        is_recording, weight, apply,
    )  # fmt: skip
    return z.view(shape.batch, shape.num_queries, -1)


class _SelfAttention(torch.autograd.Function):
    """(qkv, cos, sin, gain, columns, weights, bounds, shape, is_value_excluded, ..., weight, apply) -> z (B n, H E).

    qkv (N, (H + 2 K) E), or with a weight what it is to be made of; columns (B n, W) and weights (H, W) are the heads'
    gate, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, columns: Tensor | None, weights: Tensor | None,
        bounds: Bounds, shape: _Shape, is_value_excluded: bool, backend: str, is_recording: bool,
        weight: Tensor | None, apply: Callable[..., Any],
    ) -> Tensor:  # fmt: skip
        from model.attention.gate_triton import gate
        from model.attention.heads_product_triton import project_and_rotate
        from model.attention.heads_triton import rotate
        from model.attention.varlen_triton import attend

        is_own = backend == "triton"
        excludes = is_value_excluded and not is_own  # ours does it itself, and the gate
        # Others' backward is faster with copies of key and value heads; ours reads a head once for its whole group.
        num_copies = shape.num_heads // shape.num_kv_heads if is_recording and not is_own else 1
        how = cos, sin, gain, shape.num_kv_heads
        if weight is None:
            turned, inverse = rotate(qkv, *how, num_copies=num_copies)
        else:
            turned, inverse = apply(qkv, weight, lambda x, weight: project_and_rotate(x, weight, *how))
        q, k, v = _split(turned, shape)
        kept: tuple[Tensor | None, ...] = (None,) * 4
        if is_own:
            kept = attend(q, k, v, bounds, is_value_excluded=is_value_excluded, columns=columns, weights=weights)
            y = kept[0]
        else:
            if is_recording:
                q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
            with torch.set_grad_enabled(is_recording):
                y = VARLEN_KERNELS[backend](q, k, v, bounds)  # (B n, H, E)
        if is_recording:
            ctx.inner = None if is_own else (q, k, v, y)
            ctx.save_for_backward(
                turned, inverse, cos, sin, gain, columns, weights, *kept, qkv if weight is not None else None, weight
            )
            ctx.bounds, ctx.shape, ctx.excludes = bounds, shape, excludes
        z = y.detach()
        if not is_own and (columns is not None or excludes):
            z = gate(z, _own_values(v, shape), columns, weights, is_value_excluded=excludes)
        return z.reshape(z.size(0), -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from model.attention.gate_triton import gate_backward, spread
        from model.attention.heads_triton import rotate_backward
        from model.attention.varlen_backward_triton import Attended, Rotation, attend_backward

        turned, inverse, cos, sin, gain, columns, weights, *kept, x, weight = ctx.saved_tensors
        shape, is_own = ctx.shape, ctx.inner is None
        q, k, v, y = (*_split(turned, shape), kept[0]) if is_own else ctx.inner
        grad_y = grads[0].reshape(y.shape).contiguous()
        grad_own = slope = grad_columns = grad_weights = None
        if not is_own and (columns is not None or ctx.excludes):
            grad_y, grad_own, slope = gate_backward(
                grad_y, y.detach(), _own_values(v, shape), columns, weights, is_value_excluded=ctx.excludes
            )
        needs_gain = ctx.needs_input_grad[3]
        if is_own:
            missing = shape.time - shape.num_queries
            grad_heads = torch.empty_like(turned)
            into = grad_heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
            into[0].unflatten(0, (shape.batch, -1))[:, :missing] = 0
            rotation = Rotation(inverse, cos, sin, gain, shape.num_queries, missing, needs_gain)
            grad_gain, slope = attend_backward(grad_y, q, k, v, Attended(*kept), ctx.bounds, into, rotation)
            grad_qkv = grad_heads.flatten(1)
        else:
            grad_q, grad_k, grad_v = torch.autograd.grad(y, (q, k, v), grad_y)
            ctx.inner = ()  # lets go of the graph
            grad_q, grad_own = _whole(grad_q, shape), None if grad_own is None else _whole(grad_own, shape)
            grad_qkv, grad_gain = rotate_backward(
                (grad_q, grad_k, grad_v), grad_own, turned, inverse, cos, sin, gain, needs_gain=needs_gain
            )
        if slope is not None:
            grad_columns, grad_weights = spread(slope, columns, weights, needs_weights=ctx.needs_input_grad[5])
        grad_x: Tensor | None = grad_qkv
        grad_weight = None
        if weight is not None:
            grad_x = grad_qkv @ weight if ctx.needs_input_grad[0] else None
            grad_weight = grad_qkv.mT @ x if ctx.needs_input_grad[11] else None
        return grad_x, None, None, grad_gain, grad_columns, grad_weights, *(None,) * 5, grad_weight, None


def _split(turned: Tensor, shape: _Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return q (B n, H, E), k and v (N, H or K, E) as views of turned, q a copy where n < T."""
    num_others = (turned.size(1) - shape.num_heads) // 2
    q, k, v = turned.split((shape.num_heads, num_others, num_others), dim=1)
    return _last(q, shape), k, v


def _own_values(v: Tensor, shape: _Shape) -> Tensor:
    """Return the wanted tokens' value heads (B n, K, E), each once."""
    return _last(v.detach(), shape)[:, :: v.size(1) // shape.num_kv_heads]


def _last(x: Tensor, shape: _Shape) -> Tensor:
    """Return the last num_queries tokens of each row of x (N, heads, E)."""
    if shape.num_queries == shape.time:
        return x
    return x.view(shape.batch, shape.time, *x.shape[1:])[:, -shape.num_queries :].flatten(0, 1)


def _whole(grad: Tensor, shape: _Shape) -> Tensor:
    """Return grad (B n, heads, E) of the last tokens of each row as that of all tokens (N, heads, E)."""
    missing = shape.time - shape.num_queries
    if not missing:
        return grad
    return F.pad(grad.view(shape.batch, -1, *grad.shape[1:]), (0, 0, 0, 0, missing, 0)).flatten(0, 1)
