"""Scale, by simulation: `python -m tests.bench_runner` prints how the runner does with a thousand seeds, no GPU."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from runner import sweep as sweep_module
from runner.simulate import fill_directory, measure_decisions
from runner.spec import Gang
from runner.status import look
from runner.sweep import Options, run_sweep
from tests.stub_work import TARGET
from tests.sweep_tools import make_spec

WANTED = "wanted"


def show(name: str, value: str, wanted: str) -> None:
    """Print one figure."""
    print(f"{name:<58} {value:>14}   {WANTED}: {wanted}", flush=True)


def decisions(folder: Path, num_seeds: int) -> None:
    """Print the figures of the decision loop."""
    spec = make_spec(folder, gang=Gang(gpus=8, cpus=4))
    figures = measure_decisions(spec, folder, num_seeds=num_seeds)
    what = f"{figures.runs} seeds on {figures.slots} slots"
    show(f"time of a decision, {what}", f"{figures.decision_ms:.3f} ms", "under 1 ms")
    show(f"memory of the loop, {what}", f"{figures.peak_bytes / 1e6:.1f} MB", "under 100 MB")
    half = measure_decisions(spec, folder, num_seeds=num_seeds // 2)
    show(
        "memory with all seeds over memory with half of them",
        f"{figures.peak_bytes / half.peak_bytes:.2f}",
        "about 2: linear",
    )
    show("idle slots beyond the last wave", f"{100 * figures.idle_frac:.2f} %", "under 2 %")


def large_directory(folder: Path, num_seeds: int) -> None:
    """Print how long a look at a large sweep takes."""
    from results.tables import render, seed_table

    fill_directory(make_spec(folder, seeds=list(range(num_seeds))), folder)
    begun = time.perf_counter()
    look(str(folder))
    show(f"status of {num_seeds} finished seeds", f"{time.perf_counter() - begun:.2f} s", "under 2 s")
    begun = time.perf_counter()
    render(seed_table(folder), "text")
    show(f"table of {num_seeds} finished seeds", f"{time.perf_counter() - begun:.2f} s", "under 2 s")


def overhead(folder: Path) -> None:
    """Print what Ray adds to one tiny seed."""
    sweep_module.data_hash = lambda _data, **_more: "d" * 64
    seconds = {}
    for name, is_local in (("local", True), ("ray", False)):
        begun = time.perf_counter()
        assert run_sweep(make_spec(folder / name, seeds=[1]), Options(is_local=is_local, target=TARGET)) == 0
        seconds[name] = time.perf_counter() - begun
    show("Ray's share of one tiny seed", f"{seconds['ray'] - seconds['local']:.1f} s", "1 % of a 600 s seed + 15 s")


def main() -> int:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--no-ray", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        decisions(Path(name) / "decisions", args.seeds)
        large_directory(Path(name) / "large", args.seeds)
        if not args.no_ray:
            overhead(Path(name) / "overhead")
    return 0


if __name__ == "__main__":
    sys.exit(main())
