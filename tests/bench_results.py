"""Speed of the results package on a large store: `python -m tests.bench_results [RUNS] [DOCUMENTS]`.

Writes a sweep of RUNS runs (1,000 of 50,000 documents by default, about 1.3 GB) and one of a tenth into a temporary
folder, times each command in a process of its own, prints seconds and peak memory, and removes the folder. Seconds
are those of the command; with Python's start and the import of pandas or matplotlib they stand in brackets.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from results.store import commit_attempt
from tests.fake_runs import fake_documents, fake_run, fake_stages, fake_steps, fake_sweep

TARGETS = {"seed table": 1.0, "paired documents, two runs": 2.0, "report of 10 runs": 15.0}
MEMORY_TARGET_MB = 1000
CHILD = """
import resource, sys, time
import pandas, pyarrow.dataset, pyarrow.parquet, scipy.stats
if sys.argv[1] == "report":
    import matplotlib.figure, matplotlib.backends.backend_agg, matplotlib.backends.backend_svg
from jobs.cli import main
began = time.perf_counter()
code = main(sys.argv[1:])
seconds = time.perf_counter() - began
print(code, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
"""


def main(num_runs: int = 1000, num_documents: int = 50_000) -> None:
    """Write the store, time the commands, print one line each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        write_sweep(folder / "a", num_runs, num_documents)
        write_sweep(folder / "b", max(2, num_runs // 10), num_documents)
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        print(
            f"wrote {num_runs} + {max(2, num_runs // 10)} runs of {num_documents:,} documents: {size / 1e6:.0f} MB "
            f"in {time.perf_counter() - began:.0f} s"
        )
        ten = fake_sweep(folder / "ten", tuple(range(10)))
        a, b = str(folder / "a"), str(folder / "b")
        measure("seed table", "table", a)
        measure("paired documents, two runs", "compare", a, b, "--paired", "documents", "--seeds", "1")
        measure("Welch, all runs", "compare", a, b)
        measure("paired documents, shared runs", "compare", a, b, "--paired", "documents")
        measure("report of 10 runs", "report", str(ten), "-o", str(folder / "report.html"))
    print(f"peak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


def write_sweep(out: Path, num_runs: int, num_documents: int) -> None:
    """Commit runs that differ in their scores by a factor, documents included."""
    documents = fake_documents(num_documents)
    for seed in range(num_runs):
        factor = 1 + 1e-4 * (seed % 7) + (5e-5 if out.name == "b" else 0)
        scaled = {name: values * factor if name.startswith("nats") else values for name, values in documents.items()}
        commit_attempt(out, run=fake_run(seed), stages=fake_stages(seed), steps=fake_steps(10), documents=scaled)


def measure(label: str, *arguments: str) -> None:
    """Run one command in a fresh process and print its seconds and peak memory."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True)
    whole = time.perf_counter() - began
    code, seconds, megabytes = done.stderr.splitlines()[-1].split()
    target = f" (target {TARGETS[label]:g} s)" if label in TARGETS else ""
    memory = f"{float(megabytes):.0f} MB (target {MEMORY_TARGET_MB})"
    print(f"{label}: {float(seconds):.2f} s{target} [{whole:.2f} s], {memory}, exit {code}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
