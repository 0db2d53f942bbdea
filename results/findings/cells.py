"""One printed cell against the logs: is there a number of that kind in it, and is it one that the logs show."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from results.findings.meanings import column_meaning, log_values, stage_meaning
from results.published.printed import agrees, is_near, printed_numbers, printed_score, printed_seconds, text_of
from results.published.records import Record, Run, one_run_a_seed
from results.published.track import TIME_LIMIT_S

NOT_A_FIGURE = re.compile(
    r"^\W*(?:[<≤>≥]|(?:under|below|over|above|less|more|up to|at most)\b)|^[^\d]*\bstd\b|\blines?\b|\bn/?a\b|^\W*±",
    re.IGNORECASE,
)
SEVERAL = re.compile(r"\d\s*(?:→|->|=>|/|vs\.?|to)\s*\d", re.IGNORECASE)  # "before → after" in one cell
TIMED = re.compile(r"\d\s*(s|sec|seconds|ms|min|m)\b", re.IGNORECASE)
TIMES = ((r"ttt", "TTT time"), (r"eval\w*", "eval time"), (r"train\w*", "train time"))
SCORE_RANGE = {"bpb": (0.2, 6.0), "nats": (0.2, 15.0)}
LEAST_BYTES = {"artifact bytes": 100_000, "model bytes": 100_000, "code bytes": 1_000}
MIB_PER_MB = 2**20 / 1e6
NOMINAL_SLACK_S = 15.0  # what scripts keep back of the 600 seconds for what follows training
GAIN_RANGE = 0.5
LEAST_GAIN_SLACK = 1.5e-5  # a gain is a difference of two rounded columns
AVERAGE_FRAC = 5e-4  # the average that was printed last and the one of the whole run differ by less


def cell_meaning(column: str, cell: object) -> str | None:
    """Return which figure a cell holds; a heading such as "Post-TTT" alone means a score where the cell is one."""
    meaning = column_meaning(column)
    if meaning is not None:
        return meaning
    if TIMED.search(text_of(cell)) and not printed_numbers(cell)[1:]:
        return next((time for word, time in TIMES if re.fullmatch(rf"\W*{word}\W*", column, re.IGNORECASE)), None)
    stage = stage_meaning(column)
    is_score = re.fullmatch(r"\W*[012]\.\d{3,}\W*", text_of(cell)) is not None
    return f"{stage} bpb" if stage and is_score else None


def read_cell(meaning: str, column: str, cell: Any) -> list[tuple[float, float]]:
    """Return how a cell can be read as a figure of this kind: values with their tolerance, [] when it holds none.

    A size in "MB" may be MiB; a duration may be cut instead of rounded.
    """
    text = text_of(cell)
    if not isinstance(cell, int | float | str):
        return []
    if NOT_A_FIGURE.search(text.replace("+-", "±")):
        return []
    kind = meaning.rpartition(" ")[2]
    numbers = printed_numbers(cell)
    if kind in SCORE_RANGE:
        low, high = SCORE_RANGE[kind]
        found = [(value, half) for value, half in numbers if low < value < high and half < 0.05]
        if found and isinstance(cell, float):
            return [(found[0][0], printed_score(cell)[1])]
        return found if SEVERAL.search(text) else found[:1]
    if kind == "time":
        value, unit = printed_seconds(cell, column)
        return [] if value is None or value <= 0 else [(value, unit)]
    if kind == "bytes" and isinstance(cell, int):
        return numbers[:1]  # a key of submission.json: bytes, however few
    if kind == "bytes":
        return _sizes(meaning, column, text, numbers)
    if meaning == "TTT gain":
        return [
            (abs(value), max(2 * half, LEAST_GAIN_SLACK)) for value, half in numbers if abs(value) < GAIN_RANGE and half
        ][:1]
    if meaning == "steps":
        return [(value, half) for value, half in numbers if value >= 1 and (value == int(value) or half)][:1]
    return [(value, half) for value, half in numbers if value > 0][:1]


def _sizes(meaning: str, column: str, text: str, numbers: list[tuple[float, float]]) -> list[tuple[float, float]]:
    least = LEAST_BYTES[meaning]
    heading = re.search(r"\b(MiB|MB|KiB|kB|KB)\b", column.replace("_mb", " MB").replace("_", " "))
    for value, half in numbers:
        if value >= least:
            is_decimal = re.search(r"\d\s*MB?\b", text) is not None
            return [(value, 2 * half), *([(value * MIB_PER_MB, 2 * half * MIB_PER_MB)] if is_decimal else [])]
        if half and 0.1 < value < 100 and (heading or meaning == "artifact bytes"):
            scales: dict[str, list[float]] = {"MiB": [2**20], "KiB": [1024], "kB": [1e3, 1024], "KB": [1e3, 1024]}
            unit = heading.group(1) if heading else "MB"
            return [(value * scale, 2 * half * scale) for scale in scales.get(unit, [1e6, 2**20])]
    return []


def fits(meaning: str, column: str, cell: object, actual: Iterable[float], log_half_unit: float = 0.0) -> bool | None:
    """Return whether a cell is one of these values, None when it cannot be told: no such number, or no such value."""
    ways = read_cell(meaning, column, cell)
    values = [abs(value) if meaning == "TTT gain" else value for value in actual]
    if not ways or not values:
        return None
    slack = AVERAGE_FRAC * values[0] if meaning == "ms/step" else log_half_unit
    return any(is_near(said, value, tolerance + slack) for said, tolerance in ways for value in values)


def list_allowed(run: Run, meaning: str, record: Record) -> list[float]:
    """Return the log's values of a figure, with the nominal budget and the files of the folder where they may stand."""
    values = log_values(run, meaning)
    if meaning == "code bytes" and values:
        files = record.get("source_file_bytes_in_folder") or {}
        values += [*files.values(), sum(files.values())]
    planned = (run.get("hparams") or {}).get("iterations")
    if meaning == "steps" and values and str(planned).isdigit():
        values.append(float(str(planned)))
    if meaning == "train time" and values:
        budget = (run.get("hparams") or {}).get("max_wallclock_seconds")
        if budget and re.fullmatch(r"\d+(\.\d*)?", str(budget)):
            values.append(float(budget))
        elif abs(values[0] - TIME_LIMIT_S) < NOMINAL_SLACK_S:
            values.append(TIME_LIMIT_S)
    return values


