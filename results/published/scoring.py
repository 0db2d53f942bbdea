"""Which stage a record is scored on, and which of several logs of a seed counts: those that the authors report.

submission.json decides, seed by seed, then by its headline; without one the README's numbers; without those the last
stage that every log has.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

from results.published.labels import base_label
from results.published.printed import agrees, printed_number
from results.published.records import Record, Run, submitted_seeds
from results.published.stages import unused_note
from results.published.submission_json import headline_of

SCORED_ORDER = ("post_ttt", "sliding", "post_quant")
ALSO_REPORTED = ("ttt_lr0", "post_ema", "live")  # scored only where the authors say so
OTHER = "other: "
MAX_COMBINATIONS = 512
NEAR_BPB = 0.0015  # a headline this near to a stage, and much farther from the others, means that stage
MAIN_KEYS = ("val_bpb", "bpb", "final_bpb", "final_val_bpb", "score", "val_bpb_exact")
ARTIFACT_KEYS = ("artifact_bytes", "bytes_total", "total_bytes", "artifact_size", "submission_bytes")
SETTING_OF_A_RUN = re.compile(
    r"seed|run_id|logfile|path|dir|file|rank|wandb|port|host|name|time|date|world_size|pid|device", re.IGNORECASE
)


def score_record(record: Record, notes: list[str], readme_numbers: list[str]) -> None:
    """Fill in the scored stage, final score and gains of every run, and mark the log of each seed that counts."""
    runs = _seeded(record)
    stage = choose_stage(record, runs, readme_numbers)
    for run in record["runs"]:
        entry = entry_of(run, stage)
        run["scored_stage"] = stage
        run["final_bpb"] = entry["val_bpb"] if entry else None
        run["final_nats"] = entry["val_loss_nats"] if entry else None
        for name in ("post_quant", "sliding"):
            both = run.get(name) and run.get("post_ttt")
            gain = round(run["post_ttt"]["val_bpb"] - run[name]["val_bpb"], 8) if both else None
            run[f"ttt_gain_vs_{name}_bpb"] = gain
        if stage and stage.startswith(OTHER) and entry:
            note = unused_note(run["log_file"], entry["label"], entry["stage"])
            notes[:] = [line for line in notes if line != note]
    if stage is not None:
        _mark_chosen(record, runs, stage, notes, readme_numbers)
        _leave_out_unscored(record, stage, notes)


def _leave_out_unscored(record: Record, stage: str, notes: list[str]) -> None:
    """Take logs without the final score off the record where another log of their seed has it, and those of no seed."""
    scored = {run["seed"] for run in record["runs"] if run["final_bpb"] is not None}
    is_known = any(run["seed"] is not None for run in record["runs"])
    kept = []
    for run in record["runs"]:
        if is_known and run["seed"] is None:
            notes.append(f"{run['log_file']}: no seed in its name or its lines; not used")
        elif run["final_bpb"] is None and run["seed"] in scored:
            notes.append(f"{run['log_file']}: does not show stage {stage}, as another log of its seed does; not used")
        else:
            kept.append(run)
            if run["final_bpb"] is None:
                notes.append(f"{run['log_file']}: stage {stage}, on which the others are scored, not found: left out")
    record["runs"] = kept


def entry_of(run: Run, stage: str | None) -> dict[str, Any] | None:
    """Return a run's score of a stage, of the live weights, or under a label of another kind; None without one."""
    if stage is None:
        return None
    if stage == "live":
        bpb = run.get("live_weights_bpb_at_stop")
        nats = run.get("live_weights_nats_at_stop")
        return None if bpb is None else {"val_bpb": bpb, "val_loss_nats": nats, "seconds": None, "label": "live"}
    if stage.startswith(OTHER):
        found = next((entry for entry in run["other_scores"] if OTHER + base_label(entry["label"]) == stage), None)
        if found is None:
            return None
        seconds = None if found["time_ms"] is None else found["time_ms"] / 1000
        return {
            "val_bpb": found["bpb"], "val_loss_nats": found["nats"], "seconds": seconds, "label": found["label"],
            "stage": found["stage"],
        }  # fmt: skip
    entry: dict[str, Any] | None = run.get(stage)
    return entry


def reported_scores(submission: dict[str, Any] | None, seed: int | None, num_seeds: int) -> list[Any]:
    """Return every bits per byte that submission.json gives for a seed; the headline where there is one seed."""
    said = submitted_seeds({"submission_json": submission}).get(seed, {}) if seed is not None else {}
    values = [value for key, value in said.items() if "bpb" in str(key) and not re.search("std|gain|delta", str(key))]
    headline = headline_of(submission or {})
    if num_seeds <= 1 and headline is not None:
        values.append(headline)
    return [value for value in values if printed_number(value)[0] is not None]


