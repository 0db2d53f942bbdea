"""Gangs of two GPUs on real Ray that live far longer than they may be silent: python -m tests.gpu_gangs OUT.

One sweep of one seed after another, each with limits.stall_s of ten seconds and a training of --seconds, then
quantization, evaluation and adaptation. Every gang must end at attempt 1, with no stacks written and no rank dead.
Prints one JSON line a gang and a last one over all; exit code 1 if anything was not so. Needs no network and no git:
the corpus is made of installed docstrings. The defaults take about nine minutes on two H100s.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from runner.spec.read import parse_spec
from runner.spec.sweep import SweepSpec
from runner.sweep import run_sweep
from runner.work import Options
from tests.gpu_kit import BUILTIN_VOCAB_SIZE, data_section, make_builtin_corpus, read_fates


def make_spec(args: argparse.Namespace, seed: int) -> SweepSpec:
    """Return the sweep of one gang."""
    return parse_spec(
        {
            "name": "gpu-gangs",
            "preset": args.preset,
            "seeds": [seed],
            "out": str(args.out / f"gang-{seed}"),
            "data": data_section(args.out / "corpus"),
            "overrides": {
                "model": {"vocab_size": BUILTIN_VOCAB_SIZE},
                "train": {"max_steps": 1_000_000, "budget_s": float(args.seconds), "reserve_s": 0.0},
                "evaluation": {"row_tokens": 8192},
                "runtime": {"device": "cuda", "checkpoint_every_s": 15.0, "report_every_s": 30.0},
            },
            "gang": {"gpus": args.gpus, "cpus": args.cpus},
            "limits": {"stall_s": args.stall_s, "attempts": 3, "backoff_s": 1.0},
        }
    )


def run_gang(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run one gang and return how it fared."""
    spec, begun = make_spec(args, seed), time.monotonic()
    code = run_sweep(spec, Options(progress="plain"))
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "exit_code": code,
        **read_fates(Path(spec.out))[seed],
    }


def is_well(gang: dict[str, Any]) -> bool:
    """Return whether a gang did all its work at once."""
    return (gang["state"], gang["attempts"], gang["stacks"], gang["deaths"]) == ("DONE", 1, [], [])


def main() -> int:
    """Run the gangs one after another, as many as the time allows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gangs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=80.0, help="of training, each gang")
    parser.add_argument("--stall_s", type=float, default=10.0)
    parser.add_argument("--gpus", type=int, default=2, help="of a gang")
    parser.add_argument("--cpus", type=int, default=4, help="of each rank")
    parser.add_argument("--preset", default="bench_500")
    parser.add_argument("--limit_s", type=float, default=570.0, help="begin no gang that would not end within this")
    args = parser.parse_args()
    if torch.cuda.device_count() < args.gpus:
        print(f"{args.gpus} GPUs are needed, {torch.cuda.device_count()} are here", file=sys.stderr)
        return 2
    begun = time.monotonic()
    if not make_builtin_corpus(args.out / "corpus"):
        return 2
    gangs: list[dict[str, Any]] = []
    for seed in range(args.gangs):
        longest = max((gang["seconds"] for gang in gangs), default=args.seconds + 40.0)
        if time.monotonic() - begun + longest > args.limit_s:
            break
        gangs.append(run_gang(args, seed))
        print(json.dumps(gangs[-1]), flush=True)
    well = sum(is_well(gang) for gang in gangs)
    total_s = round(time.monotonic() - begun, 1)
    summary = {
        "wanted": args.gangs,
        "run": len(gangs),
        "well": well,
        "seconds": total_s,
        "gpu": torch.cuda.get_device_name(),
    }
    print(json.dumps(summary), flush=True)
    return 0 if well == len(gangs) == args.gangs else 1


if __name__ == "__main__":
    sys.exit(main())
