"""Our exported program as anybody's, on GPUs through Ray: python -m tests.gpu_program OUT [--steps 60].

Runs the pipeline over two seeds on gangs of one GPU, exports its program (`bundle`), runs that program over the same
seeds, both at once where there are two GPUs, and holds the rows against the pipeline's. Prints one JSON line a seed and
a last one over all; exit code 1 unless every score is equal to the last bit. Needs no network and
no git: the corpus is made of installed docstrings.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

import results
from jobs.cli import main as command_line
from runner.spec.read import parse_spec
from runner.sweep import run_sweep
from runner.work import Options
from tests.gpu_kit import BUILTIN_VOCAB_SIZE, data_section, make_builtin_corpus

SEEDS = (42, 0)
STAGES = ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt")
FIGURES = [f"{stage}_{figure}" for stage in STAGES for figure in ("nats", "tokens", "bytes", "bpb")]


def run_pipeline(args: argparse.Namespace, corpus: Path, out: Path) -> int:
    """Run our own pipeline over the seeds."""
    runtime = {"device": "cuda", "attention": args.attention} if args.gpus else {"device": "cpu"}
    spec = {
        "name": "gpu-pipeline", "preset": args.preset, "seeds": list(SEEDS), "out": str(out),
        "data": data_section(corpus, val_documents=args.documents),
        "overrides": {
            "model": {"vocab_size": BUILTIN_VOCAB_SIZE}, "train": {"max_steps": args.steps, "budget_s": None},
            "evaluation": {"row_tokens": 8192}, "runtime": runtime,
        },
        "gang": {"gpus": args.gpus, "cpus": args.cpus},
    }  # fmt: skip
    return run_sweep(parse_spec(spec), Options(progress="plain"))


def run_program(args: argparse.Namespace, corpus: Path, folder: Path, out: Path) -> int:
    """Run the exported program over the same seeds."""
    train, val, tokenizer = data = list(data_section(corpus).values())
    spec = {
        "name": "gpu-program", "seeds": list(SEEDS), "out": str(out), "gang": {"gpus": args.gpus, "cpus": args.cpus},
        "program": {
            "folder": str(folder), "inputs": data, "outputs": {"model": "model.ssq"},
            "command": [
                "python", "train_gpt.py", "--train", train, "--val", val, "--tokenizer", tokenizer, "--seed", "{seed}",
                "--out", "{out}", "--json", "{out}/results.json",
            ],
        },
    }  # fmt: skip
    return run_sweep(parse_spec(spec), Options(progress="plain"))


def hold_together(pipeline: Path, program: Path, seed: int) -> dict[str, Any]:
    """Return what differs between the two rows of a seed, and what a person wants to see beside it."""
    ours, theirs = (row_of(out, seed) for out in (pipeline, program))
    unequal = {
        name: (ours[name], theirs[name])
        for name in (*FIGURES, "steps", "val_documents_hash")
        if ours[name] != theirs[name] and not (is_nan(ours[name]) and is_nan(theirs[name]))
    }
    curve = results.steps(program)
    return {
        "seed": seed, "unequal": {name: [str(value) for value in pair] for name, pair in unequal.items()},
        "post_ttt_bpb": theirs["post_ttt_bpb"], "train_s": [ours["train_s"], theirs["train_s"]],
        "gpu": theirs["gpu_model"], "attempts": [int(ours["attempt"]), int(theirs["attempt"])],
        "started": str(theirs["started_at"]), "ended": str(theirs["ended_at"]),
        "clock_samples": int(curve.loc[curve["seed"] == seed, "gpu_clock_mhz"].notna().sum()),
        "findings": json.loads(theirs["provenance_json"])["findings"],
    }  # fmt: skip


def row_of(out: Path, seed: int) -> Any:
    """Return the finished row of a seed."""
    frame = results.load(out)
    return frame[(frame["seed"] == seed) & (frame["state"] == "DONE")].iloc[-1]


def is_nan(value: object) -> bool:
    """Return whether a figure was not measured."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def main() -> int:
    """Run pipeline and program and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--documents", type=int, default=400, help="of the validation text")
    parser.add_argument("--cpus", type=int, default=4, help="of each gang")
    parser.add_argument("--preset", default="bench_500")
    parser.add_argument("--attention", default="triton", help="one kernel for both: a stopwatch may choose another")
    parser.add_argument("--gpus", type=int, default=1, help="of each gang; 0 tries this script on a CPU, with tiny")
    args = parser.parse_args()
    if args.gpus and not torch.cuda.is_available():
        print("a GPU is needed", file=sys.stderr)
        return 2
    begun, out = time.monotonic(), args.out.absolute()
    corpus, pipeline, folder, program = (out / name for name in ("corpus", "pipeline", "bundle", "program"))
    if not make_builtin_corpus(corpus):
        return 2
    codes = [run_pipeline(args, corpus, pipeline)]
    if not folder.exists():
        codes.append(command_line(["bundle", str(pipeline), "-o", str(folder)]))
    codes.append(run_program(args, corpus, folder, program))
    if any(codes):
        print(json.dumps({"exit_codes": codes}), flush=True)
        return 1
    found = [hold_together(pipeline, program, seed) for seed in SEEDS]
    for line in found:
        print(json.dumps(line, default=str), flush=True)
    at_once = max(line["started"] for line in found) < min(line["ended"] for line in found)
    equal = not any(line["unequal"] for line in found)
    summary = {
        "equal": equal, "at_once": at_once, "gpus": torch.cuda.device_count(),
        "seconds": round(time.monotonic() - begun, 1),
    }  # fmt: skip
    print(json.dumps(summary), flush=True)
    return 0 if equal and (at_once or torch.cuda.device_count() < 2 * args.gpus) else 1


if __name__ == "__main__":
    sys.exit(main())
