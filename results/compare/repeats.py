"""Same-seed noise: how far a figure moves when a seed is run again under the same configuration, code and data."""

from __future__ import annotations

import math
from typing import NamedTuple

from results.schema import FINISHED
from results.store.reader import latest_attempts, read_runs

CONFIDENCE = 0.95


class Noise(NamedTuple):
    """The pooled sample std of repeats of one seed, and the degrees of freedom behind it (0: there are none)."""

    std: float
    dof: int

    def allows(self, difference: float) -> bool:
        """Return whether two runs of one seed differ by so much, or more, in at least 5 % of cases by noise alone."""
        if self.dof == 0:
            return False
        from scipy import special

        limit = float(special.stdtrit(self.dof, (1 + CONFIDENCE) / 2)) * self.std * math.sqrt(2)
        return abs(difference) <= limit


def same_seed_noise(out: str, metric: str, *, config_hash: str) -> Noise:
    """Return the noise of one column of `runs` over the repeats that a run directory holds."""
    frame = latest_attempts(read_runs(out, ["config_hash", metric])).frame
    chosen = frame[(frame["state"] == FINISHED) & (frame["config_hash"] == config_hash)].dropna(subset=[metric])
    squares, dof = 0.0, 0
    for _, values in chosen.groupby("seed")[metric]:
        if len(values) > 1:
            squares += float(((values - values.mean()) ** 2).sum())
            dof += len(values) - 1
    return Noise(math.sqrt(squares / dof) if dof else 0.0, dof)
