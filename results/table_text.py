"""The seed table in words: text, Markdown, JSON or CSV."""

from __future__ import annotations

import json
from typing import Any

from results.render import MISSING, csv_table, fixed, markdown_table, signed, text_table
from results.schema import FINISHED
from results.stats import Summary
from results.tables import SEED_KEYS, SPENT, SUMMARIZED, SeedTable, shown_columns, spent_in_all

REUSED = "*"  # beside the time of a stage that another run computed
REUSED_TIMES = ("train_s", "quantize_s", "evaluate_s", "ttt_s")


def as_json(table: SeedTable, *, with_population_std: bool = False) -> dict[str, Any]:
    """Return the table as plain JSON values.

    `same_seed_spread` is there only when a seed was repeated, `spent` only where the sweep names what a GPU costs.
    """
    content: dict[str, Any] = {
        "schema_version": table.schema_version,
        "sweep": table.identity["sweep"],
        "data_hash": table.identity["data_hash"],
        "seeds": [{key: row[key] for key in SEED_KEYS} for row in table.seeds],
        "summary": {column: table.summary[column]._asdict() for column in SUMMARIZED},
    }
    if with_population_std:
        for column in SUMMARIZED:
            content["summary"][column]["std_ddof0"] = table.std_ddof0[column]
    if any(spread.n for spread in table.same_seed.values()):
        content["same_seed_spread"] = {
            column: {"degrees_of_freedom": spread.n, "std_ddof1": spread.std_ddof1}
            for column, spread in table.same_seed.items()
            if column in SUMMARIZED
        }
    if "cost" in spent_in_all(table.seeds):
        each = [{key: row[key] for key in ("seed", "repeat", *SPENT)} for row in table.seeds]
        content["spent"] = {**spent_in_all(table.seeds), "seeds": each}
    return content


def render(table: SeedTable, form: str, *, with_population_std: bool = False) -> str:
    """Return the table as text, markdown, json or csv (csv: the rows of the seeds, full precision, no summary).

    with_population_std: add the std with ddof=0, as some published tables have it, under its own name.
    """
    if form == "json":
        return json.dumps(as_json(table, with_population_std=with_population_std), indent=2, allow_nan=False)
    if form == "csv":
        keys = [*SEED_KEYS, "context_gain_bpb", "adaptation_gain_bpb", *spent_in_all(table.seeds)]
        return csv_table(keys, [[row[key] for key in keys] for row in table.seeds]).rstrip("\n")
    header, rows = block_cells(table, with_population_std)
    if form == "markdown":
        body = markdown_table(header, rows)
        return "\n".join([body, "", *(f"- {line}" for line in foot(table))])
    body = text_table(header, rows, rules_before=[len(table.seeds)])
    return "\n".join([_title(table), body, *foot(table)])


def _title(table: SeedTable) -> str:
    """Return the line above the table: which sweep, how many seeds, which data and configuration."""
    finished = sum(row["state"] == FINISHED for row in table.seeds)
    hashes = "  ".join(f"{name[:-5]} {hash_shown(table, name)}" for name in ("config_hash", "data_hash"))
    return f"{table.identity['sweep'] or 'unnamed sweep'}: {finished} of {len(table.seeds)} runs finished  {hashes}"


def hash_shown(table: SeedTable, name: str) -> str:
    """Return the start of the hash that all rows share; mixed when they differ, unknown when none has one."""
    value = table.identity[name]
    if value is not None:
        return value[:12]
    return "mixed" if any(note.startswith(f"{name} differs") for note in table.notes) else "unknown"


def block_cells(table: SeedTable, with_population_std: bool) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of cells: one row a run, then mean, std and n."""
    shows_repeat = any(row["repeat"] for row in table.seeds)
    shown = shown_columns(table)
    header = ["seed", *(["repeat"] if shows_repeat else []), *(heading for heading, _, _ in shown), "marks"]
    rows = []
    for row in table.seeds:
        first = [str(row["seed"]), *([str(row["repeat"])] if shows_repeat else [])]
        cells = [_cell(row[key], decimals) + _reuse_mark(row, key) for _, key, decimals in shown]
        rows.append([*first, *cells, ", ".join(row["marks"]) or MISSING])
    blank = [""] if shows_repeat else []
    summaries = [table.summary[key] for _, key, _ in shown]
    decimals = [places for _, _, places in shown]
    is_reused = [any(_reuse_mark(row, key) for row in table.seeds) for _, key, _ in shown]
    means = [
        _cell(entry.mean, 1 if places == 0 else places) + REUSED * reused
        for entry, places, reused in zip(summaries, decimals, is_reused)
    ]
    spreads = [_spread(entry, places) for entry, places in zip(summaries, decimals)]
    rows.append(["mean", *blank, *means, ""])
    rows.append(["std", *blank, *spreads, ""])
    if with_population_std:
        entries = [Summary(entry.n, None, table.std_ddof0[key]) for entry, (_, key, _) in zip(summaries, shown)]
        cells = [_spread(entry, places) for entry, places in zip(entries, decimals)]
        rows.append(["population std", *blank, *cells, ""])
    rows.append(["n", *blank, *(str(entry.n) for entry in summaries), ""])
    return header, rows


def _cell(value: float | None, decimals: int | None) -> str:
    return signed(value) if decimals is None else fixed(value, decimals)


def _reuse_mark(row: dict[str, Any], key: str) -> str:
    """Return the mark of a time that another run spent."""
    return REUSED if key in REUSED_TIMES and key.removesuffix("_s") in (row["reused_stages"] or "").split(",") else ""


def _spread(entry: Summary, decimals: int | None) -> str:
    """Return the sample std; one value has none, and that is said instead of 0."""
    if entry.n == 1:
        return "no spread"
    return fixed(entry.std_ddof1, 5 if decimals is None else max(decimals, 1))


def foot(table: SeedTable) -> list[str]:
    """Return the lines under the table: conventions, same-seed spread, order-0 bpb, limits, notes."""
    lines = [
        "mean, std and n are over seeds (repeats of a seed averaged first); std is the sample one (ddof=1); "
        "scores in bits per byte",
        "TTT gain = context (lr-0 minus pre-TTT) + adaptation (post-TTT minus lr-0); negative is better",
    ]
    spread = table.same_seed["post_ttt_bpb"]
    if spread.n:
        lines.append(
            f"same-seed spread of post-TTT (repeats of one seed, pooled, {spread.n} degrees of freedom): "
            f"std {spread.std_ddof1:.6f}"
        )
    order0 = "not recorded" if table.order0_bpb is None else f"{table.order0_bpb:.5f} bpb"
    lines.append(f"order-0 token distribution of the training part, on the same validation text: {order0}")
    conventions = sorted({str(row["code_bytes_convention"]) for row in table.seeds if row["code_bytes_convention"]})
    if conventions:
        lines.append(f"artifact bytes = model + code; code counted as: {'; '.join(conventions)}")
    lines += spent_lines(table.seeds)
    lines += [f"seed={row['seed']} {row['state']}: {row['error']}" for row in table.seeds if row["error"]]
    return [*lines, *(f"note: {note}" for note in table.notes)]


def spent_lines(seeds: list[dict[str, Any]]) -> list[str]:
    """Return a line with what all runs together spent, none where no GPU was used."""
    spent = spent_in_all(seeds)
    if not spent:
        return []
    cost = f", cost {spent['cost']:.2f} at the spec's price_per_gpu_hour" if "cost" in spent else ""
    words = "all attempts of a run, failed ones too, from their place to their end"
    return [f"GPU-hours: {words}; {spent['gpu_hours']:.3f} in all{cost}"]
