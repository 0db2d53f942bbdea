"""What cannot be asked of somebody else's program, because it has none of our stages."""

from __future__ import annotations

import json
from pathlib import Path


def refuse_program(place: Path, fix: str) -> None:
    """Raise ValueError if place is the run directory of a program's sweep, or of one of its runs; fix: what to do."""
    for folder in (place, place.resolve().parent.parent):  # a run lies in SWEEP/seeds
        try:
            is_program = bool(json.loads((folder / "sweep.json").read_text())["spec"].get("program"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # whoever reads it next says what is wrong with it
        if is_program:
            raise ValueError(f"{place}: somebody else's program has none of our stages; {fix}")
        return
