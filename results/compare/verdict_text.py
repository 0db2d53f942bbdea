"""The verdict on a rerun in words: the seeds side by side, steps and seconds, and one sentence."""

from __future__ import annotations

import json
from typing import Any

from results.compare.power import POWER
from results.compare.sides import Pace, Side
from results.compare.verdict import (
    ALPHA,
    NOT_DECIDED,
    NOT_REPRODUCED,
    REPRODUCED,
    Plan,
    Verdict,
    predicted_range,
)
from results.render import csv_table, fixed, markdown_table, signed, text_table
from results.stats import summarize

SAME_PACE_FRAC = 0.03  # steps or seconds that differ by less go unmentioned: two machines of a kind do
UNKNOWN = Pace(None, None, None)
# heading, key, decimals
COLUMNS = (
    ("claimed bpb", "claimed_bpb", 5), ("rerun bpb", "rerun_bpb", 5), ("rerun - claimed", "difference_bpb", 5),
    ("claimed steps", "claimed_steps", 0), ("rerun steps", "rerun_steps", 0), ("claimed train s", "claimed_train_s", 1),
    ("rerun train s", "rerun_train_s", 1), ("claimed score s", "claimed_score_s", 1),
    ("rerun score s", "rerun_score_s", 1),
)  # fmt: skip


def sentence(result: Verdict) -> str:
    """Return the verdict as one sentence."""
    gap = f"{signed(result.difference.mean)} bpb"
    between = f"{result.rerun.name} - {result.claimed.name}"
    text = "" if result.text != "not known" else ", on validation text that is not known to be the same"
    if result.words == REPRODUCED:
        return (
            f"{REPRODUCED}: the mean of {between} is {gap}, shown to lie within +-{result.margin:g} "
            f"({_p_words(result, result.p_equivalent)}two one-sided tests at {ALPHA:g}){text}"
        )
    if result.words == NOT_REPRODUCED:
        word = "worse" if result.difference.mean > 0 else "better"
        return (
            f"{NOT_REPRODUCED}: the mean of {between} is {gap} ({word}), "
            f"shown to lie beyond +-{result.margin:g} "
            f"({_p_words(result, result.p_beyond)}tested at {ALPHA:g}){text}"
        )
    return f"{NOT_DECIDED} with {_counts(result)}: {_reason(result)}; {_needed(result)}{text}"


def _p_words(result: Verdict, p: float | None) -> str:
    """Return a p value for a sentence; values without any spread leave nothing to chance."""
    assert p is not None, "something was shown"
    return "no spread at all, " if result.difference.standard_error == 0 else f"p = {p:.2g}, "


def _counts(result: Verdict) -> str:
    """Return how many seeds the test had."""
    if result.is_paired and result.difference.degrees_of_freedom is not None:
        return f"{result.difference.degrees_of_freedom + 1:.0f} seeds on both sides"
    return f"{_seeds(len(result.rerun.bpb))} rerun and {len(result.claimed.bpb)} claimed"


def _reason(result: Verdict) -> str:
    """Return why nothing is shown."""
    interval = result.difference.interval
    if interval is not None:
        return (
            f"the 90% interval of the difference, [{interval.low:+.5f}, {interval.high:+.5f}], "
            f"lies neither within nor beyond +-{result.margin:g}"
        )
    alone, other, who = result.claimed, result.rerun, "claimed"
    if len(alone.bpb) > 1:
        alone, other, who = other, alone, "rerun"
    known = predicted_range(other)
    if len(alone.bpb) > 1 or known is None:
        return f"one pair has no spread (the difference is {signed(result.difference.mean)} bpb)"
    mean, reach = known
    away = next(iter(alone.bpb.values())) - mean
    place = "inside" if abs(away) <= reach else "outside"
    return (
        f"one seed has no spread; the {who} one lies {signed(away)} bpb from the mean of the {len(other.bpb)} others, "
        f"{place} the +-{reach:.5f} within which 95% of seeds spread like them fall"
    )


