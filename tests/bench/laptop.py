"""What a newcomer's machine feels: imports, opening a large shard, counting bytes, GPTQ of the demo's model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jobs.bench.figures import Probe
from jobs.bench.process import Bench

SHARD_TOKENS = 10_000_000
COUNTED_TOKENS = 2_400_000
IMPORT_CODE = "import time; begun = time.perf_counter(); import jobs.cli; print(time.perf_counter() - begun)"
NUM_CALIBRATION_ROWS = 4096  # of the made-up inputs behind each Hessian


def bench_laptop(bench: Bench, *, with_corpus: bool) -> None:
    """Measure everything once for each repeat, in processes of their own."""
    for number in range(bench.repeats):
        bench.say(f"import {number + 1}/{bench.repeats}")
        done = bench.run_command(["-c", IMPORT_CODE])
        bench.report.add("import jobs.cli", "s", [float(done.stdout)], wanted="below 0.5")
        whole_s = bench.run_command(["-m", "jobs.cli", "--help"]).seconds
        bench.report.add("seedsweep --help, whole process", "s", [whole_s])
        bench.measure("tests.bench.laptop:measure_laptop", process=number)
        if with_corpus:
            bench.say(f"builtin corpus {number + 1}/{bench.repeats}")
            out = bench.folder / f"corpus{number}"
            seconds = bench.run_command(["-m", "jobs.cli", "data", "builtin", "--out", str(out)]).seconds
            bench.report.add("builtin corpus, whole process", "s", [seconds], wanted="at most 45")


def measure_laptop(request: dict[str, Any], probe: Probe) -> None:
    """Measure shard opening, byte counting and GPTQ in this process."""
    import torch

    probe.facts["num_threads"] = torch.get_num_threads()
    _open_shard(Path(request["folder"]), probe)
    _count_bytes(probe)
    _quantize_tiny(probe)


def _open_shard(folder: Path, probe: Probe) -> None:
    """Add how much the resident set grows when a shard is opened for training, then for validation."""
    import psutil

    from jobs.bench.inputs import made_up_tokens
    from model.corpus.shard_file import write_shard
    from model.data.loader import SpanLoader
    from model.data.validation import load_validation
    from model.presets import tiny

    config, path = tiny(), folder / "large.bin"
    vocab_size = config.model.vocab_size
    write_shard(path, made_up_tokens(SHARD_TOKENS, vocab_size, seed=0))
    process = psutil.Process()
    before = process.memory_info().rss
    loader = SpanLoader([path], micro_batch_tokens=config.train.micro_batch_tokens, span_group=1, vocab_size=vocab_size)
    trained = process.memory_info().rss
    validation = load_validation([path], vocab_size=vocab_size)
    after = process.memory_info().rss
    assert loader.shard_sizes == [SHARD_TOKENS] == [validation.tokens.size]
    megabytes = "10-million-token shard opened for {}: resident set grows by"
    probe.add(megabytes.format("training"), "MB", [(trained - before) / 1e6], wanted="below 50")
    probe.add(megabytes.format("validation"), "MB", [(after - trained) / 1e6], wanted="below 50")


def _count_bytes(probe: Probe) -> None:
    """Add how long it takes to count the bytes of a stream's targets."""
    import numpy as np

    from jobs.bench.inputs import made_up_tokens
    from model.data.tokenizer import ByteTable, target_bytes

    generator = np.random.Generator(np.random.PCG64(0))
    base = generator.integers(0, 12, size=8192).astype(np.int16)
    table = ByteTable(base, generator.random(8192) < 0.5, base == 0)
    tokens = made_up_tokens(COUNTED_TOKENS + 1, 8192, seed=0)
    started = time.perf_counter()
    total = int(target_bytes(table, tokens).sum(dtype=np.int64))
    seconds = time.perf_counter() - started
    assert total > 0
    probe.add("byte counting of 2.4 M tokens", "s", [seconds], wanted="below 0.2")


def _quantize_tiny(probe: Probe) -> None:
    """Add how long GPTQ takes for all matrices of the preset tiny."""
    import torch

    from model.banks import KINDS_OF_HESSIAN, parameter_shapes, tensor_shapes
    from model.presets import tiny
    from tests.rounding import quantize_state

    config = tiny()
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(config.model).items()}
    widths = {name: shape[-1] for name, shape in tensor_shapes(config.model).items() if len(shape) == 2}
    hessians = {}
    for shared, kinds in KINDS_OF_HESSIAN.items():
        for layer in range(config.model.num_layers):
            hessians[f"layers.{layer}.{shared}"] = _hessian(widths[f"layers.{layer}.{kinds[0]}"], generator)
    hessians["embedding"] = _hessian(widths["embedding"], generator)
    started = time.perf_counter()
    quantized = quantize_state(state, hessians, config.quant)
    seconds = time.perf_counter() - started
    probe.add("GPTQ of all tiny matrices", "s", [seconds], wanted="below 10")
    probe.add("GPTQ of all tiny matrices: matrices", "", [len(quantized.matrices)])


def _hessian(width: int, generator: Any) -> Any:
    """Return the second moments (width, width) float32 of made-up inputs."""
    import torch

    x = torch.randn(NUM_CALIBRATION_ROWS, width, generator=generator)
    return x.T @ x / NUM_CALIBRATION_ROWS
