"""What a sweep announced in sweep.json of its run directory: its variants in their order, and what a GPU costs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from results.schema import BASE
from results.store.location import open_location
from results.store.reader import Rows

MAX_NAMED = 20  # in one line of an error


def announced_variants(out: object) -> list[str]:
    """Return the names of a sweep's variants, the baseline first; none where sweep.json is absent or names none.

    Raises ValueError for a damaged sweep.json.
    """
    return [str(name) for name in _section(out, "variants")]


def announced_price(out: object) -> float | None:
    """Return price_per_gpu_hour of the spec that a run directory was last driven with, None where it names none.

    Raises ValueError for a damaged sweep.json.
    """
    price = _section(out, "spec").get("price_per_gpu_hour")
    return float(price) if isinstance(price, int | float) else None


def _section(out: object, name: str) -> Mapping[str, Any]:
    """Return one mapping of sweep.json, {} where the file or the mapping is absent."""
    import pyarrow.fs as pafs

    location = open_location(out)
    path = location.path("sweep.json")
    if location.filesystem.get_file_info(path).type != pafs.FileType.File:
        return {}
    try:
        with location.filesystem.open_input_stream(path) as stream:
            return dict(json.loads(bytes(stream.read())).get(name) or {})
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{location.shown}/sweep.json is damaged ({error})") from None


def order_variants(found: Iterable[str], announced: list[str]) -> list[str]:
    """Return the variants in the announced order, `base` before what nobody announced, that by name."""
    places = {name: place for place, name in enumerate(announced)}
    return sorted(set(found), key=lambda name: (places.get(name, len(places)), name != BASE, name))


def rows_of_variant(rows: Rows, out: object, wanted: str | None, *, fix: str) -> Rows:
    """Return the rows of the one variant that is meant. Raises as choose_variant does."""
    names = order_variants(rows.frame["variant"], announced_variants(out))
    chosen = choose_variant(names, wanted, shown=str(out), fix=fix)
    return rows._replace(frame=rows.frame[rows.frame["variant"] == chosen].reset_index(drop=True))


def choose_variant(names: Sequence[str], wanted: str | None, *, shown: str, fix: str) -> str:
    """Return the variant that is meant: the wanted one, or the only one.

    fix: how to name one, in words that a variant's name completes. Raises ValueError when there is no such variant,
    naming the nearest, or when there are several and none is wanted, naming them.
    """
    listed = ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
    if wanted is None and len(names) > 1:
        raise ValueError(f"{shown} holds {len(names)} variants ({listed}); {fix}{names[0]}")
    if wanted is not None and wanted not in names:
        nearest = difflib.get_close_matches(wanted, names, n=1)
        hint = f"nearest: {nearest[0]}" if nearest else f"there are {listed}"
        raise ValueError(f"{shown} has no variant {wanted!r}; {hint}")
    return names[0] if wanted is None else wanted
