"""`seedsweep rerun DIR --failed`: run what failed in an earlier sweep again, from what they left."""

from __future__ import annotations

import argparse

from jobs.sweeps.driving import add_driving_options, options_of
from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rerun`."""
    parser.add_argument("out", metavar="DIR", help="run directory (or URI) of a sweep")
    parser.add_argument("--failed", action="store_true", required=True, help="the runs that FAILED, of every variant")
    add_driving_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the failed seeds; the exit code says how that ended."""
    from runner.life.states import State
    from runner.sweep import announced_spec, run_sweep
    from runner.view.status import look

    picture = look(args.out)
    failed = frozenset(run.key for run in picture.runs if run.state is State.FAILED)
    if not failed:
        print(f"{args.out}: no run has failed")
        return EXIT_OK
    return run_sweep(announced_spec(args.out), options_of(args, only=failed))