def _needed(result: Verdict) -> str:
    """Return how many seeds would decide."""
    plan = result.plan
    if plan is None:
        return "without a measured spread nobody can say how many seeds would decide; 2 on each side are the fewest"
    if plan.true_gap:
        truth = f"if the true difference is the observed {plan.true_gap:.5f}"
    else:
        truth = "if the two are truly equal"
    if plan.both is None:
        return f"no affordable number of seeds would decide {truth}"
    decide = f"would decide with power {POWER:g} {truth} and the spread is as measured"
    if result.is_paired:
        return f"{plan.both} seeds on both sides {decide}{_too_few_claimed(result, plan)}"
    if plan.rerun is not None:
        return f"{_seeds(plan.rerun)} rerun beside the {len(result.claimed.bpb)} claimed {decide}"
    few = f" (no number of reruns alone: the claim rests on {_seeds(len(result.claimed.bpb))})"
    return f"{plan.both} seeds on each side {decide}{few}"


def _too_few_claimed(result: Verdict, plan: Plan) -> str:
    claimed = len(result.claimed.bpb)
    return f" (only {claimed} are claimed)" if plan.both is not None and plan.both > claimed else ""


def _seeds(count: int) -> str:
    return f"{count} seed{'' if count == 1 else 's'}"


def describe_pace(result: Verdict) -> str | None:
    """Return what the steps explain where they differ by more than a few percent between the sides, else None.

    The same wall clock on a slower machine holds fewer steps, and fewer steps by themselves make a score worse.
    """
    means = {}
    for who, side in (("rerun", result.rerun), ("claimed", result.claimed)):
        seeds = [seed for seed in side.bpb if not result.is_paired or seed in _other(result, side).bpb]
        paces = [side.pace.get(seed, UNKNOWN) for seed in seeds]
        means[who] = [summarize(list(values)).mean for values in zip(*paces)]
    steps, claimed_steps = means["rerun"][0], means["claimed"][0]
    if not steps or not claimed_steps or abs(steps / claimed_steps - 1) <= SAME_PACE_FRAC:
        return None
    change = steps / claimed_steps - 1
    more = "more" if change > 0 else "fewer"
    made = f"the rerun made {abs(change):.1%} {more} steps ({steps:,.0f} against {claimed_steps:,.0f} a seed)"
    moves = f"{more} steps by themselves make a score {'better' if change > 0 else 'worse'}"
    if (result.difference.mean < 0) == (change > 0):
        effect = f"{moves}, so the difference may be the machine's or the clock's and not the recipe's"
    else:
        effect = f"{moves}, which does not explain a difference of {signed(result.difference.mean)} bpb"
    return f"{made} {_time_words(means['rerun'][1], means['claimed'][1], change)}: {effect}"


def _other(result: Verdict, side: Side) -> Side:
    return result.claimed if side is result.rerun else result.rerun


def _time_words(seconds: float | None, claimed: float | None, change: float) -> str:
    """Return how the training times compare, and what that says about the machine."""
    if not seconds or not claimed:
        return "in a training time that is not known on both sides"
    pace = (seconds / claimed) / (1 + change) - 1  # of the seconds a step takes
    machine = "its machine is slower" if pace > 0 else "its machine is faster"
    if abs(pace) <= SAME_PACE_FRAC:
        machine = "a step takes as long on both machines, so it trained for another time"
    return f"in {seconds:,.1f} s of training against {claimed:,.1f} s ({machine})"


def as_rows(result: Verdict) -> list[dict[str, Any]]:
    """Return each seed of either side: what was claimed, what the rerun gave, steps and seconds; None: not there."""
    seeds = [*result.claimed.bpb, *(seed for seed in result.rerun.bpb if seed not in result.claimed.bpb)]
    rows = []
    for seed in seeds:
        row: dict[str, Any] = {"seed": seed}
        for who, side in (("claimed", result.claimed), ("rerun", result.rerun)):
            pace = side.pace.get(seed, UNKNOWN)
            row[f"{who}_bpb"] = side.bpb.get(seed)
            row |= {f"{who}_{name}": value for name, value in pace._asdict().items()}
        both = row["rerun_bpb"], row["claimed_bpb"]
        row["difference_bpb"] = None if None in both or seed is None else both[0] - both[1]
        rows.append(row)
    return rows


def as_json(result: Verdict) -> dict[str, Any]:
    """Return the verdict as plain JSON values."""
    return {
        "verdict": result.words,
        "sentence": sentence(result),
        "rerun": _side_json(result.rerun),
        "claimed": _side_json(result.claimed),
        "seeds": as_rows(result),
        "margin_bpb": result.margin,
        "alpha": ALPHA,
        "method": result.method,
        **_figures(result),
        "seeds_needed": None if result.plan is None else result.plan._asdict(),
        "steps": describe_pace(result),
        "validation_text": result.text,
        "forced": result.forced,
        "notes": result.notes,
    }


