"""A comparison in words: what its p values mean, as text, Markdown or JSON."""

from __future__ import annotations

import json
import math
from typing import Any

from results.compare.comparison import ALPHA, Comparison, pooled_std, smallest_gain
from results.compare.power import POWER, pairs_needed, seeds_needed
from results.compare.sides import Side
from results.render import csv_table
from results.stats import Difference, summarize


def explain(result: Comparison) -> list[str]:
    """Return what the p values mean, a sentence for each margin."""
    return [_sentence(result, margin, p) for margin, p in result.margins.items()]


def _sentence(result: Comparison, margin: float, p: float | None) -> str:
    claim = f"{margin:g} nats better" if margin else "better at all"
    if p is None:
        short = [side.name for side in (result.a, result.b) if len(side.bpb) < 2]
        return f"{result.a.name} {claim}: cannot be tested, n = 1 has no spread ({', '.join(short) or 'one pair'})"
    if p < ALPHA:
        return f"{result.a.name} is shown to be {claim} than {result.b.name} at p < {ALPHA:g}"
    said = f"{result.a.name} is not shown to be {claim} than {result.b.name} at p < {ALPHA:g}"
    return f"{said}; {_advice(result, margin)}"


def _advice(result: Comparison, margin: float) -> str:
    """Return how many more seeds the observed gain would need, taking it and the observed spread for true."""
    scale = 1.0 if result.unit == "nats" else result.nats_per_bpb or 0.0
    gain = -result.tested.mean
    if gain <= margin * scale:
        return "the observed gain is not above that, so more seeds of the same would not show it"
    if result.method.startswith("paired t"):
        return _advice_for_pairs(result, gain - margin * scale)
    if not result.method.startswith("Welch"):
        return "more pairs would narrow the interval"
    std = pooled_std(result)
    if std is None or std == 0:
        return "there is no spread to plan with"
    needed = seeds_needed(gain=gain, std=std, margin=margin * scale, alpha=ALPHA)
    if needed is None:
        return f"no affordable number of seeds would have power {POWER:g} at this gain and spread"
    fewest = min(len(result.a.bpb), len(result.b.bpb))
    more = max(1, needed - fewest)
    return (
        f"{more} more seed{'s' if more > 1 else ''} (to {max(needed, fewest + 1)} a side) would have power {POWER:g} "
        "if the observed gain and spread are the true ones"
    )


def _advice_for_pairs(result: Comparison, gain: float) -> str:
    """Return how many more seeds on both sides a paired test would need for a gain above its margin."""
    error, freedom = result.tested.standard_error, result.tested.degrees_of_freedom
    if not error or freedom is None:
        return "there is no spread to plan with"
    pairs = int(freedom) + 1
    needed = pairs_needed(gain=gain, std=error * math.sqrt(pairs), alpha=ALPHA)
    if needed is None:
        return f"no affordable number of seeds would have power {POWER:g} at this gain and spread"
    more = max(1, needed - pairs)
    return (
        f"{more} more seed{'s' if more > 1 else ''} on both sides (to {pairs + more}) would have power {POWER:g} "
        "if the observed gain and spread are the true ones"
    )


def as_json(result: Comparison) -> dict[str, Any]:
    """Return the comparison as plain JSON values."""
    return {
        "a": _side_json(result.a),
        "b": _side_json(result.b),
        "method": result.method,
        "tested_unit": "nats per token" if result.unit == "nats" else "bits per byte",
        "difference_bpb": _difference_json(result.bpb),
        "difference_nats": None if result.nats is None else _difference_json(result.nats),
        "p_values": {f"p_margin_{margin:g}": p for margin, p in result.margins.items()},
        "p_equivalent": None if result.equivalence is None else result.equivalence[1],
        "meaning": explain(result),
        "forced": result.forced,
        "notes": result.notes,
    }


