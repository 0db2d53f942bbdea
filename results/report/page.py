"""The report: one self-contained page made from Parquet, for looking at rather than reading.

Nothing in it is fetched from elsewhere; figures are inline SVG in the page's colors and also saved as files.
"""

from __future__ import annotations

import math
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from results.compare.published_text import published_block
from results.compare.sides import text_of_runs
from results.published.records import Record
from results.render import fixed, signed
from results.report.audit import audit_section
from results.report.data import System, read_system
from results.report.figures import Drawn, draw_all, inline_svg, own_style, save_files, score_intervals
from results.schema import FINISHED, SCHEMA_VERSION
from results.stats import Summary, t_interval
from results.tables import shown_columns

if TYPE_CHECKING:
    import pandas as pd

PROVENANCE = (
    "state", "config_hash", "data_hash", "code_hash", "code_changed", "git_commit", "git_dirty", "python_version",
    "torch_version", "ray_version", "gpu_model", "driver_version", "num_gpus", "num_cpus", "world_size", "node_label",
    "attention_backend", "peak_memory_bytes", "started_at", "ended_at", "attempts", "num_resumes", "lost_steps",
    "val_documents_hash", "tokenizer_hash", "code_bytes_convention", "source",
)  # fmt: skip


def write_report(outs: list[str], path: Path, *, records: list[Record] | None = None) -> list[Path]:
    """Write the page of one or more run directories and its figure files; return the paths written.

    records: published records to show in a block of their own. Figures go to <stem>_figures beside the page.
    Raises FileNotFoundError or ValueError when a directory has no row to show.
    """
    with own_style():
        return _write_report([read_system(out) for out in outs], path, records or [])


def _write_report(systems: list[System], path: Path, records: list[Record]) -> list[Path]:
    folder = path.with_name(f"{path.stem}_figures")
    written: list[Path] = []
    parts = [_header(systems)]
    if len(systems) > 1:
        overview = score_intervals(systems)
        if overview is not None:
            parts += ["<h2>Side by side</h2>", '<div class="figures">', _figure(overview, "all"), "</div>"]
            written += save_files(overview, folder, "all_intervals")
    for number, system in enumerate(systems):
        drawn = draw_all(system)
        parts += _section(system, drawn, f"f{number}", has_heading=len(systems) > 1)
        prefix = f"{number}_" if len(systems) > 1 else ""
        for entry in drawn:
            written += save_files(entry, folder, f"{prefix}{entry.name}")
    parts += _published(records, systems[0])
    parts.append(f'<p class="note">Made by seedsweep from Parquet, results schema {SCHEMA_VERSION}.</p>')
    title = " and ".join(dict.fromkeys(system.name for system in systems))
    page = Template(_asset("page.html")).substitute(
        title=escape(f"{title}: seeds"), style=_asset("page.css"), body="\n".join(parts)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return [path, *written]


def _asset(name: str) -> str:
    return resources.files("results.report").joinpath(name).read_text(encoding="utf-8")


def _header(systems: list[System]) -> str:
    names = ", ".join(dict.fromkeys(escape(system.name) for system in systems))
    runs = sum(len(system.table.seeds) for system in systems)
    done = sum(row["state"] == FINISHED for system in systems for row in system.table.seeds)
    return f'<h1>{names}</h1>\n<p class="sub">{done} of {runs} runs finished. Lower bits per byte is better.</p>'


def _section(system: System, drawn: list[Drawn], prefix: str, *, has_heading: bool) -> list[str]:
    """Return one system's cards, table, figures, provenance and disagreements."""
    heading = [f"<h2>{escape(system.name)} <span class='sub'>{escape(system.out)}</span></h2>"] if has_heading else []
    return [
        *heading,
        _cards(system),
        "<h3>Seeds</h3>",
        _seed_table(system),
        *(f'<p class="note">{escape(line)}</p>' for line in _remarks(system)),
        "<h3>Figures</h3>",
        '<div class="figures">',
        *(_figure(entry, f"{prefix}-{entry.name}") for entry in drawn),
        "</div>",
        "<h3>Disagreements</h3>",
        _list(system.disagreements, "None found: rows, their sums over documents and their hashes agree."),
        *audit_section(system.out),
        "<h3>Provenance</h3>",
        _provenance(system.runs),
    ]


def _cards(system: System) -> str:
    """Return the headline figures."""
    summary = system.table.summary
    score = summary["post_ttt_bpb"]
    interval = t_interval(system.runs["post_ttt_bpb"].tolist())
    spread = (
        "no spread: one seed" if score.n == 1 else f"sample std {fixed(score.std_ddof1, 5)} (ddof=1), n = {score.n}"
    )
    said = "no interval" if interval is None else f"95% t interval {interval.low:.5f} to {interval.high:.5f}"
    minutes = sum(summary[name].mean or 0.0 for name in ("train_s", "quantize_s", "evaluate_s", "ttt_s")) / 60
    largest = system.runs["artifact_bytes"].max()
    cards = [
        (fixed(score.mean, 5), f"post-TTT bits per byte, mean; {spread}"),
        (said.rpartition("interval ")[2] if interval else "-", "95% t interval of the mean" if interval else said),
        (signed(summary["adaptation_gain_bpb"].mean), "gain by adaptation"),
        (signed(summary["context_gain_bpb"].mean), "gain by longer context"),
        (fixed(None if math.isnan(largest) else float(largest), 0), "artifact bytes, largest"),
        (f"{minutes:.1f} min", "a seed, all stages"),
        (fixed(system.table.order0_bpb, 5), "order-0 token distribution, for scale"),
    ]
    body = "\n".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in cards
    )
    return f'<div class="cards">\n{body}\n</div>'


