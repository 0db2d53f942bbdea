"""How the intervals and tests behave on made-up normal scores: `python -m tests.simulate_statistics`.

Prints the coverage of the 95 % interval at three seeds, the size of the margin test (nominal 1 %) at equal spreads
and at 1:4 and 1:10, and how often a verdict on a rerun is wrong by a hair (nominal 5 %): the true difference is the
margin. The vectorized formulas are checked against results.stats on the first draws.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from results.compare.verdict import ALPHA
from results.stats import paired, t_interval, welch

DRAWS = 20_000
SPREADS = ((1.0, 1.0), (1.0, 4.0), (4.0, 1.0), (1.0, 10.0), (10.0, 1.0))


def coverage_of_interval(n: int) -> float:
    """Return how often the 95 % t interval of n normal scores holds their true mean."""
    scores = np.random.default_rng(4).normal(0.0, 1.0, (DRAWS, n))
    reach = stats.t.ppf(0.975, n - 1) / math.sqrt(n) * scores.std(axis=1, ddof=1)
    for i in range(3):
        interval = t_interval(scores[i].tolist())
        assert interval is not None
        assert math.isclose(interval.high - scores[i].mean(), reach[i], rel_tol=1e-9)
    return float(np.mean(np.abs(scores.mean(axis=1)) < reach))


def size_of_margin_test(n_a: int, n_b: int, std_a: float, std_b: float) -> float:
    """Return how often pairs of samples whose true gain IS the margin are called better than it at 1 %."""
    rng = np.random.default_rng(5)
    margin = 0.5
    a, b = rng.normal(-margin, std_a, (DRAWS, n_a)), rng.normal(0.0, std_b, (DRAWS, n_b))
    p = stats.ttest_ind(a + margin, b, axis=1, equal_var=False, alternative="less").pvalue
    for i in range(3):
        ours = welch(a[i].tolist(), b[i].tolist()).p_better(margin)
        assert ours is not None
        assert math.isclose(ours, p[i], rel_tol=1e-9)
    return float(np.mean(p < 0.01))


def rates_of_verdict(
    n_a: int, n_b: int, std_a: float, std_b: float, *, gap: float, margin: float = 1.0, alike: float | None = None
) -> tuple[float, float]:
    """Return how often a rerun whose true difference is `gap` is called reproduced, and how often not reproduced.

    alike: the correlation between the two runs of a seed, for the paired test; None for Welch's.
    """
    rng = np.random.default_rng(6)
    claimed = rng.normal(0.0, 1.0, (DRAWS, n_b))
    own = rng.normal(0.0, 1.0, (DRAWS, n_a))
    rerun = gap + std_a * (own if alike is None else alike * claimed + math.sqrt(1 - alike**2) * own)
    claimed = std_b * claimed
    if alike is None:
        up, down = (
            stats.ttest_ind(rerun + shift, claimed, axis=1, equal_var=False, alternative="less").pvalue
            for shift in (margin, -margin)
        )
    else:
        up, down = (
            stats.ttest_rel(rerun + shift, claimed, axis=1, alternative="less").pvalue for shift in (margin, -margin)
        )
    equivalent = np.maximum(down, 1 - up)  # below +margin, and above -margin
    beyond = np.minimum(up + down, 2 - up - down)  # as far out, to either side, from a truth on the nearer edge
    for i in range(3):
        ours = (welch if alike is None else paired)(rerun[i].tolist(), claimed[i].tolist())
        for mine, theirs in ((ours.p_equivalent(margin), equivalent[i]), (ours.p_beyond(margin), beyond[i])):
            assert mine is not None
            assert math.isclose(mine, theirs, rel_tol=1e-6, abs_tol=1e-12), (mine, theirs)
    return float(np.mean(equivalent < ALPHA)), float(np.mean((beyond < ALPHA) & (equivalent >= ALPHA)))


def print_simulation() -> None:
    """Print every figure, one line each."""
    print(f"95% t interval at n = 3 covers {coverage_of_interval(3):.4f} ({DRAWS:,} draws)")
    for n_a, n_b in ((3, 3), (3, 6)):
        for std_a, std_b in SPREADS:
            size = size_of_margin_test(n_a, n_b, std_a, std_b)
            print(f"margin test, n {n_a} and {n_b}, spreads {std_a:g}:{std_b:g}: size {size:.4f} at nominal 0.01")


def print_verdicts() -> None:
    """Print how often a verdict on a rerun is wrong where the true difference is the margin."""
    for spread in (0.2, 1.0, 4.0):  # in margins
        for alike in (None, 0.0, 0.9):
            same, other = rates_of_verdict(3, 3, spread, spread, gap=1.0, alike=alike)
            test = "Welch" if alike is None else f"pairs alike by {alike:g}"
            print(
                f"verdict on the edge, 3 and 3, spread {spread:g}, {test}: {same:.4f} and {other:.4f} at nominal 0.05"
            )


if __name__ == "__main__":
    print_simulation()
    print_verdicts()
