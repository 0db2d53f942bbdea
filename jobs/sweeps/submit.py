"""`seedsweep submit SPEC --address URL`: run a sweep on a cluster as a Ray job."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `submit`."""
    parser.add_argument("spec", metavar="SPEC", help="sweep spec, a YAML file inside the working directory")
    parser.add_argument("--address", metavar="URL", required=True, help="the cluster's job server, http://host:8265")
    parser.add_argument(
        "--out", metavar="DIR", help="run directory or URI as the cluster sees it, instead of the spec's"
    )
    parser.add_argument("--working-dir", metavar="DIR", type=Path, default=Path(), help="what travels (default: here)")
    parser.add_argument("--follow", action="store_true", help="print the job's output and end when it ends")
    parser.add_argument(
        "--allow-code-change", action="store_true", help="continue under other code or surroundings; rows are marked"
    )
    parser.add_argument("--verbose", action="store_true", help="show what Ray says while it packs")


def execute(args: argparse.Namespace) -> int:
    """Submit; with --follow the exit code is the sweep's."""
    from jobs.sweeps.ray_job import connect, follow, make_submission, submit
    from runner.spec.read import load_spec

    spec = load_spec(args.spec, out=args.out)
    arguments = [
        *(["--out", args.out] if args.out else []),
        *(["--allow-code-change"] if args.allow_code_change else []),
    ]
    submission = make_submission(spec, Path(args.spec), working_dir=args.working_dir.resolve(), run_arguments=arguments)
    for link in submission.left_links:
        print(f"left at home: {link}, a link to another folder", flush=True)
    client = connect(args.address, is_verbose=args.verbose)
    job_id = submit(client, submission)
    print(f"{job_id}: {submission.entrypoint}")
    print(f"follow: ray job logs {job_id} --follow --address {args.address}; stop: ray job stop {job_id}", flush=True)
    return follow(client, job_id) if args.follow else 0
