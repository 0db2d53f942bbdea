"""Kernels of lanes, gates, smearing and slope, run in numpy: each does forward and backward what its plain twin does.

The kernels run in float32 and the twin in float64, on more rows than one program takes, and on an odd number of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import model.kernels
from model.attention import self_attention
from model.attention.bounds import Bounds
from model.banks import visit_plan
from model.gpt import GPT
from model.kernels import lanes, residual
from model.kernels.lanes import CrossedLanes, cross_norm, mean_norm, merge_norm
from model.kernels.residual import Mix, Skip, Smear, Stream, add_norm, mix_norm, settle, smear_norm
from model.layers import exclude_own_value, gate_heads, squared_leaky_relu
from model.presets import tiny
from tests.fake_triton import load_kernels

ROWS, TIME, DIM = 3, 7, 24  # 21 rows, 24 columns of a tile of 32
Function = Callable[..., Any]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve float32 by the kernels, which run in numpy by two or three programs, and float64 by the twins."""
    for module, stem in ((residual, "residual_triton"), (lanes, "lanes_triton")):
        kernels = load_kernels(Path(residual.__file__).with_name(f"{stem}.py"), monkeypatch)
        monkeypatch.setattr(kernels, "BACKWARD_PROGRAMS", 3)
        monkeypatch.setitem(sys.modules, f"model.kernels.{stem}", kernels)
        monkeypatch.setattr(model.kernels, stem, kernels, raising=False)
        monkeypatch.setattr(module, "uses_triton", lambda x: x.dtype == torch.float32)


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return random float32 numbers."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int, seed: int) -> Tensor:
    """Return random numbers around one half, away from what would hide a part."""
    return 0.5 + 0.3 * draw(*shape, seed=seed)


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Return what function gives that is a tensor, and the gradients of a random sum of it."""
    leaves = [x if x is None else x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [y for y in ((found,) if isinstance(found, Tensor) else found) if y is not None]
    loss = sum((y.double() * draw(*y.shape, seed=100 + i).double()).sum() for i, y in enumerate(outputs))
    assert isinstance(loss, Tensor)
    return [*outputs, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def check(function: Function, inputs: Sequence[Tensor | None]) -> None:
    """Compare function in float32, by kernels, with itself in float64, by its twin."""
    wide = [x if x is None else x.double() for x in inputs]
    pairs = zip(outputs_and_gradients(function, inputs), outputs_and_gradients(function, wide), strict=True)
    for number, (got, wanted) in enumerate(pairs):
        assert got.dtype == torch.float32
        error = float((got.detach().double() - wanted.detach()).norm() / wanted.detach().norm())
        assert error < 2e-5, f"tensor {number} of outputs and gradients"


def streams(*seeds: int) -> list[Tensor]:
    return [draw(ROWS, TIME, DIM, seed=seed) for seed in seeds]


@pytest.mark.parametrize("width", [None, 8, 28])  # 28: numbers for more columns than there are, as packing leaves them
def test_add_norm(fused: None, width: int | None) -> None:
    gate = None if width is None else parameter(width, seed=3)
    check(lambda x, d, g: add_norm(Stream(x, d, g), 0.7), [*streams(1, 2), gate])


def test_a_settled_stream(fused: None) -> None:
    check(lambda x, d, g: settle(Stream(x, d, g)), [*streams(1, 2), parameter(8, seed=3)])


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("has_shift", [False, True])
@pytest.mark.parametrize("width", [None, 12])
@pytest.mark.parametrize("num_columns", [0, 5])
def test_mix_norm(fused: None, has_skip: bool, has_shift: bool, width: int | None, num_columns: int) -> None:
    def function(
        x: Tensor, d: Tensor, first: Tensor, mix: Tensor, g: Tensor, shift: Tensor, *skip: Tensor
    ) -> tuple[Tensor | None, ...]:
        return mix_norm(Stream(x, d, g), Mix(first, mix, shift), 0.7, Skip(*skip) if skip else None, num_columns)

    gate = None if width is None else parameter(width, seed=5)
    inputs = [*streams(1, 2, 3), parameter(2, DIM, seed=4), gate, parameter(DIM, seed=6) if has_shift else None]
    skip = [*streams(7), parameter(DIM, seed=8), parameter(DIM, seed=9)] if has_skip else []
    check(function, [*inputs, *skip])


def test_only_the_norm_of_a_mixture_is_used(fused: None) -> None:
    """As where crossed lanes part: nothing comes back to the mixture itself."""

    def function(x: Tensor, first: Tensor, mix: Tensor) -> tuple[Tensor, ...]:
        mixed = mix_norm(Stream(x, None), Mix(first, mix), 0.7, None, 5)
        assert mixed.columns is not None
        return mixed.normed, mixed.columns

    check(function, [*streams(1, 2), parameter(2, DIM, seed=3)])


@pytest.mark.parametrize("recipe", ["published", "frontier"])
def test_the_first_state_s_gradient_comes_back_from_visit_to_visit(
    fused: None, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Each visit adds its share to what the next one sends back, so autograd adds no tensors; the last has none."""
    config = replace(tiny().model, vocab_size=40, num_layers=5, model_dim=DIM, num_heads=2, num_kv_heads=1, rope_dims=8)
    if recipe == "frontier":
        gates = {"attn_gate_width": 8, "smear_gate_width": 5, "mlp_gate_width": 7}
        config = replace(config, lane_routing="full", parallel_start_layer=3, pass_embeddings=True, **gates)
    heard: list[bool] = []
    for name in ("residual_triton", "lanes_triton"):
        kernels = sys.modules[f"model.kernels.{name}"]

        def listen(*args: Any, launch: Any = kernels.launch, **options: Any) -> None:
            if options.get("HAS_FIRST"):
                heard.append(options["HAS_LATER"])
            launch(*args, **options)

        monkeypatch.setattr(kernels, "launch", listen)
    tokens, targets = torch.randint(40, (2, 1, 21), generator=torch.Generator().manual_seed(0))
    found = []
    for dtype in (torch.float32, torch.float64):
        model = GPT(config, compute_dtype=dtype).to(dtype)
        model.init_weights(1)
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                parameter += 0.1 * draw(*parameter.shape, seed=number)
        loss = model(tokens, targets, is_looped=True)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert heard == [False, *[True] * (visit_plan(config, is_looped=True).num_visits - 1)]
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=2e-5 * float(wanted.norm()))