def _side_json(side: Side) -> dict[str, Any]:
    return {"name": side.name, "stage": side.stage, **summarize(list(side.bpb.values()))._asdict()}


def _figures(result: Verdict) -> dict[str, float | None]:
    """Return the difference of the means, its interval and the p values."""
    interval = result.difference.interval
    return {
        "mean_difference_bpb": result.difference.mean,
        "low_90_bpb": None if interval is None else interval.low,
        "high_90_bpb": None if interval is None else interval.high,
        "p_equivalent": result.p_equivalent,
        "p_beyond": result.p_beyond,
    }


def render(result: Verdict, form: str = "text") -> str:
    """Return the verdict as text, markdown, json or csv (a line a seed); the sentence stands last in text.

    A forced verdict is labelled on every line.
    """
    if form == "json":
        return json.dumps(as_json(result), indent=2, allow_nan=False)
    if form == "csv":
        return _csv(result)
    header, cells = _table(result)
    table = markdown_table(header, cells) if form == "markdown" else text_table(header, cells)
    lines = [*_side_lines(result), *_test_lines(result)]
    if form == "markdown":
        lines = ["", *(f"- {line}" for line in lines), "", f"**{sentence(result)}**"]
    else:
        lines.append(sentence(result))
    label = "FORCED, not comparable: " if result.forced else ""
    return "\n".join(label + line if line else line for line in [*table.splitlines(), *lines])


def _csv(result: Verdict) -> str:
    """Return a row for each seed, with the verdict and its figures in every row."""
    whole = {
        "verdict": result.words, "margin_bpb": result.margin, "method": result.method, **_figures(result),
        "validation_text": result.text, "forced": "; ".join(result.forced),
    }  # fmt: skip
    rows = as_rows(result)
    keys = ["seed", *(key for _, key, _ in COLUMNS)]
    body = [[*(row[key] for key in keys), *whole.values()] for row in rows]
    return csv_table([*keys, *whole], body).rstrip("\n")


def _table(result: Verdict) -> tuple[list[str], list[list[str]]]:
    """Return heading and cells of the seeds side by side, without columns that nobody knows."""
    rows = as_rows(result)
    shown = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]
    cells = []
    for row in rows:
        figures = [
            (signed if key == "difference_bpb" else fixed)(row[key], places)  # a sign where a sign says something
            for _, key, places in shown
        ]
        cells.append(["?" if row["seed"] is None else str(row["seed"]), *figures])
    return ["seed", *(heading for heading, _, _ in shown)], cells


def _side_lines(result: Verdict) -> list[str]:
    lines = []
    for who, side in (("claimed", result.claimed), ("rerun", result.rerun)):
        entry = summarize(list(side.bpb.values()))
        spread = "no spread" if entry.std_ddof1 is None else f"std {entry.std_ddof1:.5f} (sample, ddof=1)"
        lines.append(f"{who} = {side.name}: {side.stage} bpb mean {entry.mean:.5f}, {spread}, n = {entry.n}")
    return lines


def _test_lines(result: Verdict) -> list[str]:
    """Return the difference, the test and the p values, what the steps explain, and everything else to be said."""
    interval = result.difference.interval
    lines = []
    gaps = [abs(row["difference_bpb"]) for row in as_rows(result) if row["difference_bpb"] is not None]
    if gaps:
        most = f"differing by at most {max(gaps):.2g} bpb" if max(gaps) else "each with the very score that was claimed"
        lines.append(f"seeds on both sides: {len(gaps)}, {most}")
    lines.append(f"test: {result.method}, margin {result.margin:g} bpb")
    if interval is not None:
        least = max(abs(interval.low), abs(interval.high))
        closest = f"; these seeds show the two equal within +-{least:.5f}, not closer" if least >= 1e-5 else ""
        lines += [
            f"rerun - claimed = {signed(result.difference.mean)} bpb, 90% interval [{interval.low:+.5f}, "
            f"{interval.high:+.5f}]{closest}",
            f"p_equivalent = {result.p_equivalent:.4g}, p_beyond = {result.p_beyond:.4g}",
        ]
    steps = describe_pace(result)
    lines += [] if steps is None else [f"steps: {steps}"]
    lines += [f"forced: {reason}" for reason in result.forced]
    return [*lines, *(f"note: {note}" for note in result.notes)]
