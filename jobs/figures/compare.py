"""`seedsweep compare A B`: is A better than B, by how much, and is that shown; or does A reproduce B."""

from __future__ import annotations

import argparse

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "a", metavar="A", help="run directory (DIR#V: variant V of it), pr:N, or a submission folder with logs"
    )
    parser.add_argument("b", metavar="B", help="what A is compared with, the baseline")
    parser.add_argument(
        "--margin-nats", type=float, help="test only this margin (nats per token) instead of 0 and 0.005"
    )
    parser.add_argument(
        "--paired",
        choices=("documents", "seeds", "none"),
        help="same artifacts on both sides, pair by this (default: seeds between variants of one sweep, else none)",
    )
    parser.add_argument("--equivalence-nats", type=float, metavar="BAND", help="also test equivalence within +-BAND")
    parser.add_argument("--seeds", help="only these seeds of both sides, such as 42,0,1337")
    parser.add_argument("--stage", help="compare this scoring pass instead of the last one")
    parser.add_argument(
        "--reproduces",
        action="store_true",
        help="A is a rerun of B: is its mean shown to be the same (exit 0), or not (1)",
    )
    parser.add_argument(
        "--margin", type=float, metavar="BPB", help="with --reproduces: what counts as the same (default 0.0005 bpb)"
    )
    parser.add_argument("--force", action="store_true", help="compare what is not comparable; every line is labelled")
    parser.add_argument("--format", choices=("text", "markdown", "json", "csv"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the comparison. Returns 0 whatever it shows; sides that do not compare are bad input (2).

    With --reproduces 0 stands for reproduced alone, 1 for not reproduced and for not decided.
    """
    from results.compare.comparison import compare
    from results.compare.sides import open_side
    from results.compare.text import render

    if args.reproduces:
        return _judge(args)
    if args.margin is not None:
        raise ValueError(f"--margin {args.margin:g} goes with --reproduces; the margin of a gain is --margin-nats")
    seeds = _seeds(args.seeds)
    result = compare(
        open_side(args.a, args.stage, seeds),
        open_side(args.b, args.stage, seeds),
        margin_nats=args.margin_nats,
        pairing=args.paired,
        band_nats=args.equivalence_nats,
        is_forced=args.force,
    )
    print(render(result, args.format))
    return EXIT_OK


def _judge(args: argparse.Namespace) -> int:
    """Print whether A reproduces B, on the pass that B was scored by."""
    from results.compare.sides import open_side
    from results.compare.verdict import MARGIN_BPB, REPRODUCED, judge
    from results.compare.verdict_text import render
    from results.schema import SCORES

    for name in ("margin_nats", "equivalence_nats"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} is not for --reproduces, whose margin is --margin, in bits per byte")
    seeds = _seeds(args.seeds)
    claimed = open_side(args.b, args.stage, seeds)
    rerun = open_side(args.a, claimed.stage if claimed.stage in SCORES else args.stage, seeds)
    margin = MARGIN_BPB if args.margin is None else args.margin
    result = judge(rerun, claimed, margin=margin, pairing=args.paired, is_forced=args.force)
    print(render(result, args.format))
    return 0 if result.words == REPRODUCED else 1


def _seeds(text: str | None) -> list[int] | None:
    """Return the seeds named by --seeds. Raises ValueError for anything but whole numbers."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.lstrip("-").isdigit() for word in words):
        raise ValueError(f"seeds={text} must be whole numbers separated by commas, such as 42,0,1337")
    return [int(word) for word in words]
