"""What submission.json, the README's tables and the pull request text print of each seed, against its log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from results.findings.cells import (
    Seeds,
    cell_meaning,
    fits,
    half_unit_of_log,
    list_allowed,
    read_cell,
    stage_with_value,
)
from results.findings.findings import Claim, Finding
from results.findings.meanings import average_runs, column_meaning
from results.findings.readme_tables import AGGREGATE, seed_column, seed_in_cell, turn_table
from results.published.printed import agrees, is_near, printed_numbers, text_of
from results.published.records import Record, Run
from results.published.submitted import listed_seeds, submitted_figures
from results.stats import summarize

HEADLINES = ("final bpb", "final nats")  # results/findings/headline.py
WHOLE_NUMBERS = ("steps", "artifact bytes", "model bytes", "code bytes")
Place = tuple[str, str, str, Any]  # source, place, heading or key, cell
MIN_FOREIGN_CELLS = 3  # a table of which so many cells, and none, fit the logs is about other runs


class Said(NamedTuple):
    """What was compared: claims the logs contradict, seeds without a scored log by place, and what no log shows.

    unchecked: figure and place.
    """

    claims: list[Claim]
    missing: dict[int, dict[str, Any]]
    unchecked: list[tuple[str, str]]


def compare_said(record: Record) -> Said:
    """Compare every printed figure of a seed, and the record's own figures of submission.json, with the logs."""
    said = Said([], {}, [])
    seeds = Seeds(record)
    _submission_seeds(record, seeds, said)
    _submission_record(record, seeds, said)
    _readme(record, seeds, said)
    _readme_values(record, seeds, said)
    said.claims.extend(_pull_request_text(record))
    return said


def missing_seeds(record: Record, said: Said) -> Iterator[Finding]:
    """Yield one finding for each seed that is listed without a log, or whose log has no final score."""
    seeds = Seeds(record)
    if len(seeds.nameless) >= len(said.missing) > 0:
        return  # logs that name no seed may be theirs
    for seed, places in sorted(said.missing.items()):
        files = seeds.unscored(seed)
        field = (
            "log has no final score of the scored stage"
            if files
            else f"{' and '.join(_sources(places))} lists a seed without a log"
        )
        values = {**places, **({"log_file": files} if files else {})}
        yield Finding(seed, field, values, "seed_without_score", len(places), 0)


def _sources(places: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(place.split(",")[0].split(" table")[0].split(" seed")[0] for place in places))


def _submission_seeds(record: Record, seeds: Seeds, said: Said) -> None:
    submission = record.get("submission_json")
    submitted = submitted_figures(submission)
    for seed in listed_seeds(submission):
        logs = seeds.logs(seed)
        if not logs:
            said.missing.setdefault(seed, {})["submission.json"] = submitted.get(seed, "listed")
            continue
        for key, value in submitted.get(seed, {}).items():
            _judge(record, seed, logs, ("submission.json", f"submission.json seed {seed} {key}", key, value), said)


def _submission_record(record: Record, seeds: Seeds, said: Said) -> None:
    """Compare the record's own keys: each is one seed's figure, the mean or the largest."""
    runs = list(seeds)
    if runs:
        said.claims.extend(_unnamed_lists(record, runs))
        for key, value in (record.get("submission_json") or {}).items():
            if column_meaning(key) not in HEADLINES and isinstance(value, int | float | str):
                _judge_record(record, runs, ("submission.json", f"submission.json {key}", key, value), said)


def _readme_values(record: Record, seeds: Seeds, said: Said) -> None:
    """Compare the README's tables of one value a figure, where they fit the logs at all."""
    runs = list(seeds)
    for number, values in enumerate(record.get("readme_values") or [], 1):
        part = Said([], {}, [])
        places = {key: ("README", f'README value table {number} "{key}"', key, cell) for key, cell in values.items()}
        verdicts = [_judge_record(record, runs, place, part) for place in places.values()] if runs else []
        if any(verdicts):
            said.claims.extend(part.claims)
            said.unchecked.extend(part.unchecked)


def _judge_record(record: Record, runs: list[Run], where: Place, said: Said) -> bool | None:
    """Compare a figure of the whole record with every seed's and with their mean; add a claim. Returns the verdict."""
    source, place, key, value = where
    meaning = None if isinstance(value, bool) else cell_meaning(key, value)
    ways = read_cell(meaning, key, value) if meaning else []
    if meaning is None or not ways:
        return None
    actual = [number for run in record["runs"] for number in list_allowed(run, meaning, record)]
    if not actual:
        said.unchecked.append((meaning, f"{place} {text_of(value)}"))
        return None
    slack = 0.51 if meaning in WHOLE_NUMBERS else 1e-8
    is_mean = any(
        is_near(way, abs(mean), max(half, slack)) for way, half in ways for mean in average_runs(runs, meaning)
    )
    log_half = max(half_unit_of_log(run, meaning) for run in runs)
    is_known = is_mean or _follows_from_seeds(meaning, key, value, record, said)
    if is_known or fits(meaning, key, value, actual, log_half):
        return True
    only = runs[0]["seed"] if len(runs) == 1 else None
    shown = [values[0] for run in runs if (values := list_allowed(run, meaning, record))]
    said.claims.append(Claim(only, meaning, source, place, value, shown))
    return False


