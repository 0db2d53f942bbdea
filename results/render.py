"""Plain tables as text, Markdown, CSV: lists of cells in, one string out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

MISSING = "-"


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, rules_before: Sequence[int] = (), is_words: bool = False
) -> str:
    """Return right-aligned columns under a header, left-aligned ones if is_words.

    A rule stands before each row index of rules_before.
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    align = str.ljust if is_words else str.rjust
    rule = "  ".join("-" * width for width in widths)
    lines = ["  ".join(map(align, header, widths)).rstrip(), rule]
    for index, row in enumerate(rows):
        if index in rules_before:
            lines.append(rule)
        lines.append("  ".join(map(align, row, widths)).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, is_words: bool = False) -> str:
    """Return a GitHub table, numbers to the right, words (is_words) to the left."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join(["---" if is_words else "---:"] * len(header)) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return CSV with full-precision numbers; missing values are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if cell is None else cell for cell in row] for row in rows])
    return buffer.getvalue()


def fixed(value: object, decimals: int) -> str:
    """Return a number with so many decimals, thousands separated; a dash for None."""
    if value is None:
        return MISSING
    assert isinstance(value, int | float), f"{value!r} is not a number"
    return f"{value:,.{decimals}f}"


def signed(value: float | None, decimals: int = 5) -> str:
    """Return a difference with its sign; a dash for None."""
    return MISSING if value is None else f"{value:+.{decimals}f}"
