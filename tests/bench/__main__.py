"""`python -m tests.bench MODE`: what tests us and no user's run: the loop, a laptop, large stores."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.bench.command import DEFAULT_REPEATS, show_report, timed
from jobs.bench.figures import Report, check_out, describe_environment
from jobs.bench.process import Bench, MeasurementFailed
from tests.bench.laptop import bench_laptop
from tests.bench.results import bench_results
from tests.bench.sweep import bench_ablation, bench_sweep

MODES = {
    "sweep": "the decision loop with many seeds, status and table, Ray's overhead",
    "laptop": "imports, opening shards, counting bytes, GPTQ of the preset tiny",
    "results": "table, comparisons and report over a large store",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="modes:\n" + "\n".join(f"  {name:8} {text}" for name, text in MODES.items()),
    )
    parser.add_argument("mode", choices=MODES, metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="seeds, or runs (default 1000)")
    parser.add_argument("--variants", type=int, default=0, metavar="V", help="sweep: so many variants, the loop only")
    parser.add_argument("--documents", type=int, default=50_000, metavar="K", help="results: of a run (default 50000)")
    parser.add_argument("--corpus", action="store_true", help="laptop: time the builtin corpus as well (up to 45 s)")
    parser.add_argument("--repeats", type=int, default=DEFAULT_REPEATS, metavar="N",
                        help=f"measuring processes (default {DEFAULT_REPEATS})")  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every raw sample too, .json or .parquet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write; 1 when a measuring process died, 2 for a mistake."""
    args = build_parser().parse_args(argv)
    try:
        check_out(args.out)
        command = shlex.join(["python", "-m", "tests.bench", *(sys.argv[1:] if argv is None else argv)])
        report = Report(args.mode, {"command": command, "repeats": args.repeats}, describe_environment())
        with timed(report), tempfile.TemporaryDirectory(prefix="seedsweep-bench-") as folder:
            measure(Bench(report, Path(folder), args.repeats, {"folder": folder, "preset": "tiny"}), args)
    except MeasurementFailed as error:
        print(f"python -m tests.bench: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"python -m tests.bench: error: {error}", file=sys.stderr)
        return 2
    show_report(report, args.format, args.out)
    return 0


def measure(bench: Bench, args: argparse.Namespace) -> None:
    """Take the samples of one mode."""
    if args.mode == "laptop":
        bench_laptop(bench, with_corpus=args.corpus)
    elif args.mode == "sweep" and args.variants:
        bench_ablation(bench, num_seeds=args.runs, num_variants=args.variants)
    elif args.mode == "sweep":
        bench_sweep(bench, num_seeds=args.runs)
    else:
        bench_results(bench, num_runs=args.runs, num_documents=args.documents)


if __name__ == "__main__":
    sys.exit(main())
