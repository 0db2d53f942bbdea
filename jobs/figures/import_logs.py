"""`seedsweep import-logs FOLDER`: a submission folder into Parquet, with every disagreement listed."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, help="folder with submission.json, README.md and training logs")
    parser.add_argument("--out", type=Path, help="where results go (default: runs/imported/FOLDER's name)")
    parser.add_argument("--format", choices=("text", "markdown", "json", "csv"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Import and print the recomputed figures. Returns 1 when no log of some seed shows a final score, else 0."""
    from results.compare.published_text import record_json, render_record
    from results.findings.importer import import_submission, unscored_seeds

    out = args.out or Path("runs/imported") / args.folder.resolve().name
    submission, _ = import_submission(args.folder, out)
    if args.format == "json":
        content = {**record_json(submission.record), "notes": submission.notes, "out": str(out)}
        print(json.dumps(content, indent=2))
    else:
        print(render_record(submission.record, args.format))
    notes_to = sys.stdout if args.format in ("text", "markdown") else sys.stderr
    for note in submission.notes:
        print(f"note: {note}", file=notes_to)
    print(f"written to {out} (show it with: seedsweep table {out})", file=notes_to)
    return 1 if unscored_seeds(submission.record) else 0
