"""README.md keeps its promises: it is short, and explains the words of its headline table."""

import re
from pathlib import Path

import yaml

from runner.spec.read import load_spec, parse_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 150


def headline() -> list[str]:
    """Return the column names of the first table."""
    first = next(line for line in README.splitlines() if line.startswith("|"))
    return [cell.strip() for cell in first.strip("|").split("|")]


def test_it_is_short() -> None:
    assert len(README.splitlines()) < MAX_LINES


def test_every_column_of_the_headline_table_is_explained() -> None:
    explained = set(re.findall(r"\*\*([^*]+)\*\*: ", README))
    assert {"seed", "live", "post-TTT", "artifact bytes"} <= set(headline()) <= explained
    assert "gang" in explained


def test_it_shows_a_live_table_and_both_ways_to_install() -> None:
    assert re.search(r"┃ +seed ┃ state +┃", README)
    assert "make demo" in README
    assert "pip install -c constraints.txt -e ." in README


def test_the_spec_that_it_shows_is_that_of_the_demo() -> None:
    shown = README.split("```yaml\n")[1].split("```")[0]
    assert parse_spec(yaml.safe_load(shown)) == load_spec(ROOT / "jobs" / "specs" / "demo.yaml")
