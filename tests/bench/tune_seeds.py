"""Three seeds with Ray Tune, as a careful user writes it: `python -m tests.bench.tune_seeds OUT GPUS [restore]`.

The work is that of tests/stub_work.py: twenty steps of 20 ms and a checkpoint after every fourth. WAIT in OUT makes
seed 42 hang at step 6. Every step that is taken is a line of OUT/steps.txt.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Checkpoint, FailureConfig, RunConfig, Tuner


def train(config: dict[str, Any]) -> None:
    """Take the steps of one seed, from its last checkpoint where it has one."""
    out, step, value = Path(config["out"]), 0, float(config["seed"])
    checkpoint = tune.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            step, value = json.loads(Path(folder, "step.json").read_text())
    while step < 20:
        if config["seed"] == 42 and step == 6 and (out / "WAIT").exists():
            time.sleep(600)
        time.sleep(0.02)
        step, value = step + 1, value * 0.75 + 1.0 / (step + 2)
        with (out / "steps.txt").open("a") as file:
            file.write(f"{config['seed']} {step}\n")
        if step % 4:
            tune.report({"bpb": value})
            continue
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "step.json").write_text(json.dumps([step, value]))
            tune.report({"bpb": value}, checkpoint=Checkpoint.from_directory(folder))


def main(out: Path, gpus: int, *, may_restore: bool) -> int:
    """Run or restore the experiment; 1 if a seed failed."""
    ray.init(address="local", _node_ip_address="127.0.0.1", log_to_driver=False)
    trainable = tune.with_resources(train, {"cpu": 1, "gpu": gpus})
    if may_restore and Tuner.can_restore(out / "tune"):
        tuner = Tuner.restore(str(out / "tune"), trainable, resume_unfinished=True, restart_errored=True)
    else:
        tuner = Tuner(
            trainable,
            param_space={"seed": tune.grid_search([42, 0, 1337]), "out": str(out)},
            run_config=RunConfig(name="tune", storage_path=str(out), failure_config=FailureConfig(max_failures=2)),
        )
    results = tuner.fit()
    for result in results:
        print("result", result.config["seed"] if result.config else "", (result.metrics or {}).get("bpb"), result.error)
    return 1 if results.errors else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), may_restore="restore" in sys.argv[3:]))
