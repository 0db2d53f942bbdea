"""`seedsweep published [list | show N]`: the figures other people published, recomputed from their logs."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    parser.add_argument("number", nargs="?", metavar="N", help="pull request number (show), or 'baseline'")
    parser.add_argument("--records", type=Path, help="another file of the form published-figures/1")
    parser.add_argument("--format", choices=("text", "markdown", "json", "csv"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the list or one record."""
    from results.compare.published_text import render_list, render_record
    from results.published.records import find_record, load_published

    if args.action == "show":
        if args.number is None:
            raise ValueError("published show needs a pull request number, such as: published show 1536")
        print(render_record(find_record(args.number, args.records), args.format))
    else:
        print(render_list(load_published(args.records)["records"], args.format))
    return EXIT_OK
