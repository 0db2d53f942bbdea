"""Pieces of the report's page: cards, tables, figures and lists as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from results.render import fixed, signed
from results.report.figures import Drawn, inline_svg
from results.stats import Summary
from results.tables import SeedTable, shown_columns


def make_cards(cards: Sequence[tuple[str, str]]) -> str:
    """Return headline figures, each with what it is."""
    body = "\n".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in cards
    )
    return f'<div class="cards">\n{body}\n</div>'


def seed_rows(table: SeedTable) -> str:
    """Return the seed table; every number carries its full-precision value in data-value."""
    shown = shown_columns(table)
    header = "".join(f"<th>{escape(heading)}</th>" for heading in ("seed", *(h for h, _, _ in shown), "marks"))
    rows = []
    for row in table.seeds:
        name = str(row["seed"]) + (f" / {row['repeat']}" if row["repeat"] else "")
        cells = "".join(_cell(row[key], places, f'data-seed="{name}" data-column="{key}"') for _, key, places in shown)
        marks = escape(", ".join(row["marks"]))
        kind = "note" if row["reused_stages"] and len(row["marks"]) == 1 else "mark"  # a shared stage is no warning
        rows.append(f'<tr><td>{name}</td>{cells}<td class="{kind}">{marks}</td></tr>')
    for label, index in (("mean", 1), ("std (ddof=1)", 2), ("n", 0)):
        cells = "".join(
            _summary_cell(table.summary[key], index, places, f'data-summary="{label}" data-column="{key}"')
            for _, key, places in shown
        )
        rows.append(f'<tr class="summary"><td>{label}</td>{cells}<td></td></tr>')
    content = f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="seeds">{content}</table></div>'


def _cell(value: float | None, places: int | None, data: str) -> str:
    text = signed(value) if places is None else fixed(value, places)
    full = "" if value is None else repr(value)
    return f'<td {data} data-value="{full}">{escape(text)}</td>'


def _summary_cell(entry: Summary, index: int, places: int | None, data: str) -> str:
    if index == 0:
        return _cell(entry.n, 0, data)
    if index == 2 and entry.n == 1:
        return f'<td {data} data-value="">no spread</td>'
    value = entry[index]
    shown = places if places is None or index == 1 else max(places, 1)
    if places is None and index == 2:
        shown = 5
    return _cell(value, shown, data)


def draw_inline(drawn: Drawn, prefix: str) -> str:
    """Return a figure inside the page, its ids beginning with prefix."""
    return (
        f"<figure><h3>{escape(drawn.title)}</h3>\n{inline_svg(drawn, prefix)}\n"
        f"<figcaption>{escape(drawn.caption)}</figcaption></figure>"
    )


def show_value(value: Any) -> str:
    """Return one fact as text, a dash for none."""
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return str(value)


def as_list(lines: Sequence[str], otherwise: str) -> str:
    """Return lines as a list, or what is said where there are none."""
    if not lines:
        return f'<p class="ok">{escape(otherwise)}</p>'
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
