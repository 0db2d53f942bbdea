"""`seedsweep export DIR`: a submission folder, every figure rendered from the rows."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", metavar="DIR", help="a sweep's run directory: local path or URI")
    parser.add_argument("--variant", metavar="V", help="which variant, of a sweep that has several")
    parser.add_argument("--author", required=True, help="who submits")
    parser.add_argument("--github-id", required=True, help="the submitter's GitHub account")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument(
        "--against", default="pr:1493", help="what the README's delta is taken to: pr:N (default pr:1493), a directory"
    )


def execute(args: argparse.Namespace) -> int:
    """Write the folder. Returns 1 when some launched seed is not in it, else 0."""
    from results.export.evidence import write_sums
    from results.export.folder import Author, export_submission

    author = Author(args.author, args.github_id)
    notes = export_submission(args.out, args.output, author, against=args.against, variant=args.variant)
    write_sums(args.output)
    for path in sorted(args.output.iterdir()):
        print(path)
    for note in notes:
        print(f"note: {note}")
    return 1 if any("is not in the mean: FAILED" in note for note in notes) else 0
