"""What a seed costs besides its own work: `python -m tests.bench.overhead [--out FILE.json] [--seeds N]`.

First how long a seed takes from its place on a node to its first training step, the first on a node and later ones,
with processes that wait for it and without. Then a sweep of many seeds of no work at all on two slots: how many a
second, what the driver keeps in memory, how fast its events grow. Everything goes through Ray, with real gangs.
docs/performance.md is written from the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.bench.figures import describe_environment
from runner.gang.rank import Rank
from tests.house import ROOT

NUM_SEEDS = 1000
NUM_STARTS = 6
STAMPS = "stamps.json"
DRIVER = "driver.json"
SAMPLE_EVERY_S = 5.0
TELL_EVERY_S = 10.0
GIVE_UP_S = 4 * 3600.0
IMPORTS = ("runner.gang.worker",)  # what a process that waits for a rank of timed_pipeline imports


def timed_pipeline(rank: Rank) -> None:
    """Run the pipeline of a seed and leave in its folder when it came how far."""
    stamps = {"process made": psutil.Process().create_time(), "rank called": time.time()}
    is_ahead = "torch" in sys.modules
    from runner.gang.rank import import_ahead
    from runner.gang.worker import run_pipeline

    import_ahead("runner.gang.worker:run_pipeline")
    stamps["all imported"] = time.time()
    report = rank.report

    def note(phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        name = "first step" if (phase, step) == ("train", 1) else phase
        if name in ("check", "prepare", "train", "first step"):
            stamps.setdefault(name, time.time())
        report(phase, step, total, metrics)

    rank.report = note  # type: ignore[method-assign]
    run_pipeline(rank)
    (Path(rank.job.workdir) / STAMPS).write_text(json.dumps({"had torch": is_ahead, **stamps}))


def trivial_work(rank: Rank) -> None:
    """Leave the records of four stages that took no time."""
    from runner.folder.storage import LocalStorage
    from tests.stub_work import STAGES, leave_record

    storage = LocalStorage(Path(rank.job.workdir))
    for stage in STAGES:
        rank.report(stage, 1, 1, {"loss": 1.0})
        leave_record(rank, stage, 1.0, [], storage)
    cpu_s = time.process_time()
    (Path(rank.job.workdir) / STAMPS).write_text(json.dumps({"cpu_s": cpu_s, "had torch": "torch" in sys.modules}))


def drive(given: Mapping[str, Any]) -> int:
    """Be the driver of a sweep; leaves in its folder what this process took."""
    from runner import sweep
    from runner.gang.ray_start import LOOPBACK_VARIABLE, prepare_environment
    from runner.spec.read import parse_spec
    from runner.work import Options

    os.environ[LOOPBACK_VARIABLE] = "0"
    prepare_environment()
    from runner.gang import ray_backend, ray_rank

    ray_backend.usable_cpus = lambda: int(given["slots"])
    if not given["waits"]:
        ray_rank.MAX_FAULTS = 0
    if given["target"].endswith("trivial_work"):
        sweep.data_hash = lambda _data, **_more: "d" * 64
        sweep.data_problems = lambda _data: []
    samples: list[tuple[float, float]] = []
    threading.Thread(target=sample_memory, args=(samples,), daemon=True).start()
    code = sweep.run_sweep(parse_spec(given["spec"]), Options(target=given["target"], progress="plain"))
    taken = {"peak_bytes": peak_bytes(), "cpu_s": time.process_time(), "memory": samples}
    (Path(given["spec"]["out"]) / DRIVER).write_text(json.dumps(taken))
    return code


def sample_memory(samples: list[tuple[float, float]]) -> None:
    """Note time and resident bytes of this process every few seconds."""
    process = psutil.Process()
    while True:
        samples.append((time.time(), process.memory_info().rss))
        time.sleep(SAMPLE_EVERY_S)


def peak_bytes() -> int:
    """Return the most that was ever resident of this process, as the system keeps it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def run_driver(spec: dict[str, Any], target: str, *, slots: int, waits: bool, limit_s: float = GIVE_UP_S) -> None:
    """Run a sweep in a process of its own and tell how far it is; end it after limit_s.

    Raises SystemExit if a seed fails.
    """
    given = json.dumps({"spec": spec, "target": f"tests.bench.overhead:{target}", "slots": slots, "waits": waits})
    out, begun = Path(spec["out"]), time.monotonic()
    log = out.with_name(f"{out.name}.log")
    with log.open("wb") as file:
        driver = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.overhead", "--drive", given], cwd=ROOT, stdout=file, stderr=file
        )
    while driver.poll() is None and time.monotonic() - begun < limit_s:
        try:
            driver.wait(TELL_EVERY_S)
        except subprocess.TimeoutExpired:
            done = sum(event["to"] == "DONE" for event in read_events(out))
            say(f"{target}: {done} of {len(spec['seeds'])} seeds after {time.monotonic() - begun:.0f} s")
    wanted = 0
    if driver.poll() is None:
        driver.terminate()
        wanted = 3  # interrupted, and resumable
    if driver.wait(120) != wanted:
        raise SystemExit(f"the driver ended with {driver.returncode}: {log.read_text(errors='replace')[-2000:]}")


