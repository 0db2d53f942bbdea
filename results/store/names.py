"""The names of runs and of their files: what a row of any table says about where its other files lie."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from results.schema import BASE

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


def parse_run_name(name: str) -> tuple[str, int, int] | None:
    """Return variant (empty where none is named), seed and repeat of a run's name; None for any other name."""
    found = re.fullmatch(r"(?:variant=(.+)-)?seed=(-?\d+)-repeat=(\d+)", name)
    return None if found is None else (found[1] or "", int(found[2]), int(found[3]))


def attempt_file_name(variant: str, seed: int, repeat: int, attempt: int) -> str:
    """Return the file name that one attempt has in all four tables; variant as for run_name."""
    return f"{run_name(variant, seed, repeat)}-attempt={attempt}.parquet"


def variant_of_file(name: str) -> str | None:
    """Return the variant that an attempt's file name says, `base` where it names none; None for any other name."""
    run, mark, _ = name.rpartition("-attempt=")
    parsed = parse_run_name(run) if mark else None
    return None if parsed is None else parsed[0] or BASE


def is_named(row: pd.Series | Mapping[str, Any]) -> bool:
    """Return whether a row is of a sweep that names variants: `base` may be one, or stand for having none."""
    return str(row["run_id"]).startswith("variant=")


def name_of_row(row: pd.Series | Mapping[str, Any]) -> str:
    """Return the name of the run that a row belongs to: that of its folder, and the start of its file names.

    Raises ValueError for a variant that cannot be part of a file name.
    """
    return run_name(str(row["variant"]) if is_named(row) else "", int(row["seed"]), int(row["repeat"]))
