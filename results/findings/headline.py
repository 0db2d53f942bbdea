"""The record's own score against its logs: the mean over seeds, or what else it turns out to be."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import Any, NamedTuple

from results.findings.cells import stage_with_value
from results.findings.findings import Claim, Finding, Review
from results.published.printed import is_near, printed_score, text_of
from results.published.records import Record, Run, one_run_a_seed
from results.published.submission_json import headline_of
from results.published.submitted import headline, listed_seeds, submitted_figures
from results.stats import summarize

KEYS = {
    "bpb": ("val_bpb", "mean_val_bpb", "val_bpb_mean", "mean_bpb", "bpb"),
    "nats": ("val_loss", "mean_val_loss", "val_loss_mean", "mean_val_loss_nats", "mean_nats"),
}
SCORED_STAGES = ("post_ttt", "sliding", "post_quant")  # that a record may be scored on
MEAN_ROUNDING = 1e-8  # logs carry eight decimals
SEEDS_DIFFER_FRAC = 0.01  # seeds of one record are ten times closer
MAX_CHOICES = 64  # of one log each where a seed has several


class Score(NamedTuple):
    """A printed headline: its kind ("bpb" or "nats"), where it stands, and as it was written."""

    kind: str
    source: str
    said: Any


def check_headline(record: Record) -> Review:
    """Return what is wrong with the headline scores, and which of them the logs cannot confirm."""
    runs = one_run_a_seed(record)
    found: list[Finding] = []
    unchecked: list[str] = []
    claims: list[Claim] = []
    one_seed: dict[int, dict[str, Any]] = {}
    for score in _headlines(record):
        if not runs or _is_explained(score, record, runs):
            continue
        mean = _mean([_final(run, score.kind) for run in runs])
        seed = _seed_with_score(score, runs)
        if seed is not None:
            one_seed.setdefault(seed, {})[score.source] = score.said
        elif score.kind == "nats" and _is_explained(score._replace(kind="bpb"), record, runs):
            values = {score.source: score.said, "log_mean": mean}
            field = "headline val_loss is a score in bits per byte, not in nats per token"
            found.append(Finding(None, field, values, "headline", score.said, mean))
        elif _rests_on_seeds_without_logs(score, record, runs):
            unchecked.append(f"{score.source} {text_of(score.said)} cannot be checked: not every seed has a log")
        elif lowest := lowest_seeds(score.said, runs, score.kind):
            values = {score.source: score.said, "seeds": lowest, "log_mean": mean}
            field = f"headline is the mean of the {len(lowest)} lowest of {len(runs)} seeds"
            found.append(Finding(None, field, values, "seed_selection", score.said, mean))
        elif mean is not None:
            equals = stage_with_value(runs, score.said) if score.kind == "bpb" else None
            extra = {"equals_log_stage": equals} if equals else {}
            claims.append(Claim(None, f"headline {score.kind}", score.source, score.source, score.said, [mean], extra))
    for seed, places in one_seed.items():
        found.append(_one_seed_finding(seed, places, runs))
    found += [_claimed(claim, len(runs)) for claim in claims]
    return Review(_same_fact_once(found), unchecked)


def lowest_seeds(said: object, runs: list[Run], kind: str = "bpb") -> list[int] | None:
    """Return the seeds of the k lowest scores (1 < k < n) whose mean a printed score is, None when it is none."""
    ranked = sorted((score, run["seed"]) for run in runs if (score := _final(run, kind)) is not None)
    value, half_unit = printed_score(said)
    for size in range(len(ranked) - 1, 1, -1):
        mean = _mean([score for score, _ in ranked[:size]])
        if value is not None and mean is not None and is_near(value, mean, half_unit + MEAN_ROUNDING):
            return [seed for _, seed in ranked[:size]]
    return None


def _headlines(record: Record) -> Iterator[Score]:
    submission = record.get("submission_json")
    names = {"bpb": "val_bpb", "nats": "val_loss"}
    for kind, keys in KEYS.items():
        said = headline(submission, keys)
        if said is None and kind == "bpb":
            said = headline_of(submission or {})
        if said is not None:
            yield Score(kind, f"submission.json {names[kind]}", said)
    score = (record.get("leaderboard") or {}).get("score")
    if score is not None:
        yield Score("bpb", "leaderboard", score)


def _is_explained(score: Score, record: Record, runs: list[Run]) -> bool:
    """Return whether a printed headline is a mean over the seeds: of the listed ones or all, of any one stage."""
    value, half_unit = printed_score(score.said)
    if value is None:
        return True
    return any(is_near(value, mean, half_unit + MEAN_ROUNDING) for mean in _means(score.kind, record, runs, score.said))


def _means(kind: str, record: Record, runs: list[Run], said: Any) -> Iterator[float]:
    listed = set(listed_seeds(record.get("submission_json")))
    groups = [runs, [run for run in runs if run["seed"] in listed]]
    groups += [list(choice) for choice in islice(product(*_logs_by_seed(record)), MAX_CHOICES)]
    groups.append([run for run in record["runs"] if run.get("final_bpb") is not None])
    decimals = {len(text_of(said).partition(".")[2]), 4, 5}
    for group in groups:
        for values in (_column(group, kind, stage) for stage in (None, *SCORED_STAGES)):
            if values:
                yield _mean(values) or 0.0
                for places in decimals:
                    yield _mean([round(value, places) for value in values]) or 0.0
        yield from _means_of_other_scores(group, kind)


def _logs_by_seed(record: Record) -> list[list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in record["runs"]:
        if run.get("seed") is not None and run.get("final_bpb") is not None:
            groups.setdefault(run["seed"], []).append(run)
    return list(groups.values())


def _column(runs: list[Run], kind: str, stage: str | None) -> list[float]:
    """Return one stage's scores, [] unless every run has it."""
    name = "val_bpb" if kind == "bpb" else "val_loss_nats"
    if stage is None:
        values = [_final(run, kind) for run in runs]
    else:
        values = [run[stage][name] if run.get(stage) else None for run in runs]
    shown = [value for value in values if value is not None]
    return shown if len(shown) == len(runs) else []


