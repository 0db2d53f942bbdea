"""A README's tables with one row a seed, and the spreads its text states; tables with one column a seed are turned.

A table counts when a column is called after the seed, when the cells of its first column name seeds ("Seed 42"), or
when its headings do (transposed). Cells stay text, because their decimals say what the author vouches for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from results.published.printed import printed_numbers

SEED_WORD = re.compile(r"\W*(?:random |rng )?seed\b(?!\s*[-_#]?\s*\d)", re.IGNORECASE)  # "Seeds" counts them
SEED_CELL = re.compile(r"\W*(?:seed\s*[-_=:#]?\s*|s)?(\d{1,10})\W*(?:\([^)]*\)\W*|\[[^\]]*\]\W*)?", re.IGNORECASE)
NAMED_SEED = re.compile(r"\W*seed\s*[-_=:#]?\s*(\d{1,10})\b.*", re.IGNORECASE)
AGGREGATE = re.compile(r"\W*(?:\d+[- ]seed\s+)?(mean|avg|average|std|stdev|sd|σ|μ|max|min|median|spread|range)\b", re.I)
VALUE_NAMES = ("metric", "metrics", "figure", "quantity", "measure", "item", "stat", "statistic", "result", "")
VALUE_HEADS = ("value", "values", "result", "results", "score", "this run", "this submission", "")
SPREAD_TEXT = re.compile(
    r"(?<![\w.])(\d\.\d{2,})\s*(?:bpb|BPB|val_bpb)?\s*(?:±|\+/?-|\\pm)\s*(\d?\.\d+(?:e-\d+)?|\d(?:\.\d+)?e-\d+)"
)


def read_tables(text: str) -> list[dict[str, Any]]:
    """Return the tables about seeds as {"columns": [...], "rows": [{column: cell}]}, the first column naming them."""
    tables = []
    for block in _blocks(text):
        columns = _unique(block[0])
        rows = [cells for cells in block[1:] if not set("".join(cells)) <= set("-: ")]
        if not rows:
            continue
        if seed_column(columns):
            tables.append({"columns": columns, "rows": [dict(zip(columns, cells)) for cells in rows]})
        elif sum(_heads_a_seed(name, columns) for name in columns[1:]):
            tables.append(_turned(columns, rows))
        elif any(NAMED_SEED.fullmatch(cells[0]) for cells in rows if cells):
            columns = ["Seed", *columns[1:]]
            tables.append({"columns": columns, "rows": [dict(zip(columns, cells)) for cells in rows]})
    return tables


def read_values(text: str) -> list[dict[str, str]]:
    """Return the tables with one value a figure ("| Metric | Value |") as {figure: cell}."""
    found = []
    for block in _blocks(text):
        heads = [name.lower() for name in block[0]]
        if len(heads) == 2 and heads[0] in VALUE_NAMES and heads[1] in VALUE_HEADS:
            rows = [cells for cells in block[1:] if len(cells) == 2 and not set("".join(cells)) <= set("-: ")]
            found.append(dict(zip(_unique([cells[0] for cells in rows]), (cells[1] for cells in rows))))
    return found


def read_spreads(text: str) -> list[dict[str, str]]:
    """Return every "mean +- spread" of a README outside its tables, with the line it stands in."""
    found = []
    for line in text.splitlines():
        if not line.lstrip().startswith("|"):
            found += [
                {"mean": match.group(1), "std": match.group(2), "line": line.strip()[:200]}
                for match in SPREAD_TEXT.finditer(line)
            ]
    return found


def turn_table(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table with its seeds in rows; one that already is so comes back as it is."""
    columns = table["columns"]
    if seed_column(columns) or not any(_heads_a_seed(name, columns) for name in columns[1:]):
        return table
    return _turned(columns, [[str(row.get(name, "")) for name in columns] for row in table["rows"]])


def seed_column(columns: list[str]) -> str | None:
    """Return the name of a table's seed column, None where it has none; "Seed 42" heads the figures of one seed."""
    return next((name for name in columns if SEED_WORD.match(name)), None)


def seed_in_cell(cell: str) -> int | None:
    """Return the seed that a row is about: a number, perhaps with a remark in brackets; None for mean and std rows."""
    match = SEED_CELL.fullmatch(cell) or NAMED_SEED.fullmatch(cell)
    return int(match.group(1)) if match else None


def _heads_a_seed(name: str, columns: list[str]) -> bool:
    """Return whether a heading names one seed: "Seed 42", or a bare number among several under "Metric"."""
    if NAMED_SEED.fullmatch(name):
        return True
    bare = [other for other in columns[1:] if re.fullmatch(r"\W*\d{1,6}\W*", other)]
    return name in bare and len(bare) >= 2 and not printed_numbers(columns[0])


def _turned(columns: list[str], rows: list[list[str]]) -> dict[str, Any]:
    """Return a transposed table with one row a seed (and one each for mean and std)."""
    kept = [(place, name) for place, name in enumerate(columns) if place and _is_about_seeds(name, columns)]
    headings = _unique([cells[0] for cells in rows if cells])
    turned = []
    for place, name in kept:
        seed = seed_in_cell(name)
        row = {"Seed": name if seed is None else str(seed)}
        row |= {heading: cells[place] for heading, cells in zip(headings, rows) if place < len(cells)}
        turned.append(row)
    return {"columns": ["Seed", *headings], "rows": turned}


def _is_about_seeds(name: str, columns: list[str]) -> bool:
    return _heads_a_seed(name, columns) or AGGREGATE.match(name) is not None


def _blocks(text: str) -> Iterator[list[list[str]]]:
    block: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.strip().startswith("|"):
            block.append([cell.strip().strip("*`").strip() for cell in line.strip().strip("|").split("|")])
            continue
        if len(block) > 1:
            yield block
        block = []


def _unique(names: list[str]) -> list[str]:
    """Return headings with repeated ones numbered, so that no cell hides another."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique
