"""`seedsweep table OUT`: the seed table, computed from Parquet."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from runner.errors import EXIT_FAILED, EXIT_OK

if TYPE_CHECKING:
    from results.compare.variants import Ablation
    from results.tables import SeedTable


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", help="a sweep's run directory: local path or URI")
    parser.add_argument("--with", dest="beside", metavar="pr:N,...", help="published records to print in blocks below")
    parser.add_argument("--population-std", action="store_true", help="also show the std with ddof=0, labelled")
    parser.add_argument("--format", choices=("text", "markdown", "json", "csv"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the table. Returns 1 when a seed has not finished or a file could not be read, else 0."""
    from results.compare.variants import read_table

    records = _published(args.beside)
    table = read_table(args.out)
    print(_written(table, records, args))
    if args.format != "json":
        _print_blocks(records, args.out, args.format)
    for problem in table.problems:
        print(f"seedsweep: {problem}", file=sys.stderr)
    if args.format in ("json", "csv"):
        for note in table.notes:
            print(f"seedsweep: note: {note}", file=sys.stderr)
    return EXIT_FAILED if table.has_failures else EXIT_OK


def _written(table: Ablation | SeedTable, records: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Return the table, or the tables and differences of several variants, in the form that was asked for."""
    from results.compare import variants_text
    from results.compare.variants import Ablation
    from results.table_text import as_json, render

    with_std = args.population_std
    if isinstance(table, Ablation):
        if args.format == "json":
            return _json(variants_text.as_json(table, with_population_std=with_std), records, args.out)
        return variants_text.render(table, args.format, with_population_std=with_std)
    if args.format == "json":
        return _json(as_json(table, with_population_std=with_std), records, args.out)
    return render(table, args.format, with_population_std=with_std)


def _published(beside: str | None) -> list[dict[str, Any]]:
    """Return the records named by --with."""
    if beside is None:
        return []
    from results.published.records import find_record

    return [find_record(number.strip()) for number in beside.split(",")]


def _print_blocks(records: list[dict[str, Any]], out: str, form: str) -> None:
    """Print each record in a block of its own; in CSV, where blocks have no place, to standard error."""
    if not records:
        return
    from results.compare.published_text import published_block
    from results.compare.sides import text_of_runs

    ours = text_of_runs(out)
    for record in records:
        block = published_block(record, ours)
        if form == "markdown":
            block = f"```\n{block}\n```"
        print(f"\n{block}", file=sys.stderr if form == "csv" else sys.stdout)


def _json(content: dict[str, Any], records: list[dict[str, Any]], out: str) -> str:
    """Return the table's content as JSON, with the key `published` when records were asked for."""
    import json

    from results.compare.published_text import block_json
    from results.compare.sides import text_of_runs

    if records:
        ours = text_of_runs(out)
        content["published"] = [block_json(record, ours) for record in records]
    return json.dumps(content, indent=2, allow_nan=False)
