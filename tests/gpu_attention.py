"""Is the Triton attention right and fast on a real pack? python -m tests.gpu_attention OUT.json --train GLOB.

Forward, and both kernels of the backward, alone for every tiling worth a look, on views of one buffer as the model has
them; forward and backward of the backends; errors against float32. About half a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from model.attention import varlen_backward_triton
from model.attention.backends import VARLEN_KERNELS, attention
from model.attention.bounds import Bounds, segment_bounds
from model.attention.varlen_backward_triton import (
    KEY_TILING,
    QUERY_TILING,
    Prepared,
    Rotation,
    attend_backward,
    grad_keys,
    grad_queries,
)
from model.attention.varlen_tiles_triton import Tiling, list_key_tiles, list_query_tiles
from model.attention.varlen_triton import TILING, attend
from tests.gpu_probe import CONFIG, DEVICE, TOKENS, load_batches

SLEEP_CYCLES = 2_000_000  # a millisecond: longer than the host takes to launch a pass
STARTED = time.perf_counter()
NUM_HEADS, HEAD_DIM = CONFIG.model.num_heads, CONFIG.model.model_dim // CONFIG.model.num_heads
HEADS = [NUM_HEADS, CONFIG.model.num_kv_heads, CONFIG.model.num_kv_heads]  # of q, k and v
TILINGS = [TILING, Tiling(64, 64, 4, 3), Tiling(64, 64, 4, 2, 128), Tiling(128, 64, 8, 3, 128)]
QUERY_TILINGS = [
    QUERY_TILING,
    Tiling(64, 64, 4, 2, 168),
    Tiling(64, 64, 4, 2, 128),
    Tiling(128, 64, 8, 2, 128),
    Tiling(128, 64, 8, 3, 128),
    Tiling(64, 128, 4, 2),
    Tiling(128, 128, 8, 2),
]
KEY_TILINGS = [
    KEY_TILING,
    Tiling(64, 64, 4, 3, 168),
    Tiling(64, 64, 4, 1, 168),
    Tiling(32, 64, 4, 3, 128),
    Tiling(32, 64, 4, 2),
    Tiling(64, 128, 8, 2),
    Tiling(32, 128, 8, 3, 128),
]


def label(tiling: Tiling) -> str:
    """Return a short name: rows x keys, warps, stages, registers."""
    size = f"{tiling.block_m}x{tiling.block_n} w{tiling.num_warps} s{tiling.num_stages}"
    return f"{size} r{tiling.max_registers or 'any'}"


def error(got: Tensor, wanted: Tensor) -> float:
    """Return |got - wanted| / |wanted|."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def log_sums(q: Tensor, k: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Return the log of the summed weights (H, T) float32, segment by segment."""
    parts = []
    k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)
    for start, end in pairwise(cu_seqlens):
        scores = torch.einsum("qhe,khe->hqk", q[start:end], k[start:end]) / HEAD_DIM**0.5
        hidden = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill_(hidden, float("-inf")).logsumexp(-1))
    return torch.cat(parts, dim=1)


