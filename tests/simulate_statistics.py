"""How the intervals and tests behave on made-up normal scores: `python -m tests.simulate_statistics`.

Prints the coverage of the 95 % interval at three seeds and the size of the margin test (nominal 1 %) at equal spreads
and at 1:4 and 1:10. The vectorized formulas are checked against results.stats on the first draws.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from results.stats import t_interval, welch

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


def print_simulation() -> None:
    """Print every figure, one line each."""
    print(f"95% t interval at n = 3 covers {coverage_of_interval(3):.4f} ({DRAWS:,} draws)")
    for n_a, n_b in ((3, 3), (3, 6)):
        for std_a, std_b in SPREADS:
            size = size_of_margin_test(n_a, n_b, std_a, std_b)
            print(f"margin test, n {n_a} and {n_b}, spreads {std_a:g}:{std_b:g}: size {size:.4f} at nominal 0.01")


if __name__ == "__main__":
    print_simulation()
