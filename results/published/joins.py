"""From logs to runs: which seed a log is of, which logs show one run together, and which only repeat another."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from results.published.labels import base_label, is_mixture, is_plain_variant
from results.published.layout import ASIDE
from results.published.log import SINGLE_FIGURES, Log
from results.published.printed import agrees
from results.published.stages import STAGES, unused_note

Reported = Callable[[int | None], list[Any]]  # seed -> scores that submission.json reports for it
FILLED = (
    "total_bytes",
    "model_bytes",
    "code_bytes_implied",
    "live_weights_bpb_at_stop",
    "train_losses",
    "token_rates",
    "clock",
    *SINGLE_FIGURES,
)


def settle_seeds(logs: list[Log], known: list[int], reported: Reported, notes: list[str]) -> None:
    """Decide the seed of every log, by its lines, its name, and the seeds that the submission lists (`known`)."""
    for log in logs:
        named, inside = log.run["seed_in_filename"], log.run["seed_in_log"]
        if named is not None and inside is not None and named != inside and _is_named_one(log, logs, known, reported):
            log.run["seed"] = named
            notes.append(
                f"{log.run['log_file']}: its lines say seed {inside}, its name and submission.json seed {named}"
            )
    for log in logs:
        if log.run["seed"] is None:
            folder = re.search(r"(?:^|/)(\d{1,7})/[^/]*$", log.run["log_file"])
            log.run["seed"] = int(folder.group(1)) if folder else _seed_by_score(log, known, reported)
    unnamed = [log for log in logs if log.run["seed"] is None]
    others = {log.run["seed"] for log in logs if log.run["seed"] is not None}
    if len(known) == 1 and not others - set(known) and unnamed:
        for log in unnamed:
            log.run["seed"] = known[0]
            notes.append(
                f"{log.run['log_file']}: no seed in its name or its lines; {known[0]} is the submission's only one"
            )


def leave_aside(logs: list[Log], known: list[int], reported: Reported, notes: list[str]) -> list[Log]:
    """Return the logs without those that their names set apart, such as ablations, unless these are reported."""
    kept = []
    apart = [log for log in logs if ASIDE.search(log.run["log_file"])]
    main = [log for log in logs if log not in apart and log.has_scores]
    for log in logs:
        seed = log.run["seed"]
        is_needed = seed in known and not any(other.run["seed"] == seed for other in main)
        is_said = any(agrees(said, score) for said in reported(seed) for score in _scores(log))
        if log not in apart or not main or is_needed or is_said:
            kept.append(log)
        else:
            notes.append(f"{log.run['log_file']}: by its name not a run of this submission; left out")
    return kept


def join_logs(logs: list[Log], reported: Reported, notes: list[str]) -> list[Log]:
    """Return one log a run: logs that hold only evaluations are joined to the log that trained their seed."""
    kept: list[Log] = []
    for log in logs:
        same = next((other for other in kept if _is_copy(other, log)), None)
        if same is None:
            kept.append(log)
        else:
            same.run["files"] |= {name: ["the same figures"] for name in log.run["files"]}
            notes.append(f"{log.run['log_file']}: the same figures as {same.run['log_file']}; left out")
    for log in [log for log in kept if not _has_training(log) and log.has_scores]:
        base = _training_of(log, kept) or _other_evaluation(log, kept)
        if base is not None:
            _join(base, log, reported(base.run["seed"]), notes)
            kept.remove(log)
    return kept


def promote_variants(logs: list[Log]) -> None:
    """Take the only scores of a stage as that stage, where all logs that have one have the same variant of it.

    Where some log has the plain score, or the variants are several or mixtures with other predictors, they stay beside
    it: a mean is never over two ways to evaluate.
    """
    for stage in ("post_ema", "post_quant", "sliding", "post_ttt"):
        if any(log.run[stage] for log in logs):
            continue
        labels = [[entry["label"] for entry in log.run["other_scores"] if entry["stage"] == stage] for log in logs]
        labels = [[label for label in entries if not is_mixture(label)] for entries in labels]
        plain = [[label for label in entries if is_plain_variant(label, stage)] for entries in labels]
        for choices in (plain, labels):
            found = {base_label(entries[-1]) for entries in choices if entries}
            is_clear = choices is plain or all(len(entries) <= 1 for entries in choices)
            if len(found) == 1 and is_clear:
                for log, entries in zip(logs, choices):
                    if entries:
                        _promote(log, stage, entries[-1])
                break


def _promote(log: Log, stage: str, label: str) -> None:
    entry = next(entry for entry in log.run["other_scores"] if entry["label"] == label)
    log.run["other_scores"].remove(entry)
    seconds = None if entry["time_ms"] is None else entry["time_ms"] / 1000
    log.run[stage] = {"val_bpb": entry["bpb"], "val_loss_nats": entry["nats"], "seconds": seconds, "label": label}
    log.run["score_decimals"][stage] = entry["decimals"]
    if seconds is not None:
        log.run["eval_times"][stage] = entry["time_ms"]
    log.provenance[stage] = f"{log.run['log_file']}: {label}"
    note = unused_note(log.run["log_file"], label, stage)
    if note in log.unknown:
        log.unknown.remove(note)


def _is_named_one(log: Log, logs: list[Log], known: list[int], reported: Reported) -> bool:
    """Return whether a log is of the seed in its name, against the one in its lines."""
    named, inside = log.run["seed_in_filename"], log.run["seed_in_log"]
    if named in known and inside not in known:
        return True
    scores = _scores(log)
    by_name = any(agrees(said, score) for said in reported(named) for score in scores)
    by_line = any(agrees(said, score) for said in reported(inside) for score in scores)
    if by_name != by_line:
        return by_name
    names = {other.run["seed_in_filename"] for other in logs if other.run["seed_in_log"] == inside and other.has_scores}
    return len(names - {None}) > 1 and named in (known or names)  # one line of a script printed the same in every log


def _seed_by_score(log: Log, known: list[int], reported: Reported) -> int | None:
    """Return the one seed whose reported score a log shows, None where none or several match."""
    scores = _scores(log)
    matching = [seed for seed in known if any(agrees(said, score) for said in reported(seed) for score in scores)]
    return matching[0] if len(matching) == 1 else None


def _scores(log: Log) -> list[float]:
    entries = [log.run[stage]["val_bpb"] for stage in STAGES if log.run[stage]]
    return [*entries, *(entry["bpb"] for entry in log.run["other_scores"])]


def _has_training(log: Log) -> bool:
    return log.run["steps"] is not None or len(log.steps) > 1


def _is_copy(a: Log, b: Log) -> bool:
    """Return whether b shows nothing that a does not: the same seed (or none named) and the same figures throughout."""
    if b.run["seed"] not in (a.run["seed"], None) or not a.has_scores or not b.has_scores:
        return False
    names = ("steps", "train_ms", "total_bytes", "model_bytes", *STAGES)
    same = all(_shown(a.run[name]) == _shown(b.run[name]) for name in names)
    return same and a.run["hparams"] == b.run["hparams"] and _scores(a) == _scores(b)


def _shown(value: Any) -> Any:
    return (value["val_bpb"], value["val_loss_nats"]) if isinstance(value, dict) else value


def _training_of(log: Log, logs: list[Log]) -> Log | None:
    """Return the log that trained what another one evaluates: of its seed, or the only one where no seed is named."""
    trained = [other for other in logs if _has_training(other)]
    seeds = {other.run["seed"] for other in trained}
    if log.run["seed"] is not None:
        trained = [other for other in trained if other.run["seed"] == log.run["seed"]]
    elif len(seeds) > 1:
        trained = [other for other in trained if set(_scores(other)) & set(_scores(log))]
        if len(trained) != 1:
            return None
    shared = [other for other in trained if set(_scores(other)) & set(_scores(log))]
    unscored = [other for other in trained if not other.has_scores]
    choices = shared or unscored or trained
    return choices[-1] if choices else None


def _other_evaluation(log: Log, logs: list[Log]) -> Log | None:
    """Return an earlier log of the same seed that scored other stages, where no log shows the training."""
    for other in logs[: logs.index(log)]:
        is_same = other.run["seed"] == log.run["seed"] and other.run["seed"] is not None and other.has_scores
        if is_same and not any(other.run[stage] and log.run[stage] for stage in STAGES):
            return other
    return None


def _join(base: Log, log: Log, said: list[Any], notes: list[str]) -> None:
    """Bring an evaluation's figures into the log of its training; of two scores of a stage the reported one counts."""
    name = log.run["log_file"]
    taken = []
    for stage in STAGES:
        old, new = base.run[stage], log.run[stage]
        if new is None or (old is not None and old["val_bpb"] == new["val_bpb"]):
            continue
        if old is not None:
            is_new = _is_reported(new, said) or (not _is_reported(old, said) and stage in ("sliding", "post_ttt"))
            used = new if is_new else old
            values = f"{old['val_bpb']} in {base.run['log_file']}, {new['val_bpb']} in {name}"
            notes.append(f"seed {base.run['seed']}: stage {stage} is {values}: {used['val_bpb']} is used")
            if not is_new:
                continue
        base.run[stage] = new
        base.provenance[stage] = log.provenance[stage]
        for table in ("score_decimals", "eval_times"):
            base.run[table].pop(stage, None)
            base.run[table] |= {stage: log.run[table][stage]} if stage in log.run[table] else {}
        taken.append(stage)
    labels = {entry["label"] for entry in base.run["other_scores"]}
    base.run["other_scores"] += [entry for entry in log.run["other_scores"] if entry["label"] not in labels]
    for figure in FILLED:
        if not base.run.get(figure) and log.run.get(figure):
            base.run[figure] = log.run[figure]
            base.provenance[figure] = log.provenance.get(figure, name)
            taken.append(figure)
    base.run["files"] |= dict.fromkeys(log.run["files"], taken)
    base.unknown.extend(log.unknown)
    what = ", ".join(taken) or "the same figures"
    notes.append(f"{name}: an evaluation without training, joined to {base.run['log_file']} ({what})")


def _is_reported(entry: dict[str, Any], said: list[Any]) -> bool:
    return any(agrees(value, entry["val_bpb"]) for value in said)
