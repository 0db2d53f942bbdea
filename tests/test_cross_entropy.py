"""The kernels of the loss, and the loss made part by part: each agrees with its plain twin in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.kernels
from model.kernels import cross_entropy
from model.kernels.cross_entropy import projected_cross_entropy, softcap_cross_entropy
from tests.fake_triton import load_kernels
from tests.kernel_tools import check, draw, relative_error, run


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [256, 1000, 8192])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_kernel(vocab: int, reduction: str) -> None:
    targets = torch.randint(vocab, (2, 150), device="cuda")

    def function(logits: Tensor) -> Tensor:
        return softcap_cross_entropy(logits * 1, targets, 30.0, reduction=reduction)  # a copy: it is overwritten

    logits = draw(2, 150, vocab, scale=15.0)
    check(function, [logits])
    with torch.no_grad():
        before = logits.clone()
        got = softcap_cross_entropy(logits, targets, 30.0, reduction=reduction)
        assert torch.equal(logits, before)
        assert relative_error(got, softcap_cross_entropy(logits.double(), targets, 30.0, reduction=reduction)) < 1e-5


@pytest.mark.parametrize("vocab", [64, 50])
@pytest.mark.parametrize("cap", [30.0, 80.0, 88.0, 200.0, 5000.0])
def test_the_cross_entropy_kernel_is_finite_and_right_under_any_cap(
    cap: float, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels(Path(cross_entropy.__file__).with_name("cross_entropy_triton.py"), monkeypatch)
    generator = torch.Generator().manual_seed(0)
    middles = torch.tensor([0.0, 0.0, -60.0, 60.0, -3 * cap, 3 * cap]).unsqueeze(1)
    logits = middles + torch.randn(6, vocab, generator=generator)
    logits[1] *= 20
    targets = torch.randint(vocab, (6,), generator=generator)
    exact = logits.double().requires_grad_()
    wanted = softcap_cross_entropy(exact.unsqueeze(0), targets.unsqueeze(0), cap, reduction="none")[0]
    (grad,) = torch.autograd.grad(wanted.sum(), exact)
    assert relative_error(kernels.row_nll(logits.clone(), targets, cap), wanted) < 1e-5
    overwritten = logits.clone()
    nll = kernels.row_nll(overwritten, targets, cap, 1.0)
    assert torch.isfinite(nll).all()
    assert torch.isfinite(overwritten).all()
    assert float((overwritten - grad).abs().max()) < 2e-5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_a_projected_loss_makes_its_gradients_part_by_part(
    reduction: str, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = load_kernels(Path(cross_entropy.__file__).with_name("cross_entropy_triton.py"), monkeypatch)
    monkeypatch.setitem(sys.modules, "model.kernels.cross_entropy_triton", kernels)
    monkeypatch.setattr(model.kernels, "cross_entropy_triton", kernels, raising=False)
    monkeypatch.setattr(kernels, "LOGIT_ROWS", 4)  # of ten: two whole parts and a shorter one
    monkeypatch.setattr(cross_entropy, "uses_triton", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (50, 8)))
    targets, heard = torch.randint(50, (2, 5), generator=generator), []

    def project(x: Tensor, weight: Tensor) -> Tensor:
        heard.append(x.dtype)
        return F.linear(x, weight)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return factor * projected_cross_entropy(x, weight, targets, 30.0, project, reduction=reduction)

    exact = run(loss, [x.double(), weight.double()], [torch.ones((), dtype=torch.float64)])
    for got, wanted in zip(run(loss, [x, weight], [torch.ones(())]), exact, strict=True):
        assert relative_error(got, wanted) < 1e-5
    assert heard == [torch.float64], "logits were made as a whole"
    with torch.no_grad():
        assert relative_error(loss(x, weight), exact[0]) < 1e-5
    again = loss(x.clone().requires_grad_(), weight)
    again.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward of this loss is not possible"):
        again.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projected_cross_entropy(reduction: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels import cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "LOGIT_ROWS", 128)  # of 300: two whole parts and a shorter one
    targets = torch.randint(8192, (2, 150), device="cuda")

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return projected_cross_entropy(x, weight, targets, 30.0, F.linear, reduction=reduction)

    weight = draw(8192, 512, scale=0.3).to(dtype)
    check(function, [draw(2, 150, 512), weight])
    x = draw(2, 150, 512).requires_grad_()
    losses = [projected_cross_entropy(x, weight, targets, 30.0, F.linear, reduction=reduction) for _ in range(2)]
    assert torch.equal(*(torch.autograd.grad(loss.sum(), x)[0] for loss in losses))


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [30.0, 80.0, 88.0, 1000.0])
def test_cross_entropy_kernel_under_any_cap(cap: float) -> None:
    targets = torch.randint(1000, (2, 150), device="cuda")
    for middle in (0.0, -60.0, 60.0):
        logits = draw(2, 150, 1000, scale=5.0) + middle
        check(lambda x: softcap_cross_entropy(x * 1, targets, cap), [logits])


@pytest.mark.gpu
def test_overwritten_logits_cannot_be_used_by_another_backward() -> None:
    hidden = draw(1, 8, 64).requires_grad_()
    logits = hidden * 2
    squares = (logits * logits).sum()  # keeps the logits for its backward
    loss = softcap_cross_entropy(logits, torch.zeros(1, 8, dtype=torch.long, device="cuda"), 30.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()
