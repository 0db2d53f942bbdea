"""What the scripts tests/gpu_*.py share: corpora, what became of a sweep's runs, speeds, processes and archives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench.figures import spread
from jobs.cli import main as command_line

ROOT = Path(__file__).parent.parent
BUILTIN_VOCAB_SIZE = 1024  # of the corpus made of docstrings
LAST_LINES = 12  # of a process that failed
STOP_S = 6.0  # from asking processes to end to killing them


def make_builtin_corpus(folder: Path) -> bool:
    """Make the corpus of installed docstrings, unless it is there; return whether it is."""
    return command_line(["data", "builtin", "--out", str(folder), "--reuse"]) == 0


def data_section(folder: Path, **more: Any) -> dict[str, Any]:
    """Return the data section of a spec for a folder of shards and one tokenizer.

    Raises ValueError, naming what the folder lacks.
    """
    for split in ("train", "val"):
        if not list(folder.glob(f"*_{split}_*.bin")):
            raise ValueError(f"{folder} has no *_{split}_*.bin; name a folder with shards and their tokenizer")
    tokenizers = sorted(folder.glob("*.model"))
    if len(tokenizers) != 1:
        raise ValueError(f"{folder} has {len(tokenizers)} tokenizers (*.model); one is needed beside the shards")
    shards = {split: f"{folder}/*_{split}_*.bin" for split in ("train", "val")}
    return {**shards, "tokenizer": str(tokenizers[0]), **more}


def read_events(out: Path) -> list[dict[str, Any]]:
    """Return every transition of a sweep, the oldest first."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def read_fates(out: Path) -> dict[int, dict[str, Any]]:
    """Return by seed how its run ended, after how many attempts, what failed, and what its ranks left behind."""
    events, fates = read_events(out), {}
    for run in json.loads((out / "state.json").read_text())["runs"]:
        folder = out / "seeds" / f"seed={run['seed']}-repeat=0"
        fates[run["seed"]] = {
            "state": run["state"],
            "attempts": run["attempt"],
            "failures": [line["why"] for line in events if line["seed"] == run["seed"] and line.get("failure")],
            "stacks": sorted(path.name for path in folder.rglob("*.stacks.txt")),
            "deaths": sorted(path.name for path in folder.rglob("*.end.json")),
        }
    return fates


def describe_samples(values: Sequence[float] | np.ndarray) -> dict[str, Any] | None:
    """Return median, p10, p90 and number of some samples, None where there is none."""
    if not len(values):
        return None
    return {**spread(float(value) for value in values)._asdict(), "samples": len(values)}


def rates_by_loop(steps: Any, *, skip: int = 0) -> dict[str, dict[str, Any] | None]:
    """Return the train tokens/s of a step table without and with loops ("plain", "looped"), its first steps left out.

    steps: the columns tokens_per_s and is_looped, from steps.npz or the `steps` rows of one seed in their order.
    """
    rates, is_looped = (np.asarray(steps[name])[skip:] for name in ("tokens_per_s", "is_looped"))
    looped = is_looped.astype(bool)
    return {"plain": describe_samples(rates[~looped]), "looped": describe_samples(rates[looped])}


def start_process(command: Sequence[str], log: Path, *, cwd: Path = ROOT, **env: str) -> subprocess.Popen[bytes]:
    """Start Python with these arguments in a process group of its own; what it prints goes to log."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=cwd, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def list_gpus() -> list[str]:
    """Return the names (numbers or UUIDs) of the GPUs that this process may use, in order.

    Where the environment names some, they are the only ones: another program may be at work on the others.
    """
    from runner.machine.gpus import VISIBLE, count_gpus

    visible, count = os.environ.get(VISIBLE), count_gpus()
    named = [str(number) for number in range(count)] if visible is None else visible.split(",")
    return [name.strip() for name in named][:count]


def search_path(*folders: Path) -> str:
    """Return a PYTHONPATH in which these folders come before whatever the present one names."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def last_words(log: Path) -> str:
    """Return the last lines that a process printed besides its progress."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    lines = [line for line in lines if not line.startswith("[")]
    return " | ".join(line.strip() for line in lines[-LAST_LINES:])[-1500:]


def end_processes(processes: Iterable[subprocess.Popen[bytes]], stop_s: float = STOP_S) -> None:
    """Ask the groups of processes that still run to end, and kill those that have not after stop_s seconds.

    Each must lead a group of its own, as start_process makes it.
    """
    living = [process for process in processes if process.poll() is None]
    for process in living:
        os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + stop_s
    for process in living:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_archive(target: Path, paths: Iterable[tuple[Path, str]], work: Path) -> None:
    """Replace an .tar.xz archive by one of the paths that exist, each under a name; target is always whole.

    work: a folder on this machine's own disk, for the archive while it grows.
    """
    partial = work / target.name
    with tarfile.open(partial, "w:xz", preset=1) as archive:
        for path, name in paths:
            if path.exists():
                archive.add(path, arcname=name)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.part")
    temporary.write_bytes(partial.read_bytes())
    os.replace(temporary, target)
