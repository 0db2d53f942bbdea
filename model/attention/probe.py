"""Which attention backend is fastest here: run each on the real shapes, check it against float32, keep the best."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.attention.backends import attention, is_available
from model.config import ATTENTION_BACKENDS

if TYPE_CHECKING:
    from model.data.packing import Packing

logger = logging.getLogger(__name__)

MAX_ERROR = 0.02  # relative, of output and gradients: about four times what bfloat16 inputs alone cost
NUM_TIMED = 10


class Choice(NamedTuple):
    """The backend to use, and the record of how it was chosen.

    timings_ms and errors per backend that was timed or checked: median milliseconds of one forward and backward, and
    the largest relative error against float32; rejected: why a backend cannot be used. One that is alone is not timed.
    """

    name: str
    timings_ms: dict[str, float]
    errors: dict[str, float]
    rejected: dict[str, str]


def probe_backends(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None = None,
    *,
    candidates: Sequence[str] | None = None,
    fallback: str | None = None,
) -> Choice:
    """Time attention's backends forward and backward on these tensors and return the fastest that is right.

    Shapes as in attention. Without candidates: every importable backend on CUDA in 16 bits, "sdpa" elsewhere. Every
    candidate is checked; where only one is right, no stopwatch can change the choice. fallback is tried, and imported,
    only where no candidate is right.
    Raises ValueError, with each backend's reason, if none passes.
    """
    if candidates is None:
        is_half_on_cuda = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        candidates = [name for name in ATTENTION_BACKENDS[1:] if is_available(name)] if is_half_on_cuda else ["sdpa"]
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]  # strided as they come
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)
    wide = [x.detach().float().requires_grad_() for x in (q, k, v)]
    wanted = _forward_backward(wide, grad.float(), packing, "sdpa")
    timings_ms: dict[str, float] = {}
    errors: dict[str, float] = {}
    rejected: dict[str, str] = {}

    def check(name: str) -> None:
        got = _forward_backward(inputs, grad, packing, name)
        errors[name] = max(_relative_error(x, y) for x, y in zip(got, wanted, strict=True))
        if not errors[name] <= MAX_ERROR:  # NaN fails as well
            rejected[name] = f"relative error {errors[name]:.3g} above {MAX_ERROR}"

    def measure(name: str) -> None:
        timings_ms[name] = _time_ms(partial(_forward_backward, inputs, grad, packing, name), q.device)

    passed = _keep_usable(candidates, check, rejected)
    if len(passed) > 1:
        passed = _keep_usable(passed, measure, rejected)
    if not passed and fallback is not None:
        passed = _keep_usable([fallback], check, rejected)
    if not passed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected.items())
        raise ValueError(f"no attention backend passed its check: {reasons}")
    name = min(passed, key=lambda each: timings_ms.get(each, 0.0))
    logger.info("attention_backend=%s timings_ms=%s errors=%s rejected=%s", name, timings_ms, errors, rejected)
    return Choice(name, timings_ms, errors, rejected)


def _keep_usable(names: Sequence[str], call: Callable[[str], None], rejected: dict[str, str]) -> list[str]:
    """Return the backends that call neither rejects nor fails on; rejected gets the reasons of the others."""
    for name in names:
        try:
            call(name)
        # whatever a package or a compiler raises at these shapes takes its kernel out of the choice, with the reason
        except (RuntimeError, ImportError, TypeError, ValueError, NotImplementedError, AssertionError) as error:
            rejected[name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return [name for name in names if name not in rejected]


def _forward_backward(inputs: list[Tensor], grad: Tensor, packing: Packing | None, name: str) -> list[Tensor]:
    q, k, v = inputs
    y = attention(q, k, v, packing, backend=name)
    return [y, *torch.autograd.grad(y, inputs, grad)]


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def _time_ms(run: Callable[[], object], device: torch.device) -> float:
    """Return the median wall time of run in milliseconds, after three calls to warm up."""
    samples = []
    for i in range(3 + NUM_TIMED):
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        if i >= 3:
            samples.append(1000 * (time.perf_counter() - start))
    return statistics.median(samples)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
