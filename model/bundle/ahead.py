"""A program made by another process while this one has other work: seconds of plain Python, most of it minifying.

A thread would hold Python's lock against whoever launches kernels.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from model.bundle.program import (
    NUM_MODULES,
    NUM_PROGRAMS,
    ROOT,
    Program,
    keep,
    make_program,
    minified,
    programs,
    settings_of,
)
from model.config import RunConfig

logger = logging.getLogger(__name__)

WAIT_S = 60.0
CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from model.bundle.ahead import main; main(*sys.argv[2:])"


@contextmanager
def making_program(config: RunConfig, *, root: Path = ROOT) -> Iterator[Callable[[], None]]:
    """Have code_program's work done meanwhile, and yield the function that waits for it.

    Nothing is started where this process has minified modules already: what is left takes half a second. The other
    process does not outlive the block. If it fails, code_program does the work, and raises what there is to raise.
    """
    if minified:
        yield lambda: None
        return
    settings = json.dumps(settings_of(config), sort_keys=True)
    command = [sys.executable, "-P", "-c", CHILD, str(ROOT), str(root), settings]
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:  # too many processes, no memory
        logger.warning("the program is made later, in this process: %s", error)
        yield lambda: None
        return
    with child:
        try:
            yield partial(_take_program, child, settings, root)
        finally:
            child.kill()  # nothing where it has ended


def _take_program(child: subprocess.Popen[bytes], settings: str, root: Path) -> None:
    """Wait for the other process and keep what it made."""
    try:
        out, words = child.communicate(timeout=WAIT_S)
    except subprocess.TimeoutExpired:
        logger.warning("the program is made in this process: another one took over %.0f s", WAIT_S)
        return
    if child.returncode:
        lines = words.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"]
        logger.warning("the program is made in this process, for another one failed: %s", lines[-1][:300])
        return
    made = json.loads(out)
    for name, source, small in made["modules"]:
        keep(minified, (name, source), small, NUM_MODULES)
    keep(programs, (settings, root), Program(made["readable"], made["packed"].encode("latin-1")), NUM_PROGRAMS)


def main(root: str, settings: str) -> None:
    """Make a program and write it to standard output, with every module that was minified on the way."""
    program = make_program(settings, Path(root))
    modules = [[name, source, small] for (name, source), small in minified.items()]
    made = {"readable": program.readable, "packed": program.packed.decode("latin-1"), "modules": modules}
    sys.stdout.write(json.dumps(made))  # ASCII, whatever the locale
