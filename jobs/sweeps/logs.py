"""`seedsweep logs DIR [--variant V] --seed S`: what a rank printed."""

from __future__ import annotations

import argparse

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `logs`."""
    parser.add_argument("out", metavar="DIR", help="run directory (or URI) of a sweep")
    parser.add_argument("--variant", metavar="V", help="which variant, in a sweep that has several")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--attempt", type=int, help="default: the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="go on while the sweep is driven")


def execute(args: argparse.Namespace) -> int:
    """Print the log."""
    from runner.view.status import read_log

    for text in read_log(
        args.out,
        variant=args.variant,
        seed=args.seed,
        repeat=args.repeat,
        rank=args.rank,
        attempt=args.attempt,
        follow=args.follow,
    ):
        print(text, end="", flush=True)
    return EXIT_OK
