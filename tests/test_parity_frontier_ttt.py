"""Adaptation of the model with lanes and gates agrees with the published script (tests/golden_frontier)."""

from pathlib import Path

from tests.parity_core import GoldenSet
from tests.parity_frontier_ttt import MODEL, check_ttt_scaled

GOLDEN = Path(__file__).parent / "golden_frontier"


def test_adaptation_agrees_with_the_published_figures() -> None:
    golden = GoldenSet(GOLDEN, ("ttt_scaled.npz",), borrowed=(MODEL,))
    check_ttt_scaled(golden)
    assert [item for item in golden.comparisons if not item.has_passed] == []
    compared = {item.key for item in golden.comparisons}
    assert {key for key in golden.keys("") if key.startswith(("on", "off", "control_", "doc_"))} <= compared
    assert golden.not_compared() == ["reference_batches"]
