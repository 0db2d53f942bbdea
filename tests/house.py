"""The rooms of the house and what each may import: the one table that the README shows and the architecture tests hold.

A room is a folder of a package, or one file in a package's top corridor. `python -m tests.house` prints rooms, files,
arrows (imports between rooms) and circles.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PACKAGES = ("jobs", "runner", "model", "results")


class Room(NamedTuple):
    """What a room holds, in one sentence, and the rooms of the same package that it may import."""

    holds: str
    may_import: tuple[str, ...] = ()


def tower(*floors: Mapping[str, tuple[str, str]]) -> dict[str, Room]:
    """Return the rooms of a package, lowest floor first.

    Each floor maps a room to its sentence and the names it may import; "below" stands for every room of lower floors.
    """
    rooms: dict[str, Room] = {}
    for floor in floors:
        below = tuple(rooms)
        for name, (holds, imports) in floor.items():
            words = imports.split()
            named = tuple(word for word in words if word != "below")
            rooms[name] = Room(holds, (*below, *named) if "below" in words else named)
    return rooms


STAGE = "banks config data distributed fields files gpt kernels lora report"

HOUSE: dict[str, dict[str, Room]] = {
    "results": tower(
        {
            "schema": ("every column of the four tables", ""),
            "stats": ("statistics over seeds and documents", ""),
            "render": ("plain tables as text, Markdown and CSV", ""),
        },
        {"store": ("Parquet files written whole, read back, and tried out before they are trusted", "schema")},
        {
            "__init__": ("`results.load` and friends for pandas", "store"),
            "tables": ("the seed table, as rows", "render schema stats store"),
            "published": ("what others published: their records, and what a folder of logs says", "stats"),
        },
        {
            "table_text": ("the seed table in words", "render schema stats tables"),
            "validation_text": ("which text a score was computed on, and when two are the same", "published"),
            "findings": ("where a record or a folder of logs contradicts itself", "published schema stats store"),
        },
        {"compare": ("two sides over seeds or documents", "below")},
        {
            "export": ("a submission folder out of the rows", "below"),
            "report": ("one page to look at", "below"),
        },
        {"verify": ("a submission folder derived again from its own files", "export schema stats store")},
    ),
    "runner": tower(
        {
            "errors": ("what can go wrong, as one tree", ""),
            "spec": ("a sweep, read from its YAML file", ""),
            "provenance": ("source, packages and fingerprints", ""),
        },
        {"life": ("states, decisions and capacity: pure", "errors spec")},
        {"machine": ("what this machine has, and the signals that reach a process on it", "life errors spec")},
        {"folder": ("a sweep on disk: lease, events, storage, commits", "errors spec life")},
        {
            "view": ("a running sweep, shown here and told to trackers", "errors spec life folder"),
            "scheduler": ("the driver's loop", "errors spec life folder"),
            "work": ("the job of each attempt, and its commit", "errors spec life folder provenance"),
        },
        {"gang": ("the only room with Ray and torch", "errors spec life folder scheduler machine provenance work")},
        {"sweep": ("the order of events of a run", "below")},
        {"plan": ("what a sweep would do", "below")},
    ),
    "model": tower(
        {
            "fields": ("the one parser of settings", ""),
            "report": ("the words between a stage and whoever started it", ""),
            "distributed": ("the process group of one gang", ""),
            "layers": ("layer formulas as pure functions", ""),
            "files": ("files whole or absent", ""),
        },
        {"config": ("every setting of a run", "fields")},
        {
            "presets": ("published, bench_500, tiny", "config"),
            "banks": ("weights in banks and the plan of visits", "config"),
            "bundle": ("one program out of the sources", "config fields"),
            "data": ("tokens read", "config files report"),
        },
        {
            "corpus": ("tokens made", "config fields files data report"),
            "kernels": ("fused operations, each with a plain twin", "layers"),
        },
        {
            "lora": ("low-rank adapters of one document each", "config kernels"),
            "attention": ("one door, several kernels", "config data kernels layers"),
        },
        {"gpt": ("the one forward pass", "attention banks config data kernels layers lora")},
        {
            "train": ("optimizer steps", STAGE),
            "quant": ("GPTQ and the artifact", STAGE),
            "score": ("bits per byte and plain evaluation", STAGE),
        },
        {"ttt": ("documents adapted while they are scored", f"{STAGE} score")},
        {"pipeline": ("one seed, stage by stage", "below")},
        {
            "standalone": ("the command line of a generated program", "below"),
            "audit": ("probes on a finished run", "below"),
        },
        {"controls": ("systems broken on purpose", "below")},
    ),
    "jobs": tower(
        {
            "sweeps": ("commands that run seeds, watch them and bring them their data", ""),
            "figures": ("commands that turn rows into tables, pages and comparisons", ""),
            "evidence": ("commands that prove a run, or give it to others", ""),
            "bench": ("what a user measures on a GPU", ""),
        },
        {"cli": ("the front door", "below")},
    ),
}  # fmt: skip


def sources(package: str) -> list[Path]:
    """Return every Python file of a package, sorted."""
    return sorted((ROOT / package).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def modules() -> dict[str, Path]:
    """Return every module of the four packages by its dotted name; a package's own file under the package's name."""
    found = {}
    for package in PACKAGES:
        for path in sources(package):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that path imports, inside functions and type-checking blocks too.

    `from a import b` yields a and a.b, because b may be a module.
    """
    package_parts = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package_parts[: len(package_parts) - node.level + 1] if node.level else ()
            base = ".".join((*prefix, *((node.module,) if node.module else ())))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imports() -> dict[str, frozenset[str]]:
    """Return for every module of ours the modules of ours that it imports; a package counts only for its own code."""
    ours = modules()
    empty = {name for name, path in ours.items() if path.name == "__init__.py" and not parse(path).body}
    return {
        name: frozenset(target for target in imported_names(path) if target in ours and target not in empty) - {name}
        for name, path in ours.items()
    }


