"""Where a record contradicts itself: logs against submission.json, README tables, leaderboard and pull request text.

A printed value agrees when it is the log's value rounded to the decimals it was printed with. The list is
mechanical: a README may have meant another stage or another run, and then the line says which stage it equals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from results.published import STAGES, Record, Run, one_run_a_seed, recompute, submitted_seeds
from results.stats import population_std, summarize

SIZE_LIMIT_BYTES = 16_000_000
TRAIN_LIMIT_MS = 600_000
GAIN_TOLERANCE = 1.5e-5  # a gain is a difference of two rounded columns
WORSE_TTT_BPB = 0.05  # a TTT result this much above the sliding one was not what a record meant to report


class Finding(NamedTuple):
    """One contradiction: the seed it is about (None: the record), what contradicts what, and the values by source."""

    seed: int | None
    field: str
    values: dict[str, Any]

    def __str__(self) -> str:
        """Return the finding as one line."""
        place = "record" if self.seed is None else f"seed {self.seed}"
        said = ", ".join(f"{source} {_short(value)}" for source, value in self.values.items())
        return f"{place}: {self.field}: {said}"


def find_disagreements(record: Record) -> list[Finding]:
    """Return every contradiction inside a record, logs first, then what was written about them."""
    checks: list[Callable[[Record], Iterator[Finding]]] = [
        _log_limits, _several_logs, _worse_ttt, _code_sizes, _headline, _stated_std, _submitted_seed_figures,
        _readme_tables, _pull_request_text,
    ]  # fmt: skip
    return [finding for check in checks for finding in check(record)]


def agrees(said: object, actual: float | None) -> bool:
    """Return whether a printed number (text or float) is `actual` rounded to the printed decimals."""
    value, half_unit = printed_number(said)
    if value is None or actual is None:
        return value is None and actual is None
    return abs(value - actual) <= half_unit * (1 + 1e-6) + 1e-9


def printed_number(said: object) -> tuple[float | None, float]:
    """Return the number in a printed cell and half a unit of its last decimal; (None, 0) where there is none."""
    if isinstance(said, bool) or said is None:
        return None, 0.0
    text = repr(said) if isinstance(said, float) else str(said)
    match = re.search(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", text.replace("−", "-"))
    if not match:
        return None, 0.0
    digits = match.group().replace(",", "")
    decimals = len(digits.partition(".")[2].partition("e")[0])
    scale = 1e6 if re.search(r"\d\s*M(B|iB)?\b", text) else 1.0
    half_unit = 0.5 * 10.0**-decimals * scale if "." in digits or scale > 1 else 0.0
    return float(digits) * scale, half_unit


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_short(entry)}" for key, entry in value.items()) + ")"
    return str(value)


def _log_limits(record: Record) -> Iterator[Finding]:
    for run in record["runs"]:
        if (run.get("train_ms") or 0) > TRAIN_LIMIT_MS:
            values = {"train_ms": run["train_ms"], "log_file": run["log_file"]}
            yield Finding(run["seed"], "logged train_time over 600,000 ms (stop check granularity)", values)
        if (run.get("total_bytes") or 0) > SIZE_LIMIT_BYTES:
            values = {"log_total_bytes": run["total_bytes"], "log_file": run["log_file"]}
            yield Finding(run["seed"], "log total bytes over the 16,000,000 cap", values)
        named, inside = run.get("seed_in_filename"), run.get("seed_in_log")
        if named is not None and inside is not None and named != inside:
            yield Finding(run["seed"], "seed in the file name vs in the log", {"file name": named, "log": inside})


def _several_logs(record: Record) -> Iterator[Finding]:
    used = {run["seed"]: run["log_file"] for run in one_run_a_seed(record)}
    for seed, log_file in used.items():
        scores = {run["log_file"]: run["final_bpb"] for run in record["runs"] if run["seed"] == seed}
        if len(set(scores.values())) > 1:
            yield Finding(seed, "several logs of one seed differ", {**scores, "used": log_file})


def _worse_ttt(record: Record) -> Iterator[Finding]:
    for run in one_run_a_seed(record):
        sliding, adapted = run.get("sliding"), run.get("post_ttt")
        if sliding and adapted and adapted["val_bpb"] > sliding["val_bpb"] + WORSE_TTT_BPB:
            field = "log holds a later, worse TTT result that the submission does not report"
            if run["scored_stage"] == "sliding":
                field += " (submission reports the sliding stage)"
            yield Finding(
                run["seed"], field, {"sliding_bpb": sliding["val_bpb"], "post_ttt_bpb_in_log": adapted["val_bpb"]}
            )


def _code_sizes(record: Record) -> Iterator[Finding]:
    files = record.get("source_file_bytes_in_folder") or {}
    committed = files.get("train_gpt.py") or next((size for name, size in files.items() if "train_gpt" in name), None)
    printed: dict[str, list[int]] = {}
    for run in one_run_a_seed(record):
        counted, model = run.get("code_bytes_implied"), run.get("model_bytes")
        is_there = counted in (committed, files.get("train_gpt_packed.py"))
        if committed is not None and counted is not None and not is_there:
            values = {"file_bytes": committed, "counted": counted, "model_bytes": model}
            if model is not None:
                values["total_if_file_counted_as_is"] = model + committed
                values["over_cap_if_counted_as_is"] = model + committed > SIZE_LIMIT_BYTES
            field = "code bytes: train_gpt.py file as committed vs code bytes counted in the log total"
            yield Finding(run["seed"], field, values)
        if run.get("code_bytes_printed"):
            sizes = str(sorted(run["code_bytes_printed"].values()))
            printed.setdefault(sizes, []).append(run["seed"])
    if len(printed) > 1:
        field = "code size printed differs between the seeds of one record (not one revision of the script)"
        yield Finding(None, field, dict(printed))


def _headline(record: Record) -> Iterator[Finding]:
    mine = recompute(record)
    if mine is None:
        return
    submission = record.get("submission_json") or {}
    names = {
        "val_bpb": (("val_bpb", "mean_val_bpb", "mean_bpb"), mine.bpb),
        "val_loss": (("val_loss", "mean_val_loss", "mean_val_loss_nats"), mine.nats),
    }
    for label, (keys, summary) in names.items():
        said = next((submission[key] for key in keys if submission.get(key) is not None), None)
        if said is not None and not _agrees_with_mean(said, summary.mean):
            values = {"submission_json": said, "log_mean": summary.mean, "n": summary.n}
            yield Finding(None, f"headline {label}: submission.json vs mean of logs", values)
    totals = [run["total_bytes"] for run in one_run_a_seed(record) if run.get("total_bytes")]
    said = submission.get("bytes_total")
    if isinstance(said, int | float) and totals and said not in (*totals, round(sum(totals) / len(totals))):
        values = {"submission_json": said, "log_totals": totals, "log_mean": sum(totals) / len(totals)}
        yield Finding(None, "bytes_total: submission.json vs logs", values)
    score = (record.get("leaderboard") or {}).get("score")
    if score is not None and not _agrees_with_mean(score, mine.bpb.mean):
        values = {"leaderboard": score, "log_mean": mine.bpb.mean, "n": mine.bpb.n}
        yield Finding(None, "leaderboard score vs mean of logs", values)


def _agrees_with_mean(said: object, mean: float | None) -> bool:
    """Return agrees() for a mean of logged values, which themselves carry eight decimals."""
    value, half_unit = printed_number(said)
    return value is None or mean is None or abs(value - mean) <= half_unit * (1 + 1e-6) + 1e-8


def _stated_std(record: Record) -> Iterator[Finding]:
    """Name the convention of a stated std unless it is the sample one."""
    submission = record.get("submission_json") or {}
    runs = one_run_a_seed(record)
    scores = [run["final_bpb"] for run in runs]
    stated = submission.get("val_bpb_std", submission.get("std_bpb"))
    sample, population = summarize(scores).std_ddof1, population_std(scores)
    if stated is None or sample is None or population is None or agrees(stated, sample):
        return
    seeds = submission.get("seeds")
    if isinstance(seeds, list) and len(seeds) != len(runs):
        return  # the logs of some seeds are not there
    value, half_unit = printed_number(stated)
    assert value is not None
    if half_unit < 1e-6 and abs(value - sample) < 2e-6:  # the std of scores rounded to five decimals
        return
    convention = "ddof=0" if agrees(stated, population) else "neither"
    values = {"stated": stated, "log_ddof1": sample, "log_ddof0": population, "convention": convention, "n": len(runs)}
    yield Finding(None, "std convention", values)


def _submitted_seed_figures(record: Record) -> Iterator[Finding]:
    submitted = submitted_seeds(record)
    runs = {run["seed"]: run for run in one_run_a_seed(record)}
    for seed, said in submitted.items():
        run = runs.get(seed)
        if run is None:
            yield Finding(seed, "submission.json lists a seed without a log", {"submission_json": said})
            continue
        if said.get("steps") is not None and said["steps"] != run.get("steps"):
            values = {"submission_json": said["steps"], "log": run.get("steps")}
            yield Finding(seed, "steps: submission.json vs log", values)
        size = said.get("artifact_bytes", said.get("bytes_total"))
        if size is not None and size != run.get("total_bytes"):
            values = {"submission_json": size, "log_total": run.get("total_bytes"), "log_model": run.get("model_bytes")}
            yield Finding(seed, "artifact/total bytes: submission.json vs log", values)
        for key, actual in (("val_bpb", run["final_bpb"]), ("val_loss", run["final_nats"])):
            if said.get(key) is not None and not agrees(said[key], actual):
                values = {"submission_json": said[key], "log": actual, "log_stage": run["scored_stage"]}
                yield Finding(seed, f"{key}: submission.json vs log", values)


def _readme_tables(record: Record) -> Iterator[Finding]:
    runs = {run["seed"]: run for run in one_run_a_seed(record)}
    for table in record.get("readme_seed_tables") or []:
        for row in table["rows"]:
            first = str(row.get(seed_column(table["columns"]) or "", ""))
            if re.match(r"\W*(mean|avg|average)\b", first, re.IGNORECASE):
                yield from _readme_means(row, table["rows"], list(runs.values()))
            seed = _seed_in_cell(first)
            if seed is None:
                continue
            candidates = [run for run in record["runs"] if run["seed"] == seed]
            if seed not in runs:
                yield Finding(seed, "README lists a seed without a log", {"readme": dict(row)})
                continue
            for column, cell in row.items():
                yield from _readme_cell(seed, column, str(cell), candidates)


def seed_column(columns: list[str]) -> str | None:
    """Return the name of a table's seed column, None where it has none."""
    return next((name for name in columns if re.match(r"\W*seed\b", name, re.IGNORECASE)), None)


