"""The adapters' products and updates: joined, scaled and by kernels, against the formula of one document."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import adapter_update
from model.kernels import adapters as adapters_module
from model.kernels.adapter_update import AdamSettings, adam_rows_, gather_rows
from model.kernels.adapters import GradientBuffers, LowRank, adapt_product, add_low_rank_, add_product, reduce_inputs
from model.lora import Adapters, Layout
from tests.fake_triton import load_kernels
from tests.micro_model import random_model


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The formula, one document at a time: (x A^T) B^T."""
    return torch.stack([x[i] @ a[i].T @ b[i].T for i in range(x.size(0))])


@pytest.mark.parametrize("has_buffers", [False, True])
def test_joined_adapters_have_the_values_and_gradients_of_their_formula(has_buffers: bool) -> None:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, time, dim, rank = 3, 5, 6, 2
    widths = {"q": 4, "k": 2, "o": 4}
    x, weight = draw(rows, time, dim), draw(6, dim)
    seen, out_weight = draw(rows, time, 7), draw(4, 7)  # what the o adapter's result is added to a product of
    a, b = draw(rows, 3 * rank, dim), {kind: draw(rows, width, rank) for kind, width in widths.items()}
    leaves = [x, a, *b.values(), seen, out_weight]
    grad, grad_out = draw(rows, time, 6), draw(rows, time, 4)

    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    parts = torch.split(inputs[1], rank, dim=1)
    expected = inputs[0] @ weight.T + torch.cat([low_rank(inputs[0], parts[i], inputs[2 + i]) for i in range(2)], dim=2)
    expected_out = inputs[5] @ inputs[6].T + low_rank(inputs[0], parts[2], inputs[4])
    wanted = torch.autograd.grad((expected * grad).sum() + (expected_out * grad_out).sum(), inputs)

    ours = [leaf.clone().requires_grad_(not has_buffers or place in (0, 5, 6)) for place, leaf in enumerate(leaves)]
    zero = [torch.full_like(leaf, torch.nan) for leaf in leaves[1:5]]
    anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
    buffers = GradientBuffers(zero[0], dict(zip(b, zero[1:])), anchor) if has_buffers else None
    adapters = LowRank(ours[1], dict(zip(b, ours[2:5])), buffers)
    y, reduced = adapt_product(ours[0], weight, adapters, {"q": (0, 4), "k": (4, 6)}, torch.nn.functional.linear)
    assert reduced is not None
    places: list[int] = []
    reduced.register_hook(lambda grad: places.append(grad.stride(1)))
    out = add_product(ours[5], ours[6], reduced, adapters, "o", torch.nn.functional.linear)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(out, expected_out, rtol=0, atol=1e-12)
    torch.autograd.backward((y * grad).sum() + (out * grad_out).sum())
    assert places == [3 * rank]  # beside room for the others, so that nothing is copied to them
    middle = zero if has_buffers else [leaf.grad for leaf in ours[1:5]]
    got = [ours[0].grad, *middle, ours[5].grad, ours[6].grad]
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine is not None
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("kinds", "num_sets", "time", "is_joined"),
    [
        ("qkv", 2, 21, True),
        ("qk", 1, 16, True),
        ("q", 2, 17, False),
        ("qv", 2, 17, True),
        ("v", 1, 21, False),
        ("qkv", 2, 7, False),
    ],
)
def test_one_kernel_makes_a_product_with_its_adapters(
    kinds: str, num_sets: int, time: int, is_joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sets of any length: a tile that reaches beyond its rows must not touch those of the next set.

    Columns without an adapter, too, and ranks that are no whole number of steps.
    """
    kernels = load_kernels(Path(adapters_module.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    for name in ("TILE_M", "TILE_N", "DEPTH"):
        monkeypatch.setattr(kernels, name, 8)
    monkeypatch.setattr(kernels, "STEP", 12)
    monkeypatch.setattr(kernels, "has_bulk_copies", lambda _device: True)
    monkeypatch.setitem(sys.modules, "model.kernels.adapter_update_triton", kernels)
    monkeypatch.setattr(adapters_module, "uses_triton", lambda _x: True)
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    places, rank = {"q": (0, 16), "k": (16, 24), "v": (24, 40)}, 16
    products: list[Tensor] = []
    x, weight, a = draw(num_sets, time, 16), draw(40, 16), draw(num_sets, (len(kinds) + 1) * rank, 16)
    columns = {kind: places[kind] for kind in kinds}
    b = {kind: draw(num_sets, end - first, rank) for kind, (first, end) in columns.items()}
    adapters = LowRank(a, {**b, "o": draw(num_sets, 24, rank)})

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        products.append(x)
        return x @ weight.T

    y, rest = adapt_product(x, weight, adapters, columns, apply)
    parts = torch.split(adapters.a, rank, dim=1)
    expected = x @ weight.T
    for i, (kind, (first, end)) in enumerate(columns.items()):
        expected[..., first:end] += low_rank(x, parts[i], b[kind])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-3)
    assert rest is not None
    torch.testing.assert_close(rest, x @ parts[-1].mT)
    # the last adapter's result is added to a product of something else
    seen, out_weight = draw(num_sets, time, 32), draw(24, 32)
    out = add_product(seen, out_weight, rest, adapters, "o", apply)
    expected = seen @ out_weight.T + rest @ adapters.b["o"].mT
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    assert len(products) == (0 if is_joined else 1 if time >= 8 else 2)  # one adapter of few columns stays apart


def test_an_adapter_of_its_own_input_reads_it() -> None:
    generator = torch.Generator().manual_seed(6)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((2, 3, 4), (2, 2, 4), (2, 5, 2)))
    pair = LowRank(a, {"mlp": b})
    reduced, same = reduce_inputs(x.requires_grad_(), pair)
    y = add_low_rank_(torch.zeros(2, 3, 5), reduced, pair, "mlp")
    assert torch.allclose(y, low_rank(x, a, b), atol=1e-6)
    assert torch.equal(same, x)
    grad, grad_same = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5), (2, 3, 4)))
    torch.autograd.backward((y * grad).sum() + (same * grad_same).sum())
    wanted = torch.autograd.grad((low_rank(x, a, b) * grad).sum(), x)[0] + grad_same
    assert x.grad is not None
    assert torch.allclose(x.grad, wanted, atol=1e-6)


def test_output_scales_lie_in_the_adapters_and_come_back_into_their_gradients() -> None:
    """Into the buffers, too, and only when every gradient is there."""
    generator = torch.Generator().manual_seed(9)
    model = random_model(dtype=torch.float64)
    layout = Layout(model.config, 3, 2, ("q", "o", "mlp"))
    rows, found = torch.randn(2, layout.num_parameters, generator=generator, dtype=torch.float64), []
    x = torch.randn(2, 5, model.config.model_dim, generator=generator, dtype=torch.float64)
    dim = model.config.model_dim
    scales = {kind: torch.randn(3, dim, generator=generator, dtype=torch.float64) for kind in ("o", "k", "mlp")}
    for has_buffers in (True, False):
        gradients = torch.full_like(rows, torch.nan)
        leaf = rows.clone().requires_grad_(not has_buffers)
        adapters = layout.view(leaf)
        if has_buffers:
            anchor = torch.zeros((), dtype=torch.float64, requires_grad=True)
            adapters = replace(adapters, gradients=layout.view(gradients), anchor=anchor)
        total = x.new_zeros(())
        for visit, each in enumerate(adapters.scaled(scales).visits(3)):
            assert each.attention is not None
            assert each.mlp is not None
            y, reduced = adapt_product(x, x.new_zeros(dim, dim), each.attention, {"q": (0, dim)}, F.linear)
            assert reduced is not None
            if not has_buffers:
                wanted = scales["o"][visit] * (reduced @ adapters.b["o"][:, visit].mT)
                assert torch.allclose(add_low_rank_(torch.zeros_like(x), reduced, each.attention, "o"), wanted)
            out = add_product(y, x.new_zeros(dim, dim), reduced, each.attention, "o", F.linear)
            hidden, same = reduce_inputs(out + y, each.mlp)
            total = total + add_low_rank_(same * 1.0, hidden, each.mlp, "mlp").square().sum()
        total.backward()
        if not has_buffers:
            assert leaf.grad is not None
            gradients = leaf.grad
        found.append([*layout.view(gradients).a.values(), *layout.view(gradients).b.values()])
    assert all(map(torch.allclose, *found))
    assert len(found[0]) == 6


def test_a_layout_gives_every_number_of_a_row_to_one_adapter() -> None:
    model = random_model()
    layout = Layout(model.config, 7, 2, ("q", "k", "v", "o", "mlp", "head"))
    row = torch.arange(layout.num_parameters).float().expand(2, -1).contiguous()
    views = layout.view(row)
    numbers = torch.cat([tensor[1].flatten() for tensor in views.tensors()])
    assert torch.equal(numbers.sort().values, row[1])
    assert views.attention_a is not None
    assert torch.equal(views.attention_a[:, :, 2:4], views.a["k"])
    assert isinstance(views, Adapters)


@pytest.mark.parametrize("rows", [[1], [3, 0]])
def test_stepping_rows_is_adam_without_momentum_on_those_rows_only(rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(8)
    values, moments = torch.randn(4, 50, generator=generator), torch.zeros(4, 50)
    reference = [torch.nn.Parameter(values[row].clone()) for row in rows]
    optimizers = [torch.optim.AdamW([p], lr=0.01, betas=(0.0, 0.999), eps=1e-10, weight_decay=0.5) for p in reference]
    kept, index = values.clone(), torch.tensor(rows)
    for step in range(1, 4):
        gradients = torch.randn(len(rows), 50, generator=generator)
        for parameter, optimizer, gradient in zip(reference, optimizers, gradients):
            parameter.grad = gradient.clone()
            optimizer.step()
        correction = torch.full((len(rows),), 1 - 0.999**step)
        adam_rows_(values, moments, index, gradients, correction, AdamSettings(0.01, 0.5, 0.999, 1e-10))
    assert torch.allclose(gather_rows(values, index, torch.float64).float(), torch.stack([*reference]), atol=1e-5)
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(values[others], kept[others])


def test_the_kernel_scales_as_plain_pytorch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of longer rows, to a tensor of their own and where they stand; no number beside them changes."""
    kernels = load_kernels(Path(adapter_update.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    monkeypatch.setattr(kernels, "BLOCK", 8)
    generator = torch.Generator().manual_seed(4)
    rows, scale = torch.randn(3, 50, generator=generator), torch.randn(2, 5, generator=generator)
    part = rows[:, 7:37].view(3, 2, 5, 3)
    expected, kept = adapter_update.scale_rows(part, scale), rows.clone()
    assert torch.equal(expected, part * scale.unsqueeze(-1))
    assert torch.equal(kernels.launch_scale(part, scale, None), expected)
    assert kernels.launch_scale(part, scale, part) is part
    assert torch.equal(part, expected)
    assert torch.equal(rows[:, :7], kept[:, :7])
    assert torch.equal(rows[:, 37:], kept[:, 37:])


@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_the_kernels_gather_and_step_as_plain_pytorch_does(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels(Path(adapter_update.__file__).with_name("adapter_update_triton.py"), monkeypatch)
    generator, index = torch.Generator().manual_seed(9), torch.tensor([3, 1])
    values, moments = (torch.rand(4, 5000, generator=generator) for _ in range(2))  # more than a program takes
    gradients, correction = torch.randn(2, 5000, generator=generator), torch.tensor([0.01, 0.2])
    gathered = kernels.launch_gather(values, index, torch.float32, factor)
    assert torch.equal(gathered, gather_rows(values, index, torch.float32, factor))
    expected = values.clone(), moments.clone()
    settings = AdamSettings(0.1, 0.5, 0.99, 1e-10)
    adam_rows_(*expected, index, gradients, correction, settings, factor)
    kernels.launch_adam(values, moments, index, gradients, correction, *settings, factor)
    assert torch.allclose(moments, expected[1], rtol=1e-6, atol=0)
    assert torch.allclose(values, expected[0], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_scaled_adapter_is_taken_through_its_scale() -> None:
    index, gradients = torch.tensor([0]), torch.full((1, 3), 2.0)
    values, moments = torch.ones(1, 3), torch.zeros(1, 3)
    adam_rows_(values, moments, index, gradients, torch.tensor([1.0]), AdamSettings(0.0, 0.0, 0.5, 1e-10), 3.0)
    assert moments.tolist() == [[18.0] * 3]  # (1 - beta2) (3 x 2)^2
