# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Triton kernels around attention: norm, rotary and gain of the heads, and the way back, which our attention shares."""

# N tokens, H query heads, K kv heads, G query heads or copies a kv head, E head_dim, W = (H + 2 K) E columns

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import launch

EPS: tl.constexpr = tl.constexpr(2.0**-23)
ROWS = 4  # tokens of one tile
BACKWARD_ROWS = 32


@triton.jit
def _rotate(
    x_ptr, cos_ptr, sin_ptr, gain_ptr, y_ptr, inverse_ptr, num_rows, table_rows, H: tl.constexpr, K: tl.constexpr,
    G: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    head = tl.arange(0, HEADS)[None, :, None]
    e = tl.arange(0, E)[None, None, :]
    inside = (rows < num_rows) & (head < H + (K if IN_PLACE else 2 * K))
    at = rows * ((H + 2 * K) * E) + head * E
    x = tl.load(x_ptr + at + e, mask=inside & (e < E), other=0.0).to(tl.float32)
    turns = inside & (head < H + K) & (e < 2 * HALF)
    partner = tl.load(x_ptr + at + tl.where(e < HALF, e + HALF, e - HALF), mask=turns, other=0.0).to(tl.float32)
    angle = (rows % table_rows) * HALF + e % HALF
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    inverse = tl.rsqrt(tl.sum(x * x, axis=2) / E + EPS)  # (ROWS, HEADS)
    heads = tl.arange(0, HEADS)[None, :]
    gain = tl.load(gain_ptr + heads, mask=heads < H, other=1.0).to(tl.float32)
    factor = tl.where(heads < H + K, gain * inverse, 1.0)
    y = (x * cos + tl.where(e < HALF, partner, -partner) * sin) * factor[:, :, None]
    y = y.to(y_ptr.dtype.element_ty)
    if IN_PLACE:
        tl.debug_barrier()  # other threads have read what is overwritten now
    out = y_ptr + rows * ((H + 2 * K * G) * E) + e
    tl.store(out + head * E, y, mask=inside & (head < H))
    for copy in tl.static_range(G):  # G copies of each key and value head
        tl.store(out + (H + (head - H) * G + copy) * E, y, mask=inside & (head >= H))
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    tl.store(inverse_ptr + row * (H + K) + heads, inverse, mask=(row < num_rows) & (heads < H + K))


@triton.jit
def write_gradient(
    grad, scale, grad_ptr, grad_row, y_ptr, y_row, first, head, num_rows, inverse_ptr, cos_ptr, sin_ptr, gain_ptr,
    partial_ptr, table_rows,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the gradient, scale times grad (ROWS, E), of num_rows rows y of a head, or of what rotate made them of.

    The latter if there is inverse, whose rows are first, first + 1, ...; partial, if there, gets what each row adds to
    the gradient of the head's gain.
    """
    row = tl.arange(0, ROWS)
    exists = (row < num_rows)[:, None]
    e = tl.arange(0, E)[None, :]
    at = grad_ptr + row[:, None] * grad_row
    if inverse_ptr is None:
        tl.store(at + e, grad * scale, mask=exists)
    else:
        y = tl.load(y_ptr + row[:, None] * y_row + e, mask=exists, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + (first + row) * (H + K) + head, mask=row < num_rows, other=0.0)
        gain = tl.load(gain_ptr + head, mask=head < H, other=1.0).to(tl.float32)
        # A gain of exactly zero leaves no trace of the query in y: it gets no gradient.
        over_gain = 1.0 / tl.where(gain == 0.0, float("inf"), gain)
        # Of the normed head and its gradient the norm needs the product, which turning does not change.
        along = tl.sum(grad * y, axis=1) * (scale * over_gain)
        if partial_ptr is not None:
            tl.store(partial_ptr + row[:, None], along[:, None], mask=exists)
        grad = (inverse * (scale * gain))[:, None] * grad - (inverse * along / E)[:, None] * y
        tl.store(at + e, grad, mask=exists)
        pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
        turns = exists & (pair < HALF)
        angle = (first % table_rows + row)[:, None] * HALF + pair
        cos = tl.load(cos_ptr + angle, mask=turns, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
        tl.debug_barrier()  # the columns of a pair are two threads', so they meet in memory
        left = tl.load(at + pair, mask=turns, other=0.0).to(tl.float32)
        right = tl.load(at + HALF + pair, mask=turns, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(at + pair, left * cos - right * sin, mask=turns)
        tl.store(at + HALF + pair, right * cos + left * sin, mask=turns)


@triton.jit
def _rotate_backward(
    grad_q_ptr, grad_k_ptr, grad_v_ptr, grad_own_ptr, y_ptr, inverse_ptr, cos_ptr, sin_ptr, gain_ptr,
    grad_x_ptr, partial_ptr, num_tokens, table_rows, H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a block of rows of one head, which does not reach across the end of the tables."""
    head = tl.program_id(0) % (H + 2 * K)
    block = tl.program_id(0) // (H + 2 * K)
    blocks = (table_rows + ROWS - 1) // ROWS
    first = block // blocks * table_rows + block % blocks * ROWS
    num_rows = table_rows - block % blocks * ROWS
    exists = (tl.arange(0, ROWS) < num_rows)[:, None]
    wide = first.to(tl.int64)
    row = wide + tl.arange(0, ROWS)[:, None]
    e = tl.arange(0, E)[None, :]
    grad = tl.load(grad_q_ptr + (row * H + head) * E + e, mask=exists & (head < H), other=0.0).to(tl.float32)
    for copy in tl.static_range(G):  # gradients of copies are added up
        at = (row * (K * G) + (head - H) * G + copy) * E + e
        is_key = exists & (head >= H) & (head < H + K)
        grad += tl.load(grad_k_ptr + at, mask=is_key, other=0.0).to(tl.float32)
        grad += tl.load(grad_v_ptr + (at - K * G * E), mask=exists & (head >= H + K), other=0.0).to(tl.float32)
    if head < H + K:
        if partial_ptr is not None:
            partial_ptr += head.to(tl.int64) * num_tokens + first
        y_head = tl.where(head < H, head, H + (head - H) * G)
        write_gradient(
            grad, 1.0, grad_x_ptr + (wide * (H + 2 * K) + head) * E, (H + 2 * K) * E,
            y_ptr + (wide * (H + 2 * K * G) + y_head) * E, (H + 2 * K * G) * E, first, head, num_rows,
            inverse_ptr, cos_ptr, sin_ptr, gain_ptr, partial_ptr, table_rows, H, K, E, HALF, ROWS,
        )  # fmt: skip
    else:
        if grad_own_ptr is not None:
            own_at = grad_own_ptr + (row * K + head - H - K) * E + e
            grad += tl.load(own_at, mask=exists, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + (row * (H + 2 * K) + head) * E + e, grad, mask=exists)


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, gain: Tensor, num_kv_heads: int, *, num_copies: int
) -> tuple[Tensor, Tensor]:
    """Return (y, inverse): heads ready for attention, and 1/rms of queries and keys (N, H + K) float32.

    y (N, H + 2 K num_copies, E) holds H queries, normed, turned and scaled, then the keys, normed and turned, and the
    values, each of them num_copies times: with H / K copies attention and its backward need no grouping. cos and sin
    float32 (rows, E'), row n of qkv (N, W) uses row n modulo rows; gain (H,). TRAP: one copy is written over qkv, whose
    values are in their place already; whoever saved qkv for a backward is told by an error.
    """
    num_heads = gain.numel()
    head_dim = qkv.size(1) // (num_heads + 2 * num_kv_heads)
    shape = qkv.size(0), num_heads + 2 * num_kv_heads * num_copies, head_dim
    if num_copies == 1:
        torch.autograd.graph.increment_version(qkv)
        y = qkv.detach().view(shape)
    else:
        y = qkv.new_empty(shape)
    inverse = torch.empty(qkv.size(0), num_heads + num_kv_heads, device=qkv.device, dtype=torch.float32)
    launch(
        _rotate, (triton.cdiv(qkv.size(0), ROWS),),
        qkv, cos, sin, gain, y, inverse, qkv.size(0), cos.size(0), H=num_heads, K=num_kv_heads, G=num_copies,
        E=head_dim, HALF=cos.size(1),
        HEADS=triton.next_power_of_2(num_heads + 2 * num_kv_heads), ROWS=ROWS, IN_PLACE=num_copies == 1, num_warps=4,
    )  # fmt: skip
    return y, inverse


def rotate_backward(
    grads: tuple[Tensor, Tensor, Tensor], grad_own: Tensor | None, y: Tensor, inverse: Tensor, cos: Tensor, sin: Tensor,
    gain: Tensor, *, needs_gain: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of qkv (N, W) and gain from those of the queries, keys and values in y (N, its heads, E).

    Gradients of copies are added up. grad_own (N, K, E) is added to the values'. The second is None unless needs_gain.
    The rows of cos and sin divide N.
    """
    grad_q, grad_k, grad_v = (g.contiguous() for g in grads)
    num_rows, num_heads, head_dim = grad_q.shape
    num_kv_heads = inverse.size(1) - num_heads
    heads = num_heads + 2 * num_kv_heads
    grad_x = torch.empty(num_rows, heads * head_dim, device=y.device, dtype=y.dtype)
    table_rows, half = cos.shape
    blocks = triton.cdiv(table_rows, BACKWARD_ROWS) * (num_rows // table_rows)
    partial = inverse.new_empty(inverse.T.shape) if needs_gain else None
    launch(
        _rotate_backward, (blocks * heads,),
        grad_q, grad_k, grad_v, grad_own, y, inverse, cos, sin, gain, grad_x, partial, num_rows, table_rows,
        H=num_heads, K=num_kv_heads, G=grad_k.size(1) // num_kv_heads, E=head_dim, HALF=half, ROWS=BACKWARD_ROWS,
        num_warps=4,
    )  # fmt: skip
    return grad_x, None if partial is None else partial[:num_heads].sum(1).to(gain.dtype)