def _seed_in_cell(cell: str) -> int | None:
    """Return the seed that a row is about: a number, perhaps with a remark in brackets; None for mean and std rows."""
    match = re.fullmatch(r"\W*(\d+)\W*(\(.*\)\W*)?", cell)
    return int(match.group(1)) if match else None


def _readme_means(row: dict[str, str], rows: list[dict[str, str]], runs: list[Run]) -> Iterator[Finding]:
    """Compare a README's row of means with the means over the logs, or over the README's own rounded cells."""
    for column, cell in row.items():
        label = column_meaning(column)
        value, half_unit = printed_number(cell)
        if label is None or value is None:
            continue
        per_seed = [_log_values(run, label) for run in runs]
        if not per_seed or any(len(values) != len(per_seed[0]) for values in per_seed):
            continue  # the logs do not all show it
        means = [summarize(list(values)).mean for values in zip(*per_seed) if None not in values]
        seeds = [other for other in rows if _seed_in_cell(next(iter(other.values()), "")) is not None]
        own = [printed_number(other.get(column))[0] for other in seeds]
        tolerance = max(half_unit, 0.5 if label in ("steps", "artifact bytes") else 0.0) * 1.001 + 1e-8
        choices = [abs(mean) for mean in (*means, summarize(own).mean) if mean is not None]
        if means and not any(abs(abs(value) - choice) <= tolerance for choice in choices):
            values = {"readme": cell, "column": column, "log": [mean for mean in means if mean is not None]}
            yield Finding(None, f"mean of {label}: README vs logs", values)


