"""What docs/performance.md says of a sweep's own cost is what was measured."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from tests.bench.overhead import count_events, quarters
from tests.house import ROOT

PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "docs" / "bench" / "overhead.json").read_text(encoding="utf-8"))
WITH, WITHOUT, TRIVIAL = FIGURES["starts"]["with"], FIGURES["starts"]["without"], FIGURES["trivial"]


def cell(name: str) -> str:
    """Return what we have in the table's row that begins with name."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return line.strip("|").split("|")[-1].strip()


def listed(values: list[float]) -> str:
    """Return seconds as the page lists them."""
    return ", ".join(f"{value:.1f}" for value in values)


@pytest.mark.parametrize(
    ("name", "found"), [("later seeds, in processes that waited", WITH), ("later seeds, in fresh processes", WITHOUT)]
)
def test_the_seconds_to_a_first_step_are_those_that_were_measured(name: str, found: dict[str, Any]) -> None:
    later = [seed["seconds_after_placed"]["first step"] for seed in found["seeds"][1:]]
    assert later == found["later_s"]
    assert statistics.median(later) == found["later_median_s"]
    assert cell(name) == f"{found['later_median_s']:.1f} s ({listed(sorted(later))})"


def test_later_seeds_had_waited_and_start_within_three_seconds() -> None:
    assert [seed["had_torch"] for seed in WITH["seeds"]] == [False] + [True] * len(WITH["later_s"])
    assert not any(seed["had_torch"] for seed in WITHOUT["seeds"])
    assert WITH["later_median_s"] < 3
    assert cell("the first seed on a node") == f"{WITHOUT['first_s']:.1f} and {WITH['first_s']:.1f} s"


def test_the_sweep_of_seeds_without_work_is_the_one_that_was_measured() -> None:
    rate = cell("seeds without work, two slots")
    assert rate == f"{TRIVIAL['seeds_per_s']:.2f} a second over {TRIVIAL['seeds']} seeds"
    assert cell("most memory of the driver") == f"{TRIVIAL['driver_peak_mb']:.0f} MB"


def test_events_grow_with_the_seeds_and_no_faster() -> None:
    counted = {int(seeds): found for seeds, found in TRIVIAL["events_after_seeds"].items()}
    per_seed = {seeds: found["lines"] / seeds for seeds, found in sorted(counted.items())}
    assert max(per_seed.values()) < 1.05 * min(per_seed.values())
    bytes_per_seed = [found["bytes"] / seeds for seeds, found in sorted(counted.items())]
    assert max(bytes_per_seed) < 1.05 * min(bytes_per_seed)
    words = "; ".join(f"{lines:.2f} lines after {seeds}" for seeds, lines in per_seed.items())
    assert cell("events of a seed") == words


def test_events_are_counted_up_to_a_time_without_the_announcement() -> None:
    events = [{"at": at, "to": to, "bytes": 10} for at, to in ((0, "QUEUED"), (1, "PLACED"), (2, "DONE"), (3, "DONE"))]
    assert count_events(events, 2) == {"lines": 2, "bytes": 20}
    assert quarters(10) == [2, 5, 7, 10]
