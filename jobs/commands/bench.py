"""`seedsweep bench MODE`: how fast each part is here, with raw samples, percentiles and the machine they are from."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jobs.bench_process import Bench

EXIT_OK, EXIT_FAILED = 0, 1
MODES = {
    "train": "optimizer steps with and without loops",
    "gptq": "Hessians, solve, compress, reload",
    "eval": "plain evaluation, first pass and later ones",
    "ttt": "test-time training: all documents cold, a sample, one step of full windows",
    "cold": "from a new process with empty kernel caches to its first step, and again with full ones",
    "sweep": "the decision loop with many seeds, status and table, Ray's overhead",
    "laptop": "imports, opening shards, counting bytes, GPTQ of the preset tiny",
    "results": "table, comparisons and report over a large store",
}
DEFAULT_REPEATS = 3
ON_A_MODEL = ("train", "gptq", "eval", "ttt", "cold")
# caches of compiled kernels that a cold start finds empty
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from model.config import ATTENTION_BACKENDS, PRESETS

    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "modes:\n" + "\n".join(f"  {name:8} {text}" for name, text in MODES.items())
    parser.add_argument("mode", choices=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="configuration to measure (default tiny)")
    parser.add_argument("--train", metavar="GLOB", default="", help="training shards (default: made-up tokens)")
    parser.add_argument("--val", metavar="GLOB", default="", help="validation shards (default: made-up tokens)")
    parser.add_argument("--tokenizer", metavar="FILE", default="", help="for bits per byte; speed does not need it")
    parser.add_argument("--val-tokens", type=int, metavar="N", help="the first N tokens of the validation stream only")
    parser.add_argument("--weights", metavar="FILE", default="", help="a run's train.safetensors for gptq, eval, ttt")
    parser.add_argument("--attention", choices=ATTENTION_BACKENDS, default="auto", help="attention backend")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="train: processes, one GPU each (default 1)")
    parser.add_argument("--documents", type=int, metavar="K", help="ttt: in the sample (192); results: a run (50000)")
    parser.add_argument(
        "--runs", type=int, default=1000, metavar="N", help="sweep: seeds; results: runs (default 1000)"
    )
    parser.add_argument("--corpus", action="store_true", help="laptop: time the builtin corpus as well (up to 45 s)")
    parser.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, metavar="N",
                        help=f"measuring processes (default {DEFAULT_REPEATS})")  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every raw sample too, .json or .parquet")


def execute(args: argparse.Namespace) -> int:
    """Measure, print and write. Returns 1 when a measuring process died."""
    from jobs.bench_figures import Report, check_out, environment, write_report
    from jobs.bench_process import Bench, MeasurementFailed

    for name in ("repeats", "ranks", "runs", "documents", "val_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    check_out(args.out)
    settings = {"command": shlex.join(["seedsweep", *sys.argv[1:]]), "repeats": args.repeats}
    if args.mode in ON_A_MODEL:
        settings["preset"] = args.preset
    report = Report(args.mode, settings, environment())
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix="seedsweep-bench-") as folder:
            measure(Bench(report, Path(folder), args.repeats, child_options(args, folder)), args)
    except MeasurementFailed as error:
        print(f"seedsweep: bench {args.mode}: {error}", file=sys.stderr)
        return EXIT_FAILED
    report.settings["took_s"] = round(time.perf_counter() - started, 1)
    print(json.dumps(report.as_json(), indent=1) if args.format == "json" else report.as_text())
    if args.out is not None:
        write_report(report, args.out)
        print(f"wrote {args.out}", file=sys.stderr)
    return EXIT_OK


def child_options(args: argparse.Namespace, folder: str) -> dict[str, object]:
    """Return what every measuring process is told; paths hold from any current directory."""
    return {
        "folder": folder, "preset": args.preset, "train": args.train, "val": args.val, "tokenizer": args.tokenizer,
        "val_tokens": args.val_tokens, "weights": args.weights, "attention": args.attention,
        "documents": args.documents or 192,
    }  # fmt: skip


def measure(bench: Bench, args: argparse.Namespace) -> None:
    """Take the samples of one mode."""
    if args.mode == "laptop":
        from jobs.bench_laptop import bench_laptop

        bench_laptop(bench, with_corpus=args.corpus)
    elif args.mode == "sweep":
        from jobs.bench_sweep import bench_sweep

        bench_sweep(bench, num_seeds=args.runs)
    elif args.mode == "results":
        from jobs.bench_results import bench_results

        bench_results(bench, num_runs=args.runs, num_documents=args.documents or 50_000)
    elif args.mode == "train":
        for number in range(args.repeats):
            bench.measure("train", process=number, num_ranks=args.ranks)
    else:
        measure_with_empty_caches(bench, args.mode)


def measure_with_empty_caches(bench: Bench, mode: str) -> None:
    """Run each measuring process with kernel caches of its own, empty at its start; `cold` then once more with them."""
    for number in range(bench.repeats):
        caches = {name: str(bench.folder / f"cache{number}" / name.lower()) for name in CACHE_VARIABLES}
        if mode != "cold":
            bench.measure(mode, process=number, env=caches)
            continue
        bench.measure(mode, process=number, env=caches, prefix="empty caches: ")
        bench.measure(mode, process=number, env=caches, prefix="full caches: ")
