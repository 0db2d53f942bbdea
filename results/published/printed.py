"""Numbers as people print them: with their unit, and with the half unit of the last digit that they vouch for.

A printed number agrees with a log when it is the log's value rounded to what was printed. "~7200" vouches for its
digits up to the last one that is not a zero; sizes may be in MB or MiB; seconds may be minutes or milliseconds.
"""

from __future__ import annotations

import json
import re
from typing import Any

NUMBER = r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"
IN_TEXT = re.compile(rf"(?<![A-Za-z\d.])({NUMBER})\s*(?:(MiB|KiB|MB|kB|KB|M|k|K)\b)?")
APPROXIMATE = re.compile(r"[~≈∼]|\b(?:about|approx\w*|around|ca\.)|\d\s*\+\W*$", re.IGNORECASE)
SCALES = {"MiB": 2.0**20, "KiB": 1024.0, "MB": 1e6, "M": 1e6, "kB": 1e3, "KB": 1e3, "k": 1e3, "K": 1e3}
MINUTES_AND_SECONDS = re.compile(r"(\d+)\s*(?:m|min|minutes?)\s*(\d+(?:\.\d+)?)\s*s|\b(\d+):(\d{2})(?!\d)")
TIME_UNIT = re.compile(r"(?<![A-Za-z])(ms|milliseconds|s|secs?|seconds|m|mins?|minutes|h|hours?)(?![A-Za-z/])", re.I)
LARGEST = 1e18  # no figure of a record is larger
LEAST_SLACK_S = 0.5  # between two clocks of one pass
FEWEST_SCORE_DECIMALS = 3  # of a number in JSON, whose last zeros most writers drop: 1.110 has become 1.11


class PrintedFloat(float):
    """A float that remembers how it was written: 1.1100 vouches for four decimals, 1.11 for two."""

    text: str

    def __new__(cls, text: str) -> PrintedFloat:
        """Return the number that text writes."""
        number = super().__new__(cls, text)
        number.text = text
        return number


def parse_json(text: str) -> Any:
    """Return JSON whose fractions remember their digits. Raises json.JSONDecodeError like json.loads."""
    return json.loads(text, parse_float=PrintedFloat)


def text_of(said: object) -> str:
    """Return a value as it was written."""
    if isinstance(said, PrintedFloat):
        return said.text
    return repr(said) if isinstance(said, float) else str(said)


def printed_numbers(said: object) -> list[tuple[float, float]]:
    """Return every number in a printed cell, each with half a unit of its last digit (0 for a whole number)."""
    if isinstance(said, bool) or said is None:
        return []
    text = text_of(said).replace("−", "-").replace("–", "-").replace("+-", "±").replace("+/-", "±")
    found = []
    for match in IN_TEXT.finditer(text):
        digits = match.group(1).replace(",", "")
        if not abs(float(digits)) < LARGEST:
            continue
        scale = SCALES.get(match.group(2) or "", 1.0)
        mantissa, _, exponent = digits.lower().partition("e")
        decimals = len(mantissa.partition(".")[2]) - int(exponent or 0)
        half_unit = 0.5 * 10.0**-decimals * scale if "." in mantissa or scale > 1 or exponent else 0.0
        if half_unit == 0.0 and APPROXIMATE.search(text):
            half_unit = 0.5 * 10.0 ** (len(digits) - len(digits.rstrip("0")))
        found.append((float(digits) * scale, half_unit))
    return found


def printed_number(said: object) -> tuple[float | None, float]:
    """Return the first number in a printed cell and half a unit of its last digit; (None, 0) where there is none."""
    return next(iter(printed_numbers(said)), (None, 0.0))


def printed_score(said: object) -> tuple[float | None, float]:
    """Return printed_number() for a score: a number, unlike text, counts with at least three decimals."""
    value, half_unit = printed_number(said)
    if isinstance(said, float):
        half_unit = min(half_unit, 0.5 * 10.0**-FEWEST_SCORE_DECIMALS)
    return value, half_unit


def agrees(said: object, actual: float | None) -> bool:
    """Return whether a printed score is `actual` rounded to the printed decimals.

    log_half_unit: what the log itself rounded away.
    """
    value, half_unit = printed_score(said)
    if value is None or actual is None:
        return value is None and actual is None
    return is_near(value, actual, half_unit)


def is_near(value: float, actual: float, tolerance: float) -> bool:
    """Return whether two numbers differ by no more than the tolerance, float rounding apart."""
    return abs(value - actual) <= tolerance * (1 + 1e-6) + 1e-9


def printed_seconds(said: object, heading: str = "") -> tuple[float | None, float]:
    """Return a printed duration in seconds and one unit of its last digit (durations are cut as often as rounded).

    heading: column or key, which may name the unit ("Eval ms", "eval_time_ms").
    """
    text = text_of(said)
    if both := MINUTES_AND_SECONDS.search(text):
        minutes, seconds = (both.group(1), both.group(2)) if both.group(1) else (both.group(3), both.group(4))
        return 60 * float(minutes) + float(seconds), 1.0
    value, half_unit = printed_number(said)
    if value is None:
        return None, 0.0
    unit = TIME_UNIT.search(re.sub(r"(?<=\d)(?=[A-Za-z])", " ", text)) or TIME_UNIT.search(heading.replace("_", " "))
    name = unit.group(1).lower() if unit else ("ms" if value > 10_000 else "s")
    scale = 1e-3 if name.startswith(("ms", "milli")) else 60.0 if name.startswith("m") else 1.0
    scale = 3600.0 if name.startswith("h") else scale
    return value * scale, max(max(2 * half_unit, 1.0) * scale, LEAST_SLACK_S)