def test_frozen_weights_need_no_gradient_of_the_first_state(fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test-time training, where gradients come back to adapters only."""
    heard: list[bool | None] = []
    for name in ("residual_triton", "lanes_triton"):
        kernels = sys.modules[f"model.kernels.{name}"]
        monkeypatch.setattr(kernels, "launch", lambda *_args, **options: heard.append(options.get("HAS_FIRST")))
    x, first = draw(1, TIME, DIM, seed=1).requires_grad_(), draw(1, TIME, DIM, seed=2)
    mix = Mix(first, parameter(2, DIM, seed=3))
    mixed = mix_norm(Stream(x, None), mix, 0.7)
    again = mix_norm(Stream(mixed.mixed, None), mix._replace(first=mixed.first), 0.7)
    lanes = CrossedLanes(again.mixed, x, x, x, parameter(8, seed=4))
    crossed = cross_norm(lanes, mix._replace(first=again.first), 0.7)
    cross_norm(
        lanes._replace(mlp=crossed.mlp), mix._replace(first=crossed.first), 0.7
    ).attention_normed.sum().backward()
    assert heard == [None] * 4 + [False] * 4


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("width", [None, 12])
@pytest.mark.parametrize("kind", ["stream", "lanes", "end"])
def test_frozen_vectors_get_no_sums_and_the_streams_the_same_gradients(
    fused: None, monkeypatch: pytest.MonkeyPatch, has_skip: bool, width: int | None, kind: str
) -> None:
    """As in test-time training, where gradients come back to adapters only."""
    kernels = sys.modules[f"model.kernels.{'residual' if kind == 'stream' else 'lanes'}_triton"]
    heard: list[bool] = []

    def listen(*args: Any, launch: Any = kernels.launch, **options: Any) -> None:
        heard.extend([options["HAS_SUMS"]] if "HAS_SUMS" in options else [])
        launch(*args, **options)

    monkeypatch.setattr(kernels, "launch", listen)
    xs, gate = streams(1, 2, 3, 4, 5, 6), None if width is None else parameter(width, seed=7)
    vectors = [parameter(2, DIM, seed=8), parameter(DIM, seed=9), parameter(DIM, seed=10), parameter(8, seed=11)]

    def outputs(xs: list[Tensor], vectors: list[Tensor], gate: Tensor | None) -> list[Tensor]:
        mix, skip = Mix(xs[4], vectors[0]), Skip(xs[5], *vectors[1:3]) if has_skip else None
        crossed = CrossedLanes(xs[0], xs[1], xs[2], xs[3], vectors[3], gate)
        if kind == "end":
            return [mean_norm(crossed)]
        if kind == "lanes":
            return [y for y in cross_norm(crossed, mix, 0.7, skip)[:4] if y is not None]
        return list(mix_norm(Stream(xs[0], xs[1], gate), mix, 0.7, skip)[:3])

    found = []
    for is_frozen in (True, False):
        leaves = [x.clone().requires_grad_(place != 4) for place, x in enumerate(xs)]
        learned = [v.clone().requires_grad_(not is_frozen) for v in vectors]
        sums = [(y * draw(*y.shape, seed=20 + i)).sum() for i, y in enumerate(outputs(leaves, learned, gate))]
        torch.stack(sums).sum().backward()
        assert all((v.grad is None) or not is_frozen for v in learned)
        found.append([x.grad for x in leaves if x.grad is not None])
    assert heard == [False, True]
    assert len(found[0]) == {"stream": 2, "lanes": 4, "end": 4}[kind] + (has_skip and kind != "end")
    assert all(map(torch.equal, *found))


def crossed_inputs(width: int | None) -> list[Tensor | None]:
    gate = None if width is None else parameter(width, seed=6)
    return [*streams(1, 2, 3, 4), parameter(8, seed=5), gate]


@pytest.mark.parametrize("has_skip", [False, True])
@pytest.mark.parametrize("width", [None, 12, 28])
@pytest.mark.parametrize("num_columns", [0, 5])
def test_cross_norm(fused: None, has_skip: bool, width: int | None, num_columns: int) -> None:
    def function(*inputs: Tensor) -> tuple[Tensor | None, ...]:
        skip = Skip(*inputs[8:]) if inputs[8:] else None
        return cross_norm(CrossedLanes(*inputs[:6]), Mix(*inputs[6:8]), 0.7, skip, num_columns)

    skip = [*streams(9), parameter(DIM, seed=10), parameter(DIM, seed=11)] if has_skip else []
    check(lambda *x: [y for y in function(*x) if y is not None], drop_unused_routes([
        *crossed_inputs(width), *streams(7), parameter(2, DIM, seed=8), *skip,
    ]))  # fmt: skip


def drop_unused_routes(inputs: list[Tensor | None]) -> list[Tensor | None]:
    assert inputs[4] is not None
    inputs[4][6:] = 0
    return inputs


def test_only_the_lanes_norms_are_used(fused: None) -> None:
    """Then no gradient comes back to the lanes themselves."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        return cross_norm(CrossedLanes(*inputs[:6]), Mix(*inputs[6:8]), 0.7)[2:4]

    check(function, drop_unused_routes([*crossed_inputs(12), *streams(7), parameter(2, DIM, seed=8)]))


@pytest.mark.parametrize("width", [None, 12])
def test_mean_norm(fused: None, width: int | None) -> None:
    check(lambda *x: mean_norm(CrossedLanes(*x)), drop_unused_routes(crossed_inputs(width)))


@pytest.mark.parametrize("width", [None, 12])
def test_merge_norm(fused: None, width: int | None) -> None:
    def function(a: Tensor, da: Tensor, b: Tensor, db: Tensor, share: Tensor, gate: Tensor | None) -> Tensor:
        return merge_norm(Stream(a, da), Stream(b, db, gate), share)

    gate = None if width is None else parameter(width, seed=6)
    check(function, [*streams(1, 2, 3, 4), torch.tensor(0.4), gate])


@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("padding", [None, [0, 3, 6]])
def test_smear_norm(fused: None, bos_id: int | None, padding: list[int] | None) -> None:
    tokens = torch.tensor([[1, 5, 1, 1, 6, 7, 8], [4, 4, 4, 1, 4, 4, 1], [9, 8, 7, 6, 5, 4, 1]])
    # a column of a table, as learning steps have it
    left_padding = None if padding is None else torch.tensor([[n, 99] for n in padding])[:, 0]
    inputs = [*streams(1), parameter(5, seed=2), torch.tensor(0.6)]
    check(lambda x, gate, strength: smear_norm(x, tokens, Smear(gate, strength, bos_id), left_padding), inputs)


@pytest.mark.parametrize("is_value_excluded", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (4, 4)])
def test_the_heads_gate(
    monkeypatch: pytest.MonkeyPatch, is_value_excluded: bool, num_heads: int, num_kv_heads: int
) -> None:
    path = Path(self_attention.__file__).with_name("gate_triton.py")
    kernels = load_kernels(path, monkeypatch)
    monkeypatch.setattr(kernels, "SPREAD_PROGRAMS", 2)
    monkeypatch.setattr(kernels, "SPREAD_ROWS", 4)
    y, v = draw(21, num_heads, 8, seed=1), draw(21, 2 * num_kv_heads, 8, seed=2)[:, ::2]  # every other head
    columns, weights, grad = draw(21, 5, seed=3), draw(num_heads, 5, seed=4), draw(21, num_heads, 8, seed=5)

    def twin(y: Tensor, v: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
        y, v = y.unsqueeze(0), v.unsqueeze(0)
        return gate_heads(exclude_own_value(y, v) if is_value_excluded else y, columns.unsqueeze(0), weights)[0]

    leaves = [x.double().requires_grad_() for x in (y, v, columns, weights)]
    wanted = twin(*leaves)
    grads = torch.autograd.grad(wanted, leaves, grad.double(), allow_unused=True)
    got = kernels.gate(y, v, columns, weights, is_value_excluded=is_value_excluded)
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    *found, slope = kernels.gate_backward(grad, y, v, columns, weights, is_value_excluded=is_value_excluded)
    assert kernels.spread(slope, columns, weights, needs_weights=False)[1] is None
    for mine, theirs in zip([*found, *kernels.spread(slope, columns, weights, needs_weights=True)], grads, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=2e-5)


def test_visits_that_share_bounds_share_the_tables_of_their_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels(Path(self_attention.__file__).with_name("varlen_tiles_triton.py"), monkeypatch)
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(kernels, "launch", lambda _kernel, _grid, *_args, **options: launched.append(options))
    monkeypatch.setattr(kernels, "TILE_FIELDS", SimpleNamespace(value=4))
    queries, keys = torch.tensor([0, 5, 10]), torch.tensor([0, 9, 18])
    for tables, count in ((None, 10), ({}, 5)):
        launched.clear()
        whole, last = Bounds(keys, keys, 9, 9, tables), Bounds(queries, keys, 5, 9, tables)
        for _visit in range(2):
            found = [kernels.list_query_tiles(whole, 18, 4), kernels.list_key_tiles(whole, 18, 4)]
            # the last visit of a window asks for fewer positions, and other kernels have other tiles
            found += [kernels.list_query_tiles(last, 10, block) for block in (4, 2)] + [
                kernels.list_key_tiles(last, 18, 4)
            ]
            assert [x.size(0) - 1 for x in found] == [6, 6, 4, 6, 6]
        assert len(launched) == count


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.5])
def test_the_activation_s_slope(monkeypatch: pytest.MonkeyPatch, slope: float) -> None:
    kernels = load_kernels(Path(residual.__file__).with_name("mlp_triton.py"), monkeypatch)
    monkeypatch.setattr(kernels, "grid", lambda _out, _tiling: (3,))
    tiling = kernels.Tiling(8, 128, 8, 1, 1, 1)
    monkeypatch.setattr(kernels, "UP_TILING", tiling)
    monkeypatch.setattr(kernels, "DOWN_TILING", tiling)
    x, up, down, grad = draw(21, 16, seed=1), draw(200, 16, seed=2), draw(16, 200, seed=3), draw(21, 16, seed=4)
    hidden = (x.double() @ up.double().T).requires_grad_()
    y = squared_leaky_relu(hidden, slope)
    (wanted,) = torch.autograd.grad(y, hidden, grad.double() @ down.double())
    narrow = hidden.detach().float()

    def same(*pairs: tuple[Tensor, Tensor]) -> None:
        for got, right in pairs:
            torch.testing.assert_close(got.double(), right.detach(), rtol=1e-4, atol=1e-4)

    signs, activated = kernels.up_and_activate(x, up, needs_signs=True, slope=slope)
    assert signs.shape == (7, 21)
    bits = (signs.T.unsqueeze(2) >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(1)[:, :200].bool(), narrow < 0)
    same((activated, y), (kernels.activate(narrow, slope), y))
    same((kernels.up_and_activate(x, up, needs_signs=False, slope=slope)[1], y))
    same((kernels.down_backward(grad, down, signs, activated, slope=slope), wanted))
    overwritten = grad @ down
    same((kernels.activate_backward_(overwritten, narrow, needs_y=True, slope=slope), y), (overwritten, wanted))
