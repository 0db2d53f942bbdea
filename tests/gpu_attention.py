"""Is the Triton attention right and fast on a real pack? python -m tests.gpu_attention OUT.json --train GLOB.

Forward alone for every tiling worth a look and for FlashAttention-2, on views of one buffer as the model has them and
on tensors of their own; forward and backward of the backends; errors against float32. About half a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from model.kernels.attention import VARLEN_KERNELS, Bounds, attention, segment_bounds
from model.kernels.varlen_triton import TILING, Tiling, attend, list_tiles
from tests.gpu_probe import CONFIG, DEVICE, TOKENS, load_batches

SLEEP_CYCLES = 2_000_000  # a millisecond: longer than the host takes to launch a pass
STARTED = time.perf_counter()
NUM_HEADS, HEAD_DIM = CONFIG.model.num_heads, CONFIG.model.model_dim // CONFIG.model.num_heads
TILINGS = [
    TILING,
    Tiling(64, 64, 4, 3),
    Tiling(64, 64, 4, 2, max_registers=128),
    Tiling(64, 32, 4, 4, max_registers=128),
    Tiling(128, 64, 8, 3, max_registers=128),
]


def label(tiling: Tiling) -> str:
    """Return a short name: rows x keys, warps, stages, registers."""
    size = f"{tiling.block_m}x{tiling.block_n}"
    return f"{size} w{tiling.num_warps} s{tiling.num_stages} r{tiling.max_registers or 'any'}"


def error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def log_sums(q: Tensor, k: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Return the log of the summed weights (H, T) float32, segment by segment."""
    parts = []
    for start, end in pairwise(cu_seqlens):
        scores = torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) / HEAD_DIM**0.5
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill_(hidden, float("-inf")).logsumexp(-1))
    return torch.cat(parts, dim=1)


def forward_backward(name: str, inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> list[Tensor]:
    """Return the output and the gradients of one backend."""
    y = VARLEN_KERNELS[name](*inputs, bounds)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def compile_all(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds) -> dict[str, Any]:
    """Compile every tiling and return why those that cannot run cannot."""
    refused = {}
    for tiling in TILINGS:
        try:
            attend(q, k, v, bounds, tiling)
            torch.cuda.synchronize()
        except (RuntimeError, triton.errors.TritonError) as reason:
            refused[label(tiling)] = f"{type(reason).__name__}: {reason}"[:200]
    return refused


def measure(pattern: str) -> dict[str, Any]:
    """Return errors and milliseconds, and print them as they come."""
    batch = load_batches(pattern, 1)[0]
    packing = batch.packing
    bounds = segment_bounds(packing, 1, TOKENS, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    buffer = torch.randn(TOKENS, 3 * NUM_HEADS, HEAD_DIM, device=DEVICE, generator=generator).bfloat16()
    grad = torch.randn(TOKENS, NUM_HEADS, HEAD_DIM, device=DEVICE, generator=generator).bfloat16()
    views = buffer.chunk(3, dim=1)
    own = [x.contiguous() for x in views]
    figures: dict[str, Any] = {"entries": bounds.queries.numel(), "refused": compile_all(*views, bounds)}
    report("compiled", {"seconds": time.perf_counter() - STARTED})

    wide = [x.float().requires_grad_() for x in own]
    y = attention(*(x[None] for x in wide), packing, backend="sdpa")[0]
    wanted = [y.detach(), *torch.autograd.grad(y, wide, grad.float())]
    lse = log_sums(wide[0].detach(), wide[1].detach(), sorted(set(bounds.queries.tolist())))
    leaves = [x.detach().requires_grad_() for x in views]
    for name in ("varlen", "triton"):
        got = forward_backward(name, leaves, grad, bounds)
        figures[f"error_{name}"] = dict(zip(["y", "q", "k", "v"], map(error, got, wanted), strict=True))
        report(f"error {name}", figures[f"error_{name}"])
    figures["tilings"] = {}
    for tiling in TILINGS:
        if label(tiling) in figures["refused"]:
            report(label(tiling), {"refused": figures["refused"][label(tiling)]})
            continue
        got, got_lse = attend(*views, bounds, tiling)
        found = {"error": error(got, wanted[0]), "lse": float((got_lse - lse).abs().max())}
        found["views"] = median(partial(attend, *views, bounds, tiling))
        found["own"] = median(partial(attend, *own, bounds, tiling))
        figures["tilings"][label(tiling)] = found
        report(label(tiling), found)
    del wide, wanted, y, lse
    grouped = [own[0], *(x[:, ::2].contiguous() for x in own[1:])]
    figures["forward_ms"] = {
        "table": median(partial(list_tiles, bounds, TOKENS, TILING.block_m)),
        **{
            f"{name} {kind}": median(partial(VARLEN_KERNELS[name], *tensors, bounds))
            for name in ("varlen", "triton")
            for kind, tensors in (("views", views), ("own", own), ("grouped", grouped))
        },
    }
    report("forward", figures["forward_ms"])
    figures["forward_backward_ms"] = {
        name: median(partial(forward_backward, name, leaves, grad, bounds)) for name in ("varlen", "triton")
    }
    report("forward and backward", figures["forward_backward_ms"])
    figures["seconds"] = time.perf_counter() - STARTED
    return figures


def median(run: Callable[[], object]) -> float:
    """Return the median milliseconds of run on the device, which never waits for the host as it sleeps first."""
    samples = []
    for number in range(3 + 15):
        torch.cuda._sleep(SLEEP_CYCLES)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if number >= 3:
            samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def report(name: str, found: dict[str, Any]) -> None:
    """Print one line of the table."""
    cells = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items())
    print(f"{name:36s} {'  '.join(cells)}", flush=True)


def main() -> int:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "figures": measure(args.train),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