def _side_json(side: Side) -> dict[str, Any]:
    scores = {str(seed): value for seed, value in side.bpb.items()}
    return {"name": side.name, "stage": side.stage, "bpb": scores, **summarize(list(side.bpb.values()))._asdict()}


def _difference_json(entry: Difference) -> dict[str, Any]:
    interval = None if entry.interval is None else [entry.interval.low, entry.interval.high]
    return {"mean": entry.mean, "interval_95": interval, "degrees_of_freedom": entry.degrees_of_freedom}


def render(result: Comparison, form: str = "text") -> str:
    """Return the comparison as text, markdown, json or csv; forced comparisons are labelled on every line."""
    if form == "json":
        return json.dumps(as_json(result), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(result)
    lines = [*_side_lines(result), *_difference_lines(result), *_p_lines(result)]
    if form == "markdown":
        lines = [f"- {line}" for line in lines]
    label = "FORCED, not comparable: " if result.forced else ""
    return "\n".join(label + line for line in lines)


def _csv(result: Comparison) -> str:
    """Return one row of figures under their names; a forced comparison says so in a column."""
    row: dict[str, object] = {"a": result.a.name, "b": result.b.name, "method": result.method}
    for unit, entry in (("bpb", result.bpb), ("nats", result.nats)):
        row[f"difference_{unit}"] = None if entry is None else entry.mean
        row[f"low_95_{unit}"] = None if entry is None or entry.interval is None else entry.interval.low
        row[f"high_95_{unit}"] = None if entry is None or entry.interval is None else entry.interval.high
    row |= {f"p_margin_{margin:g}": p for margin, p in result.margins.items()}
    row["forced"] = "; ".join(result.forced)
    return csv_table(list(row), [list(row.values())]).rstrip("\n")


def _side_lines(result: Comparison) -> list[str]:
    lines = []
    for letter, side in (("A", result.a), ("B", result.b)):
        entry = summarize(list(side.bpb.values()))
        spread = "no spread" if entry.std_ddof1 is None else f"std {entry.std_ddof1:.5f} (sample, ddof=1)"
        seeds = ", ".join(map(str, side.bpb))
        lines.append(
            f"{letter} = {side.name}: {side.stage} bpb mean {entry.mean:.5f}, {spread}, n = {entry.n} ({seeds})"
        )
    return lines


def _difference_lines(result: Comparison) -> list[str]:
    lines = []
    for unit, entry in (("bpb", result.bpb), ("nats per token", result.nats)):
        if entry is None:
            continue
        if entry.interval is None:
            lines.append(f"A - B = {entry.mean:+.5f} {unit} (n = 1: no spread, no interval)")
        else:
            low, high = entry.interval.low, entry.interval.high
            lines.append(
                f"A - B = {entry.mean:+.5f} {unit}, 95% interval [{low:+.5f}, {high:+.5f}]; negative: A is better"
            )
    return lines


def _p_lines(result: Comparison) -> list[str]:
    lines = [f"test: {result.method}, on {'nats per token' if result.unit == 'nats' else 'bits per byte'}"]
    for margin, p in result.margins.items():
        lines.append(f"p_margin_{margin:g} = {'no spread' if p is None else format(p, '.4g')}")
    if result.equivalence is not None:
        band, p = result.equivalence
        said = "no spread" if p is None else f"{p:.4g}"
        verdict = "equivalent" if p is not None and p < ALPHA else "not shown to be equivalent"
        lines.append(f"p_equivalent_{band:g} = {said} ({verdict} within +-{band:g} nats at p < {ALPHA:g})")
    gain = smallest_gain(result)
    lines += explain(result)
    if gain is not None:
        unit = "nats per token" if result.unit == "nats" else "bpb"
        lines.append(
            f"as many seeds show a true gain of {gain:.5f} {unit} with power {POWER:g} (margin 0, p < {ALPHA:g})"
        )
    lines += [f"forced: {reason}" for reason in result.forced]
    return [*lines, *(f"note: {note}" for note in result.notes)]
