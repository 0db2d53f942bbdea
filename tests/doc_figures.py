"""Renders what docs/recipe.md takes from the code and from docs/bench/frontier: presets, and the measured ablation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from model.config import HASHED_SECTIONS, RunConfig
from model.presets import PRESETS, published
from results.compare.variants import Ablation, Effect, read_table
from results.render import signed
from results.stats import Difference, paired
from tests.house import ROOT

MEASURED = ROOT / "docs" / "bench" / "frontier"
NOT_MEASURED = "No figures are committed yet."
LENGTHS = {
    "final": "500 steps", "screening": "One epoch of the corpus, 160 steps",
    "screening_rates": "The same epoch by later kernels, for seeds that were missing",
}  # fmt: skip
# (variant, what it is held against, quantity): the artifacts of both sides fill the same limit
EQUAL_BYTES = (
    ("all", "fit", "post-TTT"),
    ("quant", "fit", "post-TTT"),
    ("quant_matrix", "fit", "post-TTT"),
)
# the same: both sides of a pair have the same trained weights, or the same artifact
SAME_WEIGHTS = (
    ("quant", "fit", "quantization loss"),
    ("quant_matrix", "fit", "quantization loss"),
    ("quant_matrix", "quant", "quantization loss"),
    ("ttt", "base", "adaptation"),
    ("ttt_rank_96", "base", "adaptation"),
    ("ttt_chunk_48", "base", "adaptation"),
    ("all", "all_but_ttt", "adaptation"),
    ("all_chunk_48", "all_but_ttt", "adaptation"),
    ("all_chunk_48", "all", "adaptation"),
)
PAIRS = {"At equal bytes": EQUAL_BYTES, "On the same trained weights or the same artifact": SAME_WEIGHTS}
QUANTITIES: dict[str, Callable[[dict[str, Any]], float]] = {
    "post-TTT": lambda row: row["post_ttt_bpb"],
    "quantization loss": lambda row: row["pre_ttt_bpb"] - row["post_ema_bpb"],
    "adaptation": lambda row: row["post_ttt_bpb"] - row["ttt_lr0_bpb"],
}


def shown(value: object) -> str:
    """Return a setting's value as docs/recipe.md writes it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return str(value).lower()  # as YAML has it
    if isinstance(value, tuple):
        return ", ".join(item if isinstance(item, str) else ": ".join(map(str, item)) for item in value)
    return str(value)


def settings(config: RunConfig) -> dict[str, str]:
    """Return every setting that decides a score, by section and name."""
    return {
        f"{section}.{field.name}": shown(getattr(getattr(config, section), field.name))
        for section in HASHED_SECTIONS
        for field in dataclasses.fields(getattr(config, section))
    }


def changes(preset: str) -> dict[str, str]:
    """Return the settings in which a preset differs from the published recipe."""
    base = settings(published())
    return {name: value for name, value in settings(PRESETS[preset]()).items() if value != base[name]}


def preset_table(preset: str) -> str:
    """Return the table of what a preset changes."""
    lines = [f"| setting | {preset} |", "|---|---|", *(f"| `{name}` | {v} |" for name, v in changes(preset).items())]
    return "\n".join(lines)


def measured_tables(folder: Path = MEASURED) -> str:
    """Return the tables of the ablation's rows, or that there are none."""
    parts = []
    for name, length in LENGTHS.items():
        if (folder / name / "results").is_dir():
            ablation = read_table(folder / name)
            assert isinstance(ablation, Ablation)
            parts.append(f"{length}, {_where(ablation)}:\n\n{ablation_table(ablation)}")
            tables = {title: pair_table(ablation, pairs) for title, pairs in PAIRS.items()}
            parts += [f"{title}:\n\n{table}" for title, table in tables.items() if table]
    return "\n\n".join(parts) or NOT_MEASURED


def _where(ablation: Ablation) -> str:
    """Return which rows these are: the sweep and its code; variants of another code are named with theirs."""
    codes = {name: {row["code_hash"][:8] for row in table.seeds} for name, table in ablation.tables.items()}
    first, *others = dict.fromkeys(code for found in codes.values() for code in sorted(found))
    more = [f"{code} ({', '.join(f'`{name}`' for name in codes if code in codes[name])})" for code in others]
    sweep = next(iter(ablation.tables.values())).identity["sweep"]
    return f"sweep `{sweep}`, code hash {', '.join([first, *more])}"


def ablation_table(ablation: Ablation) -> str:
    """Return one row a variant: means over its seeds, and the paired difference of the final score to the baseline."""
    head = (
        "variant", "n", "live", "post-EMA", "quantization loss", "post-TTT", "difference", "95 % interval", "p",
        "p (Holm)", "artifact bytes", "train s", "TTT s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    effects = {effect.variant: effect for effect in ablation.effects}
    for name, table in ablation.tables.items():
        rows = [row for row in table.seeds if row["post_ttt_bpb"] is not None]
        cells = [f"`{name}`", str(len(rows)), *_means(rows), *_effect_cells(effects.get(name)), *_costs(rows)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def pair_table(ablation: Ablation, pairs: Iterable[tuple[str, str, str]]) -> str:
    """Return the paired differences of pairs for which there are two seeds or more; empty where there are none."""
    lines = [
        "| variant | against | quantity | its mean | difference | 95 % interval | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, other, quantity in pairs:
        ours, theirs = (_values(ablation, variant, quantity) for variant in (name, other))
        seeds = [seed for seed in ours if seed in theirs]
        if len(seeds) > 1:
            difference = paired([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
            mean = sum(ours[seed] for seed in seeds) / len(seeds)
            cells = [
                f"`{name}`",
                f"`{other}`",
                quantity,
                signed(mean),
                *_difference_cells(difference),
                str(len(seeds)),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _values(ablation: Ablation, variant: str, quantity: str) -> dict[int, float]:
    rows = ablation.tables[variant].seeds if variant in ablation.tables else []
    return {row["seed"]: QUANTITIES[quantity](row) for row in rows if row["post_ttt_bpb"] is not None}


def _mean(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float | None:
    return sum(value(row) for row in rows) / len(rows) if rows else None


def _means(rows: list[dict[str, Any]]) -> list[str]:
    columns: list[Callable[[dict[str, Any]], float]] = [
        lambda row: row["live_bpb"], lambda row: row["post_ema_bpb"], QUANTITIES["quantization loss"],
        QUANTITIES["post-TTT"],
    ]  # fmt: skip
    means = [_mean(rows, column) for column in columns]
    return ["-" if mean is None else f"{mean:.5f}" for mean in means]


def _costs(rows: list[dict[str, Any]]) -> list[str]:
    size = _mean(rows, lambda row: row["artifact_bytes"])
    times = [_mean(rows, lambda row, name=name: row[name]) for name in ("train_s", "ttt_s")]  # type: ignore[misc]
    return ["-" if size is None else f"{size:,.0f}", *("-" if time is None else f"{time:.1f}" for time in times)]


def _effect_cells(effect: Effect | None) -> list[str]:
    if effect is None or effect.difference is None:
        return ["", "", "", ""]
    p_values = (effect.p_better, effect.p_better_holm)
    return [*_difference_cells(effect.difference), *("-" if p is None else f"{p:.2g}" for p in p_values)]


def _difference_cells(difference: Difference) -> list[str]:
    interval = difference.interval
    shown_interval = "-" if interval is None else f"[{interval.low:+.5f}, {interval.high:+.5f}]"
    return [signed(difference.mean), shown_interval]