def say(words: str) -> None:
    """Say how far the benchmark is: over one line of a terminal, a line each in a log."""
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"{words:<79}", end=end, file=sys.stderr, flush=True)


def read_events(out: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a sweep's events so far, with the bytes of each."""
    path = out / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = [{**json.loads(line), "bytes": len(line)} for line in lines if line.endswith(b"\n")]
    return [{**event, "at": datetime.fromisoformat(event["time"]).timestamp()} for event in found]


def stamps_of(out: Path, seed: int) -> dict[str, Any]:
    """Return what a rank left of itself."""
    return dict(json.loads((out / "seeds" / f"seed={seed}-repeat=0" / STAMPS).read_text()))


def measure_starts(folder: Path, num_seeds: int, *, waits: bool) -> dict[str, Any]:
    """Return for each seed the seconds from its place to its first step, and where they went; one gang at a time."""
    from tests.small_run import SPEC, write_data

    out = folder / f"starts-{waits}"
    (folder / f"data-{waits}").mkdir()
    spec = {**yaml.safe_load(SPEC), "data": write_data(folder / f"data-{waits}"), "out": str(out)}
    run_driver({**spec, "seeds": list(range(num_seeds))}, "timed_pipeline", slots=1, waits=waits)
    placed = {event["seed"]: event["at"] for event in read_events(out) if event["to"] == "PLACED"}
    seeds = []
    for seed in sorted(placed, key=lambda seed: placed[seed]):
        stamps = stamps_of(out, seed)
        since = {name: round(at - placed[seed], 2) for name, at in stamps.items() if name != "had torch"}
        seeds.append({"seed": seed, "had_torch": stamps["had torch"], "seconds_after_placed": since})
    later = [seed["seconds_after_placed"]["first step"] for seed in seeds[1:]]
    return {
        "first_s": seeds[0]["seconds_after_placed"]["first step"],
        "later_s": later,
        "later_median_s": statistics.median(later),
        "seeds": seeds,
    }


def measure_trivial(folder: Path, num_seeds: int, limit_s: float) -> dict[str, Any]:
    """Return what a sweep of seeds without work takes, on two slots; the seeds are those done within limit_s."""
    out = folder / "trivial"
    spec = {
        "name": "trivial", "preset": "tiny", "seeds": list(range(num_seeds)), "out": str(out), "gang": {"cpus": 1},
        "data": {"train": "none_train_*.bin", "val": "none_val_*.bin", "tokenizer": "none.model"},
    }  # fmt: skip
    begun, load = time.time(), os.getloadavg()
    run_driver(spec, "trivial_work", slots=2, waits=True, limit_s=limit_s)
    events = read_events(out)
    num_asked, num_seeds = num_seeds, sum(event["to"] == "DONE" for event in events)
    driver = json.loads((out / DRIVER).read_text())
    done = [event["at"] for event in events if event["to"] == "DONE"]
    first = min(event["at"] for event in events if event["to"] == "PLACED")
    stamps = [stamps_of(out, event["seed"]) for event in events if event["to"] == "DONE"]
    parts = sorted({num_seeds // 4, num_seeds // 2, num_seeds})
    return {
        "seeds_asked_for": num_asked,
        "seeds": num_seeds,
        "seconds": round(done[-1] - first, 1),
        "seeds_per_s": round(num_seeds / (done[-1] - first), 3),
        "seconds_with_start_of_ray": round(done[-1] - begun, 1),
        "seeds_per_s_of_quarters": [
            round((high - low) / (done[high - 1] - (done[low - 1] if low else first)), 3)
            for low, high in zip([0, *quarters(num_seeds)], quarters(num_seeds))
        ],
        "attempts": Counter(event["attempt"] for event in events if event["to"] == "DONE"),
        "had_torch": sum(stamp["had torch"] for stamp in stamps),
        "rank_cpu_s_median": round(statistics.median(stamp["cpu_s"] for stamp in stamps), 2),
        "driver_cpu_s": round(driver["cpu_s"], 1),
        "driver_peak_mb": round(driver["peak_bytes"] / 1e6, 1),
        "driver_mb_after_seeds": {str(part): memory_at(driver["memory"], done[part - 1]) for part in parts},
        "events_after_seeds": {str(part): count_events(events, done[part - 1]) for part in parts},
        "load_average_before": load,
        "load_average_after": os.getloadavg(),
    }


def quarters(num_seeds: int) -> list[int]:
    """Return the numbers of seeds at which the quarters of a sweep end."""
    return [num_seeds * quarter // 4 for quarter in range(1, 5)]


def memory_at(samples: Sequence[Sequence[float]], at: float) -> float:
    """Return the driver's megabytes in the last sample before a time."""
    return round([size for when, size in samples if when <= at][-1] / 1e6, 1)


def count_events(events: Sequence[Mapping[str, Any]], at: float) -> dict[str, int]:
    """Return how many lines the events had at a time, and how many bytes; those before the first place left out."""
    found = [event for event in events if event["at"] <= at and event["to"] != "QUEUED"]
    return {"lines": len(found), "bytes": sum(event["bytes"] for event in found)}


def measure(num_seeds: int, num_starts: int, limit_s: float) -> dict[str, Any]:
    """Return all figures."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-overhead-") as name:
        folder = Path(name)
        load = os.getloadavg()
        starts = {
            words: measure_starts(folder, num_starts, waits=waits)
            for words, waits in (("without", False), ("with", True))
        }
        return {"load_average": load, "starts": starts, "trivial": measure_trivial(folder, num_seeds, limit_s)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.overhead", description=__doc__)
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, metavar="N", help=f"without work ({NUM_SEEDS})")
    parser.add_argument(
        "--starts", type=int, default=NUM_STARTS, metavar="N", help=f"whose start is timed ({NUM_STARTS})"
    )
    parser.add_argument("--limit_s", type=float, default=GIVE_UP_S, metavar="S", help="end the seeds without work then")
    parser.add_argument("--note", default="", help="what else the machine does; goes into the figures")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures, .json")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.drive:
        return drive(json.loads(args.drive))
    if args.seeds < 4 or args.starts < 2:
        parser.error(f"--seeds {args.seeds} must be at least 4, --starts {args.starts} at least 2")
    command = " ".join(["python -m tests.bench.overhead", *(sys.argv[1:] if argv is None else argv)])
    figures = {
        "command": command,
        "note": args.note,
        "environment": describe_environment(),
        **measure(args.seeds, args.starts, args.limit_s),
    }
    text = json.dumps(figures, indent=1, default=str)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
