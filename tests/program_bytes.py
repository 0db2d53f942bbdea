"""What each room of the generated program costs: `python -m tests.program_bytes` measures it, in half a minute.

A room's counted bytes are those by which the packed program shrinks without it. Together they are fewer than the whole,
because rooms share words that a compressor writes once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from model.bundle.program import LOADER, ROOT, minify, pack_twin, read_modules, settings_of, tool_versions
from runner.spec.read import load_spec

DEMO = "jobs/specs/demo.yaml"
MEASURED = ROOT / "docs" / "bench" / "program_bytes.json"
KERNELS = "Triton kernels"  # of kernels/ and attention/: a CPU has no use for them


def room_of(module: str) -> str:
    """Return the row of a module: its room, or that of all Triton kernels."""
    room = module.split(".")[1]
    if "_triton" in module:
        return KERNELS
    return f"{room}/" if (ROOT / "model" / room).is_dir() else f"{room}.py"


def group_by_room(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return row -> its modules, sorted."""
    rooms: dict[str, list[str]] = {}
    for module in sorted(modules):
        rooms.setdefault(room_of(module), []).append(module)
    return rooms


def measure() -> dict[str, Any]:
    """Return the counted bytes of the demo's program, and for each room its modules, minified and counted bytes."""
    modules, settings = read_modules(ROOT), json.dumps(settings_of(load_spec(DEMO).config), sort_keys=True)
    loader = (ROOT / f"{LOADER.replace('.', '/')}.py").read_text(encoding="utf-8")
    whole = len(pack_twin(modules, loader, settings))
    rooms = {}
    for room, names in group_by_room(modules).items():
        rest = {name: text for name, text in modules.items() if name not in names}
        small = sum(len(minify(modules[name], name=name)) for name in names)
        counted = whole - len(pack_twin(rest, loader, settings))
        rooms[room] = {"modules": len(names), "minified_bytes": small, "counted_bytes": counted}
    return {"command": "python -m tests.program_bytes", "tools": tool_versions(), "spec": DEMO, "num_bytes": whole,
            "rooms": rooms}  # fmt: skip


def program_table() -> str:
    """Return the measured figures as a Markdown table, the largest room first."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    lines = ["| room | modules | minified bytes | counted bytes |", "|---|---:|---:|---:|"]
    for name, room in sorted(measured["rooms"].items(), key=lambda item: -item[1]["counted_bytes"]):
        shown = name if name == KERNELS else f"`{name}`"
        lines.append(f"| {shown} | {room['modules']} | {room['minified_bytes']:,} | {room['counted_bytes']:,} |")
    total = {key: sum(room[key] for room in measured["rooms"].values()) for key in ("modules", "minified_bytes")}
    lines.append(
        f"| all, with settings and loader | {total['modules']} | {total['minified_bytes']:,} | "
        f"{measured['num_bytes']:,} |"
    )
    return "\n".join([*lines, "", f"{measured['tools']}; `{measured['command']}`, then `python -m tests.docs`."])


if __name__ == "__main__":
    MEASURED.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    print(f"{MEASURED.relative_to(ROOT)}: now run python -m tests.docs")
    sys.exit(0)
