"""`seedsweep status DIR`: where every run stands, from the run directory alone."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from runner.errors import EXIT_OK

if TYPE_CHECKING:
    from runner.view.status import Picture


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
             "error": run.failure.one_line if run.failure else None, **spent}
            for row, age, run, spent in zip(picture.rows, picture.ages, picture.runs, spent_of(picture))
        ]  # fmt: skip
        head = {
            "sweep": picture.sweep,
            "driver": picture.driver,
            "is_driven": picture.is_driven,
            "eta_s": picture.eta_s,
            **({"price_per_gpu_hour": picture.price} if picture.price is not None else {}),
            **({"devices": picture.devices} if picture.devices else {}),
        }
        print(json.dumps({**head, "counts": picture.counts, "runs": runs}, indent=1))
        return EXIT_OK
    print_text(args.out, picture)
    return EXIT_OK


def spent_of(picture: Picture) -> list[dict[str, float]]:
    """Return gpu_hours, and cost where the spec names a price, of each run; {} in a sweep without GPUs."""
    if not picture.gpu_hours:
        return [{} for _ in picture.runs]
    price = picture.price
    return [{"gpu_hours": hours, **({} if price is None else {"cost": hours * price})} for hours in picture.gpu_hours]


def print_text(out: str, picture: Picture) -> None:
    """Print the picture as a table with a line above and below it."""
    from results.render import text_table
    from runner.view.progress import duration, tabulate

    print(f"{picture.sweep}: {out}; {picture.driver}")
    header, body = tabulate(picture.rows)
    spent = spent_of(picture)
    words = {"gpu_hours": ("GPU-hours", 3), "cost": ("cost", 2)}
    names = [name for name in words if spent and name in spent[0]]

    def show(values: dict[str, float]) -> list[str]:
        return [f"{values[name]:.{words[name][1]}f}" for name in names]

    rows = [
        (*line[:-1], duration(age.state_s), duration(age.progress_s), *show(each), line[-1])
        for line, age, each in zip(body, picture.ages, spent)
    ]
    print(text_table((*header[:-1], "in state", "last step", *(words[name][0] for name in names), header[-1]), rows))
    counts = ", ".join(f"{count} {state}" for state, count in picture.counts.items())
    sums = {name: sum(each[name] for each in spent) for name in names}
    totals = [f"{words[name][0]} in all {value}" for name, value in zip(names, show(sums))]
    eta = [f"all done in about {duration(picture.eta_s)}"] if picture.eta_s else []
    print("; ".join([counts, *eta, *totals]))
    if picture.devices:
        print(f"note: {picture.devices}")