def choose_stage(record: Record, runs: list[Run], readme_numbers: list[str]) -> str | None:
    """Return the stage on which the authors scored their record, None where no log has a score."""
    labels = [OTHER + base_label(entry["label"]) for run in reversed(runs) for entry in reversed(run["other_scores"])]
    usual = [stage for stage in (*SCORED_ORDER, *dict.fromkeys(labels)) if any(entry_of(run, stage) for run in runs)]
    present = [*usual, *(stage for stage in ALSO_REPORTED if any(entry_of(run, stage) for run in runs))]
    by_seed = {stage: _matching_seeds(record, runs, stage) for stage in present}
    best = max(present, key=lambda stage: by_seed[stage], default=None)
    if best is not None and by_seed[best] > 0:
        return best
    headline = headline_of(record.get("submission_json") or {})
    found = _stage_by_headline(headline, runs, present) if headline is not None else None
    known = [stage for stage in present if not stage.startswith(OTHER)]
    found = found or _stage_by_readme(readme_numbers, runs, known)
    if found is not None:
        return found
    in_all = (stage for stage in usual if len(_by_seed(runs, stage)) == len({run["seed"] for run in runs}))
    return next(in_all, usual[0] if usual else None)


def _seeded(record: Record) -> list[Run]:
    """Return the runs that count as rows: those with a seed; without any, those whose seed is not known."""
    seeded = [run for run in record["runs"] if run["seed"] is not None]
    return seeded or list(record["runs"])


def _by_seed(runs: list[Run], stage: str) -> dict[int | None, list[Run]]:
    found: dict[int | None, list[Run]] = {}
    for run in runs:
        if entry_of(run, stage):
            found.setdefault(run["seed"], []).append(run)
    return found


def _matching_seeds(record: Record, runs: list[Run], stage: str) -> int:
    """Return for how many seeds submission.json gives a score that a log shows for this stage."""
    submitted = submitted_seeds(record)
    count = 0
    for seed, choices in _by_seed(runs, stage).items():
        said = [submitted.get(seed, {}).get(key) for key in MAIN_KEYS] if seed is not None else []
        values = [value for value in said if printed_number(value)[0] is not None]
        count += any(agrees(value, _bpb(run, stage)) for value in values for run in choices)
    return count


def _stage_by_headline(headline: Any, runs: list[Run], present: list[str]) -> str | None:
    """Return the stage whose mean over seeds, mean over logs, or single score the headline is."""
    value, half_unit = printed_number(headline)
    if value is None:
        return None
    for measure in (_seed_means, _log_means, _single_scores):
        for stage in present:
            if any(abs(value - score) <= half_unit * (1 + 1e-6) + 1e-8 for score in measure(runs, stage)):
                return stage
    usual = [stage for stage in present if stage != "live"]
    distances = sorted((min(abs(value - score) for score in _seed_means(runs, stage)), stage) for stage in usual)
    is_near = bool(distances) and distances[0][0] <= NEAR_BPB
    is_clear = len(distances) == 1 or (len(distances) > 1 and distances[1][0] >= 3 * distances[0][0])
    return distances[0][1] if is_near and is_clear else None


def _seed_means(runs: list[Run], stage: str) -> list[float]:
    """Return the mean over seeds for every choice of one log a seed (the first logs only, where these are too many)."""
    choices = [[_bpb(run, stage) for run in entries] for entries in _by_seed(runs, stage).values()]
    return [sum(scores) / len(scores) for scores in itertools.islice(itertools.product(*choices), MAX_COMBINATIONS)]


def _log_means(runs: list[Run], stage: str) -> list[float]:
    scores = _single_scores(runs, stage)
    return [sum(scores) / len(scores)]


def _single_scores(runs: list[Run], stage: str) -> list[float]:
    return [_bpb(run, stage) for entries in _by_seed(runs, stage).values() for run in entries]


def _stage_by_readme(numbers: list[str], runs: list[Run], stages: list[str]) -> str | None:
    """Return the last stage whose scores the README prints for every seed, None where it prints none of them."""
    for stage in stages:
        found = _by_seed(runs, stage)
        if found and all(
            any(agrees(text, _bpb(run, stage)) for text in numbers for run in entries) for entries in found.values()
        ):
            return stage
    return None


def _mark_chosen(record: Record, runs: list[Run], stage: str, notes: list[str], readme_numbers: list[str]) -> None:
    """Mark one log a seed: the one whose figures submission.json reports, else the one that gives its headline."""
    headline = headline_of(record.get("submission_json") or {})
    by_seed = _by_seed(runs, stage)
    fitting = _combination_of(headline, by_seed, stage) or ()
    settings = _settings_of_most(by_seed)
    is_said = printed_number(headline)[0] is not None

    def rank(run: Run) -> tuple[int, ...]:
        said = submitted_seeds(record).get(run["seed"], {}) if run["seed"] is not None else {}
        return (
            _num_agreeing(run, said, stage), int(any(run is other for other in fitting)),
            int(is_said and agrees(headline, _bpb(run, stage))),
            int(any(agrees(text, _bpb(run, stage)) for text in readme_numbers)), int(_settings(run) == settings),
            int(run["steps"] is not None), _place_in_file(run),
        )  # fmt: skip

    unlisted = _unlisted_seeds(record, by_seed, stage)
    for seed, choices in by_seed.items():
        if seed in unlisted:
            notes.append(f"seed {seed}: has a log but is not among the seeds of submission.json: not in the mean")
            for run in choices:
                run["is_chosen"] = False
            continue
        chosen = max(choices, key=rank)
        for run in choices:
            run["is_chosen"] = run is chosen
        _note_choice(seed, choices, chosen, stage, notes)


