"""Ray Tune and seedsweep do the same three seeds: `python -m tests.bench.beside_tune [--out FILE.json]`.

The work of a seed is 0.4 s of sleeping (tests/stub_work.py and tests/bench/tune_seeds.py), so that the rest is what
each of them costs. Then a request that no node can fulfil, a driver that is killed while one seed hangs, and the same
command again. docs/why.md is written from the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.figures import environment
from tests.house import ROOT
from tests.stub_work import NUM_STEPS

SEEDS = (42, 0, 1337)
GIVE_UP_S = 90.0  # for a request that nothing can fulfil
REPEATS = 3
QUIET = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}


def ours(out: Path, *, gpus: int = 0, restore: bool = False) -> list[str]:
    """Return the command of the sweep; it is the same the second time."""
    return ["-m", "tests.drive_sweep", json.dumps({"out": str(out), "gang": {"gpus": gpus, "cpus": 1}})]


def tunes(out: Path, *, gpus: int = 0, restore: bool = False) -> list[str]:
    """Return the command of the experiment."""
    return ["-m", "tests.bench.tune_seeds", str(out), str(gpus), *(["restore"] if restore else [])]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a driver that writes into a log."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, env=os.environ | QUIET)


def finish(command: list[str], log: Path, within_s: float = 300.0) -> dict[str, Any]:
    """Run a driver to its end, or to the end of patience; return its exit code (None: it did not end) and seconds."""
    begun, process = time.monotonic(), start(command, log)
    try:
        code: int | None = process.wait(within_s)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - begun
    if code is None:
        end_family(process, signal.SIGTERM)
    return {"exit_code": code, "seconds": round(seconds, 2)}


def end_family(process: subprocess.Popen[bytes], number: int) -> float:
    """Send a signal to a driver alone and return the seconds until it and all that it had started are gone."""
    family = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    process.send_signal(number)
    process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    for member in alive:
        member.kill()
    return round(time.monotonic() - begun, 2) if not alive else float("inf")


def steps_of_ours(out: Path) -> list[int]:
    """Return how many training steps each seed has taken, in the order of SEEDS."""
    logs = [list(out.glob(f"seeds/seed={seed}-*/logs/*-rank=0.log")) for seed in SEEDS]
    texts = ["".join(path.read_text() for path in paths) for paths in logs]
    return [sum(f"{stage} step=" in line for line in text.splitlines() for stage in NUM_STEPS) for text in texts]


def steps_of_tune(out: Path) -> list[int]:
    """Return the same of the experiment."""
    lines = (out / "steps.txt").read_text().splitlines()
    return [sum(line.startswith(f"{seed} ") for line in lines) for seed in SEEDS]


def hang(out: Path, is_wanted: bool) -> None:
    """Make seed 42 hang at step 6, in both of them, or no longer."""
    if is_wanted:
        (out / "WAIT").touch()
        fault = {"seed": 42, "attempt": 1, "stage": "train", "step": 6, "do": "wait", "seconds": 600}
        (out / "faults.json").write_text(json.dumps([fault]))
    else:
        (out / "WAIT").unlink()
        (out / "faults.json").unlink()


def kill_and_go_on(
    command: Callable[..., list[str]], count: Callable[[Path], list[int]], out: Path, *, restore: bool
) -> dict[str, Any]:
    """Kill the driver when two seeds are done and one hangs, then give the command again."""
    hang(out, True)
    process = start(command(out), out / "log.txt")
    deadline = time.monotonic() + 180
    while (not (out / "steps.txt").exists() and not (out / "seeds").exists()) or count(out) != [6, 20, 20]:
        assert time.monotonic() < deadline, (out / "log.txt").read_text()[-2000:]
        time.sleep(0.2)
    time.sleep(2.0)
    gone_s = end_family(process, signal.SIGKILL)
    hang(out, False)
    again = finish(command(out, restore=restore), out / "log.txt")
    return {"all_gone_s": gone_s, "again": again, "steps_taken": count(out)}


def code_lines(path: Path) -> int:
    """Return the lines of a file that are neither empty nor comments nor docstrings."""
    import ast

    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in text.splitlines())
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return len(ast.unparse(tree).splitlines())


def measure(folder: Path) -> dict[str, Any]:
    """Return all figures."""
    figures: dict[str, Any] = {
        "lines": {
            "tune_seeds.py without its work": code_lines(ROOT / "tests/bench/tune_seeds.py"),
            "demo.yaml": code_lines(ROOT / "jobs/specs/demo.yaml"),
        }
    }
    sides = {"seedsweep": (ours, steps_of_ours), "tune": (tunes, steps_of_tune)}
    for name, (command, count) in sides.items():
        side: dict[str, Any] = {"whole": []}
        for number in range(REPEATS):
            out = folder / f"{name}-whole-{number}"
            out.mkdir()
            side["whole"].append(finish(command(out), out / "log.txt"))
            print(name, side["whole"][-1], flush=True)
        side["whole_median_s"] = statistics.median(item["seconds"] for item in side["whole"])
        out = folder / f"{name}-infeasible"
        out.mkdir()
        side["infeasible"] = finish(command(out, gpus=8), out / "log.txt", GIVE_UP_S)
        side["infeasible"]["last_line"] = last_line(out / "log.txt", folder)
        print(name, side["infeasible"], flush=True)
        for restore in (False, True)[: 1 + (name == "tune")]:
            out = folder / f"{name}-killed-{restore}"
            out.mkdir()
            key = "killed, restore" if restore else "killed"
            side[key] = kill_and_go_on(command, count, out, restore=restore)
            print(name, key, side[key], flush=True)
        figures[name] = side
    return figures


def last_line(log: Path, folder: Path) -> str:
    """Return the last line with words that a driver printed, without this machine's folders."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if any(c.isalpha() for c in line)]
    return lines[-1].replace(str(folder), "OUT")[:400] if lines else ""


def main() -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside_tune")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures, .json")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="seedsweep-tune-") as name:
        figures = measure(Path(name))
    command = "python -m tests.bench.beside_tune --out docs/bench/beside_tune.json"
    report = {"command": command, "environment": environment(), **figures}
    text = json.dumps(report, indent=1, default=str)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
