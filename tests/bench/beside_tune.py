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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from jobs.bench.figures import describe_environment
from runner.gang.rank import Rank
from tests import stub_work
from tests.house import ROOT

SEEDS = (42, 0, 1337)
GIVE_UP_S = 90.0  # for a request that nothing can fulfil
REPEATS = 3
QUIET = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}


def ours(out: Path, *, gpus: int = 0, restore: bool = False) -> list[str]:
    """Return the command of the sweep; it is the same the second time."""
    if gpus:  # the spec of the README on eight GPUs; it ends before any work
        spec = yaml.safe_load((ROOT / "jobs" / "specs" / "demo.yaml").read_text())
        spec |= {"gang": {"gpus": gpus}, "out": str(out / "run"), "overrides": {"train": {"batch_tokens": 8192}}}
        (out / "spec.yaml").write_text(json.dumps(spec))
        return ["-m", "jobs.cli", "run", str(out / "spec.yaml")]
    given = {"out": str(out), "gang": {"gpus": 0, "cpus": 1}, "target": "tests.bench.beside_tune:counted_work"}
    return ["-m", "tests.drive_sweep", json.dumps(given)]


def counted_work(rank: Rank) -> None:
    """Do the stub work of a rank, and leave a line of OUT/steps.txt for every step that is taken, as the other does."""
    report = rank.report

    def note(phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        with (Path(rank.job.out) / "steps.txt").open("a") as file:
            file.write(f"{rank.job.key.seed} {step}\n")
        report(phase, step, total, metrics)

    rank.report = note  # type: ignore[method-assign]
    stub_work.work(rank)


def tunes(out: Path, *, gpus: int = 0, restore: bool = False) -> list[str]:
    """Return the command of the experiment."""
    return ["-m", "tests.bench.tune_seeds", str(out), str(gpus), *(["restore"] if restore else [])]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a driver that writes into a log."""
    with log.open("ab") as file:
        return subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, env=os.environ | QUIET)


def finish(command: list[str], log: Path, within_s: float = 300.0) -> dict[str, Any]:
    """Run a driver to its end, or to the end of patience.

    Returns its exit code (None: it did not end), seconds, and the last line that it printed of its own.
    """
    begun, process = time.monotonic(), start(command, log)
    try:
        code: int | None = process.wait(within_s)
    except subprocess.TimeoutExpired:
        code = None
    result = {"exit_code": code, "seconds": round(time.monotonic() - begun, 2), "last_line": last_line(log)}
    if code is None:
        end_family(process, signal.SIGTERM)
    return result


def end_family(process: subprocess.Popen[bytes], number: int) -> float | None:
    """Send a signal to a driver alone; return the seconds until it and all that it had started are gone.

    None: something was still there after a minute; it is killed then.
    """
    family = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    process.send_signal(number)
    process.wait(60)
    _, alive = psutil.wait_procs(family, timeout=60)
    for member in alive:
        member.kill()
    return None if alive else round(time.monotonic() - begun, 2)


def count_steps(out: Path) -> list[int]:
    """Return how many steps each seed has taken, in the order of SEEDS."""
    path = out / "steps.txt"
    lines = path.read_text().splitlines() if path.exists() else []
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
    command: Callable[..., list[str]], out: Path, *, restore: bool, after_s: float
) -> dict[str, Any]:  # fmt: skip
    """Kill the driver some seconds after two seeds are done and one hangs, then give the command again."""
    hang(out, True)
    process = start(command(out), out / "log.txt")
    deadline = time.monotonic() + 180
    while count_steps(out) != [6, 20, 20]:
        assert time.monotonic() < deadline, (out / "log.txt").read_text()[-2000:]
        time.sleep(0.2)
    time.sleep(after_s)
    gone_s = end_family(process, signal.SIGKILL)
    hang(out, False)
    again = finish(command(out, restore=restore), out / "log.txt")
    return {"all_gone_s": gone_s, "again": again, "steps_taken": count_steps(out)}


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
            "tune_seeds.py": code_lines(ROOT / "tests/bench/tune_seeds.py"),
            "demo.yaml": code_lines(ROOT / "jobs/specs/demo.yaml"),
        }
    }
    for name, command in {"seedsweep": ours, "tune": tunes}.items():
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
        print(name, side["infeasible"], flush=True)
        for restore, after_s in ((False, 2.0), (True, 2.0), (True, 30.0)) if name == "tune" else ((False, 2.0),):
            key = f"killed after {after_s:g} s" + ", restore" * restore
            out = folder / f"{name}-{restore}-{after_s:g}"
            out.mkdir()
            side[key] = kill_and_go_on(command, out, restore=restore, after_s=after_s)
            print(name, key, side[key], flush=True)
        figures[name] = side
    return figures


def last_line(log: Path) -> str:
    """Return the last line with words in a driver's log, without this machine's folders."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if any(c.isalpha() for c in line)]
    return lines[-1].replace(str(log.parent), "OUT").replace(str(ROOT), ".")[:200] if lines else ""


def main() -> int:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside_tune")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures, .json")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(prefix="seedsweep-tune-") as name:
        figures = measure(Path(name))
    command = "python -m tests.bench.beside_tune --out docs/bench/beside_tune.json"
    report = {"command": command, "environment": describe_environment(), **figures}
    text = json.dumps(report, indent=1, default=str)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
