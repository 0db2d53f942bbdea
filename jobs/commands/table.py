"""`seedsweep table OUT`: the seed table, computed from Parquet."""

from __future__ import annotations

import argparse
import sys

EXIT_OK, EXIT_FAILED = 0, 1


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", help="a sweep's run directory: local path or URI")
    parser.add_argument("--format", choices=("text", "markdown", "json", "csv"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the table. Returns 1 when a seed has not finished or a file could not be read, else 0."""
    from results.tables import render, seed_table

    table = seed_table(args.out)
    print(render(table, args.format))
    for problem in table.problems:
        print(f"seedsweep: {problem}", file=sys.stderr)
    if args.format in ("json", "csv"):
        for note in table.notes:
            print(f"seedsweep: note: {note}", file=sys.stderr)
    return EXIT_FAILED if table.has_failures else EXIT_OK
