"""The names of runs and of their files: what a row of any table says about where its other files lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

VARIANT_PATTERN = re.compile(r"[A-Za-z0-9_+=,][A-Za-z0-9._+=,-]{0,79}")


def run_name(variant: str, seed: int, repeat: int) -> str:
    """Return a run's name; variant is empty in a sweep that names none.

    Raises ValueError for a variant that cannot be part of a file name.
    """
    if variant and not VARIANT_PATTERN.fullmatch(variant):
        raise ValueError(
            f"variant={variant!r} must be at most 80 letters, digits and ._+=,- and not start with a dot or hyphen"
        )
    prefix = f"variant={variant}-" if variant else ""
    return f"{prefix}seed={seed}-repeat={repeat}"


def attempt_file_name(variant: str, seed: int, repeat: int, attempt: int) -> str:
    """Return the file name that one attempt has in all four tables; variant as for run_name."""
    return f"{run_name(variant, seed, repeat)}-attempt={attempt}.parquet"


def name_of_row(row: pd.Series | Mapping[str, Any]) -> str:
    """Return the name of the run that a row belongs to: that of its folder, and the start of its file names.

    A row says `base` both for a variant of that name and for a sweep without variants; run_id tells which it is.
    """
    is_named = str(row["run_id"]).startswith("variant=")
    return run_name(str(row["variant"]) if is_named else "", int(row["seed"]), int(row["repeat"]))
