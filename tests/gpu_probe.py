"""Where a CUDA device's time goes in training and adaptation: python -m tests.gpu_probe SECTION OUT.json --train GLOB.

Sections: cold (seconds to the first step), attention (every backend on a real micro-batch), kernels (each fused kernel,
with its memory rate), train (whole steps with and without loops, against float32, with a profile), ttt (one adaptation
step of 64 windows). The weights are random.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.attention.backends import is_available
from model.attention.probe import probe_backends
from model.data.loader import Batch, SpanLoader
from model.data.packing import Packing, pack_row
from model.data.shards import list_shards
from model.distributed import Dist
from model.gpt import GPT
from model.presets import bench_500
from model.train.gradients import accumulate_gradients
from model.train.optim import Optimizers
from model.train.trainer import Ema
from model.ttt.learning_step import LearningStep
from model.ttt.slots import Slots

CONFIG = bench_500()
TOKENS = CONFIG.train.micro_batch_tokens
DEVICE = torch.device("cuda")
STARTED = time.perf_counter()


def time_ms(run: Callable[[], object], *, warm: int = 3, timed: int = 10) -> dict[str, float]:
    """Return median, p10 and p90 milliseconds of run, timed with device events."""
    for _ in range(warm):
        run()
    samples = []
    for _ in range(timed):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end))
    tenths = statistics.quantiles(samples, n=10)
    return {"median_ms": statistics.median(samples), "p10_ms": tenths[0], "p90_ms": tenths[-1]}


def backends() -> list[str]:
    """Return the fast attention backends worth a whole training run here."""
    return [name for name in ("varlen", "triton", "fa2", "fa3", "fa4") if is_available(name)]


def load_batches(pattern: str, count: int) -> list[Batch]:
    """Return real micro-batches on the device."""
    loader = SpanLoader(
        list_shards(pattern), micro_batch_tokens=TOKENS, span_group=1, vocab_size=CONFIG.model.vocab_size
    )
    return [loader.batch(i, max_segment=2048, max_seqlen=2048).to(DEVICE) for i in range(count)]


def build_model(dtype: torch.dtype, backend: str) -> GPT:
    """Return the published model with weights that exercise every path (nothing at zero)."""
    model = GPT(CONFIG.model, compute_dtype=dtype, attention_backend=backend)
    model.init_weights(42)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for bank in (model.qo_bank[CONFIG.model.num_layers :], model.mlp_down_bank):
            bank.copy_(0.02 * torch.randn(bank.shape, generator=generator))
        model.tok_emb.weight.data = model.tok_emb.weight.data.to(torch.bfloat16 if dtype == torch.bfloat16 else dtype)
    return model.to(DEVICE)


def probe_attention(pattern: str) -> dict[str, Any]:
    """Every backend, forward and backward, on a real micro-batch with few and with many padding entries."""
    batch = load_batches(pattern, 1)[0]
    heads = {"q": CONFIG.model.num_heads, "k": CONFIG.model.num_kv_heads, "v": CONFIG.model.num_kv_heads}
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, n, 64, device=DEVICE, dtype=torch.bfloat16) for n in heads.values())
    result: dict[str, Any] = {}
    for entries in (64, TOKENS // 32 + 64):
        packing = pack_row(batch.inputs, max_segment=2048, max_seqlen=2048, bucket=entries)
        choice = probe_backends(q, k, v, packing.to(DEVICE), candidates=backends())
        result[f"entries_{packing.cu_seqlens.numel()}"] = choice._asdict()
    return result


def probe_kernels(_pattern: str) -> dict[str, Any]:
    """Each fused kernel on one micro-batch of rows: milliseconds and the bytes it must move over that time."""
    from model.attention import gate_triton, heads_triton
    from model.attention.heads_product_triton import project_and_rotate
    from model.kernels import cross_entropy_triton, mlp_triton, residual_triton

    width, vocab = CONFIG.model.model_dim, CONFIG.model.vocab_size

    def rows(columns: int) -> Tensor:
        return torch.randn(TOKENS, columns, device=DEVICE, dtype=torch.bfloat16)

    x, delta, skip, first = (rows(width).requires_grad_() for _ in range(4))
    mix, weight, gate = (torch.rand(n, width, device=DEVICE).squeeze(0).requires_grad_() for n in (2, 1, 1))
    unit = TOKENS * width * 2  # bytes of one residual tensor
    apply: Any = residual_triton.MixNorm.apply
    mixed = apply(x, delta, None, None, None, first, mix, 0.5)
    merged = apply(x, delta, skip, weight, gate, first, mix, 0.5)
    added = apply(x, delta, None, None, None, None, None, 0.5)
    grads = [rows(width) for _ in range(4)]

    def backward(outputs: tuple[Tensor | None, ...]) -> Callable[[], object]:
        used = [y for y in outputs if y is not None]
        inputs = [y for y in (x, delta, first, mix) if y.requires_grad]
        return lambda: torch.autograd.grad(used, inputs, grads[: len(used)], retain_graph=True, allow_unused=True)

    qkv, gain = rows(2 * width), torch.rand(8, device=DEVICE) + 1
    cos, sin = (torch.rand(TOKENS, 8, device=DEVICE) for _ in range(2))
    turned, inverse = heads_triton.rotate(qkv, cos, sin, gain, 4, num_copies=1)
    y, v = rows(width).view(TOKENS, 8, 64), turned[:, 12:]
    grad_q, grad_k, grad_v, own = (rows(64 * n).view(TOKENS, n, 64) for n in (8, 4, 4, 4))
    head_grads, saved = (grad_q, grad_k, grad_v), (turned, inverse, cos, sin, gain)
    hidden, grad_hidden = rows(2048), rows(2048)
    logits, targets = rows(vocab), torch.randint(vocab, (TOKENS,), device=DEVICE)
    up = torch.randn(2048, width, device=DEVICE, dtype=torch.bfloat16)
    flat, down = x.detach(), torch.randn(width, 2048, device=DEVICE, dtype=torch.bfloat16)
    activate_up = partial(mlp_triton.up_and_activate, flat, up, slope=0.5)
    signs, activated = activate_up(needs_signs=True)
    cases: dict[str, tuple[Callable[[], object], float]] = {
        "mix_norm": (lambda: apply(x, delta, None, None, None, first, mix, 0.5), 6 * unit),
        "mix_norm_skip": (lambda: apply(x, delta, skip, weight, gate, first, mix, 0.5), 7 * unit),
        "add_norm": (lambda: apply(x, delta, None, None, None, None, None, 0.5), 4 * unit),
        "mix_norm_backward": (backward(mixed), 8 * unit),
        "mix_norm_skip_backward": (backward(merged), 10 * unit),
        "add_norm_backward": (backward(added), 4 * unit),
        "rotate": (lambda: heads_triton.rotate(qkv, cos, sin, gain, 4, num_copies=1), 3 * unit),
        "project_and_rotate": (lambda: project_and_rotate(flat, up[:1024], *saved[2:], 4), 3 * unit),
        "rotate_backward": (lambda: heads_triton.rotate_backward(head_grads, own, *saved), 6 * unit),
        "exclude": (lambda: gate_triton.gate(y, v, None, None, is_value_excluded=True), 2.5 * unit),
        "exclude_backward": (
            lambda: gate_triton.gate_backward(y, y, v, None, None, is_value_excluded=True), 4 * unit
        ),
        "activate": (lambda: mlp_triton.activate(hidden, 0.5), 8 * unit),
        "activate_backward": (
            lambda: mlp_triton.activate_backward_(grad_hidden, hidden, needs_y=True, slope=0.5), 16 * unit
        ),
        "up_and_activate": (lambda: activate_up(needs_signs=True), 5.25 * unit),
        "up_and_activate_no_signs": (lambda: activate_up(needs_signs=False), 5 * unit),
        "down_backward": (lambda: mlp_triton.down_backward(flat, down, signs, activated, slope=0.5), 9.25 * unit),
        "cross_entropy": (lambda: cross_entropy_triton.row_nll(logits, targets, 30.0), 16 * unit),
        "cross_entropy_grad": (lambda: cross_entropy_triton.row_nll(logits, targets, 30.0, 1.0), 32 * unit),
        "copy": (lambda: hidden.copy_(grad_hidden), 8 * unit),
    }  # fmt: skip
    result: dict[str, Any] = {}
    for name, (run, num_bytes) in cases.items():
        result[name] = time_ms(run)
        result[name]["gb_per_s"] = num_bytes / result[name]["median_ms"] / 1e6
    timing = time_ms(lambda: flat @ up.mT)
    result["matmul_512_2048"] = timing | {"tflops": 2 * TOKENS * width * 2048 / timing["median_ms"] / 1e9}
    return result


def train_step(model: GPT, batches: list[Batch], optimizers: Optimizers, ema: Ema, is_looped: bool) -> None:
    """One optimizer step as in training."""
    dist = Dist.single(DEVICE)
    accumulate_gradients(model, batches, is_looped=is_looped, clip="per_rank", max_norm=0.3, dist=dist)
    optimizers.step(lr_factor=1e-6, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = None
    ema.update(0.997)


@torch.no_grad()
def evaluate(model: GPT, row: Tensor, packing: Packing) -> None:
    """Score one evaluation row."""
    model(row, row, is_looped=True, packing=packing, reduction="none")


def probe_train(pattern: str) -> dict[str, Any]:
    """Whole steps of two micro-batches, both loop states, every fast backend; agreement with float32; a profile."""
    result: dict[str, Any] = {"agreement": compare_with_float32(pattern)}
    batches = load_batches(pattern, 2)
    for backend in backends():
        model = build_model(torch.bfloat16, backend)
        optimizers, ema = Optimizers(model, CONFIG.train, Dist.single(DEVICE)), Ema(model)

        step = partial(train_step, model, batches, optimizers, ema)
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step(False)
        torch.cuda.synchronize()
        figures: dict[str, Any] = {"first_step_s": time.perf_counter() - start, "since_start_s": start - STARTED}
        for is_looped in (False, True):
            label = "17_visits" if is_looped else "11_layers"
            figures[label] = time_ms(partial(step, is_looped), warm=3, timed=12)
            figures[label]["tokens_per_s"] = 2 * TOKENS / figures[label]["median_ms"] * 1000
        figures["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["profile_17_visits_ms"] = profile(partial(step, True))
        row = batches[0].inputs[:, :65536]
        packing = pack_row(row, max_segment=2048, max_seqlen=2048).to(DEVICE)

        figures["evaluation_row"] = time_ms(partial(evaluate, model, row, packing))
        figures["evaluation_row"]["tokens_per_s"] = 65536 / figures["evaluation_row"]["median_ms"] * 1000
        result[backend] = figures
    return result


def compare_with_float32(pattern: str) -> dict[str, float]:
    """Loss and gradient norm of a quarter micro-batch in bf16 against float32, same weights."""
    inputs, targets, _ = load_batches(pattern, 1)[0]
    inputs, targets = inputs[:, : TOKENS // 4], targets[:, : TOKENS // 4]
    packing = pack_row(inputs, max_segment=2048, max_seqlen=2048).to(DEVICE)
    found: dict[str, list[float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for is_looped in (False, True):
            model = build_model(dtype, "auto")
            loss = model(inputs, targets, is_looped=is_looped, packing=packing)
            loss.backward()
            grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            found.setdefault(f"loss_{'17' if is_looped else '11'}", []).append(float(loss))
            found.setdefault(f"grad_norm_{'17' if is_looped else '11'}", []).append(float(norm))
    return {name: narrow / wide - 1 for name, (wide, narrow) in found.items()}


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Return the milliseconds of each kernel in one run, longest first, the ten-microsecond ones left out."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        run()
        torch.cuda.synchronize()
    totals: dict[str, float] = {}
    for event in record.key_averages():
        totals[f"{event.key[:90]} x{event.count}"] = event.self_device_time_total / 1000
    return dict(sorted(((k, round(t, 3)) for k, t in totals.items() if t > 0.01), key=lambda item: -item[1]))


def probe_ttt(_pattern: str) -> dict[str, Any]:
    """One adaptation step of 64 windows: forward, backward, update; for three window lengths."""
    result: dict[str, Any] = {}
    torch.manual_seed(0)
    for backend in backends():
        model = build_model(torch.bfloat16, backend)
        model.requires_grad_(False)
        slots = Slots(model, CONFIG.ttt, 42, 64)
        for slot in range(64):
            slots.reset(slot, slot)
        tokens = np.random.default_rng(0).integers(2, 8192, 64 * 2049)
        learning = LearningStep(model, tokens, CONFIG.ttt, slots, is_looped=True)
        for length in (256, 1024, 2048):
            rows = [(slot * 2049 + length, slot, length, CONFIG.ttt.chunk_tokens) for slot in range(64)]
            table = torch.tensor(rows, device=DEVICE)
            step = partial(learning.score_and_learn, table, length)
            torch.cuda.reset_peak_memory_stats()
            figures: dict[str, Any] = time_ms(step, warm=2, timed=6)
            figures["window_tokens_per_s"] = 64 * length / figures["median_ms"] * 1000
            figures["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if length == 2048:
                figures["profile_ms"] = profile(step)
            result[f"{backend}_64x{length}"] = figures
    return result


def probe_cold(pattern: str) -> dict[str, Any]:
    """Seconds from the start of this process to the end of its first steps; cold only where the caches are empty."""
    result: dict[str, Any] = {"imported": time.perf_counter() - STARTED}
    for backend in backends()[::-1]:
        model = build_model(torch.bfloat16, backend)
        batches = load_batches(pattern, 2)
        optimizers, ema = Optimizers(model, CONFIG.train, Dist.single(DEVICE)), Ema(model)
        torch.cuda.synchronize()
        result[f"{backend}_ready"] = time.perf_counter() - STARTED
        for label, is_looped in (("11_layers", False), ("17_visits", True)):
            train_step(model, batches, optimizers, ema, is_looped)
            torch.cuda.synchronize()
            result[f"{backend}_{label}"] = time.perf_counter() - STARTED
    return result


SECTIONS = {
    "cold": probe_cold,
    "attention": probe_attention,
    "kernels": probe_kernels,
    "train": probe_train,
    "ttt": probe_ttt,
}


def main() -> int:
    """Run one section and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {
        "section": args.section,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "figures": SECTIONS[args.section](args.train),
    }
    text = json.dumps(result, indent=1)
    args.out.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
