"""results.stats and results.compare.power: against worked examples computed elsewhere, published p and simulation.

Published figures: final nats per token of parameter-golf PRs 1493, 1514, 1530 and 1536, copied from their logs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from results.compare.power import minimum_detectable_gain, power, seeds_needed
from results.stats import (
    bits_per_byte,
    keep_finite,
    paired,
    paired_documents,
    population_std,
    summarize,
    t_interval,
    welch,
)
from tests.simulate_statistics import coverage_of_interval, print_simulation, size_of_margin_test

NATS = {
    1493: [2.79241542, 2.79180191, 2.79281076],
    1514: [2.78790132, 2.7896663, 2.79039264],
    1530: [2.7705909, 2.77230836, 2.77493185],
    1536: [2.78249445, 2.78548071, 2.78165791],
}
BPB_1536 = [1.07719031, 1.07834639, 1.07686646]
NATS_PER_BPB = bits_per_byte(1.0, 3.72663)  # SP8192 on the FineWeb validation set


def test_pr_1536_has_a_sample_and_a_population_std() -> None:
    summary = summarize(BPB_1536)
    assert (summary.n, round(summary.mean or 0, 5), round(summary.std_ddof1 or 0, 5)) == (3, 1.07747, 0.00078)
    assert round(population_std(BPB_1536) or 0, 5) == 0.00064


def test_published_p_values_come_out() -> None:
    assert round(welch(NATS[1514], NATS[1493]).p_better() or 1, 4) == 0.0203
    assert round(welch(NATS[1530], NATS[1493]).p_better(0.005) or 1, 4) == 0.0026
    assert round(welch(NATS[1536], NATS[1493]).p_better(0.005) or 1, 3) == 0.031


def test_welch_agrees_with_scipy_and_with_a_textbook_example() -> None:
    # unequal-variance example of Welch's test, https://en.wikipedia.org/wiki/Welch%27s_t-test (example 1)
    a = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4]
    b = [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 20.5, 24.4]
    mine = welch(a, b)
    assert mine.degrees_of_freedom == pytest.approx(25.0, abs=0.05)
    assert 2 * (mine.p_better() or 1) == pytest.approx(0.021, abs=0.0005)
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False, alternative="less")
    assert mine.p_better() == pytest.approx(theirs.pvalue, rel=1e-12)
    interval = theirs.confidence_interval  # one-sided there; ours is two-sided
    assert mine.interval is not None
    assert mine.interval.high > interval(0.95).high


def test_the_t_interval_is_the_textbook_one() -> None:
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.high - 2.0 == pytest.approx(4.302652729911275 * 1.0 / math.sqrt(3))


def test_one_value_has_no_spread_and_no_test() -> None:
    assert summarize([1.07]).std_ddof1 is None
    assert population_std([1.07]) is None
    assert t_interval([1.07]) is None
    difference = welch([1.07], [1.08, 1.09])
    assert difference.mean == pytest.approx(-0.015)
    assert difference.interval is None
    assert difference.p_better() is None
    assert difference.p_equivalent(0.1) is None


def test_nan_and_none_are_left_out_of_a_summary() -> None:
    assert summarize([1.0, None, float("nan"), 3.0]).n == 2


def test_equal_values_give_certainty_not_nan() -> None:
    assert welch([1.0, 1.0], [2.0, 2.0]).p_better() == 0.0
    assert welch([1.0, 1.0], [2.0, 2.0]).p_better(1.5) == 1.0


def test_pairing_removes_the_spread_that_seeds_share() -> None:
    a, b = [1.0770, 1.0785, 1.0760], [1.0790, 1.0804, 1.0781]
    loose, tight = welch(a, b), paired(a, b)
    assert tight.mean == pytest.approx(loose.mean)
    assert (tight.p_better() or 1) < 0.01 < (loose.p_better() or 0)
    assert tight.p_better() == pytest.approx(scipy_stats.ttest_rel(a, b, alternative="less").pvalue)


def test_equivalence_needs_both_sides_inside_the_band() -> None:
    a, b = [1.0, 1.1, 0.9, 1.05], [1.02, 1.08, 0.93, 1.04]
    difference = welch(a, b)
    lower = scipy_stats.ttest_ind(np.add(a, 0.3), b, equal_var=False, alternative="greater").pvalue
    upper = scipy_stats.ttest_ind(np.subtract(a, 0.3), b, equal_var=False, alternative="less").pvalue
    assert difference.p_equivalent(0.3) == pytest.approx(max(lower, upper))
    assert (difference.p_equivalent(1e-6) or 0) > 0.4


def test_documents_are_the_units_not_tokens() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(6, 1, 400)
    base = sizes * 0.75
    effect = sizes * rng.normal(-0.002, 0.01, 400)  # one draw a document, shared by its tokens
    difference = paired_documents(base + effect, base, sizes * math.log(2))
    assert difference.mean == pytest.approx(effect.sum() / sizes.sum() / math.log(2))
    resampled = []
    for _ in range(600):
        chosen = rng.integers(0, 400, 400)
        resampled.append(effect[chosen].sum() / sizes[chosen].sum() / math.log(2))
    assert difference.standard_error == pytest.approx(np.std(resampled), rel=0.15)


def test_splitting_documents_into_tokens_would_be_too_sure() -> None:
    rng = np.random.default_rng(1)
    effect = rng.normal(0, 1, 50)
    whole = paired_documents(effect * 10, np.zeros(50), np.full(50, 10.0))
    split = paired_documents(np.repeat(effect, 10), np.zeros(500), np.ones(500))
    assert (whole.standard_error or 0) > 2.5 * (split.standard_error or 1)


def test_mismatched_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="not 2 against 3"):
        paired([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="documents must match one by one"):
        paired_documents([1.0], [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="finite nats"):
        paired_documents([float("nan")], [1.0], [1.0])
    with pytest.raises(ValueError, match="confidence=95 must lie between 0 and 1"):
        t_interval([1.0, 2.0], confidence=95)


class VarianceComponents(NamedTuple):
    """One-way random effects: std between seeds, std between repeats of one seed, and how much data each rests on."""

    seed_std: float | None
    repeat_std: float | None
    num_seeds: int
    num_runs: int


def variance_components(groups: Mapping[int, Sequence[float]]) -> VarianceComponents:
    """Split the variance of repeated seeds into between seeds and within a seed (analysis of variance, unbalanced).

    groups: seed -> scores of its repeats. A component is None where the data cannot tell: no seed repeated, or only
    one seed. A negative estimate of the variance between seeds is reported as 0.
    """
    sets = [keep_finite(list(values)) for values in groups.values()]
    sets = [values for values in sets if values.size]
    sizes = np.array([values.size for values in sets], dtype=np.float64)
    num_seeds, num_runs = len(sets), int(sizes.sum())
    if num_runs == num_seeds:
        return VarianceComponents(None, None, num_seeds, num_runs)
    within = sum(float(((values - values.mean()) ** 2).sum()) for values in sets) / (num_runs - num_seeds)
    if num_seeds < 2:
        return VarianceComponents(None, math.sqrt(within), num_seeds, num_runs)
    means = np.array([values.mean() for values in sets])
    grand = float((sizes * means).sum() / num_runs)
    between = float((sizes * (means - grand) ** 2).sum()) / (num_seeds - 1)
    repeats = (num_runs - float((sizes**2).sum()) / num_runs) / (num_seeds - 1)
    return VarianceComponents(math.sqrt(max(0.0, (between - within) / repeats)), math.sqrt(within), num_seeds, num_runs)


def test_variance_components_separate_seeds_from_repeats() -> None:
    rng = np.random.default_rng(2)
    seeds = rng.normal(0, 3.0, 300)
    parts = variance_components({i: list(seed + rng.normal(0, 1.0, 4)) for i, seed in enumerate(seeds)})
    assert parts.seed_std == pytest.approx(3.0, rel=0.1)
    assert parts.repeat_std == pytest.approx(1.0, rel=0.1)
    assert variance_components({0: [1.0], 1: [2.0]}).repeat_std is None
    alone = variance_components({0: [1.0, 3.0]})
    assert alone.seed_std is None
    assert alone.repeat_std == pytest.approx(math.sqrt(2))


def test_planning_agrees_with_the_figures_of_the_challenge() -> None:
    # seeds a side for power 0.8: 4 to 6, 4 to 6, 10 to 19; six at a std of 0.0009 have 0.79, so exactly it is seven
    plan = {
        (gain, margin): [
            seeds_needed(gain=gain * NATS_PER_BPB, std=std, margin=margin * NATS_PER_BPB) for std in (0.0006, 0.0009)
        ]
        for gain, margin in ((0.005, 0.0), (0.010, 0.005), (0.0075, 0.005))
    }
    assert plan == {(0.005, 0.0): [4, 7], (0.010, 0.005): [4, 7], (0.0075, 0.005): [10, 19]}
    assert power(gain=0.005 * NATS_PER_BPB, std_a=0.0009, std_b=0.0009, n_a=6, n_b=6) == pytest.approx(0.79, abs=0.005)


@pytest.mark.parametrize(("n_a", "n_b", "gain", "std_b"), [(3, 3, 3.5, 1.0), (4, 4, 2.0, 1.0), (3, 6, 3.0, 2.0)])
def test_power_is_what_simulation_finds(n_a: int, n_b: int, gain: float, std_b: float) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(-gain, 1.0, (20_000, n_a)), rng.normal(0.0, std_b, (20_000, n_b))
    p = scipy_stats.ttest_ind(a, b, axis=1, equal_var=False, alternative="less").pvalue
    planned = power(gain=gain, std_a=1.0, std_b=std_b, n_a=n_a, n_b=n_b)
    assert np.mean(p < 0.01) == pytest.approx(planned, abs=0.01)


def test_the_smallest_gain_has_the_power_it_was_asked_for() -> None:
    gain = minimum_detectable_gain(std=0.0007, n_a=3, n_b=5)
    assert power(gain=gain, std_a=0.0007, std_b=0.0007, n_a=3, n_b=5) == pytest.approx(0.8, abs=1e-6)


def test_planning_without_hope_or_spread_says_so() -> None:
    assert seeds_needed(gain=0.001, std=0.001, margin=0.002) is None
    with pytest.raises(ValueError, match="n=1 seeds have no spread"):
        power(gain=1.0, std_a=1.0, std_b=1.0, n_a=1, n_b=3)
    with pytest.raises(ValueError, match="std=0 must be positive"):
        power(gain=1.0, std_a=0, std_b=1.0, n_a=3, n_b=3)


def test_the_interval_covers_at_three_seeds() -> None:
    assert 0.94 <= coverage_of_interval(3) <= 0.96


@pytest.mark.parametrize(("n_a", "n_b"), [(3, 3), (3, 6)])
def test_the_margin_test_keeps_its_size_at_equal_spreads(n_a: int, n_b: int) -> None:
    assert size_of_margin_test(n_a, n_b, 1.0, 1.0) <= 0.012


def test_the_simulation_prints_every_spread(capsys: pytest.CaptureFixture[str]) -> None:
    print_simulation()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("95% t interval at n = 3 covers 0.9")
    assert len(lines) == 1 + 2 * 5
    assert all(float(line.split("size ")[1].split()[0]) < 0.03 for line in lines[1:])


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_better_and_worse_exclude_each_other(a: list[float], b: list[float]) -> None:
    one, other = welch(a, b).p_better(), welch(b, a).p_better()
    assert one is not None
    assert other is not None
    assert one + other >= 1.0 - 1e-9 or one + other == pytest.approx(1.0)
