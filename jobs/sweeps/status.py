"""`seedsweep status DIR`: where every run stands, from the run directory alone."""

from __future__ import annotations

import argparse
import json


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `status`."""
    parser.add_argument("out", metavar="DIR", help="run directory (or URI) of a sweep")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the picture; 0 whatever it shows."""
    from runner.view.status import look

    picture = look(args.out)
    if args.format == "json":
        runs = [
            {**row._asdict(), "state_age_s": age.state_s, "progress_age_s": age.progress_s,
             "failures": run.failures, "preemptions": run.preemptions,
             "error": run.failure.one_line if run.failure else None}
            for row, age, run in zip(picture.rows, picture.ages, picture.runs)
        ]  # fmt: skip
        head = {
            "sweep": picture.sweep,
            "driver": picture.driver,
            "is_driven": picture.is_driven,
            "eta_s": picture.eta_s,
        }
        print(json.dumps({**head, "counts": picture.counts, "runs": runs}, indent=1))
        return 0
    print_text(args.out, picture)
    return 0


def print_text(out: str, picture: object) -> None:
    """Print the picture as a table with a line above and below it."""
    from results.render import text_table
    from runner.view.progress import duration, tabulate
    from runner.view.status import Picture

    assert isinstance(picture, Picture), picture
    print(f"{picture.sweep}: {out}; {picture.driver}")
    header, body = tabulate(picture.rows)
    rows = [
        (*line[:-1], duration(age.state_s), duration(age.progress_s), line[-1]) for line, age in zip(body, picture.ages)
    ]
    print(text_table((*header[:-1], "in state", "last step", header[-1]), rows))
    counts = ", ".join(f"{count} {state}" for state, count in picture.counts.items())
    print(counts + (f"; all done in about {duration(picture.eta_s)}" if picture.eta_s else ""))
