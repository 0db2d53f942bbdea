"""Broken loaders, each with a fault that the fuzz command must find; run as a worker of their own."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from tests.fuzz import cases as fuzz_cases
from tests.fuzz.drive import SEED_STRIDE
from tests.fuzz.worker import main

BAD_SEED = SEED_STRIDE + 3  # the file at which each control goes wrong


class Control(fuzz_cases.Case):
    """A loader that refuses every file, but one."""

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        return self.folder / "file", rng.randbytes(4)

    def load(self, path: Path, content: bytes) -> None:
        if content == random.Random(BAD_SEED).randbytes(4):
            self.go_wrong()
        raise ValueError("damaged")

    def go_wrong(self) -> None:
        """Do what no loader may do."""


class Crash(Control):
    def go_wrong(self) -> None:
        os.abort()


class Hang(Control):
    def go_wrong(self) -> None:
        time.sleep(1000)


class Memory(Control):
    def go_wrong(self) -> None:
        bytearray(3 << 30)


class Traceback(Control):
    def go_wrong(self) -> None:
        raise KeyError("header")


class ManyLines(Control):
    def go_wrong(self) -> None:
        raise ValueError("one\ntwo")


class Execution(Control):
    def go_wrong(self) -> None:
        os.system("true")


class Outside(Control):
    def go_wrong(self) -> None:
        (self.folder.parent / "outside").write_text("x")


CONTROLS = {
    "crash": Crash, "hang": Hang, "memory": Memory, "traceback": Traceback, "many-lines": ManyLines,
    "execution": Execution, "outside": Outside,
}  # fmt: skip

if __name__ == "__main__":
    fuzz_cases.CASES.update(CONTROLS)
    main(sys.argv[1], sys.argv[2])
