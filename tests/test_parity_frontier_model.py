"""Lanes, gates, smearing, slope and pass vectors agree with the published scripts (tests/golden_frontier)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity_core import GoldenSet
from tests.parity_frontier_model import check_extras, check_gates, check_two_lane

GOLDEN = Path(__file__).parent / "golden_frontier"


@pytest.mark.parametrize(
    ("name", "check"),
    [("model_two_lane", check_two_lane), ("model_gates", check_gates), ("model_extras", check_extras)],
)
def test_a_set_agrees_with_the_published_figures(name: str, check: Callable[[GoldenSet], None]) -> None:
    golden = GoldenSet(GOLDEN, (f"{name}.npz",))
    check(golden)
    assert golden.comparisons
    assert not [item for item in golden.comparisons if not item.has_passed]
    assert not golden.not_compared()
