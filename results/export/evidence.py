"""The evidence inside a submission folder: what each figure was computed from, copied from the run directory.

FOLDER/evidence holds the Parquet rows of every attempt, for each exported seed its stage records, ledgers, scores and
artifact as they lie in its run directory, and the announcement of the seeds. SHA256SUMS at the top covers all files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.schema import TABLES
from results.store.guard import file_sha256
from results.store.location import Location, open_location, results_location
from results.store.names import is_named, name_of_row, variant_of_file

if TYPE_CHECKING:
    import pandas as pd

EVIDENCE, SUMS = "evidence", "SHA256SUMS"
PROGRAMS = ("train_gpt.py", "train_gpt_packed.py")
# of a seed's run directory; the weights before quantization are left out for their size
COPIED = ("run.json", "steps.npz", "model.ssq", "evaluate.npz", "ttt.npz", "ttt_scores.npz")
COPIED_FOLDERS = ("stages", "ledger")
ANNOUNCED = ("format", "sweep", "announcements", "created", "config_hash", "data_hash", "code_hash", "world_size")


def copy_evidence(out: str, runs: pd.DataFrame, folder: Path) -> list[str]:
    """Copy the evidence of a sweep into folder; return a line for everything that should be there and is not.

    Of a sweep of several variants only the rows of the one that runs are of go along.
    """
    variant = str(runs["variant"].iloc[0])
    location, target = open_location(out), folder / EVIDENCE
    target.mkdir(parents=True)
    tables = results_location(out)
    for table in TABLES:
        for name in _files_in(tables, tables.path(table)):
            if name.endswith(".parquet") and variant_of_file(name) == variant:
                _copy(tables, tables.path(table, name), target / "results" / table / name)
    notes = _copy_announcement(location, target, variant if is_named(runs.iloc[0]) else None)
    programs: dict[str, bytes] = {}
    for _, run in runs.iterrows():
        name = name_of_row(run)
        root = location.path("seeds", name)
        if "run.json" not in _files_in(location, root):
            notes.append(f"{name}: its run directory is not here; only its rows can be verified")
            continue
        wanted = [
            *COPIED,
            *(f"{inner}/{file}" for inner in COPIED_FOLDERS for file in _files_in(location, f"{root}/{inner}")),
        ]
        present = set(_files_in(location, root)) | {entry for entry in wanted if "/" in entry}
        missing = [entry for entry in wanted if entry not in present]
        for entry in wanted:
            if entry in present:
                _copy(location, f"{root}/{entry}", target / name / entry)
        if missing:
            notes.append(f"{name}: {', '.join(missing)} not in the run directory; that part cannot be verified")
        notes += _copy_programs(location, root, name, folder, programs)
    return notes


def _copy_programs(location: Location, root: str, name: str, folder: Path, programs: dict[str, bytes]) -> list[str]:
    """Copy the program of the first seed that has one to the top; say where another seed's differs."""
    notes = []
    for program in PROGRAMS:
        if program not in _files_in(location, root):
            notes.append(f"{name}: {program} not in the run directory")
            continue
        content = _read(location, f"{root}/{program}")
        if programs.setdefault(program, content) != content:
            notes.append(f"{name}: {program} is not that of the other seeds")
        (folder / program).write_bytes(programs[program])
    return notes


def _copy_announcement(location: Location, target: Path, variant: str | None) -> list[str]:
    """Write what sweep.json says of hashes and announced seeds, without the machine's name; of one variant if named."""
    if "sweep.json" not in _files_in(location, location.root):
        return ["sweep.json not in the run directory: which seeds were announced cannot be verified"]
    try:
        sweep: dict[str, Any] = json.loads(_read(location, location.path("sweep.json")))
    except ValueError:
        return ["sweep.json is damaged: which seeds were announced cannot be verified"]
    chosen = {name: sweep[name] for name in ANNOUNCED if name in sweep}
    if variant is not None:
        entries = [entry for entry in sweep.get("announcements", []) if variant in entry.get("variants", [variant])]
        chosen |= {"variant": variant, "announcements": [{**entry, "variants": [variant]} for entry in entries]}
        chosen["config_hash"] = sweep.get("variants", {}).get(variant)
    (target / "sweep.json").write_text(json.dumps(chosen, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return []


def _files_in(location: Location, path: str) -> list[str]:
    """Return the names of the files in one folder, sorted; none where there is no folder."""
    import pyarrow.fs as pafs

    infos = location.filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos if info.type == pafs.FileType.File)


def _read(location: Location, path: str) -> bytes:
    with location.filesystem.open_input_stream(path) as stream:
        return bytes(stream.read())


def _copy(location: Location, path: str, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_bytes(_read(location, path))


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of folder, in the form that `sha256sum -c` reads."""
    lines = [f"{file_sha256(folder / name)}  {name}" for name in listed_files(folder)]
    (folder / SUMS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def listed_files(folder: Path) -> list[str]:
    """Return the relative paths of every file in folder but SHA256SUMS, sorted."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if name != SUMS)
