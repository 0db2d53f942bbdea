"""What was measured, and everything computed from it: `results.load(DIR)` and friends for pandas people.

Nothing heavy is imported until one of the functions is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def load(out: object) -> pd.DataFrame:
    """Return the `runs` table of a run directory (path or URI): one row an attempt."""
    from results.store.reader import load_table

    return load_table(out, "runs")


def stages(out: object) -> pd.DataFrame:
    """Return the `stages` table: one row a finished stage of a committed attempt."""
    from results.store.reader import load_table

    return load_table(out, "stages")


def steps(out: object) -> pd.DataFrame:
    """Return the `steps` table: one row an optimizer step of a committed attempt."""
    from results.store.reader import load_table

    return load_table(out, "steps")


def documents(out: object) -> pd.DataFrame:
    """Return the `documents` table: one row a validation document of a committed attempt."""
    from results.store.reader import load_table

    return load_table(out, "documents")
