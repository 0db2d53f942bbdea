"""One measuring process: python -m jobs.bench.child REQUEST.json OUTCOME.json, started by jobs/bench/process.py.

A task is named "module:function". It gets the request and a `Probe`, into which it puts samples, facts about the
machine, and notes. Mistakes of the user (ValueError, OSError) are handed back as one line; anything else ends the
process with its traceback.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.bench.figures import Probe


def main(asked: str, left: str) -> int:
    """Do the task that the request names and write the outcome."""
    request: dict[str, Any] = json.loads(Path(asked).read_text())
    module, _, name = str(request["task"]).partition(":")
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
