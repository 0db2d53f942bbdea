"""The page that compares us with Ray Tune says what was measured."""

from __future__ import annotations

import json

from tests.bench.beside_tune import code_lines
from tests.house import ROOT

PAGE = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")
FIGURES = json.loads((ROOT / "docs" / "bench" / "beside_tune.json").read_text(encoding="utf-8"))


def row(name: str) -> list[str]:
    """Return the cells of the table's row that begins with name: Tune's, then ours."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def listed(values: list[float]) -> str:
    """Return numbers as the page lists them."""
    return ", ".join(f"{value:g}" if isinstance(value, int) else f"{value:.1f}" for value in values)


def test_the_lines_of_code_are_those_of_the_files() -> None:
    tune, ours = row("what a user writes")
    assert tune.startswith(f"{code_lines(ROOT / 'tests' / 'bench' / 'tune_seeds.py')} lines")
    assert ours.startswith(f"{code_lines(ROOT / 'jobs' / 'specs' / 'demo.yaml')} lines")


def test_the_seconds_are_those_that_were_measured() -> None:
    cells = row("the three seeds, whole process, three times")
    assert cells == [
        f"{listed([run['seconds'] for run in FIGURES[side]['whole']])} s" for side in ("tune", "seedsweep")
    ]
    tune, ours = row("a gang of eight GPUs where there are none")
    assert FIGURES["tune"]["infeasible"]["exit_code"] is None
    assert f"after {FIGURES['tune']['infeasible']['seconds']:.0f} s" in tune
    assert f"after {FIGURES['seedsweep']['infeasible']['seconds']:.1f} s; exit 2" in ours
    assert FIGURES["seedsweep"]["infeasible"]["exit_code"] == 2


def test_what_a_killed_driver_leaves_and_what_is_done_again_are_those_that_were_measured() -> None:
    tune, ours = row("the driver is killed while one seed hangs")
    killed = FIGURES["seedsweep"]["killed after 2 s"]
    assert f"{killed['all_gone_s']:.1f} s" in ours
    assert all(FIGURES["tune"][name]["all_gone_s"] is None for name in FIGURES["tune"] if name.startswith("killed"))
    assert "after a minute" in tune
    tune, ours = row("the command again")
    assert f"({listed(killed['steps_taken'])})" in ours
    assert f"{listed(FIGURES['tune']['killed after 2 s']['steps_taken'])})" in tune
    (tune, _) = row("the command again, with `Tuner.restore`")
    assert f"({listed(FIGURES['tune']['killed after 2 s, restore']['steps_taken'])})" in tune
