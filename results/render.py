"""Plain tables as text, Markdown, CSV: lists of cells in, one string out; and words that several tables share."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

MISSING = "-"
CPU = "CPU"  # the device of a run without GPUs
MIXED = "computed on different devices"
SHOWN_RUNS = 12  # by name, on each device


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


def mixed_devices(devices: Mapping[str, str]) -> str:
    """Return which runs were computed on what, where that is more than one model of GPU, or GPUs and CPUs; else "".

    devices: run -> model of its GPUs, or CPU; "" where nobody knows, which is left out.
    """
    groups: dict[str, list[str]] = {}
    for run, device in devices.items():
        if device:
            groups.setdefault(device, []).append(run)
    if len(groups) < 2:
        return ""
    each = (
        f"{device}: {', '.join(runs[:SHOWN_RUNS])}" + f" and {len(runs) - SHOWN_RUNS} more" * (len(runs) > SHOWN_RUNS)
        for device, runs in groups.items()
    )
    return f"{MIXED} ({'; '.join(each)}): these round differently, so that the spread is not that of seeds alone"
