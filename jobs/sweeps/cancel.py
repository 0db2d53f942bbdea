"""`seedsweep cancel DIR [--variant V] [--seed S]`: let a running sweep, or part of it, end with a checkpoint."""

from __future__ import annotations

import argparse

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `cancel`."""
    parser.add_argument("out", metavar="DIR", help="run directory (or URI) of a sweep")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument("--variant", metavar="V", help="this variant only")


def execute(args: argparse.Namespace) -> int:
    """Leave the request where the driver looks for it; settle the state where there is no driver."""
    from runner.folder.directory import SweepDirectory
    from runner.folder.storage import open_storage
    from runner.view.status import check_variant, look, why_not_written

    picture = look(args.out)
    seeds = sorted({run.key.seed for run in picture.runs})
    if args.seed is not None and args.seed not in seeds:
        raise ValueError(f"--seed {args.seed} is not a seed of {args.out}; it has {', '.join(map(str, seeds))}")
    check_variant(args.variant, list(dict.fromkeys(run.key.variant_name for run in picture.runs)), args.out)
    if not picture.is_driven:
        print(f"{args.out}: nothing runs ({picture.driver})")
        return EXIT_OK
    try:
        SweepDirectory(open_storage(args.out)).ask_cancel(args.seed, args.variant or "")
    except OSError as error:
        raise ValueError(
            f"{args.out}: no request can be left here ({why_not_written(error)}); cancel from where the folder is "
            f"writable, or end the driver with SIGTERM ({picture.driver})"
        ) from None
    parts = [f"variant {args.variant}"] if args.variant else []
    parts += [f"seed {args.seed}"] if args.seed is not None else []
    what = " ".join(parts) or "the sweep"
    print(f"{args.out}: {what} will stop within seconds ({picture.driver}); run the same command again to continue")
    return EXIT_OK
