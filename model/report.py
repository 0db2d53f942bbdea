"""The words between a stage and whoever started it: progress out, a wish to stop in, and the names of the stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

STAGES = ("train", "quantize", "evaluate", "ttt")

# report(phase, step, total, metrics): total is None where it is not known; metrics are plain values
Report = Callable[[str, int, int | None, dict[str, Any]], None]


class Interrupted(Exception):
    """Training was told to stop; a checkpoint was written where a store was given."""
