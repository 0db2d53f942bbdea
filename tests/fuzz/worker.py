"""The child process that loads mutated files: limited memory, a watch on what loading does, one line out per file.

Started by tests.fuzz.drive as `python -m tests.fuzz.worker LOADER FOLDER`. Each line on stdin is a seed; each line on
stdout is {"seed", "refusal"} or {"seed", "fault"}. A loader that dies or hangs takes only this process along.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.fuzz.cases import Case, make_case

MEMORY_BYTES = 1 << 30  # that a load may take beyond what the process held before
NUM_WARM_UP = 20  # loads before limits and watch are set: they import what is imported late
FORBIDDEN = (
    "os.system", "os.exec", "os.spawn", "os.fork", "os.forkpty", "pickle.find_class", "socket.connect", "socket.bind",
    "ctypes.dlopen", "shutil.rmtree", "os.putenv", "sys.addaudithook",
)  # fmt: skip
CHILD_ALLOWED = ("tokenizer", "parquet")  # loaders that probe a file in a child process of their own


class Watch:
    """Notes what a load must never do: start programs, unpickle, connect, or write outside its folder."""

    def __init__(self, loader: str, folder: Path) -> None:
        self.folder, self.is_on, self.seen = os.path.realpath(folder), False, ""
        self.forbidden = set(FORBIDDEN)
        if loader not in CHILD_ALLOWED:
            self.forbidden |= {"subprocess.Popen", "os.posix_spawn"}
        else:
            self.forbidden -= {"os.fork"}
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Judge one event of the interpreter."""
        if not self.is_on:
            return
        if event in self.forbidden:
            self.seen = f"{event}{str(arguments)[:100]}"
        elif event in ("os.remove", "os.rename", "os.mkdir") and isinstance(arguments[0], str | os.PathLike):
            self._require_inside(os.fspath(arguments[0]), event)
        elif event == "open" and isinstance(arguments[0], str) and _is_writing(arguments[1], arguments[2]):
            self._require_inside(arguments[0], event)

    def _require_inside(self, path: str, event: str) -> None:
        if not os.path.realpath(path).startswith((self.folder + os.sep, "/dev/null")):
            self.seen = f"{event} outside: {path[:100]}"


def _is_writing(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def limit_memory() -> None:
    """Let this process's address space grow by MEMORY_BYTES and no further, where the system offers that."""
    with contextlib.suppress(OSError, ValueError):
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, resource.RLIM_INFINITY))


def load_once(case: Case, watch: Watch, seed: int) -> dict[str, Any]:
    """Load one mutation and return how it ended."""
    watch.seen, watch.is_on = "", True
    try:
        refusal = case.run(seed)
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # whatever a loader may not raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {str(error)[:200]} ({Path(place.filename).name}:{place.lineno})"
        return {"seed": seed, "fault": reason.replace("\n", " ")}
    finally:
        watch.is_on = False
    if watch.seen:
        return {"seed": seed, "fault": f"a load did {watch.seen}"}
    return {"seed": seed, "refusal": refusal}


def main(loader: str, folder: str) -> None:
    """Serve seeds until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # third-party parsers print
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    case = make_case(loader, Path(folder))
    watch = Watch(loader, Path(folder))
    for seed in range(-NUM_WARM_UP, 0) if loader != "tokenizer" else (-1,):
        load_once(case, watch, seed)
    limit_memory()
    replies.write(json.dumps({"ready": loader}) + "\n")
    for line in sys.stdin:
        replies.write(json.dumps(load_once(case, watch, int(line))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
