"""submission.json in the shapes that authors give it, brought to one: names and empty entries dropped, means found."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from results.published.printed import parse_json
from results.published.text_files import read_text

NAMES_DROPPED = ("author", "github_id", "name", "blurb", "authors", "co_authors")
HEADLINES = (
    "val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb", "final_val_bpb", "final_bpb", "val_bpb_exact", "bpb",
    "score", "bpb_mean", "avg_val_bpb", "val_bpb_avg",
)  # fmt: skip


def read_submission_json(path: Path | None, notes: list[str]) -> dict[str, Any] | None:
    """Return submission.json without names; None, with a note, where there is none that can be read."""
    if path is None:
        return None
    try:
        text = read_text(path).text.strip()
        content = parse_json(text)
    except json.JSONDecodeError as error:
        notes.append(f"{path.name}: not JSON ({error.msg} in line {error.lineno}); left out")
        return None
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name}: left out ({error})")
        return None
    if not isinstance(content, dict):
        notes.append(f"{path.name}: expected a JSON object, found {type(content).__name__}; left out")
        return None
    return normalize({key: value for key, value in content.items() if key not in NAMES_DROPPED})


def normalize(content: dict[str, Any]) -> dict[str, Any]:
    """Return the entries with a value; a score given as an object or a list becomes its mean, kept beside its seeds."""
    kept = {key: _finite(value) for key, value in content.items()}
    kept = {key: value for key, value in kept.items() if value is not None and value != ""}
    for key in [key for key in kept if "std" in key and not re.search(r"[0-9]", str(kept[key]))]:
        del kept[key]  # "n/a" and the like
    for key in ("val_bpb", "val_loss"):
        value = kept.get(key)
        if isinstance(value, dict):
            _take_apart(kept, key, value)
        elif isinstance(value, list):
            kept.setdefault(f"{key}_seeds", kept.pop(key))
    return kept


def headline_of(submission: dict[str, Any]) -> Any:
    """Return the score that a submission reports for the whole, None where it reports none."""
    places = [
        submission,
        *(
            submission[key]
            for key in ("metrics", "results", "summary", "headline")
            if isinstance(submission.get(key), dict)
        ),
    ]
    for place in places:
        for key in HEADLINES:
            if isinstance(place.get(key), int | float | str) and not isinstance(place.get(key), bool):
                return place[key]
    return None


def _take_apart(content: dict[str, Any], key: str, values: dict[str, Any]) -> None:
    """Replace an object of seeds and a mean by the mean; the seeds go where seeds are looked for."""
    del content[key]
    mean = next((values[name] for name in ("mean", "avg", "average", "final", "value", key) if name in values), None)
    if isinstance(mean, int | float | str):
        content[key] = mean
    spread = next((values[name] for name in ("std", "stdev") if name in values), None)
    if isinstance(spread, int | float):
        content.setdefault(f"{key}_std", spread)
    seeds = {}
    for name, value in values.items():
        match = re.fullmatch(r"(?:seed[_ -]?|s)?(\d{1,18})", str(name), re.IGNORECASE)
        if match and isinstance(value, int | float | str):
            seeds[match.group(1)] = {key: value}
    if seeds and "seed_results" not in content:
        content["seed_results"] = seeds


def _finite(value: Any) -> Any:
    """Return a JSON value without numbers that are none (NaN, Infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list) else value
