"""Stated standard deviations, wherever they stand, against the sample one (ddof=1) over the logs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from results.findings.cells import cell_meaning, read_cell
from results.findings.findings import Finding, Review
from results.findings.meanings import average_runs
from results.findings.readme_tables import AGGREGATE, seed_column, seed_in_cell, turn_table
from results.published.printed import is_near, printed_number, printed_numbers, text_of
from results.published.records import Record, Run, one_run_a_seed
from results.published.submitted import listed_seeds
from results.stats import population_std, summarize

BPB_KEYS = (
    "val_bpb_std",
    "std_bpb",
    "std_val_bpb",
    "bpb_std",
    "val_bpb_stdev",
    "val_bpb_sd",
    "std_dev",
    "std",
    "stdev",
)
NATS_KEYS = ("val_loss_std", "std_val_loss", "std_val_loss_nats", "std_nats", "val_loss_std_nats")
STD_ROW = re.compile(r"\W*(?:sample |population )?(std|stdev|sd|σ|standard deviation)\b", re.IGNORECASE)
SAYS_POPULATION = re.compile(r"population|pstdev|ddof\s*=\s*0|\bpop\b", re.IGNORECASE)
FINE_PRINT = 1e-6  # a std printed finer than this may come from scores rounded to five decimals
FINE_SLACK = 2e-6
STAGE_ORDER = ("post_ttt", "sliding", "post_quant", "post_ema")


class Stated(NamedTuple):
    """A stated std: of which figure ("final bpb", "post_ttt bpb", "final nats"), where, and as it was written.

    own: the table's own rounded cells, of which it may be the std.
    """

    meaning: str
    place: str
    said: Any
    own: Sequence[float] = ()


def check_stds(record: Record) -> Review:
    """Name the convention of the stated stds unless it is the sample one; one finding for each convention."""
    runs = one_run_a_seed(record)
    groups: dict[str, dict[str, Any]] = {}
    first: dict[str, tuple[Any, float, float]] = {}
    unchecked = []
    listed = listed_seeds(record.get("submission_json"))
    for stated in _stated(record, runs):
        samples = _samples(runs, stated.meaning)
        if len(runs) < 2 or not samples or (listed and len(listed) != len(runs)):
            unchecked.append(f"{stated.place} {text_of(stated.said)} cannot be checked: not every seed has a log")
            continue
        convention = _convention(stated.said, samples)
        if convention is None or (convention == "neither" and _is_std_of(stated.own, stated.said)):
            continue
        key = convention if convention == "ddof=0" else f"neither {stated.meaning.rpartition(' ')[2]}"
        groups.setdefault(key, {})[stated.place] = text_of(stated.said)
        sample, population = summarize(samples[0]).std_ddof1, population_std(samples[0])
        first.setdefault(key, (stated.said, sample or 0.0, population or 0.0))
    findings = []
    for key, places in groups.items():
        said, sample, population = first[key]
        values = {**places, "log_ddof1": sample, "log_ddof0": population, "convention": key.split()[0], "n": len(runs)}
        findings.append(Finding(None, "std convention", values, "std_convention", text_of(said), sample))
    return Review(findings, unchecked)


def convention_of(record: Record) -> str:
    """Return the convention of the std that submission.json states, for the line under the seed table."""
    runs = one_run_a_seed(record)
    listed = listed_seeds(record.get("submission_json"))
    stated = stated_std(record)
    samples = _samples(runs, "final bpb")
    if len(runs) < 2 or not samples or (listed and len(listed) != len(runs)):
        return "cannot be checked: not every seed has a log"
    convention = _convention(stated, samples)
    return {None: "the sample one, ddof=1", "ddof=0": "the population one, ddof=0"}.get(
        convention, "neither convention"
    )


def stated_std(record: Record) -> Any:
    """Return the std of bits per byte that submission.json states, None without one."""
    submission = record.get("submission_json") or {}
    said = next((submission[key] for key in BPB_KEYS if printed_number(submission.get(key))[0] is not None), None)
    if said is None and isinstance(submission.get("val_bpb"), dict):
        said = submission["val_bpb"].get("std")
    return said if printed_number(said)[0] is not None else None


def _stated(record: Record, runs: list[Run]) -> Iterator[Stated]:
    submission = record.get("submission_json") or {}
    if (said := stated_std(record)) is not None:
        yield Stated("final bpb", "stated", said)
    for key in NATS_KEYS:
        if printed_number(submission.get(key))[0] is not None:
            yield Stated("final nats", f"submission.json {key}", submission[key])
    for number, table in enumerate(record.get("readme_seed_tables") or [], 1):
        yield from _in_table(f"README table {number}", turn_table(table), runs)
    mean = summarize([run["final_bpb"] for run in runs]).mean if runs else None
    for entry in record.get("readme_spreads") or []:
        value, half_unit = printed_number(entry["mean"])
        is_ours = mean is not None and value is not None and is_near(value, mean, max(half_unit, 1e-8))
        if is_ours and not SAYS_POPULATION.search(entry.get("line", "")):
            yield Stated("final bpb", f"README text {entry['mean']} ±", entry["std"])


def _in_table(name: str, table: dict[str, Any], runs: list[Run]) -> Iterator[Stated]:
    """Yield the stds of a table's Std row and of "mean +- std" cells, where the table's seeds are the logs'."""
    key = seed_column(table["columns"]) or table["columns"][0]
    seeds = {seed for row in table["rows"] if (seed := seed_in_cell(str(row.get(key, "")))) is not None}
    if seeds and seeds != {run["seed"] for run in runs}:
        return
    for row in table["rows"]:
        first = str(row.get(key, ""))
        is_std_row, is_mean_row = STD_ROW.match(first), AGGREGATE.match(first)
        if SAYS_POPULATION.search(" ".join(map(str, row.values()))) or not (is_std_row or is_mean_row):
            continue
        for column, cell in row.items():
            meaning = cell_meaning(column, "1.0000") if is_std_row else cell_meaning(column, cell)
            if meaning is None or not meaning.endswith((" bpb", " nats")):
                continue
            numbers = printed_numbers(cell)
            if is_std_row and numbers and 0 <= numbers[0][0] < 0.2:
                yield Stated(
                    meaning, f'{name} "{column}" of {first}', str(cell), _own_cells(table, key, column, meaning)
                )
            elif "±" in str(cell).replace("+-", "±").replace("+/-", "±") and len(numbers) > 1:
                mean = read_cell(meaning, column, cell)
                averages = average_runs(runs, meaning)
                if mean and any(is_near(mean[0][0], other, max(mean[0][1], 1e-8)) for other in averages):
                    own = _own_cells(table, key, column, meaning)
                    yield Stated(meaning, f'{name} "{column}" of {first}', _after_sign(str(cell)), own)


