"""The row of tests.gpu_speed on what a seed costs besides its training clock and TTT: two short seeds through Ray.

The second is the one that counts: its kernels are compiled and a process waits for it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jobs.bench.figures import Report
from jobs.bench.process import MeasurementFailed
from runner.machine.gpus import count_gpus
from tests.gpu_kit import data_section, last_words, read_events, search_path

if TYPE_CHECKING:
    from tests.gpu_speed import Session, Tree

SEEDS = (42, 0)
LOG = "process.log"  # what a measuring process says, in its folder


def measure_outside(session: Session, tree: Tree, report: Report, folder: Path, pinned: Mapping[str, str]) -> None:
    """Run two short seeds through Ray and add where the second one's time went."""
    spec, log = outside_spec(session.args, folder), folder / LOG
    (folder / "outside.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    command = ["-m", "seedsweep", "run", str(folder / "outside.yaml"), "--progress", "plain"]
    command += ["--git-commit", tree.commit, "--git-dirty", "no"] if tree.commit else []
    command += ["--local"] if session.args.local else []
    env = {**pinned, "PYTHONPATH": search_path(tree.root), "NCCL_NVLS_ENABLE": "0"}
    began = time.time()
    code = session.run(command, env, log, cwd=tree.root)
    if code:
        raise MeasurementFailed(f"seedsweep run ended with exit code {code}: {last_words(log)}")
    out = Path(spec["out"])
    events, seed = read_events(out), out / "seeds" / f"seed={SEEDS[1]}-repeat=0"
    train = json.loads((seed / "stages" / "train.json").read_text())["metrics"]
    for name, value in seconds_outside(events, SEEDS[1], train).items():
        report.add(name, "s", [value])
    first = seconds_outside(events, SEEDS[0], {"train_s": 0.0, "warmup_s": 0.0})
    report.add("first seed: start", "s", [first["start"]])
    report.add("whole command", "s", [time.time() - began])
    report.environment["code_hash"] = json.loads((seed / "run.json").read_text())["code_hash"]
    report.note(
        f"the second of two seeds, {session.args.steps} steps, {session.args.seed_documents} validation documents, "
        f"{'in one process' if session.args.local else 'through Ray'}, from its place to its end by events.jsonl"
    )


def outside_spec(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the spec of two short seeds."""
    is_cuda = count_gpus() > 0
    runtime = {"checkpoint_every_s": 0.0, **({"device": "cuda", "attention": args.attention} if is_cuda else {})}
    return {
        "name": "speed-outside", "preset": args.preset, "seeds": list(SEEDS), "out": str(folder / "run"),
        "data": data_section(args.corpus, val_documents=args.seed_documents),
        "overrides": {"train": {"max_steps": args.steps, "budget_s": None}, "runtime": runtime},
        "gang": {"gpus": 1, "cpus": args.cpus} if is_cuda else {"gpus": 0, "cpus": args.cpus},
        "limits": {"attempts": 1},
    }  # fmt: skip


def seconds_outside(events: Iterable[Mapping[str, Any]], seed: int, train: Mapping[str, Any]) -> dict[str, float]:
    """Return where a seed's time went besides its training clock and TTT, out of its sweep's events.

    train: the metrics of its training stage. The sum is from its place on the machine to its end, so that what a
    driver does for it meanwhile is in it.
    """
    at = {event["to"]: datetime.fromisoformat(event["time"]).timestamp() for event in events if event["seed"] == seed}
    stages = {
        "start": at["TRAIN"] - at["PLACED"],
        "train, outside the clock": at["QUANTIZE"] - at["TRAIN"] - train["train_s"],
        "quantize": at["EVALUATE"] - at["QUANTIZE"],
        "evaluate": at["TTT"] - at["EVALUATE"],
        "commit": at["DONE"] - at["COMMITTING"],
    }
    return {
        "outside the clock and TTT": sum(stages.values()), **stages, "warm-up": train["warmup_s"],
        "training clock": train["train_s"], "ttt": at["COMMITTING"] - at["TTT"],
    }  # fmt: skip
