"""`seedsweep report DIR... -o report.html`: one self-contained page of tables and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("outs", metavar="DIR", nargs="+", help="run directories: local paths or URIs")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (default report.html)")
    parser.add_argument("--with", dest="beside", metavar="pr:N,...", help="published records in a block of their own")


def execute(args: argparse.Namespace) -> int:
    """Write the page and its figure files, and print where they are."""
    from results.published.records import find_record
    from results.report.page import write_report

    records = [find_record(number.strip()) for number in args.beside.split(",")] if args.beside else []
    for path in write_report(args.outs, args.output, records=records):
        print(path)
    return EXIT_OK