def room_of(module: str) -> str:
    """Return the room of a module: its second name, or __init__ for a package's own file."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def arrows() -> dict[tuple[str, str], set[str]]:
    """Return the imports between rooms, (package.room, package.room) -> the sentences that name the files."""
    found: dict[tuple[str, str], set[str]] = {}
    for name, targets in imports().items():
        for target in targets:
            ends = (f"{name.split('.')[0]}.{room_of(name)}", f"{target.split('.')[0]}.{room_of(target)}")
            if ends[0] != ends[1]:
                found.setdefault(ends, set()).add(f"{name} imports {target}")
    return found


def broken_rules() -> list[str]:
    """Return every import between rooms of one package that the table does not allow, as sentences."""
    wrong = []
    for (start, end), sentences in arrows().items():
        package, room = start.split(".")
        other_package, other = end.split(".")
        if package == other_package and other not in HOUSE[package].get(room, Room("")).may_import:
            wrong += sentences
    return sorted(wrong)


def find_circle(graph: Mapping[str, frozenset[str] | set[str]]) -> list[str]:
    """Return the names of one circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room_graph() -> dict[str, set[str]]:
    """Return for each room the rooms that it imports."""
    graph: dict[str, set[str]] = {}
    for start, end in arrows():
        graph.setdefault(start, set()).add(end)
    return graph


def entries(package: str) -> list[str]:
    """Return what stands at the top of a package: files and rooms, without __init__ and caches."""
    top = {path.relative_to(ROOT / package).parts[0] for path in sources(package)}
    return sorted(name for name in top if name != "__init__.py")


def main() -> int:
    """Print the house and return 1 if a rule is broken."""
    for package in PACKAGES:
        inside = [ends for ends in arrows() if ends[0].split(".")[0] == ends[1].split(".")[0] == package]
        print(f"{package}: {len(entries(package))} entries at the top, {len(inside)} arrows between them")
        for name, room in HOUSE[package].items():
            folder = ROOT / package / name
            count = (
                f"{sum(path.name != '__init__.py' for path in sources(f'{package}/{name}'))} files"
                if folder.is_dir()
                else "file"
            )
            print(f"  {name:16} {count:9} {room.holds}")
    circle = find_circle(imports()) or find_circle(room_graph())
    print(f"circles: {' -> '.join(circle) if circle else 'none'}")
    wrong = broken_rules()
    print("\n".join(wrong) or "no import against the table")
    return 1 if circle or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
