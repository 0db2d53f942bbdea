"""`seedsweep program init FOLDER`: a spec for somebody else's program, to be checked by a person."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser(
        "init", help="read a submission folder and write the spec that runs its program over its seeds"
    )
    init.add_argument("folder", type=Path, help="folder with the program, its README.md, submission.json and logs")
    init.add_argument("-o", "--output", type=Path, required=True, metavar="SPEC.yaml", help="the spec to write")
    init.add_argument("--force", action="store_true", help="write over a file that is there")


def execute(args: argparse.Namespace) -> int:
    """Write the spec and list what a person has to look at. Returns 1 where it cannot run without an addition."""
    from model.files.atomic import replace_file
    from results.findings.submitted_program import read_program
    from runner.spec.draft import draft_spec

    draft = draft_spec(read_program(args.folder), folder=str(args.folder))
    try:
        with replace_file(args.output) if args.force else args.output.open("xb") as file:
            file.write(draft.text.encode())
    except FileExistsError:
        problem = f"{args.output} is already there; choose another name, or --force to write over it"
        raise ValueError(problem) from None
    for remark in draft.remarks:
        print(remark)
    print(f"written to {args.output}; {len(draft.remarks)} lines to look at; then: seedsweep plan {args.output}")
    return 0 if draft.is_complete else 1
