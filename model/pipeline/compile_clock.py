"""Time that kernels take to compile, kept apart from the phases in which it falls."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from model.files.ledger import Ledger

COMPILE = "compile"


@contextlib.contextmanager
def noting_compilation(ledger: Ledger, device: torch.device) -> Iterator[None]:
    """Note every Triton compilation inside the block as a span "compile" of the ledger.

    Compilations answered from Triton's cache on disk count with the time they took. A CPU compiles nothing.
    """
    if device.type != "cuda":
        yield
        return
    from triton import knobs

    def listen(*, times: Any, metadata: dict[str, Any], **_facts: Any) -> None:
        ended = time.monotonic()
        ledger.add_span(COMPILE, ended - times.total / 1e6, ended, kernel=metadata.get("name", ""))  # microseconds

    before, knobs.compilation.listener = knobs.compilation.listener, listen
    try:
        yield
    finally:
        knobs.compilation.listener = before