def _own_cells(table: dict[str, Any], key: str, column: str, meaning: str) -> list[float]:
    """Return the scores of a column as the table prints them, where they are not those of the logs to the digit."""
    rows = [row for row in table["rows"] if seed_in_cell(str(row.get(key, ""))) is not None]
    ways = [read_cell(meaning, column, row.get(column, "")) for row in rows]
    return [way[0][0] for way in ways if way]


def _after_sign(cell: str) -> str:
    return cell.replace("+/-", "±").replace("+-", "±").partition("±")[2].strip()


def _samples(runs: list[Run], meaning: str) -> list[list[float]]:
    """Return what may have been averaged: the scores of the stage that is meant, then of the other stages."""
    kind = meaning.rpartition(" ")[2]
    name, final = ("val_bpb", "final_bpb") if kind == "bpb" else ("val_loss_nats", "final_nats")
    stage = meaning.rpartition(" ")[0]
    order = [stage, *(other for other in STAGE_ORDER if other != stage)]
    columns = [[run[other][name] if run.get(other) else None for run in runs] for other in order]
    finals = [run.get(final) for run in runs]
    columns = [finals, *columns] if stage in ("final", "post_ttt", "other") else [*columns, finals]
    columns.append(
        [run.get("live_weights_bpb_at_stop" if kind == "bpb" else "live_weights_nats_at_stop") for run in runs]
    )
    return [[value for value in column if value is not None] for column in columns if None not in column]


def _is_std_of(own: Sequence[float], said: Any) -> bool:
    """Return whether a std is the sample one of a table's own cells, which are compared with the logs elsewhere."""
    stated, half_unit = printed_number(said)
    sample = summarize(list(own)).std_ddof1 if len(own) > 1 else None
    return stated is not None and sample is not None and is_near(stated, sample, 2 * half_unit)


def _convention(said: Any, samples: list[list[float]]) -> str | None:
    """Return None for the sample std of any of these columns, else "ddof=0" or "neither"."""
    stated, half_unit = printed_number(said)
    assert stated is not None
    slack = FINE_SLACK if half_unit < FINE_PRINT else 0.0

    def equals(std: float | None) -> bool:
        return std is not None and is_near(stated, std, half_unit + slack)

    if any(equals(summarize(scores).std_ddof1) for scores in samples):
        return None
    return "ddof=0" if any(equals(population_std(scores)) for scores in samples) else "neither"
