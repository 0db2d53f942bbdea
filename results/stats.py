"""Statistics over seeds and documents: summaries, intervals, tests, power. One spread has one name: sample, ddof=1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """n values, their mean and sample standard deviation; None where n is too small to have one."""

    n: int
    mean: float | None
    std_ddof1: float | None


def summarize(values: Sequence[float | None]) -> Summary:
    """Return n, mean and sample std (ddof=1) of the finite values; n = 1 has no spread, which is None and never 0."""
    finite = np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)
    if finite.size == 0:
        return Summary(0, None, None)
    return Summary(finite.size, float(finite.mean()), float(finite.std(ddof=1)) if finite.size > 1 else None)
