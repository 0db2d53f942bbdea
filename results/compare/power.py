"""Planning: the power of the one-sided Welch test and of its paired twin, of two such tests for equivalence, the seeds
needed for it, and the smallest gain it can see.

A gain is positive here and in the unit of the spread. The power is exact for normal scores: Welch's estimated degrees
of freedom are averaged over, not replaced by their value at the true spreads, which promises too much at few seeds
(0.69 instead of 0.52 at 3 seeds a side and a gain of 3.5 standard deviations).
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

POWER = 0.8  # the usual one to plan for
MAX_SEEDS = 1000  # beyond this the answer is "no affordable number of seeds"
NODES = 48  # of the quadrature over each side's sample variance; 1e-4 in power against 20,000 simulated pairs


def power(
    *, gain: float, std_a: float, std_b: float, n_a: int, n_b: int, margin: float = 0.0, alpha: float = 0.01
) -> float:
    """Return the chance that Welch's test shows a gain above margin at p < alpha, if the true gain is `gain`.

    Raises ValueError for fewer than two seeds on a side or a spread that is not positive.
    """
    from scipy import special

    error, reach, weights = _welch_reach(std_a, std_b, n_a, n_b, alpha)
    return float(np.sum(weights * special.ndtr((gain - margin - reach) / error)))


def equivalence_power(
    *, gap: float, std_a: float, std_b: float, n_a: int, n_b: int, margin: float, alpha: float
) -> float:
    """Return the chance that two one-sided Welch tests, each at alpha, show a difference within +-margin.

    gap: the true difference. Raises ValueError as power does.
    """
    error, reach, weights = _welch_reach(std_a, std_b, n_a, n_b, alpha)
    return _chance_inside(gap, margin, error, reach, weights)


def paired_equivalence_power(*, gap: float, std: float, n: int, margin: float, alpha: float) -> float:
    """Return the same chance for two one-sided paired t-tests over n seeds; std: of the differences between pairs."""
    error, reach, weights = _paired_reach(std, n, alpha)
    return _chance_inside(gap, margin, error, reach, weights)


def _chance_inside(
    gap: float, margin: float, error: float, reach: NDArray[np.float64], weights: NDArray[np.float64]
) -> float:
    """Return the chance that the interval of this reach around a difference lies within +-margin."""
    from scipy import special

    room = np.maximum(margin - reach, 0.0)
    return float(np.sum(weights * (special.ndtr((room - gap) / error) - special.ndtr((-room - gap) / error))))


def _welch_reach(
    std_a: float, std_b: float, n_a: int, n_b: int, alpha: float
) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the true standard error of a difference, and how far Welch's test reaches at each pair of nodes, weighted.

    Raises ValueError for fewer than two seeds on a side or a spread that is not positive.
    """
    from scipy import special

    if min(n_a, n_b) < 2:
        raise ValueError(f"n={min(n_a, n_b)} seeds have no spread; a test needs at least 2 on each side")
    if min(std_a, std_b) <= 0:
        raise ValueError(f"std={min(std_a, std_b)} must be positive to plan with")
    ratios_a, weights_a = _variance_ratios(n_a)
    ratios_b, weights_b = _variance_ratios(n_b)
    part_a = (std_a**2 / n_a * ratios_a)[:, None]
    part_b = (std_b**2 / n_b * ratios_b)[None, :]
    share = part_a / (part_a + part_b)
    freedom = 1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1))
    reach = special.stdtrit(freedom, 1 - alpha) * np.sqrt(part_a + part_b)
    return math.sqrt(std_a**2 / n_a + std_b**2 / n_b), reach, weights_a[:, None] * weights_b[None, :]


def _paired_reach(std: float, n: int, alpha: float) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the same for a paired t-test over n seeds. Raises ValueError likewise."""
    from scipy import special

    if n < 2:
        raise ValueError(f"n={n} pairs have no spread; a test needs at least 2")
    if std <= 0:
        raise ValueError(f"std={std} must be positive to plan with")
    ratios, weights = _variance_ratios(n)
    error = std / math.sqrt(n)
    return error, special.stdtrit(n - 1, 1 - alpha) * np.sqrt(ratios) * error, weights


def seeds_needed(*, gain: float, std: float, margin: float = 0.0, alpha: float = 0.01) -> int | None:
    """Return the seeds per side for the usual power; None if the gain is within margin or MAX_SEEDS are too few."""

    def is_enough(n: int) -> bool:
        return power(gain=gain, std_a=std, std_b=std, n_a=n, n_b=n, margin=margin, alpha=alpha) >= POWER

    return None if gain <= margin else find_fewest(is_enough)


def paired_power(*, gain: float, std: float, n: int, alpha: float = 0.01) -> float:
    """Return the chance that a one-sided paired t test over n seeds shows a gain, if the true one is `gain`.

    std: of the differences between the two scores of one seed. Raises ValueError as power does.
    """
    from scipy import special

    error, reach, weights = _paired_reach(std, n, alpha)
    return float(np.sum(weights * special.ndtr((gain - reach) / error)))


def pairs_needed(*, gain: float, std: float, alpha: float = 0.01) -> int | None:
    """Return the seeds that a paired test needs for the usual power; None for no gain or over MAX_SEEDS."""
    return None if gain <= 0 else find_fewest(lambda n: paired_power(gain=gain, std=std, n=n, alpha=alpha) >= POWER)


def find_fewest(is_enough: Callable[[int], bool]) -> int | None:
    """Return the smallest number of seeds, 2 or more, that is enough; None if MAX_SEEDS are not."""
    counts = range(2, MAX_SEEDS + 1)
    place = bisect.bisect_left(counts, True, key=is_enough) if is_enough(MAX_SEEDS) else len(counts)
    return counts[place] if place < len(counts) else None


def minimum_detectable_gain(*, std: float, n_a: int, n_b: int, alpha: float = 0.01) -> float:
    """Return the smallest true gain that the test, without a margin, shows with the usual power."""
    from scipy import optimize

    def shortfall(gain: float) -> float:
        return power(gain=gain, std_a=std, std_b=std, n_a=n_a, n_b=n_b, alpha=alpha) - POWER

    highest = std
    while shortfall(highest) < 0:
        highest *= 2
    return float(optimize.brentq(shortfall, 0.0, highest, xtol=1e-9 * std))


@cache
def _variance_ratios(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return sample over true variance at quadrature nodes of its distribution (chi-square, n - 1), and weights."""
    from scipy import special

    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return special.gammaincinv((n - 1) / 2, (nodes + 1) / 2) * 2 / (n - 1), weights / 2
