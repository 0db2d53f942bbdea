"""`python -m tests.fuzz`: load thousands of damaged files; each must be refused in one line, or load right."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.drive import GUIDED, LOADERS, THIRD_PARTY, THIRD_PARTY_FILES, Outcome, fuzz_guided, fuzz_loader

MAX_SHOWN = 10


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--loader", choices=(*LOADERS, "all"), default="all", help="which loader (default all)")
    parser.add_argument(
        "--count", type=int, default=10_000,
        help=f"files of each loader (default 10000; at most {THIRD_PARTY_FILES} of {' and '.join(THIRD_PARTY)}, whose "
        "parsers are not ours)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the same seed damages files in the same ways (default 0)")
    parser.add_argument(
        "--guided", action="store_true", help="let atheris look for new branches (needs atheris; our own parsers only)"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files that caused faults here")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and end a mistake with one line and exit code 2."""
    try:
        return fuzz(build_parser().parse_args(argv))
    except ValueError as error:
        print(f"python -m tests.fuzz: error: {error}", file=sys.stderr)
        return 2


def fuzz(args: argparse.Namespace) -> int:
    """Fuzz and print a line a loader; 1 when a file crashed, hung, took too much memory or was not refused cleanly."""
    if args.count < 1:
        raise ValueError(f"--count {args.count} must be at least 1")
    names: tuple[str, ...] = LOADERS if args.loader == "all" else (args.loader,)
    if args.guided:
        names = tuple(name for name in names if name in GUIDED)
        if not names:
            raise ValueError(f"--guided is for {', '.join(GUIDED)}, not for {args.loader}")
    outcomes, started = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="seedsweep-fuzz-") as folder:
        for name in names:
            count = min(args.count, THIRD_PARTY_FILES) if name in THIRD_PARTY else args.count
            if args.guided:
                outcomes.append(fuzz_guided(name, Path(folder), seed=args.seed, count=count))
            else:
                outcomes.append(fuzz_loader(name, Path(folder), seed=args.seed, count=count, report=show_progress))
            if args.format == "text":
                print(render(outcomes[-1]), flush=True)
            if args.keep is not None and not args.guided:
                keep_files(name, outcomes[-1], args.keep)
    num_faults = sum(len(outcome.faults) for outcome in outcomes)
    seconds = time.monotonic() - started
    if args.format == "json":
        content = {"seed": args.seed, "seconds": round(seconds, 1), "loaders": [o.as_json() for o in outcomes]}
        print(json.dumps(content, indent=1))
    else:
        num_files = sum(outcome.num_files for outcome in outcomes)
        print(f"seed {args.seed}: {num_files:,} files in {seconds:.0f} s, {num_faults} faults")
    return int(num_faults > 0)


def show_progress(outcome: Outcome) -> None:
    """Say on stderr how far a loader is."""
    print(f"{outcome.loader}: {outcome.num_files} files, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)


def render(outcome: Outcome) -> str:
    """Return one loader's outcome as text."""
    plain = outcome.as_json()
    # a guided run does not count what became of its files
    counts = f"{plain['refused']:>6} refused  {plain['loaded']:>6} loaded right  " if outcome.num_refused else ""
    lines = [
        f"{plain['loader']:<11} {plain['files']:>6} files  {counts}{len(outcome.faults):>3} faults  "
        f"{plain['seconds']:>7} s"
    ]
    for seed, reason in list(outcome.faults.items())[:MAX_SHOWN]:
        lines.append(f"  fault, file seed {seed}: {reason}")
    if len(outcome.faults) > MAX_SHOWN:
        lines.append(f"  and {len(outcome.faults) - MAX_SHOWN} more")
    return "\n".join(lines)


def keep_files(loader: str, outcome: Outcome, folder: Path) -> None:
    """Write every file that caused a fault as LOADER-SEED with its own ending."""
    if not outcome.faults:
        return
    import random

    from tests.fuzz.cases import make_case

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="seedsweep-fuzz-") as scratch:
        case = make_case(loader, Path(scratch))
        for seed in outcome.faults:
            path, content = case.mutated(random.Random(seed))
            (folder / f"{loader}-{seed}{path.suffix}").write_bytes(content)


if __name__ == "__main__":
    sys.exit(main())
