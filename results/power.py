"""Planning: the power of the one-sided Welch test, seeds needed for it, and the smallest gain it can see.

A gain is positive here and in the unit of the spread. Exact for normal scores up to Satterthwaite's approximation,
which takes the true spreads for the degrees of freedom.
"""

from __future__ import annotations

import math

from results.stats import welch_freedom

MAX_SEEDS = 1000  # beyond this the answer is "no affordable number of seeds"


def power(
    *, gain: float, std_a: float, std_b: float, n_a: int, n_b: int, margin: float = 0.0, alpha: float = 0.01
) -> float:
    """Return the chance that Welch's test shows a gain above margin at p < alpha, if the true gain is `gain`.

    Raises ValueError for fewer than two seeds on a side or a spread that is not positive.
    """
    from scipy import stats

    if min(n_a, n_b) < 2:
        raise ValueError(f"n={min(n_a, n_b)} seeds have no spread; a test needs at least 2 on each side")
    if min(std_a, std_b) <= 0:
        raise ValueError(f"std={min(std_a, std_b)} must be positive to plan with")
    part_a, part_b = std_a**2 / n_a, std_b**2 / n_b
    freedom = welch_freedom(part_a, part_b, n_a, n_b)
    critical = stats.t.ppf(1 - alpha, freedom)
    return float(stats.nct.sf(critical, freedom, (gain - margin) / math.sqrt(part_a + part_b)))


def seeds_needed(
    *, gain: float, std: float, margin: float = 0.0, alpha: float = 0.01, target: float = 0.8
) -> int | None:
    """Return the seeds per side for the target power; None if the gain is within margin or MAX_SEEDS are too few."""
    if gain <= margin:
        return None
    for n in range(2, MAX_SEEDS + 1):
        if power(gain=gain, std_a=std, std_b=std, n_a=n, n_b=n, margin=margin, alpha=alpha) >= target:
            return n
    return None


def minimum_detectable_gain(
    *, std: float, n_a: int, n_b: int, margin: float = 0.0, alpha: float = 0.01, target: float = 0.8
) -> float:
    """Return the smallest true gain that the test shows with the target power, margin included."""
    from scipy import optimize

    def shortfall(gain: float) -> float:
        return power(gain=gain, std_a=std, std_b=std, n_a=n_a, n_b=n_b, margin=margin, alpha=alpha) - target

    highest = margin + std
    while shortfall(highest) < 0:
        highest = margin + 2 * (highest - margin)
    return float(optimize.brentq(shortfall, margin, highest, xtol=1e-9 * std))
