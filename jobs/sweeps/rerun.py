"""`seedsweep rerun DIR --failed`: run what failed in an earlier sweep again, from what they left."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rerun`."""
    parser.add_argument("out", metavar="DIR", help="run directory (or URI) of a sweep")
    parser.add_argument("--failed", action="store_true", required=True, help="the runs that FAILED, of every variant")
    parser.add_argument("--local", action="store_true", help="in this process, without Ray")
    parser.add_argument("--address", metavar="A", help="Ray cluster to use; without it one is started on this machine")
    parser.add_argument(
        "--allow-code-change", action="store_true", help="continue under other code or surroundings; rows are marked"
    )
    parser.add_argument("--progress", choices=("auto", "plain", "json"), default="auto")


def execute(args: argparse.Namespace) -> int:
    """Run the failed seeds; the exit code says how that ended."""
    from runner.life.states import State
    from runner.sweep import announced_spec, run_sweep
    from runner.view.status import look
    from runner.work import Options

    picture = look(args.out)
    failed = frozenset(run.key for run in picture.runs if run.state is State.FAILED)
    if not failed:
        print(f"{args.out}: no run has failed")
        return 0
    options = Options(
        is_local=args.local, address=args.address, allow_code_change=args.allow_code_change, progress=args.progress,
        only=failed,
    )  # fmt: skip
    return run_sweep(announced_spec(args.out), options)