def half_unit_of_log(run: Run, meaning: str) -> float:
    """Return what the log rounded away from a score of this meaning: half a unit of its printed decimals."""
    stage, _, kind = meaning.rpartition(" ")
    decimals = run.get("score_decimals") or {}
    stage = run.get("scored_stage") or stage if stage == "final" else stage
    names = {"roundtrip": ("post_quant",), "post_quant/sliding": ("post_quant", "sliding")}.get(stage, (stage,))
    places = [decimals[name] for name in names if decimals.get(name)]
    return 0.5 * 10.0 ** -min(places) if kind in SCORE_RANGE and places else 0.0


def stage_with_value(runs: list[Run], cell: object) -> str | None:
    """Return the stage whose score a printed score is, None when it is none of them."""
    for run in runs:
        if agrees(cell, run.get("live_weights_bpb_at_stop")):
            return "live"
        for stage in ("post_ema", "post_quant", "sliding", "ttt_lr0", "post_ttt"):
            if run.get(stage) and agrees(cell, run[stage]["val_bpb"]):
                return stage
    return None


class Seeds:
    """Which logs speak for a seed: those whose lines or settings name it, else those whose file name does."""

    def __init__(self, record: Record) -> None:
        """Take the record's logs by seed."""
        self.scored = {run["seed"]: run for run in one_run_a_seed(record)}
        self.runs: list[Run] = record["runs"]
        self.nameless = [run for run in self.runs if not isinstance(run.get("seed"), int)]

    def logs(self, seed: int) -> list[Run]:
        """Return the logs of a seed with a final score, the one that counts first."""
        same = [run for run in self.runs if run.get("seed") == seed and run.get("final_bpb") is not None]
        if seed in self.scored:
            used = self.scored[seed]["log_file"]
            return sorted(same, key=lambda run: run["log_file"] != used)
        return [run for run in self.runs if run.get("seed_in_filename") == seed and run.get("final_bpb") is not None]

    def unscored(self, seed: int) -> list[str]:
        """Return the files of a seed whose logs show no final score."""
        return [run["log_file"] for run in self.runs if seed in (run.get("seed"), run.get("seed_in_filename"))]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the runs that count."""
        return iter(self.scored.values())
