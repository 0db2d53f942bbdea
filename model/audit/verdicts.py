"""What a probe of an audit says: pass, fail or could-not-run, with the figure, its limit and what was not looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["pass", "fail", "could-not-run"]
PASS: Verdict = "pass"
FAIL: Verdict = "fail"
COULD_NOT_RUN: Verdict = "could-not-run"


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One probe's answer. "could-not-run" is never a pass: detail says why."""

    probe: str
    rule: str  # of the challenge, such as C1 or R8
    result: Verdict
    measured: float | int | str | None = None
    limit: float | int | str | None = None
    unit: str = ""
    sample_size: int = 0
    sample_of: str = ""  # what sample_size counts
    detail: str = ""
    not_checked: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)  # kept in audit.json, not printed

    def as_json(self) -> dict[str, Any]:
        """Return the result as plain values."""
        return dataclasses.asdict(self)


def judge(probe: str, rule: str, *, measured: float, limit: float, **facts: Any) -> Result:
    """Return a pass if measured is at most limit, else a fail; a figure that is not a number fails."""
    return Result(
        probe=probe, rule=rule, result=PASS if measured <= limit else FAIL, measured=measured, limit=limit, **facts
    )


def not_run(probe: str, rule: str, detail: str, **facts: Any) -> Result:
    """Return a result that says why the probe could not be run."""
    return Result(probe=probe, rule=rule, result=COULD_NOT_RUN, detail=detail, **facts)


def worst(results: Sequence[Result]) -> Verdict:
    """Return fail if any failed, else could-not-run if any could not run, else pass."""
    found = {result.result for result in results}
    return FAIL if FAIL in found else COULD_NOT_RUN if COULD_NOT_RUN in found else PASS
