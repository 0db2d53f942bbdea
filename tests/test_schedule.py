"""model.train.schedule: learning rate, looping and momentum as the formulas of the record (the grids are in set 7)."""

import itertools
import math

import pytest

from model.presets import published
from model.train.schedule import ema_decay, is_looping, lr_factor, muon_momentum, schedule_frac
from tests.micro_model import micro_train

PUBLISHED = published().train


def test_the_fraction_counts_the_budget_less_the_reserve() -> None:
    assert schedule_frac(4000, 294.0, PUBLISHED) == pytest.approx(0.5)
    assert schedule_frac(0, 588.0, PUBLISHED) == 1.0
    assert schedule_frac(9, 600.0, PUBLISHED) > 1


def test_the_fraction_counts_steps_where_there_is_no_budget() -> None:
    config = micro_train(max_steps=8)
    assert [schedule_frac(step, 1e9, config) for step in (0, 2, 8)] == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("frac", [0.0, 0.2, 0.3329])
def test_the_learning_rate_is_whole_until_the_warmdown(frac: float) -> None:
    assert lr_factor(frac, PUBLISHED) == 1.0


@pytest.mark.parametrize("frac", [0.3331, 0.5, 0.9, 1.0])
def test_the_learning_rate_falls_in_a_straight_line(frac: float) -> None:
    assert lr_factor(frac, PUBLISHED) == pytest.approx((1 - frac) / 0.667, abs=1e-12)


def test_the_learning_rate_stays_at_its_floor() -> None:
    assert lr_factor(1.3, PUBLISHED) == 0.0
    assert lr_factor(0.99, micro_train(min_lr_frac=0.1)) == 0.1
    assert lr_factor(0.99, micro_train(warmdown_frac=0.0)) == 1.0


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (375, 0.25), (1500, 1.0), (20_000, 1.0)])
def test_the_momentum_warms_up_in_a_straight_line(step: int, share: float) -> None:
    assert muon_momentum(step, 0.5, PUBLISHED) == pytest.approx(0.92 + 0.05 * share, abs=1e-12)


def test_without_warm_up_the_momentum_is_its_end_value() -> None:
    assert muon_momentum(0, 0.0, micro_train(muon_momentum_warmup_steps=0)) == pytest.approx(0.97)


def test_looping_is_on_from_its_fraction() -> None:
    assert [is_looping(frac, PUBLISHED) for frac in (0.0, 0.3499, 0.35, 2.0)] == [False, False, True, True]


# ---- horizons as parts of the schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [500, 5000])
def test_a_horizon_means_the_same_at_any_number_of_steps(steps: int) -> None:
    config = micro_train(max_steps=steps, ema_horizon_frac=0.07, muon_momentum_warmup_frac=0.31)
    decay = ema_decay(0.5, 0.4, config)
    assert decay == 1 - 1 / (0.07 * steps)
    assert decay ** (0.07 * steps) == pytest.approx(math.exp(-1), rel=0.02)  # what is left after one horizon
    halfway = round(0.155 * steps)
    assert muon_momentum(halfway, halfway / steps, config) == pytest.approx(0.945, abs=1e-3)
    assert muon_momentum(0, 0.31, config) == pytest.approx(0.97)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 3.5])
def test_with_a_budget_what_is_left_of_old_weights_depends_on_time_alone(seconds: float) -> None:
    config = micro_train(budget_s=712.0, reserve_s=12.0, ema_horizon_frac=0.5)
    fracs = [schedule_frac(step, seconds * step, config) for step in range(int(700 / seconds) + 1)]
    left = math.prod(ema_decay(now, last, config) for last, now in itertools.pairwise(fracs))
    assert left == pytest.approx(math.exp(-1 / 0.5), rel=0.02)


def test_a_step_longer_than_the_horizon_replaces_the_whole_average() -> None:
    assert ema_decay(0.9, 0.1, micro_train(budget_s=100.0, reserve_s=0.0, ema_horizon_frac=0.5)) == 0.0
    assert ema_decay(0.0, 0.0, micro_train(max_steps=2, ema_horizon_frac=0.1)) == 0.0


def test_without_horizons_the_settings_in_steps_count() -> None:
    assert ema_decay(0.3, 0.2, PUBLISHED) == 0.997
    assert muon_momentum(0, 0.0, micro_train(muon_momentum_warmup_frac=0.0)) == pytest.approx(0.97)
