"""Renders the parts of the documentation that are made from code and data: `python -m tests.docs` rewrites them.

A made part stands between two comments of its page, so that a reader sees where it comes from and a test can compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.doc_figures import measured_tables, preset_table
from tests.house import HOUSE, PACKAGES, ROOT, Room
from tests.program_bytes import program_table

# what a package may import of the other three, and the heavy packages that it may import at all
OUTSIDE = {
    "jobs": ("runner, model, results", "torch only in `bench/*.py`, Ray only in `sweeps/ray_job.py`"),
    "runner": ("model, results", "torch only in `gang/worker.py`, Ray only in `gang/ray_*.py`"),
    "model": ("none", "torch, but not in `fields`, `report`, `config`, `presets`, `bundle`; never Ray"),
    "results": ("none", "neither torch nor Ray"),
}
BEGIN, END = "<!-- {name}: made by `python -m tests.docs` -->", "<!-- end of {name} -->"

RECIPE = ROOT / "docs" / "recipe.md"


def floor_of(rooms: dict[str, Room], name: str) -> int:
    """Return how high a room stands: 0 if it imports no other room of its package."""
    return max((1 + floor_of(rooms, other) for other in rooms[name].may_import), default=0)


def floors(package: str) -> list[list[str]]:
    """Return the rooms of a package floor by floor, the ground floor first."""
    rooms = HOUSE[package]
    heights = {name: floor_of(rooms, name) for name in rooms}
    return [[name for name in rooms if heights[name] == height] for height in range(max(heights.values()) + 1)]


def layer_table() -> str:
    """Return the table of the README: for each package its floors, and what it may import from outside."""
    lines = ["| package | rooms, floor by floor | may import | heavy packages |", "|---|---|---|---|"]
    for package in PACKAGES:
        stairs = " < ".join(" ".join(f"`{name}`" for name in floor) for floor in floors(package))
        ours, heavy = OUTSIDE[package]
        lines.append(f"| **{package}** | {stairs} | {ours} | {heavy} |")
    return "\n".join(lines)


def describe_targets(room: Room, above: list[str]) -> str:
    """Return what a room may import, in words where it is nearly everything above it."""
    missing = [name for name in above if name not in room.may_import]
    if len(above) < 3 or len(missing) > 1:
        return ", ".join(room.may_import) or "none"
    return f"all above but {missing[0]}" if missing else "all above"


def room_tables() -> str:
    """Return the tables of docs/architecture.md: every room with its sentence and the rooms that it may import."""
    parts = []
    for package in PACKAGES:
        lines = [f"### {package}/", "", "| room | what it holds | may import |", "|---|---|---|"]
        above: list[str] = []
        for name, room in HOUSE[package].items():
            shown = f"`{name}/`" if (ROOT / package / name).is_dir() else f"`{name}.py`"
            lines.append(f"| {shown} | {room.holds} | {describe_targets(room, above)} |")
            above.append(name)
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "layers": (ROOT / "README.md", layer_table),
    "rooms": (ROOT / "docs" / "architecture.md", room_tables),
    "program bytes": (ROOT / "docs" / "architecture.md", program_table),
    "preset frontier": (RECIPE, partial(preset_table, "frontier")),
    "preset bench_frontier": (RECIPE, partial(preset_table, "bench_frontier")),
    "frontier measured": (RECIPE, measured_tables),
}


def renew(text: str, name: str, body: str) -> str:
    """Return a page with the part called name replaced by body. Raises ValueError where the page has no such part."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page must hold {begin!r} and {end!r} once each")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}"


def main() -> int:
    """Rewrite every made part."""
    for name, (page, render) in PARTS.items():
        page.write_text(renew(page.read_text(encoding="utf-8"), name, render()), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