def _readme_cell(seed: int, column: str, cell: str, runs: list[Run]) -> Iterator[Finding]:
    """Compare one README cell with the logs of its seed; a column of unknown meaning is not judged."""
    label = column_meaning(column)
    if label is None or printed_number(cell)[0] is None:
        return
    actual = [_log_values(run, label) for run in runs]
    if label == "steps":
        is_same = any(printed_number(cell)[0] == value for values in actual for value in values)
    elif label == "TTT gain":
        is_same = any(_same_gain(cell, value) for values in actual for value in values)
    else:
        is_same = any(agrees(cell, value) for values in actual for value in values)
    if is_same:
        return
    values: dict[str, Any] = {"readme": cell, "column": column, "log": _flat(actual)}
    if label.endswith("bpb"):
        values["readme_value_equals_log_stage"] = next(
            (stage for run in runs for stage in STAGES if run.get(stage) and agrees(cell, run[stage]["val_bpb"])), None
        )
    yield Finding(seed, f"{label}: README vs log", values)


def column_meaning(column: str) -> str | None:
    """Return which figure a README column holds, by its words; None for a column we do not know."""
    words = column.lower().replace("_", " ")
    if "gain" in words:
        return "TTT gain"
    if words.startswith("steps"):
        return "steps"
    if "ms/step" in words:
        return "ms/step"
    if words.startswith(("artifact", "total")):
        return "artifact bytes"
    is_score = "bpb" in words or "bpp" in words
    if "loss" in words or "nats" in words:
        return "final nats"
    if not is_score:
        return None
    if "pre-ttt" in words:
        return "post_quant/sliding bpb"
    if "post-ema" in words or "pre-quant" in words:
        return "post_ema bpb"
    if "pre-ema" in words:
        return None
    if "ttt" in words and "no ttt" not in words:
        return "post_ttt bpb"
    if "sliding" in words or "slide" in words:
        return "sliding bpb"
    if any(word in words for word in ("quant", "roundtrip", "rt bpb")):
        return "post_quant bpb"
    return "final bpb" if words.strip() in ("bpb", "val bpb") else None