def _follows_from_seeds(meaning: str, key: str, value: Any, record: Record, said: Said) -> bool:
    """Return whether a record's figure is one of, or the mean of, its seeds' figures, contradicted already."""
    own = []
    for figures in submitted_figures(record.get("submission_json")).values():
        for name, figure in figures.items():
            ways = read_cell(meaning, name, figure) if column_meaning(name) == meaning else []
            own += [way[0] for way in ways[:1]]
    is_claimed = any(claim.figure == meaning for claim in said.claims)
    return is_claimed and bool(own) and bool(fits(meaning, key, value, [*own, round(sum(own) / len(own))]))


def _unnamed_lists(record: Record, runs: list[Run]) -> Iterator[Claim]:
    """Yield the scores of a list by seed, where no list of seeds stands beside it, that no log shows."""
    submission = record.get("submission_json") or {}
    for key, values in submission.items():
        is_by_seed = re.search(r"seed", key, re.IGNORECASE) and re.search(r"bpb", key, re.IGNORECASE)
        if not isinstance(values, list) or not is_by_seed or isinstance(submission.get("seeds"), list):
            continue
        actual = [run["final_bpb"] for run in runs]
        for value in values:
            if isinstance(value, int | float | str) and fits("final bpb", key, value, actual) is False:
                yield Claim(None, "final bpb", "submission.json", f"submission.json {key}", value, actual)


def _judge(record: Record, seed: int, logs: list[Run], where: Place, said: Said) -> bool | None:
    """Compare one cell with the logs of its seed; add a claim, or what could not be checked. Returns the verdict."""
    source, place, heading, cell = where
    meaning = cell_meaning(heading, cell)
    if meaning is None or not read_cell(meaning, heading, cell):
        return None
    actual = [value for run in logs for value in list_allowed(run, meaning, record)]
    verdict = fits(meaning, heading, cell, actual, max(half_unit_of_log(run, meaning) for run in logs))
    if verdict is None:
        said.unchecked.append((f"{meaning} of seed {seed}", f"{place} {text_of(cell)}"))
    elif not verdict:
        extra = _what_it_is(meaning, cell, logs)
        said.claims.append(Claim(seed, meaning, source, place, cell, _likeliest(logs, meaning, record), extra))
    return verdict


def _what_it_is(meaning: str, cell: Any, logs: list[Run]) -> dict[str, Any]:
    """Return which other figure of the log a wrong cell holds, where it is one."""
    if meaning.endswith(" bpb") and (stage := stage_with_value(logs, cell)):
        return {"equals_log_stage": stage}
    models = [run["model_bytes"] for run in logs if run.get("model_bytes")]
    return {"equals": "model bytes"} if meaning == "artifact bytes" and fits(meaning, "", cell, models) else {}


def _likeliest(logs: list[Run], meaning: str, record: Record) -> list[float]:
    """Return what the log that counts shows, one value for each other log."""
    shown = [values[0] for run in logs if (values := list_allowed(run, meaning, record))]
    return list(dict.fromkeys(shown))


def _readme(record: Record, seeds: Seeds, said: Said) -> None:
    """Compare the README's tables; one that fits nowhere while another fits is about other runs, and only noted."""
    judged = []
    for number, table in enumerate(record.get("readme_seed_tables") or [], 1):
        part = Said([], {}, [])
        verdicts = _table(record, f"README table {number}", turn_table(table), seeds, part)
        judged.append((number, verdicts, part))
    some_fit = any(sum(verdicts) > 0 for _, verdicts, _ in judged)
    for number, verdicts, part in judged:
        has_no_log = not verdicts and bool(part.missing)
        is_foreign = some_fit and not any(verdicts) and (len(verdicts) >= MIN_FOREIGN_CELLS or has_no_log)
        if is_foreign:
            said.unchecked.append(
                (f"README table {number}", f"none of its {len(verdicts)} figures, so it is about other runs")
            )
            continue
        said.claims.extend(part.claims)
        said.unchecked.extend(part.unchecked)
        for seed, places in part.missing.items():
            said.missing.setdefault(seed, {}).update(places)


