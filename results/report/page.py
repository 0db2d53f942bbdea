"""The report: one self-contained page made from Parquet, for looking at rather than reading.

Nothing in it is fetched from elsewhere; figures are inline SVG in the page's colors and also saved as files.
"""

from __future__ import annotations

import math
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from results.compare.published_text import published_block
from results.compare.sides import text_of_runs
from results.published.records import Record
from results.render import fixed, signed
from results.report.audit import audit_section
from results.report.data import System
from results.report.figures import Drawn, draw_all, own_style, save_files, score_intervals
from results.report.html import as_list, draw_inline, make_cards, seed_rows, show_value
from results.report.variant_figures import draw_variants
from results.report.variants import Variants, read_view
from results.report.variants_page import variants_section
from results.schema import FINISHED, SCHEMA_VERSION
from results.stats import t_interval

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
        return _write_report([read_view(out) for out in outs], path, records or [])


def _write_report(systems: list[System | Variants], path: Path, records: list[Record]) -> list[Path]:
    folder = path.with_name(f"{path.stem}_figures")
    written: list[Path] = []
    parts = [_header(systems)]
    if len(systems) > 1:
        overview = score_intervals([system for system in systems if isinstance(system, System)])
        if overview is not None:
            parts += ["<h2>Side by side</h2>", '<div class="figures">', draw_inline(overview, "all"), "</div>"]
            written += save_files(overview, folder, "all_intervals")
    for number, system in enumerate(systems):
        if len(systems) > 1:
            parts.append(f"<h2>{escape(system.name)} <span class='sub'>{escape(system.out)}</span></h2>")
        if isinstance(system, System):
            drawn = draw_all(system)
            parts += _section(system, drawn, f"f{number}")
        else:
            drawn = draw_variants(system)
            parts += variants_section(system, drawn, f"f{number}")
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


def _header(systems: list[System | Variants]) -> str:
    names = ", ".join(dict.fromkeys(escape(system.name) for system in systems))
    tables = [
        table
        for system in systems
        for table in ([system.table] if isinstance(system, System) else system.ablation.tables.values())
    ]
    runs = sum(len(table.seeds) for table in tables)
    done = sum(row["state"] == FINISHED for table in tables for row in table.seeds)
    return f'<h1>{names}</h1>\n<p class="sub">{done} of {runs} runs finished. Lower bits per byte is better.</p>'


def _section(system: System, drawn: list[Drawn], prefix: str) -> list[str]:
    """Return one system's cards, table, figures, provenance and disagreements."""
    return [
        _cards(system),
        "<h3>Seeds</h3>",
        seed_rows(system.table),
        *(f'<p class="note">{escape(line)}</p>' for line in _remarks(system)),
        "<h3>Figures</h3>",
        '<div class="figures">',
        *(draw_inline(entry, f"{prefix}-{entry.name}") for entry in drawn),
        "</div>",
        "<h3>Disagreements</h3>",
        as_list(system.disagreements, "None found: rows, their sums over documents and their hashes agree."),
        *audit_section(system.out, set(system.table.variants)),
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
    return make_cards(cards)


def _remarks(system: System) -> list[str]:
    table = system.table
    spread = table.same_seed["post_ttt_bpb"]
    lines = ["Mean, std and n are over seeds; TTT gain is after minus before, negative is better."]
    if spread.n:
        lines.append(f"Same-seed spread of post-TTT: std {spread.std_ddof1:.6f} ({spread.n} degrees of freedom).")
    lines += [f"seed {row['seed']} {row['state']}: {row['error']}" for row in table.seeds if row["error"]]
    return [*lines, *table.notes, *table.problems]


def _provenance(runs: pd.DataFrame) -> str:
    """Return one row a fact: its one value, or every seed's where they differ."""
    rows = []
    for name in PROVENANCE:
        values = {seed: show_value(value) for seed, value in zip(runs["seed"], runs[name])}
        distinct = sorted(set(values.values()) - {"-"})
        if not distinct:
            continue
        text = distinct[0] if len(distinct) == 1 else "; ".join(f"{seed}: {value}" for seed, value in values.items())
        rows.append(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>")
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'


def _published(records: list[Record], system: System | Variants) -> list[str]:
    if not records:
        return []
    ours = text_of_runs(system.out)
    blocks = [f"<pre class='scroll'>{escape(published_block(record, ours))}</pre>" for record in records]
    return ["<h2>Published by others</h2>", *blocks]
