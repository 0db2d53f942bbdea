"""Statistics over seeds and documents: summaries, intervals and one-sided tests.

Scores are losses: lower is better, a gain is negative, and "a is better than b" means mean(a) < mean(b).
One spread has one name: the sample standard deviation, ddof=1. Where n is too small to have one the answer is None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Summary(NamedTuple):
    """n values, their mean and sample standard deviation; None where n is too small to have one."""

    n: int
    mean: float | None
    std_ddof1: float | None


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float
    confidence: float


class Difference(NamedTuple):
    """mean(a) - mean(b) with its standard error, degrees of freedom and interval; None where there is no spread."""

    mean: float
    standard_error: float | None
    degrees_of_freedom: float | None
    interval: Interval | None

    def p_better(self, margin: float = 0.0) -> float | None:
        """Return the one-sided p of "a is lower than b by more than margin" (margin >= 0, unit of the scores)."""
        return None if self.standard_error is None else self._tail(self.mean + margin)

    def p_worse(self) -> float | None:
        """Return the one-sided p of "a is higher than b"."""
        return None if self.standard_error is None else self._tail(-self.mean)

    def p_equivalent(self, band: float) -> float | None:
        """Return p of "the difference lies inside +-band": the larger of two one-sided tests (TOST)."""
        upper, lower = self.p_better(-band), None if self.standard_error is None else self._tail(-self.mean - band)
        return None if upper is None or lower is None else max(upper, lower)

    def p_beyond(self, band: float) -> float | None:
        """Return p of "the difference lies outside +-band", on either side; band 0 gives the two-sided t-test.

        Both tails are added as they are when the true difference stands on an edge of the band: one alone would be too
        sure where the band is narrow beside the standard error.
        """
        if self.standard_error is None:
            return None
        return min(1.0, self._tail(band - abs(self.mean)) + self._tail(-band - abs(self.mean)))

    def _tail(self, distance: float) -> float:
        """Return P(T <= distance / standard error)."""
        from scipy import special  # not scipy.stats, which takes a second to import

        if not self.standard_error:  # every value equal: the difference is exact
            return 0.0 if distance < 0 else 1.0
        return float(special.stdtr(self.degrees_of_freedom, distance / self.standard_error))


def keep_finite(values: Sequence[float | None]) -> NDArray[np.float64]:
    """Return the finite values as float64."""
    return np.array([value for value in values if value is not None and math.isfinite(value)], dtype=np.float64)


def summarize(values: Sequence[float | None]) -> Summary:
    """Return n, mean and sample std (ddof=1) of the finite values; n = 1 has no spread, which is None and never 0."""
    kept = keep_finite(values)
    if kept.size == 0:
        return Summary(0, None, None)
    return Summary(kept.size, float(kept.mean()), float(kept.std(ddof=1)) if kept.size > 1 else None)


def population_std(values: Sequence[float | None]) -> float | None:
    """Return the std with ddof=0, as some published tables have it; None for fewer than two values."""
    kept = keep_finite(values)
    return float(kept.std(ddof=0)) if kept.size > 1 else None


def t_interval(values: Sequence[float | None], *, confidence: float = 0.95) -> Interval | None:
    """Return the Student t interval of the mean; None for fewer than two values."""
    _require_confidence(confidence)
    kept = keep_finite(values)
    if kept.size < 2:
        return None
    error = float(kept.std(ddof=1)) / math.sqrt(kept.size)
    return _interval(float(kept.mean()), error, kept.size - 1, confidence)


def welch(a: Sequence[float | None], b: Sequence[float | None], *, confidence: float = 0.95) -> Difference:
    """Return mean(a) - mean(b) for independent samples of unequal spread (Welch, Satterthwaite's degrees of freedom).

    Raises ValueError when a side has no value. With one value on a side there is no spread, hence no test.
    """
    _require_confidence(confidence)
    left, right = keep_finite(a), keep_finite(b)
    if not left.size or not right.size:
        raise ValueError(f"a difference needs a value on each side, not {left.size} and {right.size}")
    mean = float(left.mean() - right.mean())
    if left.size < 2 or right.size < 2:
        return Difference(mean, None, None, None)
    parts = left.var(ddof=1) / left.size, right.var(ddof=1) / right.size
    error = math.sqrt(parts[0] + parts[1])
    freedom = welch_freedom(parts[0], parts[1], left.size, right.size)
    return Difference(mean, error, freedom, _interval(mean, error, freedom, confidence))


def welch_freedom(part_a: float, part_b: float, n_a: int, n_b: int) -> float:
    """Return Satterthwaite's degrees of freedom; part = variance / n of a side. Equal values: the pooled count."""
    if part_a + part_b == 0:
        return float(n_a + n_b - 2)
    share = part_a / (part_a + part_b)
    return float(1 / (share**2 / (n_a - 1) + (1 - share) ** 2 / (n_b - 1)))


def paired(a: ArrayLike, b: ArrayLike, *, confidence: float = 0.95) -> Difference:
    """Return mean(a - b) for values that belong together one by one, such as two evaluations of one artifact."""
    _require_confidence(confidence)
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape or left.size == 0:
        raise ValueError(f"paired values must match one by one, not {left.size} against {right.size}")
    gaps = left - right
    if gaps.size < 2:
        return Difference(float(gaps.mean()), None, None, None)
    error = float(gaps.std(ddof=1)) / math.sqrt(gaps.size)
    mean = float(gaps.mean())
    return Difference(mean, error, gaps.size - 1.0, _interval(mean, error, gaps.size - 1.0, confidence))


def paired_documents(
    nats_a: ArrayLike, nats_b: ArrayLike, weights: ArrayLike, *, confidence: float = 0.95
) -> Difference:
    """Return (sum nats_a - sum nats_b) / sum weights with documents as the independent units.

    nats_a, nats_b (N,): summed nats of each document; weights (N,): its bytes * ln 2 for bits per byte, or its
    tokens for nats per token. The tokens of one document depend on each other, so the error is that of a ratio of
    sums over documents (linearized): the residual of a document is its difference minus the overall rate times
    its weight.
    """
    _require_confidence(confidence)
    gaps = np.asarray(nats_a, dtype=np.float64) - np.asarray(nats_b, dtype=np.float64)
    sizes = np.asarray(weights, dtype=np.float64)
    if gaps.shape != sizes.shape or gaps.size == 0:
        raise ValueError(f"documents must match one by one, not {gaps.size} against {sizes.size}")
    if not (np.isfinite(gaps).all() and sizes.sum() > 0):
        raise ValueError("documents need finite nats and a positive total weight")
    rate = float(gaps.sum() / sizes.sum())
    if gaps.size < 2:
        return Difference(rate, None, None, None)
    residuals = gaps - rate * sizes
    error = math.sqrt(gaps.size / (gaps.size - 1) * float(residuals @ residuals)) / float(sizes.sum())
    return Difference(rate, error, gaps.size - 1.0, _interval(rate, error, gaps.size - 1.0, confidence))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values corrected for their number (Holm's step-down): the smallest times m, the next times m - 1, ...

    No corrected value is below one that was smaller before, and none is above 1. None (no test) stays, and counts for
    nothing.
    """
    tested = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[place] = highest
    return corrected


def bits_per_byte(nats: float, num_bytes: float) -> float:
    """Return bits per byte of a sum of nats; also turns nats per token into bpb, given bytes per token."""
    return nats / math.log(2) / num_bytes


def _interval(mean: float, error: float, freedom: float, confidence: float) -> Interval:
    from scipy import special

    reach = float(special.stdtrit(freedom, 0.5 + confidence / 2)) * error
    return Interval(mean - reach, mean + reach, confidence)


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