def _table(record: Record, name: str, table: dict[str, Any], seeds: Seeds, said: Said) -> list[bool]:
    """Compare one table; return the verdict of every cell that could be judged."""
    key = seed_column(table["columns"]) or table["columns"][0]
    rows = [(seed_in_cell(str(row.get(key, ""))), row) for row in table["rows"]]
    verdicts: list[bool] = []
    for seed in dict.fromkeys(seed for seed, _ in rows if seed is not None):
        logs = seeds.logs(seed)
        if not logs and key == table["columns"][0]:
            said.missing.setdefault(seed, {})[name] = next(dict(row) for own, row in rows if own == seed)
        if not logs:
            continue  # where something else heads the rows, they are variants and need no log
        parts = []
        for row in (row for own, row in rows if own == seed):
            part = Said([], {}, [])
            row_verdicts = [
                _judge(record, seed, logs, ("README", f'{name} "{column}"', column, cell), part)
                for column, cell in row.items()
                if column != key
            ]
            part.claims[:] = _without_gains_that_follow(row, part.claims, name)
            parts.append((sum(verdict is False for verdict in row_verdicts), part, row_verdicts))
        _, best, best_verdicts = min(parts, key=lambda entry: entry[0])  # several rows of a seed are variants
        said.claims.extend(best.claims)
        said.unchecked.extend(best.unchecked)
        verdicts += [verdict for verdict in best_verdicts if verdict is not None]
    for row in table["rows"]:
        first = str(row.get(key, ""))
        if (word := AGGREGATE.match(first)) and word.group(1).lower() in ("mean", "avg", "average", "μ"):
            said.claims.extend(_means_row(name, row, [other for seed, other in rows if seed is not None], list(seeds)))
    return verdicts


def _without_gains_that_follow(row: dict[str, str], claims: list[Claim], name: str) -> list[Claim]:
    """Leave out a gain that is the difference of two cells of its row when one of those is contradicted itself."""
    scores = [number for column, cell in row.items() if (cell_meaning(column, cell) or "").endswith(" bpb")
              for number in printed_numbers(cell)[:1]]  # fmt: skip
    has_wrong_score = any(claim.figure.endswith(" bpb") for claim in claims)
    kept = []
    for claim in claims:
        gains = read_cell(claim.figure, claim.place, claim.said) if claim.figure == "TTT gain" else []
        follows = any(
            is_near(abs(a - b), gain, tolerance + half_a + half_b)
            for gain, tolerance in gains
            for a, half_a in scores
            for b, half_b in scores
        )
        if not (follows and has_wrong_score):
            kept.append(claim)
    return kept


def _means_row(name: str, row: dict[str, str], rows: list[dict[str, str]], runs: list[Run]) -> Iterator[Claim]:
    """Compare a row of means with the means over the logs, or over the README's own rounded cells."""
    for column, cell in row.items():
        meaning = cell_meaning(column, cell)
        ways = read_cell(meaning, column, cell) if meaning else []
        if meaning is None or not ways:
            continue
        averages = average_runs(runs, meaning)
        own = summarize(
            [way[0][0] if (way := read_cell(meaning, column, other.get(column, ""))) else None for other in rows]
        ).mean
        slack = 0.51 if meaning in WHOLE_NUMBERS else 1e-8
        choices = [abs(mean) for mean in (*averages, own) if mean is not None]
        if averages and not any(is_near(way, mean, max(half, slack)) for way, half in ways for mean in choices):
            yield Claim(None, f"mean of {meaning}", "README", f'{name} "{column}"', cell, averages[:1])


def _pull_request_text(record: Record) -> Iterator[Claim]:
    said_seeds = ((record.get("pr_text") or {}).get("figures") or {}).get("seeds") or {}
    runs = {str(run["seed"]): run for run in Seeds(record)}
    for seed, said in said_seeds.items():
        run = runs.get(seed)
        if run is None:
            continue
        before = run["post_quant"]["val_bpb"] if run.get("post_quant") else None
        gain = run.get("ttt_gain_vs_post_quant_bpb")
        wrong_score = said.get("pre_ttt_bpb") is not None and before and not agrees(said["pre_ttt_bpb"], before)
        gain_fits = fits("TTT gain", "", said.get("ttt_gain"), [gain] if gain else [])
        if wrong_score or gain_fits is False:
            text = {key: said[key] for key in ("pre_ttt_bpb", "ttt_gain") if key in said}
            values = [value for value in (before, gain) if value is not None]
            yield Claim(run["seed"], "pre-TTT bpb and TTT gain", "PR text", "pr_text", text, values)
        if said.get("post_ttt_bpb") is not None and not agrees(said["post_ttt_bpb"], run["final_bpb"]):
            yield Claim(
                run["seed"], "final bpb", "PR text", "pr_text post_ttt_bpb", said["post_ttt_bpb"], [run["final_bpb"]]
            )
