"""The figures of submission.json by seed, whichever of the layouts in use they stand in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from results.published.printed import PrintedFloat, printed_number

SEED_KEY = re.compile(r"(?:seed[ _-]?|s)?(\d{1,10})", re.IGNORECASE)
PER_SEED_KEYS = ("seed_results", "per_seed", "seeds", "per_seed_results", "results", "runs", "seed_scores")
SEED_MAPS = re.compile(
    r"(mean_|final_)?(val_)?(bpb|loss|loss_nats)|(artifact_bytes|bytes_total|total_bytes|steps|(train|eval|ttt)_time\w*)",
    re.IGNORECASE,
)  # keys whose numbered entries are seeds; elsewhere a number may be an order, a stride, a layer
MAPPED_FIGURES = re.compile(r"bpb|loss|nats|bytes|steps|time|seconds", re.IGNORECASE)
FOREIGN_KEYS = re.compile(r"rerun|re_run|compliance|ablation|previous|baseline|parent|original", re.IGNORECASE)


def submitted_figures(submission: dict[str, Any] | None) -> dict[int, dict[str, Any]]:
    """Return {seed: {figure: value}}: mappings by seed, lists of objects, and lists beside a list of seeds.

    A bare number a seed counts as its val_bpb, unless its key names another figure. Numbers written as text count.
    """
    found: dict[int, dict[str, Any]] = {}
    for seed, figure, value in _entries(submission or {}):
        found.setdefault(seed, {}).setdefault(figure, value)
    return found


def seed_of_key(key: object) -> int | None:
    """Return the seed that a key names ("42", "seed_42", "seed42"), None for another key."""
    match = SEED_KEY.fullmatch(str(key).strip())
    return int(match.group(1)) if match else None


def headline(submission: dict[str, Any] | None, names: tuple[str, ...]) -> Any:
    """Return the record's own value of the first of these keys that has one; of a mapping by seed its mean."""
    for name in names:
        value = (submission or {}).get(name)
        if isinstance(value, dict):
            value = next((value[key] for key in ("mean", "avg", "average") if key in value), None)
        if _is_figure(value):
            return value
    return None


def listed_seeds(submission: dict[str, Any] | None) -> list[int]:
    """Return every seed that submission.json lists, with figures or without."""
    content = submission or {}
    named = content.get("seeds")
    listed = [int(seed) for seed in named if str(seed).isdigit()] if isinstance(named, list) else []
    return sorted({*listed, *submitted_figures(content)})


def _entries(submission: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    ordered = sorted(submission, key=lambda key: PER_SEED_KEYS.index(key) if key in PER_SEED_KEYS else 99)
    for key in ordered:
        value = submission[key]
        if FOREIGN_KEYS.search(str(key)):
            continue
        if isinstance(value, dict):
            own = seed_of_key(key)
            if own is not None and not str(key).isdigit():
                yield from _figures(own, value, "val_bpb")
            else:
                is_map = key in PER_SEED_KEYS or "seed" in key or SEED_MAPS.fullmatch(key)
                for name, entry in value.items():
                    is_named = is_map or str(name).lower().startswith("seed")
                    if is_named and (seed := seed_of_key(name)) is not None:
                        yield from _figures(seed, entry, _figure_of_key(key))
        elif isinstance(value, list):
            yield from _list_entries(key, value, submission.get("seeds"))
        elif str(key).lower().startswith("seed") and (seed := seed_of_key(key)) is not None and _is_figure(value):
            yield seed, "val_bpb", value


def _list_entries(key: str, values: list[Any], seeds: Any) -> Iterator[tuple[int, str, Any]]:
    """Yield the figures of a list: of objects that name their seed, or of numbers beside the list of seeds."""
    if all(isinstance(entry, dict) for entry in values):
        for entry in values:
            seed = seed_of_key(entry.get("seed"))
            if seed is not None:
                yield from _figures(seed, {name: value for name, value in entry.items() if name != "seed"}, "val_bpb")
    elif key != "seeds" and isinstance(seeds, list) and len(seeds) == len(values) and MAPPED_FIGURES.search(key):
        for named, value in zip(seeds, values):
            if (seed := seed_of_key(named)) is not None and _is_figure(value):
                yield seed, _figure_of_key(key), value


def _figures(seed: int, entry: Any, figure: str) -> Iterator[tuple[int, str, Any]]:
    if isinstance(entry, dict):
        yield from ((seed, str(name), _number(value)) for name, value in entry.items() if not isinstance(value, dict))
    elif _is_figure(entry):
        yield seed, figure, _number(entry)


def _figure_of_key(key: str) -> str:
    """Return which figure the bare numbers under a key are."""
    plain = re.sub(r"_?(by|per|each)?_?seeds?(_results|_scores)?$|^(per_)?seeds?_", "", str(key))
    return plain if MAPPED_FIGURES.search(plain) else "val_bpb"


def _number(value: Any) -> Any:
    """Return a number written as text as a number that keeps its digits; everything else as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d[\d,]*(\.\d+)?\s*", value):
        plain = value.strip().replace(",", "")
        return PrintedFloat(plain) if "." in plain else int(plain)
    return value


def _is_figure(value: Any) -> bool:
    """Return whether a JSON value is a number, or text that holds one."""
    return isinstance(value, int | float | str) and printed_number(value)[0] is not None
