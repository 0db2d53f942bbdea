"""What a check of a record returns: findings, each a named check with what was measured and what it should be.

A claim is one printed figure that the logs contradict. Claims about one fact (one seed, one figure of its log) become
one finding that names every place where it is printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One contradiction: the seed it is about (None: the record), what contradicts what, and the values by source.

    check: name of the check (docs/imports.md); value: what it measured; limit: what it should be, or may be at most.
    """

    seed: int | None
    field: str
    values: dict[str, Any]
    check: str = "printed_figure"
    value: Any = None
    limit: Any = None

    def __str__(self) -> str:
        """Return the finding as one line."""
        place = "record" if self.seed is None else f"seed {self.seed}"
        verbs = {"log": "the log shows"} if self.check == "printed_figure" else {}
        says = " says" if verbs else ""
        said = ", ".join(
            f"{verbs.get(source, source + says * (not source.startswith('equals')))} {_short(value)}"
            for source, value in self.values.items()
        )
        measured = "" if self.value is None else f": {_short(self.value)}, limit {_short(self.limit)}"
        return f"{place}: {self.field}: {said} [{self.check}{measured}]"


def finding_json(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON shows it: its fields, and the line that the text shows."""
    return {**finding._asdict(), "text": str(finding)}


class Review(NamedTuple):
    """The findings of a record, and what it prints that no log can confirm (one line each)."""

    findings: list[Finding]
    unchecked: list[str]


class Claim(NamedTuple):
    """A printed figure that the logs contradict.

    source: "submission.json", "README", "leaderboard" or "PR text"; place: where in it; actual: what the logs show,
    the likeliest reading first; extra: more to say.
    """

    seed: int | None
    figure: str
    source: str
    place: str
    said: Any
    actual: list[float]
    extra: Mapping[str, Any] = MappingProxyType({})


def merge_claims(claims: Iterable[Claim]) -> list[Finding]:
    """Return one finding a fact, in the order of the first claim about it."""
    facts: dict[tuple[Any, ...], list[Claim]] = {}
    for claim in claims:
        facts.setdefault((claim.seed, *_fact(claim)), []).append(claim)
    return [_finding(group) for group in facts.values()]


def _fact(claim: Claim) -> tuple[Any, ...]:
    """Return what a claim is about: the log's own value where it is a score or a time: two names of one are one."""
    if claim.actual and claim.figure.endswith((" bpb", " nats", " time")):
        return (round(claim.actual[0], 6),)
    return (claim.figure,)


def _finding(claims: list[Claim]) -> Finding:
    first = claims[0]
    sources = list(dict.fromkeys(claim.source for claim in claims))
    field = f"{first.figure}: {' and '.join(sources)} vs {'log' if first.seed is not None else 'logs'}"
    places = {claim.place: claim.said for claim in claims}
    shown = list(dict.fromkeys(value for claim in claims for value in claim.actual))
    extra = {key: value for claim in claims for key, value in claim.extra.items()}
    actual = shown[0] if len(shown) == 1 else shown
    return Finding(first.seed, field, {**places, "log": actual, **extra}, value=first.said, limit=actual)


def say_unchecked(figures: Iterable[tuple[str, str]]) -> list[str]:
    """Return one line for each figure that some place prints and no log shows."""
    places: dict[str, list[str]] = {}
    for figure, place in figures:
        places.setdefault(figure, []).append(place)
    return [
        f"{figure} cannot be checked, no log shows it: {'; '.join(dict.fromkeys(where))}"
        for figure, where in places.items()
    ]


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) + ")"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(entry) for entry in value) + "]"
    return str(value)