def _log_values(run: Run, label: str) -> list[float | None]:
    """Return the log's values that a README figure of this meaning may have."""

    def score(*stages: str) -> list[float | None]:
        return [run[stage]["val_bpb"] for stage in stages if run.get(stage)]

    choices: dict[str, list[float | None]] = {
        "steps": [run.get("steps")],
        "ms/step": [run.get("ms_per_step")],
        "artifact bytes": [run.get("total_bytes")],
        "final nats": [run["final_nats"], *(run[stage]["val_loss_nats"] for stage in STAGES if run.get(stage))],
        "TTT gain": [run.get("ttt_gain_vs_post_quant_bpb"), run.get("ttt_gain_vs_sliding_bpb")],
        "post_quant/sliding bpb": score("post_quant", "sliding"),
        "post_ema bpb": score("post_ema"),
        "post_ttt bpb": score("post_ttt"),
        "sliding bpb": score("sliding") or score("post_quant"),
        "post_quant bpb": score("post_quant"),
        "final bpb": [run["final_bpb"], *score(*STAGES)],
    }
    return choices[label]


def _same_gain(cell: str, actual: float | None) -> bool:
    """Return whether a printed gain is the log's, whichever sign it was printed with."""
    value = printed_number(cell)[0]
    return value is not None and actual is not None and abs(abs(value) - abs(actual)) <= GAIN_TOLERANCE


def _flat(values: list[list[float | None]]) -> list[float]:
    return sorted({value for entries in values for value in entries if value is not None})


def _pull_request_text(record: Record) -> Iterator[Finding]:
    seeds = ((record.get("pr_text") or {}).get("figures") or {}).get("seeds") or {}
    runs = {str(run["seed"]): run for run in one_run_a_seed(record)}
    for seed, said in seeds.items():
        run = runs.get(seed)
        if run is None:
            continue
        before = run["post_quant"]["val_bpb"] if run.get("post_quant") else None
        gain = run.get("ttt_gain_vs_post_quant_bpb")
        wrong_score = said.get("pre_ttt_bpb") is not None and not agrees(said["pre_ttt_bpb"], before)
        wrong_gain = said.get("ttt_gain") is not None and not _same_gain(str(said["ttt_gain"]), gain)
        if wrong_score or wrong_gain:
            text = {key: said[key] for key in ("pre_ttt_bpb", "ttt_gain") if key in said}
            values = {"pr_text": text, "log": {"post_quant_bpb": before, "ttt_gain": gain}}
            yield Finding(run["seed"], "pre-TTT bpb and TTT gain: PR text vs README and log", values)
        if said.get("post_ttt_bpb") is not None and not agrees(said["post_ttt_bpb"], run["final_bpb"]):
            values = {"pr_text": said["post_ttt_bpb"], "log": run["final_bpb"]}
            yield Finding(run["seed"], "final bpb: PR text vs log", values)
