"""What a program reads from its node: is it there, and what is in it. Large files are read once a node.

An input is a file, a folder, or a pattern that names files. Its contents are hashed with the names inside it; where it
lies does not count.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from model.data import remembered
from model.files.linked import READ_BYTES
from model.files.locks import lock_beside


def input_problems(inputs: Mapping[str, str]) -> list[str]:
    """Return one line for each input of a program that this machine lacks."""
    return [f"program.inputs: {path} is not there" for path in inputs.values() if not files_of(path)]


def hash_inputs(inputs: Mapping[str, str], tick: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Return the sha256 over the contents of each input, by its path. Raises ValueError naming one that is not there.

    tick is called while files are read, or waited for: another process of this node may be reading them.
    """
    problems = input_problems(inputs)
    if problems:
        raise ValueError(problems[0])
    found = {}
    for path in inputs.values():
        digest = hashlib.sha256()
        for name, file in files_of(path):
            digest.update(f"{name}\0{hash_once(file, tick)}\n".encode("utf-8", "surrogateescape"))
        found[path] = digest.hexdigest()
    return found


def combine_inputs(hashes: Mapping[str, str]) -> str:
    """Return the one hash of all inputs, in their order."""
    return hashlib.sha256("\n".join(["program inputs", *hashes.values()]).encode()).hexdigest()


def files_of(path: str) -> list[tuple[str, Path]]:
    """Return the files of an input with their names in it, sorted; none where it is not there."""
    place = Path(path)
    if place.is_file():
        return [(place.name, place)]
    if place.is_dir():
        found = (Path(folder) / name for folder, _, names in os.walk(place, followlinks=True) for name in names)
        return sorted((file.relative_to(place).as_posix(), file) for file in found if file.is_file())
    if re.search(r"[*?\[]", path):
        return [(Path(name).name, Path(name)) for name in sorted(glob.glob(path)) if Path(name).is_file()]
    return []


def hash_once(path: Path, tick: Callable[[], None]) -> str:
    """Return a file's sha256, for a large one from this node's memory while the file is unchanged."""
    base = remembered.place_of(path)
    if base is None:
        return hash_file(path, tick)
    place = base.with_name(f"bytes-{base.name}")
    lock: AbstractContextManager[object] = nullcontext()
    with suppress(OSError):  # a home that takes no files costs only time
        lock = lock_beside(place, tick)
    with lock:
        known = remembered.recall(place)
        if known is not None and isinstance(known.get("sha256"), str):
            return str(known["sha256"])
        sha256 = hash_file(path, tick)
        if remembered.place_of(path) == base:  # nobody wrote to the file meanwhile
            remembered.remember(place, {"sha256": sha256})
        return sha256


def hash_file(path: Path, tick: Callable[[], None]) -> str:
    """Return the sha256 (hex) of a file, calling tick as it is read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            tick()
    return digest.hexdigest()