def _unlisted_seeds(record: Record, by_seed: dict[int | None, list[Run]], stage: str) -> set[int | None]:
    """Return the seeds that submission.json does not list, where its headline is the mean over those that it lists."""
    submission = record.get("submission_json") or {}
    listed = submission.get("seeds")
    seeds = {str(seed) for seed in listed} if isinstance(listed, list) else set(map(str, submitted_seeds(record)))
    others = {seed for seed in by_seed if str(seed) not in seeds}
    value, half_unit = printed_number(headline_of(submission))
    if value is None or not others or len(others) == len(by_seed):
        return set()

    def is_mean(kept: dict[int | None, list[Run]]) -> bool:
        means = _seed_means([run for runs in kept.values() for run in runs], stage)
        return any(abs(value - mean) <= half_unit * (1 + 1e-6) + 1e-8 for mean in means)

    only_listed = {seed: runs for seed, runs in by_seed.items() if seed not in others}
    return others if is_mean(only_listed) and not is_mean(by_seed) else set()


def _note_choice(seed: int | None, choices: list[Run], chosen: Run, stage: str, notes: list[str]) -> None:
    if len(choices) < 2:
        return
    files = ", ".join(f"{run['log_file']} {_bpb(run, stage)}" for run in choices)
    differing = sorted(
        {name for run in choices for name, value in _settings(run) if (name, value) not in _settings(chosen)}
    )
    said = f", of different settings ({', '.join(differing[:4])})" if differing else ""
    who = "no seed" if seed is None else f"seed {seed}"
    notes.append(f"{who}: {len(choices)} runs{said} ({files}): {chosen['log_file']} is used")


def _combination_of(headline: Any, by_seed: dict[int | None, list[Run]], stage: str) -> tuple[Run, ...] | None:
    """Return the choice of one log a seed whose mean is the headline, where exactly one choice has that mean."""
    value, half_unit = printed_number(headline)
    if value is None or all(len(entries) == 1 for entries in by_seed.values()):
        return None
    fitting = [
        runs
        for runs in itertools.islice(itertools.product(*by_seed.values()), MAX_COMBINATIONS)
        if abs(value - sum(_bpb(run, stage) for run in runs) / len(runs)) <= half_unit * (1 + 1e-6) + 1e-8
    ]
    return fitting[0] if len(fitting) == 1 else None


def _num_agreeing(run: Run, said: dict[str, Any], stage: str) -> int:
    """Return how many of a seed's reported figures a log shows; the scored one counts most, then the artifact."""
    count = 0
    for key, value in said.items():
        if printed_number(value)[0] is None:
            continue
        if key in MAIN_KEYS:
            count += 100 * agrees(value, _bpb(run, stage))
        elif "bpb" in key:
            scores = [entry_of(run, name) for name in (*SCORED_ORDER, *ALSO_REPORTED)]
            count += 10 * any(entry is not None and agrees(value, entry["val_bpb"]) for entry in scores)
        elif key in ARTIFACT_KEYS:
            count += 3 * (printed_number(value)[0] == run["total_bytes"])
        elif "step" in key:
            count += printed_number(value)[0] == run["steps"]
    return count


def _settings_of_most(by_seed: dict[int | None, list[Run]]) -> frozenset[tuple[str, str]]:
    """Return the settings that logs of the most seeds share; of equals those of the last log."""
    seeds: dict[frozenset[tuple[str, str]], set[int | None]] = {}
    for seed, runs in by_seed.items():
        for run in runs:
            seeds.setdefault(_settings(run), set()).add(seed)
    return max(seeds, key=lambda settings: len(seeds[settings]), default=frozenset())


def _settings(run: Run) -> frozenset[tuple[str, str]]:
    settings = (run.get("hparams") or run.get("settings") or {}).items()
    return frozenset((name, str(value)) for name, value in settings if not SETTING_OF_A_RUN.search(name))


def _place_in_file(run: Run) -> int:
    """Return which run of its file this is: of several runs in one file the last one counts."""
    match = re.search(r"\(run (\d+) of \d+\)$", run["log_file"])
    return int(match.group(1)) if match else 0


def _bpb(run: Run, stage: str) -> float:
    entry = entry_of(run, stage)
    assert entry is not None, "only runs with a score of the stage are asked"
    bpb: float = entry["val_bpb"]
    return bpb
