"""One measuring process: python -m jobs.bench_child REQUEST.json OUTCOME.json, started by jobs/bench_process.py.

A task gets the request and a `Probe`, into which it puts samples, facts about the machine, and notes. Mistakes of the
user (ValueError, OSError) are handed back as one line; anything else ends the process with its traceback.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench_figures import Probe

# task -> the module and function that measures it
TASKS: dict[str, tuple[str, str]] = {
    "train": ("jobs.bench_train", "measure_train"),
    "cold": ("jobs.bench_train", "measure_cold"),
    "gptq": ("jobs.bench_stages", "measure_gptq"),
    "eval": ("jobs.bench_stages", "measure_eval"),
    "ttt": ("jobs.bench_stages", "measure_ttt"),
    "laptop": ("jobs.bench_laptop", "measure_laptop"),
    "decisions": ("jobs.bench_sweep", "measure_loop"),
    "finished": ("jobs.bench_sweep", "make_finished"),
    "corpus": ("jobs.bench_sweep", "make_corpus"),
    "store": ("jobs.bench_results", "write_store"),
    "command": ("jobs.bench_results", "measure_command"),
}


def main(asked: str, left: str) -> int:
    """Do the task that the request names and write the outcome."""
    request: dict[str, Any] = json.loads(Path(asked).read_text())
    module, name = TASKS[request["task"]]
    probe = Probe(str(request.get("label", request["task"])))
    outcome: dict[str, Any]
    try:
        task: Callable[[dict[str, Any], Probe], None] = getattr(importlib.import_module(module), name)
        task(request, probe)
        outcome = {"figures": probe.figures, "facts": probe.facts, "notes": probe.notes}
    except (ValueError, OSError) as error:
        outcome = {"error": str(error)}
    if probe.is_main:
        aside = Path(f"{left}.aside")
        aside.write_text(json.dumps(outcome))
        aside.replace(left)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
