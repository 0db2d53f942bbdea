"""`seedsweep bench MODE`: how fast each part is here, with raw samples, percentiles and the machine they are from."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from runner.errors import EXIT_FAILED, EXIT_OK

if TYPE_CHECKING:
    from jobs.bench.figures import Report
    from jobs.bench.process import Bench

MODES = {
    "train": "optimizer steps with and without loops",
    "gptq": "Hessians, solve, compress, reload",
    "eval": "plain evaluation, first pass and later ones",
    "ttt": "test-time training: all documents cold, a sample, one step of full windows",
    "cold": "from a new process with empty kernel caches to its first step, and again with full ones",
}
# mode -> what measures it in a process of its own
TASKS = {
    "train": "jobs.bench.train:measure_train",
    "cold": "jobs.bench.train:measure_cold",
    "gptq": "jobs.bench.stages:measure_gptq",
    "eval": "jobs.bench.stages:measure_eval",
    "ttt": "jobs.bench.stages:measure_ttt",
}
DEFAULT_REPEATS = 3
# caches of compiled kernels that a cold start finds empty
CACHE_VARIABLES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    from model.config import ATTENTION_BACKENDS
    from model.presets import PRESETS

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
    parser.add_argument("--documents", type=int, metavar="K", help="ttt: in the sample (default 192)")
    parser.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, metavar="N",
                        help=f"measuring processes (default {DEFAULT_REPEATS})")  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every raw sample too, .json or .parquet")


def execute(args: argparse.Namespace) -> int:
    """Measure, print and write. Returns 1 when a measuring process died."""
    from jobs.bench.figures import Report, check_out, describe_environment
    from jobs.bench.process import Bench, MeasurementFailed

    for name in ("repeats", "ranks", "documents", "val_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    check_out(args.out)
    settings = {"command": shlex.join(["seedsweep", *sys.argv[1:]]), "repeats": args.repeats, "preset": args.preset}
    report = Report(args.mode, settings, describe_environment())
    try:
        with timed(report), tempfile.TemporaryDirectory(prefix="seedsweep-bench-") as folder:
            measure(Bench(report, Path(folder), args.repeats, child_options(args, folder)), args)
    except MeasurementFailed as error:
        print(f"seedsweep: bench {args.mode}: {error}", file=sys.stderr)
        return EXIT_FAILED
    show_report(report, args.format, args.out)
    return EXIT_OK


@contextmanager
def timed(report: Report) -> Iterator[None]:
    """Note how long the block took among the report's settings."""
    started = time.perf_counter()
    yield
    report.settings["took_s"] = round(time.perf_counter() - started, 1)


def show_report(report: Report, form: str, out: Path | None) -> None:
    """Print a report as text or JSON, and write it where that was asked for."""
    from jobs.bench.figures import write_report

    print(json.dumps(report.as_json(), indent=1) if form == "json" else report.as_text())
    if out is not None:
        write_report(report, out)
        print(f"wrote {out}", file=sys.stderr)


def child_options(args: argparse.Namespace, folder: str) -> dict[str, object]:
    """Return what every measuring process gets; paths hold from any current directory."""
    return {
        "folder": folder, "preset": args.preset, "train": args.train, "val": args.val, "tokenizer": args.tokenizer,
        "val_tokens": args.val_tokens, "weights": args.weights, "attention": args.attention,
        "documents": args.documents or 192,
    }  # fmt: skip


def measure(bench: Bench, args: argparse.Namespace) -> None:
    """Take the samples of one mode."""
    if args.mode != "train":
        measure_with_empty_caches(bench, args.mode)
        return
    for number in range(args.repeats):
        bench.measure(TASKS["train"], process=number, num_ranks=args.ranks)


def measure_with_empty_caches(bench: Bench, mode: str) -> None:
    """Run each measuring process with kernel caches of its own, empty at its start; `cold` then once more with them."""
    for number in range(bench.repeats):
        caches = {name: str(bench.folder / f"cache{number}" / name.lower()) for name in CACHE_VARIABLES}
        if mode != "cold":
            bench.measure(TASKS[mode], process=number, env=caches)
            continue
        bench.measure(TASKS[mode], process=number, env=caches, prefix="empty caches: ")
        bench.measure(TASKS[mode], process=number, env=caches, prefix="full caches: ")
