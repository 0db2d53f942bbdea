"""What run.json says of a run: its first attempt, the later ones, and which difference between two counts.

Whatever moves the last bits of a score is named here beside the code: the kind of device, versions of libraries,
threads and instruction set of a CPU, the attention kernel. Another node of the same kind makes no difference.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from model.config import ATTENTION_BACKENDS
from model.files.checkpoint import write_json
from model.files.plain import read_json
from model.pipeline.run import Run

RUN_FILE = "run.json"
LATER = "later_attempts"


def latest_attempt(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return code and surroundings of the newest attempt that run.json lists.

    Raises ValueError where they cannot be read.
    """
    later = content.get(LATER, [])
    if not isinstance(later, list) or not all(isinstance(attempt, dict) for attempt in later):
        raise ValueError(f"{LATER} is no list of attempts")
    newest = {**content, **(later[-1] if later else {})}
    if not isinstance(newest.get("versions", {}), dict):
        raise ValueError("versions is no table")
    if newest.get("attention") not in (None, *ATTENTION_BACKENDS):
        raise ValueError(f"attention={newest['attention']!r} is no attention kernel")
    return newest


def changes_since(before: Mapping[str, Any], run: Run) -> list[str]:
    """Return in words what moves bits and is not as in the newest attempt before; what that did not note is as now."""
    now: dict[str, Any] = {**run.surroundings, "code_hash": run.hashes["code_hash"]}
    if run.config.runtime.attention != "auto":
        now["attention"] = run.config.runtime.attention
    changed = [
        name
        for name in ("code_hash", "device", "attention", "num_threads", "cpu_capability")
        if before.get(name) is not None and now.get(name) is not None and before[name] != now[name]
    ]
    if now["device"] != "cpu":  # nothing that a GPU's run computes is shared out among threads of the CPU
        changed = [name for name in changed if name not in ("num_threads", "cpu_capability")]
    words = {
        "code_hash": "other code (code_hash {}, now {})",
        "device": "another device ({}, now {})",
        "attention": "another attention kernel ({}, now {})",
        "num_threads": "another number of threads ({}, now {})",
        "cpu_capability": "another instruction set ({}, now {})",
    }
    shown = {name: (str(before[name]), str(now[name])) for name in changed}
    if "code_hash" in shown:
        shown["code_hash"] = (before["code_hash"][:12], now["code_hash"][:12])
    lines = [words[name].format(*values) for name, values in shown.items()]
    versions: Mapping[str, str] = before.get("versions", {})
    return lines + [
        f"another {name} ({versions[name] or 'missing'}, now {version or 'missing'})"
        for name, version in now["versions"].items()
        if name in versions and versions[name] != version
    ]


def list_attempt(run: Run) -> None:
    """Add this attempt to the later ones in run.json, once."""
    if not run.is_listed:
        run.is_listed = True
        attempt = {"started_at": time.time(), "code_hash": run.hashes["code_hash"], **run.surroundings}
        content = read_json(run.workdir / RUN_FILE)
        write_run(run, {**content, LATER: [*content.get(LATER, []), attempt]})


def note_attention(run: Run, name: str) -> None:
    """Write into run.json with which kernel this run trains, so that a later attempt goes on with it."""
    content = read_json(run.workdir / RUN_FILE)
    if content.get("attention") != name:
        write_run(run, {**content, "attention": name})


def write_run(run: Run, content: Mapping[str, Any]) -> None:
    """Replace run.json."""
    path = run.workdir / RUN_FILE
    write_json(path, content)
    run.on_write(path)
