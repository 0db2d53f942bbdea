"""Causal attention over whole rows of one length: cuDNN's kernel, where it beats the variable-length one."""

# B rows, T tokens of a row, H heads, E head_dim, N = B T

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)
Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]

MIN_TOKENS = 1024  # shorter rows spend little on attention, and every new shape costs cuDNN a plan
MAX_ERROR = 0.02
PROBE_ROWS, PROBE_TOKENS, NUM_TIMED = 16, 2048, 7


def cudnn_rows(q: Tensor, k: Tensor, v: Tensor, num_rows: int) -> Tensor:
    """Return causal attention (N, H, E) inside each of num_rows rows of equal length; q, k and v (N, H, E)."""
    q_rows, k_rows, v_rows = (x.view(num_rows, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))  # (B, H, T, E)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        y = F.scaled_dot_product_attention(q_rows, k_rows, v_rows, is_causal=True)
    return y.transpose(1, 2).reshape(q.shape)


@lru_cache(maxsize=4)
def prefers_cudnn(varlen: Kernel, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether cudnn_rows is right and faster, forward and backward, than varlen (same arguments)."""
    generator = torch.Generator().manual_seed(0)
    shape = (PROBE_ROWS * PROBE_TOKENS, num_heads, head_dim)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def run(kernel: Kernel) -> list[Tensor]:
        with torch.enable_grad():
            y = kernel(q, k, v, PROBE_ROWS)
        return [y.detach(), *torch.autograd.grad(y, inputs, grad)]

    try:
        found = run(cudnn_rows)
    except RuntimeError as error:
        logger.info("row_attention=varlen cudnn refused: %s", str(error).splitlines()[0][:200])
        return False
    errors = [float((x.float() - y.float()).norm() / y.float().norm()) for x, y in zip(found, run(varlen), strict=True)]
    timings_ms = [_time_ms(run, kernel) for kernel in (cudnn_rows, varlen)]
    is_better = max(errors) <= MAX_ERROR and timings_ms[0] < timings_ms[1]
    logger.info(
        "row_attention=%s cudnn_ms=%.3f varlen_ms=%.3f error=%.3g",
        "cudnn" if is_better else "varlen", *timings_ms, max(errors),
    )  # fmt: skip
    return is_better


def _time_ms(run: Callable[[Kernel], object], kernel: Kernel) -> float:
    """Return the median milliseconds of run(kernel) on the device."""
    samples = []
    for _ in range(NUM_TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(kernel)
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)