def _means_of_other_scores(runs: list[Run], kind: str) -> Iterator[float]:
    by_label: dict[str, list[float]] = {}
    for run in runs:
        for other in run.get("other_scores") or []:
            if other.get(kind) is not None:
                by_label.setdefault(str(other.get("label")), []).append(other[kind])
    for values in by_label.values():
        if len(values) >= len(runs) > 0:
            yield _mean(values) or 0.0


def _seed_with_score(score: Score, runs: list[Run]) -> int | None:
    """Return the seed whose score a headline is, where there are several seeds."""
    if len(runs) < 2:
        return None
    value, half_unit = printed_score(score.said)
    for run in runs:
        shown = [values[0] for stage in (None, *SCORED_STAGES) if (values := _column([run], score.kind, stage))]
        if value is not None and any(is_near(value, actual, half_unit + MEAN_ROUNDING) for actual in shown):
            return int(run["seed"])
    return None


def _rests_on_seeds_without_logs(score: Score, record: Record, runs: list[Run]) -> bool:
    """Return whether listed seeds without a log may explain a headline: near the logged ones, which are as printed."""
    listed, logged = set(listed_seeds(record.get("submission_json"))), {run["seed"]: run for run in runs}
    num_missing = len(listed - set(logged))
    value, mean = printed_score(score.said)[0], _mean([_final(run, score.kind) for run in runs])
    if not num_missing or value is None or mean is None:
        return False
    submitted = submitted_figures(record.get("submission_json"))
    for seed, run in logged.items():
        said, half_unit = printed_score(submitted.get(seed, {}).get("val_bpb" if score.kind == "bpb" else "val_loss"))
        if said is not None and not is_near(said, _final(run, score.kind) or said, half_unit):
            return False
    needed = (value * len(listed) - mean * len(logged)) / num_missing
    return abs(needed / mean - 1) < SEEDS_DIFFER_FRAC


def _one_seed_finding(seed: int, places: dict[str, Any], runs: list[Run]) -> Finding:
    mean = _mean([run["final_bpb"] for run in runs])
    said = next(iter(places.values()))
    field = f"headline is seed {seed}'s score, not the mean over {len(runs)} seeds"
    return Finding(None, field, {**places, "log_mean": mean, "n": len(runs)}, "headline", said, mean)


def _claimed(claim: Claim, num_seeds: int) -> Finding:
    name = "val_bpb" if claim.figure.endswith("bpb") else "val_loss"
    field = (
        "leaderboard score vs mean of logs"
        if claim.source == "leaderboard"
        else f"headline {name}: submission.json vs mean of logs"
    )
    values = {claim.source: claim.said, "log_mean": claim.actual[0], "n": num_seeds, **claim.extra}
    return Finding(None, field, values, "headline", claim.said, claim.actual[0])


def _same_fact_once(findings: list[Finding]) -> list[Finding]:
    """Put the leaderboard's score with the headline that it repeats."""
    kept: list[Finding] = []
    for finding in findings:
        said, half_unit = printed_score(finding.value)
        twin = None
        if finding.field.startswith("leaderboard") and said is not None:
            values = [printed_score(other.value)[0] for other in kept]
            twin = next(
                (place for place, value in enumerate(values) if value and is_near(said, value, half_unit)), None
            )
        if twin is None:
            kept.append(finding)
        else:
            kept[twin] = kept[twin]._replace(values={**kept[twin].values, **finding.values})
    return kept


def _final(run: Run, kind: str) -> float | None:
    value: float | None = run.get("final_bpb" if kind == "bpb" else "final_nats")
    return value


def _mean(values: list[Any]) -> float | None:
    shown = [value for value in values if value is not None]
    return summarize(shown).mean if shown else None