def forward_backward(name: str, inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> list[Tensor]:
    """Return the output and the gradients of one backend."""
    y = VARLEN_KERNELS[name](*inputs, bounds)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


class Kernels:
    """The kernels of one pack, each run alone with a tiling of its own."""

    def __init__(self, inputs: list[Tensor], grad: Tensor, bounds: Bounds) -> None:
        self.inputs, self.grad, self.bounds = inputs, grad, bounds
        self.found = attend(*inputs, bounds)
        self.into = tuple(x.new_empty(x.shape) for x in inputs)
        self.prepared = self._query_kernel(QUERY_TILING)

    def run_forward(self, tiling: Tiling) -> tuple[Tensor, ...]:
        """Return the output and its log-sums."""
        return attend(*self.inputs, self.bounds, tiling)[:2]

    def _query_kernel(self, tiling: Tiling) -> Prepared:
        tiles = list_query_tiles(self.bounds, TOKENS, tiling.block_m)
        return grad_queries(self.grad, *self.inputs, self.found, tiles, tiling, self.into[0], Rotation())[2]

    def run_queries(self, tiling: Tiling) -> tuple[Tensor, ...]:
        """Return the gradient of q, and the sums that the keys' kernel reads. The table of tiles is made again."""
        return self.into[0], self._query_kernel(tiling).sums

    def run_keys(self, tiling: Tiling) -> tuple[Tensor, ...]:
        """Return the gradients of k and v."""
        tiles = list_key_tiles(self.bounds, TOKENS, tiling.block_n)
        grad_keys(self.prepared, *self.inputs, self.found, tiles, tiling, *self.into[1:], Rotation())
        return self.into[1:]

    def run_backward(self) -> tuple[Tensor, ...]:
        """Return the gradients of q, k and v by the Triton kernels."""
        attend_backward(self.grad, *self.inputs, self.found, self.bounds, self.into, Rotation())
        return self.into


def compile_all(jobs: list[tuple[str, Callable[[Tiling], object], Tiling]]) -> dict[str, str]:
    """Compile every tiling, many at a time, and return why those that cannot run cannot."""

    def attempt(job: tuple[str, Callable[[Tiling], object], Tiling]) -> str:
        try:
            job[1](job[2])
        except Exception as reason:  # whatever the compiler or the driver has to say belongs in the table
            return f"{type(reason).__name__}: {reason}"[:200]
        return ""

    with ThreadPoolExecutor(8) as pool:
        reasons = list(pool.map(attempt, jobs))
    torch.cuda.synchronize()
    return {f"{name} {label(tiling)}": why for (name, _, tiling), why in zip(jobs, reasons, strict=True) if why}


def measure(pattern: str) -> dict[str, Any]:
    """Return errors and milliseconds, and print them as they come."""
    batch = load_batches(pattern, 1)[0]
    packing = batch.packing
    bounds = segment_bounds(packing, 1, TOKENS, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    buffer = torch.randn(TOKENS, sum(HEADS), HEAD_DIM, device=DEVICE, generator=generator).bfloat16()
    grad = torch.randn(TOKENS, NUM_HEADS, HEAD_DIM, device=DEVICE, generator=generator).bfloat16()
    views = list(buffer.split(HEADS, dim=1))
    own = [x.contiguous() for x in views]
    kernels = Kernels(views, grad, bounds)
    report("ready", {"seconds": time.perf_counter() - STARTED})
    runs: dict[str, tuple[Callable[[Tiling], tuple[Tensor, ...]], list[Tiling]]] = {
        "forward": (kernels.run_forward, TILINGS),
        "queries": (kernels.run_queries, QUERY_TILINGS),
        "keys": (kernels.run_keys, KEY_TILINGS),
    }
    jobs = [(name, run, tiling) for name, (run, tilings) in runs.items() for tiling in dict.fromkeys(tilings)]
    figures: dict[str, Any] = {"entries": bounds.queries.numel(), "refused": compile_all(jobs)}
    report("compiled", {"seconds": time.perf_counter() - STARTED})

    wide = [x.float().requires_grad_() for x in own]
    y = attention(*(x[None] for x in wide), packing, backend="sdpa")[0]
    wanted = [y.detach(), *torch.autograd.grad(y, wide, grad.float())]
    lse = log_sums(wide[0].detach(), wide[1].detach(), sorted(set(bounds.queries.tolist())))
    leaves = [x.detach().requires_grad_() for x in views]
    for name in ("varlen", "triton"):
        got = forward_backward(name, leaves, grad, bounds)
        figures[f"error_{name}"] = dict(zip(["y", "q", "k", "v"], map(error, got, wanted), strict=True))
        again = forward_backward(name, leaves, grad, bounds)
        same = {"same_bits": all(map(torch.equal, got, again))}
        report(f"error {name}", figures[f"error_{name}"] | same)
    figures["lse"] = float((kernels.lse - lse).abs().max())
    references = {"forward": [wanted[0]], "queries": [wanted[1]], "keys": wanted[2:]}
    figures["tilings"] = {name: {} for name in runs}
    for name, run, tiling in jobs:
        key = f"{name} {label(tiling)}"
        if key in figures["refused"]:
            report(key, {"refused": figures["refused"][key]})
            continue
        found = {"error": max(map(error, run(tiling), references[name]))}
        found["ms"] = median(partial(run, tiling))
        figures["tilings"][name][label(tiling)] = found
        report(key, found)
    del wide, wanted, y, lse, references
    figures["backward_ms"] = {
        "query table": median(partial(list_query_tiles, bounds, TOKENS, QUERY_TILING.block_m)),
        "key table": median(partial(list_key_tiles, bounds, TOKENS, KEY_TILING.block_n)),
        "triton": median(kernels.run_backward),
    }
    report("backward", figures["backward_ms"])
    figures["forward_backward_ms"] = {
        name: median(partial(forward_backward, name, leaves, grad, bounds)) for name in ("varlen", "triton")
    }
    fastest = [fastest_tiling(figures["tilings"][name], runs[name][1]) for name in ("queries", "keys")]
    figures["fastest"] = [label(tiling) for tiling in fastest]
    varlen_backward_triton.tilings = lambda _head_dim: (fastest[0], fastest[1])
    figures["backward_ms"]["triton, fastest"] = median(kernels.run_backward)
    figures["forward_backward_ms"]["triton, fastest"] = median(
        partial(forward_backward, "triton", leaves, grad, bounds)
    )
    report("forward and backward", figures["forward_backward_ms"])
    report("fastest: " + ", ".join(figures["fastest"]), {"backward": figures["backward_ms"]["triton, fastest"]})
    figures["seconds"] = time.perf_counter() - STARTED
    report("done", {"seconds": figures["seconds"]})
    return figures


def fastest_tiling(found: dict[str, dict[str, float]], tilings: list[Tiling]) -> Tiling:
    """Return the tiling with the smallest time among those that ran."""
    return min((tiling for tiling in tilings if label(tiling) in found), key=lambda tiling: found[label(tiling)]["ms"])


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
    print(f"{name:44s} {'  '.join(cells)}", flush=True)


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
