"""The variants of a sweep in words: a block each and the differences to the baseline."""

from __future__ import annotations

import json
from typing import Any

from results.compare.comparison import ALPHA
from results.compare.power import POWER
from results.compare.variants import Ablation, Effect
from results.render import MISSING, csv_table, markdown_table, signed, text_table
from results.schema import FINISHED
from results.table_text import as_json as table_json
from results.table_text import block_cells, foot, hash_shown, spent_lines
from results.tables import SEED_KEYS

MAX_SEED_ROWS = 60  # with more runs than this only means, stds and counts are shown
DIFFERENCE_HEADER = ("variant", "difference", "95% interval", "p", "p (Holm)", "seeds", "test", "verdict")
GAINS = ("context_gain_bpb", "adaptation_gain_bpb")


def render(ablation: Ablation, form: str, *, with_population_std: bool = False) -> str:
    """Return blocks and differences as text, markdown, json or csv.

    csv: the rows of the seeds, full precision, each with its variant's difference to the baseline.
    """
    if form == "json":
        return json.dumps(as_json(ablation, with_population_std=with_population_std), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(ablation)
    lines = _blocks(ablation, form, with_population_std)
    differences = [_difference_cells(effect) for effect in ablation.effects]
    heading = f"differences to {ablation.baseline} (the baseline, {ablation.how_chosen}), post-TTT bits per byte"
    if form == "markdown":
        table = [markdown_table(DIFFERENCE_HEADER, differences)] if differences else []
        return "\n".join([*lines, f"**{heading}**", "", *table, "", *(f"- {line}" for line in _foot(ablation))])
    table = [text_table(DIFFERENCE_HEADER, differences)] if differences else []
    return "\n".join([_title(ablation), "", *lines, heading, *table, "", *_foot(ablation)])


def as_json(ablation: Ablation, *, with_population_std: bool = False) -> dict[str, Any]:
    """Return plain JSON values: under `variants` what a plain sweep's table has, then `differences`."""
    first = next(iter(ablation.tables.values()))
    variants = []
    for name, table in ablation.tables.items():
        content = table_json(table, with_population_std=with_population_std)
        seeds = [{**plain, "reused_stages": row["reused_stages"]} for plain, row in zip(content["seeds"], table.seeds)]
        block = {"variant": name, "config_hash": table.identity["config_hash"], "seeds": seeds}
        variants.append(
            block | {key: content[key] for key in ("summary", "same_seed_spread", "spent") if key in content}
        )
    return {
        "schema_version": max(table.schema_version for table in ablation.tables.values()),
        "sweep": first.identity["sweep"],
        "data_hash": first.identity["data_hash"],
        "baseline": ablation.baseline,
        "variants": variants,
        "differences": [effect_json(effect, ablation.baseline) for effect in ablation.effects],
    }


def effect_json(effect: Effect, baseline: str) -> dict[str, Any]:
    """Return one difference as plain JSON values; null where nothing was tested."""
    difference = effect.difference
    interval = None if difference is None else difference.interval
    return {
        "variant": effect.variant,
        "baseline": baseline,
        "method": effect.method or None,
        "seeds": effect.seeds,
        "difference_bpb": None if difference is None else difference.mean,
        "interval_95": None if interval is None else [interval.low, interval.high],
        "degrees_of_freedom": None if difference is None else difference.degrees_of_freedom,
        "p_better": effect.p_better,
        "p_better_holm": effect.p_better_holm,
        "p_worse": effect.p_worse,
        "p_worse_holm": effect.p_worse_holm,
        "verdict": effect.words,
        "seeds_needed": effect.seeds_needed,
    }


def _csv(ablation: Ablation) -> str:
    """Return one row a run; the columns of the difference repeat on every row of a variant."""
    effects = {effect.variant: effect_json(effect, ablation.baseline) for effect in ablation.effects}
    keys = [*SEED_KEYS, *GAINS, "reused_stages"]
    figures = ("difference_bpb", "low_95_bpb", "high_95_bpb", "p_better", "p_better_holm", "method", "verdict")
    rows = []
    for name, table in ablation.tables.items():
        effect = effects.get(name, {})
        low, high = effect.get("interval_95") or (None, None)
        said = {**effect, "low_95_bpb": low, "high_95_bpb": high}
        rows += [[name, *(row[key] for key in keys), *(said.get(key) for key in figures)] for row in table.seeds]
    return csv_table(["variant", *keys, *figures], rows).rstrip("\n")


def _title(ablation: Ablation) -> str:
    """Return the line above everything: which sweep, how many runs, which data."""
    seeds = [row for table in ablation.tables.values() for row in table.seeds]
    finished = sum(row["state"] == FINISHED for row in seeds)
    first = next(iter(ablation.tables.values()))
    return (
        f"{first.identity['sweep'] or 'unnamed sweep'}: {len(ablation.tables)} variants, {finished} of {len(seeds)} "
        f"runs finished  data_hash {hash_shown(first, 'data_hash')}"
    )


def _blocks(ablation: Ablation, form: str, with_population_std: bool) -> list[str]:
    """Return one block a variant: its runs where there are few, then mean, std and n."""
    num_runs = sum(len(table.seeds) for table in ablation.tables.values())
    lines = []
    for name, table in ablation.tables.items():
        header, rows = block_cells(table, with_population_std)
        count = len(table.seeds)
        if num_runs > MAX_SEED_ROWS:
            rows, count = rows[count:], 0
        title = f"{name}  config_hash {hash_shown(table, 'config_hash')}"
        if form == "markdown":
            lines += [f"**{title}**", "", markdown_table(header, rows), ""]
        else:
            lines += [title, text_table(header, rows, rules_before=[count] if count else []), ""]
    if num_runs > MAX_SEED_ROWS:
        lines += [f"{num_runs} runs: their rows are in --format csv and json", ""]
    return lines


def _difference_cells(effect: Effect) -> list[str]:
    """Return one row of the table of differences."""
    difference = effect.difference
    interval = None if difference is None else difference.interval
    return [
        effect.variant,
        signed(None if difference is None else difference.mean),
        MISSING if interval is None else f"[{interval.low:+.5f}, {interval.high:+.5f}]",
        _shown_p(effect.p_better),
        _shown_p(effect.p_better_holm),
        str(len(effect.seeds)),
        effect.method or MISSING,
        effect.words,
    ]


def _shown_p(p: float | None) -> str:
    return MISSING if p is None else f"{p:.4g}"


def explain(ablation: Ablation) -> list[str]:
    """Return what the columns of the differences mean, and what a marked time is."""
    tables = ablation.tables
    tested = sum(effect.p_better is not None for effect in ablation.effects)
    lines = [
        "difference = variant minus baseline over the seeds that both have (paired t), negative is better; where they "
        "share fewer than two, Welch over all seeds of both",
        f"p: one-sided, of better; Holm: corrected over the {tested} variants tested. better or worse: at corrected "
        f"p < {ALPHA:g}, worse by the p of the other side",
        f"seeds needed: of each variant, for power {POWER:g} at p < {ALPHA:g}/{max(1, tested)} if the observed gain "
        "and spread are the true ones",
    ]
    lines += spent_lines([row for table in tables.values() for row in table.seeds])
    if any(row["reused_stages"] for table in tables.values() for row in table.seeds):
        lines.append("* another run computed this stage: the time is that run's and was spent once")
    return lines


def _foot(ablation: Ablation) -> list[str]:
    """Return the lines under the differences: conventions, what was tested and how, failures, notes."""
    tables = ablation.tables
    common = foot(next(iter(tables.values())))[:2]
    named = [
        f"variant={name} seed={row['seed']} {row['state']}: {row['error']}"
        for name, table in tables.items()
        for row in table.seeds
        if row["error"]
    ]
    return [*common, *explain(ablation), *named, *(f"note: {note}" for note in ablation.notes)]
