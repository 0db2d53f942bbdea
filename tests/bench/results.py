"""Speed of what is computed from Parquet: the table, comparisons and the report, on a large store of made-up runs.

Each command runs in a process of its own. Its seconds are given twice: the whole process, and the command alone once
Python, pandas and matplotlib are imported.
"""

from __future__ import annotations

import importlib
import math
import resource
import time
from pathlib import Path
from typing import Any

from jobs.bench.figures import Probe
from jobs.bench.process import Bench

MEMORY_WANTED = "below 1,000"
NUM_REPORTED = 10  # runs of the report; like the ablation's numbers, never more than there are runs
NUM_VARIANTS, NUM_SEEDS = 50, 20  # of the ablation
LIBRARIES = ("pandas", "pyarrow.dataset", "pyarrow.parquet", "scipy.stats")
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg")
BYTES_PER_TOKEN = 3.7266
LEVELS = {"live": 1.0763, "post_ema": 1.0767, "pre_ttt": 1.0879, "ttt_lr0": 1.0834, "post_ttt": 1.0775}
NUM_STEPS = 10  # step rows of a made-up run


def bench_results(bench: Bench, *, num_runs: int, num_documents: int) -> None:
    """Write three sweeps of made-up runs and time the commands on them."""
    a, b, few = (bench.folder / name for name in ("a", "b", "few"))
    num_reported, num_variants, num_seeds = (min(most, num_runs) for most in (NUM_REPORTED, NUM_VARIANTS, NUM_SEEDS))
    for out, count in ((a, num_runs), (b, max(2, num_runs // 10)), (few, num_reported)):
        bench.measure("tests.bench.results:write_store", out=str(out), num_runs=count, num_documents=num_documents)
    ablation = bench.folder / "ablation"
    bench.measure(
        "tests.bench.results:write_ablation", out=str(ablation), num_variants=num_variants, num_seeds=num_seeds
    )
    size = sum(path.stat().st_size for path in bench.folder.rglob("*.parquet"))
    bench.report.add("Parquet written", "MB", [size / 1e6])
    page = str(bench.folder / "report.html")
    commands: dict[str, tuple[list[str], str]] = {
        "seed table": (["table", str(a)], "below 1"),
        f"table of {num_variants} variants, {num_seeds} seeds": (["table", str(ablation)], "below 2"),
        "paired documents, two runs": (
            ["compare", str(a), str(b), "--paired", "documents", "--seeds", "1"], "below 2",
        ),
        "Welch, all runs": (["compare", str(a), str(b)], ""),
        "paired documents, all shared runs": (["compare", str(a), str(b), "--paired", "documents"], ""),
        f"report of {num_reported} runs": (["report", str(few), "-o", page], "below 15"),
    }  # fmt: skip
    for name, (arguments, wanted) in commands.items():
        for number in range(bench.repeats):
            time_command(bench, name, arguments, wanted=wanted, process=number)


def time_command(bench: Bench, name: str, arguments: list[str], *, wanted: str = "", process: int = 0) -> None:
    """Add the figures of one subcommand: run alone in a prepared process, then as a user runs it."""
    libraries = [] if arguments[0] == "status" else [*LIBRARIES, *(DRAWING if arguments[0] == "report" else ())]
    bench.measure(
        "tests.bench.results:measure_command",
        prefix=name,
        process=process,
        arguments=arguments,
        libraries=libraries,
        wanted=wanted,
    )
    whole_s = bench.run_command(["-m", "jobs.cli", *arguments], accepted=(0, 1)).seconds
    bench.report.add(f"{name}: whole process", "s", [whole_s])


def measure_command(request: dict[str, Any], probe: Probe) -> None:
    """Run a subcommand in this process, once the libraries are imported."""
    for name in request["libraries"]:
        importlib.import_module(name)
    from jobs.cli import main

    started = time.perf_counter()
    code = main(request["arguments"])
    seconds = time.perf_counter() - started
    if code > 1:
        raise ValueError(f"seedsweep {' '.join(request['arguments'])} ended with exit code {code}")
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    probe.add("", "s", [seconds], wanted=request["wanted"])
    probe.add(": peak memory", "MB", [peak_mb], wanted=MEMORY_WANTED)


def write_store(request: dict[str, Any], probe: Probe) -> None:
    """Commit made-up finished runs that differ in their scores by a factor."""
    from results.store.writer import commit_attempt

    out, num_runs = Path(request["out"]), int(request["num_runs"])
    documents = made_up_documents(int(request["num_documents"]))
    steps = made_up_steps()
    started = time.perf_counter()
    for seed in range(num_runs):
        factor = 1 + 1e-4 * (seed % 7) + (5e-5 if out.name == "b" else 0)
        scaled = {name: values * factor if name.startswith("nats") else values for name, values in documents.items()}
        commit_attempt(out, run=made_up_run(seed, scaled), stages=made_up_stages(), steps=steps, documents=scaled)
        probe.report(f"writing {out.name}", seed + 1, num_runs, {})
    probe.add(f"writing {out.name}: {num_runs} runs", "s", [time.perf_counter() - started])


def write_ablation(request: dict[str, Any], probe: Probe) -> None:
    """Commit made-up finished runs of many variants, without rows of documents and steps."""
    from results.store.writer import commit_attempt

    num_variants, num_seeds = int(request["num_variants"]), int(request["num_seeds"])
    documents = made_up_documents(1000)
    started = time.perf_counter()
    for seed in range(num_seeds):
        row, noise = made_up_run(seed, documents), 1e-3 * math.sin(seed)
        for place in range(num_variants):
            bpb = LEVELS["post_ttt"] + noise + 1e-4 * (place % 9 - 4) + 2e-4 * math.sin(seed + 3 * place)
            run = {**row, "variant": f"v{place:02d}", "config_hash": f"{place:064x}", "post_ttt_bpb": bpb}
            commit_attempt(request["out"], run=run, stages=made_up_stages())
    probe.add(f"writing an ablation: {num_seeds * num_variants} runs", "s", [time.perf_counter() - started])


def made_up_documents(count: int) -> dict[str, Any]:
    """Return document columns (count,): heavy-tailed lengths, scores near 1.09 bits a byte."""
    import numpy as np

    generator = np.random.default_rng(7)
    tokens = np.clip(generator.lognormal(6.2, 1.0, count), 20, 20_000).astype(np.int32)
    num_bytes = (tokens * BYTES_PER_TOKEN).astype(np.int32)
    plain = num_bytes * math.log(2) * (LEVELS["pre_ttt"] + generator.normal(0.0, 0.1, count))
    return {
        "index": np.arange(count, dtype=np.int32),
        "tokens": tokens,
        "bytes": num_bytes,
        "nats_plain": plain,
        "nats_lr0": plain * (LEVELS["ttt_lr0"] / LEVELS["pre_ttt"]),
        "nats_ttt": plain * (LEVELS["post_ttt"] / LEVELS["pre_ttt"]),
    }


def made_up_steps() -> dict[str, Any]:
    """Return the step columns of a short loss curve."""
    import numpy as np

    step = np.arange(1, NUM_STEPS + 1)
    frac = step / NUM_STEPS
    return {
        "step": step, "loss": 2.8 + 6.2 * np.exp(-4 * frac), "grad_norm": 0.3 + np.exp(-3 * frac),
        "lr_factor": np.minimum(1.0, (1 - frac) / 0.667), "momentum": np.full(NUM_STEPS, 0.97),
        "is_looped": frac >= 0.35, "elapsed_s": 588.0 * frac, "tokens_per_s": np.full(NUM_STEPS, 6.4e6),
    }  # fmt: skip


def made_up_run(seed: int, documents: dict[str, Any]) -> dict[str, Any]:
    """Return the runs row of a finished attempt whose sums are those of its documents."""
    tokens, num_bytes = int(documents["tokens"].sum()), int(documents["bytes"].sum())
    row: dict[str, Any] = {
        "seed": seed, "repeat": 0, "attempt": 1, "attempts": 1, "config_hash": "c" * 64, "state": "DONE",
        "sweep": "made_up", "source": "run", "config_json": {"seed": seed}, "data_hash": "d" * 64,
        "code_hash": "e" * 64, "code_changed": False, "world_size": 8, "num_gpus": 8, "num_cpus": 64,
        "started_at": "2026-01-01T10:00:00+00:00", "ended_at": "2026-01-01T10:25:00+00:00",
        "val_documents_hash": "a" * 64, "val_documents": len(documents["tokens"]), "val_bytes": num_bytes,
        "tokenizer_hash": "b" * 64, "vocab_size": 8192, "model_bytes": 15_968_000 + seed % 97, "code_bytes": 26_505,
        "artifact_bytes": 15_994_505 + seed % 97, "size_limit_bytes": 16_000_000, "within_limit": True,
        "order0_bpb": 2.9231,
    }  # fmt: skip
    columns = {"pre_ttt": "nats_plain", "ttt_lr0": "nats_lr0", "post_ttt": "nats_ttt"}
    for stage, level in LEVELS.items():
        nats = float(documents[columns[stage]].sum()) if stage in columns else level * math.log(2) * num_bytes
        row |= {
            f"{stage}_nats": nats, f"{stage}_bpb": nats / math.log(2) / num_bytes, f"{stage}_tokens": tokens,
            f"{stage}_bytes": num_bytes, f"{stage}_s": 8.0,
        }  # fmt: skip
    return row


def made_up_stages() -> list[dict[str, Any]]:
    """Return the four stage records of a made-up run."""
    train = {"steps": 4820, "train_s": 588.1, "tokens_per_s": 6.4e6, "num_resumes": 0, "lost_steps": 0}
    return [
        {"format": 1, "stage": "train", "seconds": 588.1, "metrics": train, "outputs": {}},
        {"format": 1, "stage": "quantize", "seconds": 80.0, "metrics": {"quantize_s": 80.0}, "outputs": {}},
        {"format": 1, "stage": "evaluate", "seconds": 16.0, "metrics": {"evaluate_s": 16.0}, "outputs": {}},
        {"format": 1, "stage": "ttt", "seconds": 251.0, "metrics": {"ttt_s": 251.0}, "outputs": {}},
    ]
