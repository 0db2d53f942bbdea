"""How fast adaptation is on a CUDA device: python -m tests.gpu_ttt OUT.json --val SHARD [--tokens N].

In this order: all documents of the stream's first N tokens, cold (kernels compiled, graphs recorded) in stream order;
the same again, in stream and in sorted order; the 192-document sample of the baseline, until every size is recorded;
single steps with a profile. The weights are random: times do not depend on them. SHARD may be compressed by xz. Each
figure is written as soon as it is known. Cold means empty compile caches: that is up to the caller.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import platform
import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import bench_500
from model.data.shards import HEADER_BYTES, find_documents
from model.data.validation import ValidationSet
from model.score_ledger import times_scored
from model.ttt import make_slots
from model.ttt_graphs import GraphAdapter, StepRecorder
from model.ttt_slots import Slots
from model.ttt_windows import window_cost
from tests.gpu_probe import build_model, profile, time_ms

CONFIG = bench_500().ttt
STEPS = ((64, 2048), (32, 2048), (16, 2048), (4, 2048), (1, 2048), (128, 1024), (128, 256), (128, 64))


def ignore(_phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
    """Take a progress report and do nothing with it."""


def load_stream(path: Path, num_tokens: int) -> ValidationSet:
    """Return the first tokens of a shard, compressed or not, as a validation set."""
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    tokens = np.frombuffer(content, dtype="<u2", offset=HEADER_BYTES)[:num_tokens]
    return ValidationSet(tokens, find_documents(tokens))


def lengths_of(validation: ValidationSet) -> list[int]:
    """Return how many predictions each document has."""
    return [int(n) for n in np.diff(validation.document_ranges, axis=1)[:, 0] - 1]


def timed_pass(work: GraphAdapter, documents: Sequence[int], slots: Slots) -> dict[str, float]:
    """Adapt documents and return seconds, useful window tokens a second, and the mean loss."""
    lengths = lengths_of(work.validation)
    work.nll.zero_()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work.run_adapted(documents, slots)
    work.close_ledger()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    tokens = sum(window_cost(lengths[document], CONFIG) for document in documents)
    targets = sum(lengths[document] for document in documents)
    loss = float(work.nll.double().sum()) / targets
    assert np.isfinite(loss), loss
    return {"seconds": seconds, "window_tokens": tokens, "window_tokens_per_s": tokens / seconds, "mean_nats": loss}


def measure_passes(validation: ValidationSet, write: Any) -> None:
    """Time whole passes: all documents cold and warm in both orders, the sample warm."""
    model = build_model(torch.bfloat16, "auto").requires_grad_(False)
    lengths = lengths_of(validation)
    stream = [document for document, length in enumerate(lengths) if length > 0]
    by_length = sorted(stream, key=lambda document: -lengths[document])
    torch.cuda.synchronize()
    start = time.perf_counter()
    slots = make_slots(model, CONFIG, stream, seed=42)
    work = GraphAdapter(model, validation, CONFIG, ignore, label="bench")
    cold = timed_pass(work, stream, slots)
    cold["seconds"] = time.perf_counter() - start
    events = work.close_ledger()
    assert (times_scored(events, validation.document_starts, validation.num_targets) == 1).all()
    peak = torch.cuda.max_memory_allocated() / 2**30
    assert work.recorder is not None
    write(
        "all_cold", cold | {"num_slots": slots.num_slots, "num_graphs": len(work.recorder.recorded), "peak_gib": peak}
    )
    first = work.nll.clone()
    write("all_again_stream", timed_pass(work, stream, slots))
    gaps = (work.nll - first).abs()
    write("rerun_noise_nats", {"mean": float(gaps.mean()), "max": float(gaps.max())})
    for name in ("all_again_sorted", "all_warm_sorted"):
        write(name, timed_pass(work, by_length, slots))
    write("all_warm_stream", timed_pass(work, stream, slots))
    sample = [d for d in sorted(random.Random(42).sample(range(499), 192)) if d < len(lengths) and lengths[d] > 0]
    for name in ("sample_first", "sample_second", "sample_warm"):  # a size is recorded when it is met again
        write(name, timed_pass(work, sample, slots))
    start = time.perf_counter()
    work.run_unadapted(stream)
    torch.cuda.synchronize()
    write("unadapted", {"seconds": time.perf_counter() - start})


def measure_steps(validation: ValidationSet, write: Any) -> None:
    """Time single recorded steps of several sizes, and one step operation by operation with its profile."""
    gc.collect()
    torch.cuda.empty_cache()
    model = build_model(torch.bfloat16, "auto").requires_grad_(False)
    slots = Slots(model, CONFIG, 42, 128, num_spare=1)
    for slot in range(128):
        slots.reset(slot, slot)
    recorder = StepRecorder(model, validation.tokens, CONFIG, slots, is_looped=True)
    for rows, length in STEPS:
        table = torch.tensor([(length + 64 * row, row) for row in range(rows)]).pin_memory()
        run = partial(recorder.run, table, length)
        figures: dict[str, Any] = time_ms(run, warm=3, timed=7)
        figures["window_tokens_per_s"] = rows * length / figures["median_ms"] * 1000
        if (rows, length) == STEPS[0]:
            figures["profile_ms"] = profile(partial(recorder.step, table.to("cuda"), length))
        write(f"step_{rows}x{length}", figures)


def main() -> int:
    """Measure, write every figure as it comes, print a table last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=851_969)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "command": "python -m tests.gpu_ttt OUT.json --val SHARD",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "figures": {},
    }

    def write(name: str, figures: dict[str, Any]) -> None:
        result["figures"][name] = figures
        args.out.write_text(json.dumps(result, indent=1) + "\n")

    validation = load_stream(args.val, args.tokens)
    measure_passes(validation, write)
    measure_steps(validation, write)
    for name, figures in result["figures"].items():
        plain = {key: round(value, 4) for key, value in figures.items() if isinstance(value, float)}
        print(name, json.dumps(plain))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
