"""`seedsweep run SPEC`: every seed of a spec, on Ray or in this process; run again, it continues."""

from __future__ import annotations

import argparse
import logging
import sys

from jobs.sweeps.driving import add_driving_options, options_of


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `run`."""
    parser.add_argument("spec", metavar="SPEC", help="sweep spec, a YAML file (see jobs/specs)")
    parser.add_argument("--out", metavar="DIR", help="run directory or URI, instead of the spec's own")
    add_driving_options(parser)
    parser.add_argument("--git-commit", metavar="SHA", help="commit to record, where git is not at hand")
    parser.add_argument("--git-dirty", choices=("yes", "no"), help="whether that working tree had changes")


def execute(args: argparse.Namespace) -> int:
    """Run the sweep; the exit code says how it ended."""
    from runner.provenance import Git
    from runner.spec.read import load_spec
    from runner.spec.sweep import seeds_line
    from runner.sweep import run_sweep

    console = logging.StreamHandler()
    console.setLevel(logging.WARNING)  # progress is the view's to show
    logging.basicConfig(handlers=[console], format="%(levelname)s %(name)s: %(message)s")
    git = None
    if args.git_commit:
        git = Git(args.git_commit, None if args.git_dirty is None else args.git_dirty == "yes")
    options = options_of(args, git=git)
    spec = load_spec(args.spec, out=args.out)
    print(seeds_line(spec), file=sys.stderr if args.progress == "json" else sys.stdout, flush=True)
    return run_sweep(spec, options)
