"""The code of a run as files that are counted: readable text, and its compressed twin that extracts itself.

Inside a generated train_gpt.py this module stands in for model.codesize: there the code is the file itself.
"""

from __future__ import annotations

import base64
import hashlib
import linecache
import lzma
from pathlib import Path
from typing import NamedTuple

from model.config import RunConfig
from model.data.files import replace_file

READABLE_NAME, PACKED_NAME = "train_gpt.py", "train_gpt_packed.py"
CONVENTION = "self-extracting-train_gpt"  # bytes of the compressed twin
# the source is put where tracebacks, Triton and inspect look for it, under a name that no file has
LAUNCHER = """import base64, linecache, lzma
source = lzma.decompress(base64.b85decode("{payload}")).decode()
linecache.cache["<train_gpt.py>"] = len(source), None, source.splitlines(True), "<train_gpt.py>"
exec(compile(source, "<train_gpt.py>", "exec"))
"""


class Program(NamedTuple):
    """The code of a run as two files that do the same."""

    readable: str
    packed: bytes

    @classmethod
    def of(cls, readable: str) -> Program:
        """Return a readable source with its twin; the same source gives the same bytes."""
        payload = base64.b85encode(lzma.compress(readable.encode(), preset=9 | lzma.PRESET_EXTREME)).decode()
        return cls(readable, LAUNCHER.format(payload=payload).encode())

    @property
    def num_bytes(self) -> int:
        """Code bytes as counted: the twin."""
        return len(self.packed)

    @property
    def readable_bytes(self) -> int:
        """Code bytes as committed: the readable file."""
        return len(self.readable.encode())

    def write(self, folder: Path) -> list[str]:
        """Write both files and return their names."""
        for name, content in ((READABLE_NAME, self.readable.encode()), (PACKED_NAME, self.packed)):
            with replace_file(folder / name) as file:
                file.write(content)
        return [READABLE_NAME, PACKED_NAME]


def own_source() -> str:
    """Return the source of the file that this function stands in, also where the twin extracted it."""
    return "".join(linecache.getlines(own_source.__code__.co_filename))


def code_hash() -> str:
    """Return the sha256 (hex) of the source."""
    return hashlib.sha256(own_source().encode()).hexdigest()


def code_program(_config: RunConfig) -> Program:
    """Return the source and its twin."""
    return Program.of(own_source())
