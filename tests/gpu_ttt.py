"""How fast adaptation is on a CUDA device: python -m tests.gpu_ttt OUT.json --val SHARD [--tokens N].

In this order: all documents of the stream's first N tokens, cold (kernels compiled, graphs recorded) in stream order;
the 192-document sample of the baseline, until every size is recorded; single steps with a profile; all documents
twice again, in stream and in sorted order (the second time counts). The weights are random: times do not depend on
them. SHARD may be compressed by xz. Cold means empty compile caches: that is up to the caller.
"""

from __future__ import annotations

import argparse
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

from model.data.shards import HEADER_BYTES, find_documents
from model.data.validation import ValidationSet
from model.presets import bench_500
from model.ttt.documents import make_slots
from model.ttt.ledger_reading import times_scored
from model.ttt.recorded_pass import RecordedPass, RecordedStep
from model.ttt.slots import Slots
from model.ttt.windows import window_cost
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


def timed_pass(work: RecordedPass, documents: Sequence[int], slots: Slots) -> dict[str, float]:
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


def measure(validation: ValidationSet, write: Any) -> None:
    """Time whole passes and single steps, the cold pass first."""
    model = build_model(torch.bfloat16, "auto").requires_grad_(False)
    lengths = lengths_of(validation)
    stream = [document for document, length in enumerate(lengths) if length > 0]
    torch.cuda.synchronize()
    start = time.perf_counter()
    slots = make_slots(model, CONFIG, stream, seed=42)
    work = RecordedPass(model, validation, CONFIG, ignore, label="bench")
    cold = timed_pass(work, stream, slots)
    cold["seconds"] = time.perf_counter() - start
    events = work.close_ledger()
    assert (times_scored(events, validation.document_starts, validation.num_targets) == 1).all()
    assert work.learning is not None
    cold["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    write("all_cold", cold | {"num_slots": slots.num_slots, "num_graphs": len(work.learning.recorded)})
    first = work.nll.clone()
    sample = [d for d in sorted(random.Random(42).sample(range(499), 192)) if d < len(lengths) and lengths[d] > 0]
    for name in ("sample_first", "sample_second", "sample_warm"):  # a size is recorded when it is first met
        write(name, timed_pass(work, sample, slots))
    gaps = (work.nll - first)[work.nll != 0].abs()
    write("rerun_noise_nats", {"mean": float(gaps.mean()), "max": float(gaps.max())})
    measure_steps(work.learning, write)
    by_length = sorted(stream, key=lambda document: -lengths[document])
    for order, documents in (("stream", stream), ("sorted", by_length)) * 2:
        write(f"all_again_{order}", timed_pass(work, documents, slots))
    start = time.perf_counter()
    work.run_unadapted(stream)
    torch.cuda.synchronize()
    write("unadapted", {"seconds": time.perf_counter() - start})


def measure_steps(recorder: RecordedStep, write: Any) -> None:
    """Time single recorded steps of several sizes, and profile the largest operation by operation."""
    for rows, length in STEPS:
        table = torch.tensor([(length + 64 * row, row, length, 64) for row in range(rows)]).pin_memory()
        run = partial(recorder.run, table, length)
        figures: dict[str, Any] = time_ms(run, warm=3, timed=7)
        figures["window_tokens_per_s"] = rows * length / figures["median_ms"] * 1000
        if (rows, length) == STEPS[0]:
            figures["profile_ms"] = profile(partial(recorder.score_and_learn, table.to("cuda"), length))
        write(f"step_{rows}x{length}", figures)


def main() -> int:
    """Measure; write and print every figure as it comes."""
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
        print(
            name,
            json.dumps({key: round(value, 4) for key, value in figures.items() if isinstance(value, (int, float))}),
        )

    validation = load_stream(args.val, args.tokens)
    measure(validation, write)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