def _seed_table(system: System) -> str:
    """Return the seed table; every number carries its full-precision value in data-value."""
    shown = shown_columns(system.table)
    header = "".join(f"<th>{escape(heading)}</th>" for heading in ("seed", *(h for h, _, _ in shown), "marks"))
    rows = []
    for row in system.table.seeds:
        name = str(row["seed"]) + (f" / {row['repeat']}" if row["repeat"] else "")
        cells = "".join(_cell(row[key], places, f'data-seed="{name}" data-column="{key}"') for _, key, places in shown)
        marks = escape(", ".join(row["marks"]))
        rows.append(f'<tr><td>{name}</td>{cells}<td class="mark">{marks}</td></tr>')
    for label, index in (("mean", 1), ("std (ddof=1)", 2), ("n", 0)):
        cells = "".join(
            _summary_cell(system.table.summary[key], index, places, f'data-summary="{label}" data-column="{key}"')
            for _, key, places in shown
        )
        rows.append(f'<tr class="summary"><td>{label}</td>{cells}<td></td></tr>')
    table = f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table class="seeds">{table}</table></div>'


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


def _remarks(system: System) -> list[str]:
    table = system.table
    spread = table.same_seed["post_ttt_bpb"]
    lines = ["Mean, std and n are over seeds; TTT gain is after minus before, negative is better."]
    if spread.n:
        lines.append(f"Same-seed spread of post-TTT: std {spread.std_ddof1:.6f} ({spread.n} degrees of freedom).")
    lines += [f"seed {row['seed']} {row['state']}: {row['error']}" for row in table.seeds if row["error"]]
    return [*lines, *table.notes, *table.problems]


def _figure(drawn: Drawn, prefix: str) -> str:
    return (
        f"<figure><h3>{escape(drawn.title)}</h3>\n{inline_svg(drawn, prefix)}\n"
        f"<figcaption>{escape(drawn.caption)}</figcaption></figure>"
    )


def _provenance(runs: pd.DataFrame) -> str:
    """Return one row a fact: its one value, or every seed's where they differ."""
    rows = []
    for name in PROVENANCE:
        values = {seed: _shown(value) for seed, value in zip(runs["seed"], runs[name])}
        distinct = sorted(set(values.values()) - {"-"})
        if not distinct:
            continue
        text = distinct[0] if len(distinct) == 1 else "; ".join(f"{seed}: {value}" for seed, value in values.items())
        rows.append(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>")
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def _shown(value: Any) -> str:
    if value is None or value != value:
        return "-"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return str(value)


def _published(records: list[Record], system: System) -> list[str]:
    if not records:
        return []
    ours = text_of_runs(system.out)
    blocks = [f"<pre class='scroll'>{escape(published_block(record, ours))}</pre>" for record in records]
    return ["<h2>Published by others</h2>", *blocks]


def _list(lines: list[str], otherwise: str) -> str:
    if not lines:
        return f'<p class="ok">{escape(otherwise)}</p>'
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
