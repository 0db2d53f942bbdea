"""Fused kernels: on a GPU each agrees with its plain twin in float64, forward and backward, over random shapes.

The twin is the same function: it serves float64 anywhere, so every comparison is one call in bf16 and one in float64.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.data.packing import cu_seqlens_from_bos
from model.gpt import GPT
from model.kernels.adapters import LowRank, adapt_product, add_product
from model.kernels.lanes import merge_norm
from model.kernels.mlp import mlp, project_and_activate
from model.kernels.residual import Mix, Skip, Stream, add_norm, mix_norm
from model.presets import tiny
from tests.kernel_tools import check, draw, relative_error, vector

SHAPES = [(1, 1, 64), (1, 13, 512), (2, 100, 512), (3, 7, 48), (1, 5000, 512)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_delta", [False, True])
def test_add_norm_kernel(shape: tuple[int, ...], has_delta: bool) -> None:
    check(lambda x, d: add_norm(Stream(x, d), 0.7), [draw(*shape), draw(*shape) if has_delta else None])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_delta", [False, True])
@pytest.mark.parametrize("has_skip", [False, True])
def test_mix_norm_kernel(shape: tuple[int, ...], has_delta: bool, has_skip: bool) -> None:
    width = shape[-1]

    def function(x: Tensor, d: Tensor, first: Tensor, mix: Tensor, *skip: Tensor) -> tuple[Tensor, ...]:
        mixed = mix_norm(Stream(x, d), Mix(first, mix), 0.7, Skip(*skip) if has_skip else None)
        return tuple(y for y in mixed if y is not None)  # the first state too, as a later visit has it

    inputs = [draw(*shape), draw(*shape) if has_delta else None, draw(*shape), vector(2, width)]
    check(function, inputs + ([draw(*shape), vector(width), vector(width)] if has_skip else []))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES[1:])  # the scalar's gradient is a sum over everything: one row cancels
def test_merge_norm_kernel(shape: tuple[int, ...]) -> None:
    inputs = [*(draw(*shape) for _ in range(4)), torch.tensor(0.4, device="cuda")]
    check(lambda a, da, b, db, share: merge_norm(Stream(a, da), Stream(b, db), share), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 7, 64, 128), (2, 300, 512, 2048), (1, 33, 48, 100), (3, 77, 40, 264), (1, 200, 72, 520)]
)
def test_mlp_node(shape: tuple[int, ...]) -> None:
    batch, time, width, hidden = shape
    weights = [draw(hidden, width, scale=width**-0.5), draw(width, hidden, scale=hidden**-0.5)]
    check(
        lambda x, up, down: mlp(x, up, down, project_and_activate, F.linear, 0.5), [draw(batch, time, width), *weights]
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "time"), [(1, 128), (3, 200), (2, 1984), (5, 64)])  # 64: not by the one kernel
@pytest.mark.parametrize(("kinds", "rank"), [("qkvo", 96), ("qvo", 80)])
def test_adapted_product(rows: int, time: int, kinds: str, rank: int) -> None:
    """Queries, keys and values at once; a tile that reaches beyond a row's end must not touch the next row."""
    weight = draw(1024, 512, scale=512**-0.5)
    places = {"q": (0, 512), "k": (512, 768), "v": (768, 1024)}
    columns = {kind: places[kind] for kind in kinds[:-1]}

    out_weight = draw(512, 512, scale=512**-0.5)

    def function(x: Tensor, seen: Tensor, a: Tensor, *b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        adapters = LowRank(a, dict(zip(kinds, b, strict=True)))  # that of o is for another product
        y, rest = adapt_product(x, weight.to(x.dtype), adapters, columns, F.linear)
        assert rest is not None
        return y, rest, add_product(seen, out_weight.to(x.dtype), rest, adapters, "o", F.linear)

    widths = [*(end - first for first, end in columns.values()), 512]
    b = [draw(rows, width, rank, scale=rank**-0.5) for width in widths]
    inputs = [draw(rows, time, 512), draw(rows, time, 512), draw(rows, len(kinds) * rank, 512, scale=512**-0.5), *b]
    check(function, inputs, tolerance=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("is_looped", [False, True])
def test_the_model_in_bf16_agrees_with_itself_in_float64(is_looped: bool) -> None:
    """One micro-batch through every node at once, loss and gradients; and evaluation gives the same loss."""
    config = replace(tiny().model, model_dim=256, num_heads=4, num_kv_heads=2)
    time = 700
    packing = cu_seqlens_from_bos(np.array([0, 5, 300, 301]), time, max_segment=256).to("cuda")
    tokens, targets = torch.randint(config.vocab_size, (2, 1, time), device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        model = GPT(config, compute_dtype=dtype)
        model.init_weights(1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for bank in (model.qo_bank[config.num_layers :], model.mlp_down_bank):
                bank.copy_(0.05 * torch.randn(bank.shape, generator=generator))
        model = model.to("cuda", torch.float64 if dtype == torch.float64 else torch.float32)
        loss = model(tokens, targets, is_looped=is_looped, packing=packing)
        loss.backward()
        with torch.no_grad():
            again = model(tokens, targets, is_looped=is_looped, packing=packing, reduction="none").mean()
        torch.testing.assert_close(loss.detach(), again, rtol=1e-5, atol=0)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append((float(loss.detach()), torch.cat([g.double().flatten() for g in grads])))
    (narrow_loss, narrow), (wide_loss, wide) = found
    assert abs(narrow_loss / wide_loss - 1) < 0.002
    assert relative_error(narrow, wide) < 0.06  # bf16 noise over all layers: 0.038 measured


def test_the_plain_twins_are_the_written_out_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    x, d, first, other = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    mix, weight, gate = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (2, 1, 1))

    def rms(y: Tensor) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 2.0**-23).sqrt()

    share = torch.sigmoid(gate[0])
    merged = share * (x + d) + (1 - share) * weight[0] * other
    mixed = mix[0] * merged + mix[1] * first
    found = mix_norm(Stream(x, d), Mix(first, mix), 0.5, Skip(other, weight[0], gate[0]))[:3]
    for got, wanted in zip(found, (merged, mixed, 0.5 * rms(mixed)), strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(add_norm(Stream(x, d), 0.5)[1], 0.5 * rms(x + d))
    merged = merge_norm(Stream(x, d), Stream(first, other), torch.tensor(0.25))
    torch.testing.assert_close(merged, rms(0.25 * (x + d) + 0.75 * (first + other)))
