"""Whether a log scored the text it should have: the byte constant of its tokenizer, how many targets, which shards."""

from __future__ import annotations

import math
from collections.abc import Iterator

from results.findings.findings import Finding
from results.findings.known_texts import (
    FINGERPRINTS,
    RATIO_LIMIT_FRAC,
    SAME_COUNT_FRAC,
    text_of_count,
    text_of_tokenizer,
)
from results.published.records import Record, Run, one_run_a_seed
from results.published.stages import STAGES

WHOLE_TEXT_BYTES = 151.08e6  # of the challenge, under every tokenizer
SAME_SIZE_FRAC = 2e-3
FEWEST_DECIMALS = 4


def check_nats_per_bpb(record: Record) -> Iterator[Finding]:
    """Yield runs whose nats over bits per byte is not the constant of their text, or moves inside one log."""
    for run in one_run_a_seed(record):
        ratios = _ratios(run)
        text = text_of_count(run.get("val_tokens"))
        off = {
            stage: ratio
            for stage, ratio in ratios.items()
            if text and abs(ratio / text.nats_per_bpb - 1) > RATIO_LIMIT_FRAC + _rounding(run, stage)
        }
        if text and off:
            stage, ratio = max(off.items(), key=lambda entry: abs(entry[1] / text.nats_per_bpb - 1))
            field = f"nats per bit per byte of {stage} are not those of {text.name} with {run['val_tokens']:,} targets"
            values = {**off, "log_file": run["log_file"]}
            values[f"{stage} bpb with the right bytes"] = _nats(run, stage) / text.nats_per_bpb
            yield Finding(run["seed"], field, values, "nats_per_bpb", ratio, text.nats_per_bpb)
        elif len(ratios) > 1:
            low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
            slack = RATIO_LIMIT_FRAC + _rounding(run, low) + _rounding(run, high)
            if ratios[high] / ratios[low] - 1 > slack:
                field = "nats per bit per byte move inside one log: its stages do not count the same bytes"
                values = {**ratios, "log_file": run["log_file"]}
                limit = f"one ratio within {RATIO_LIMIT_FRAC}"
                yield Finding(run["seed"], field, values, "nats_per_bpb_drift", ratios[high] / ratios[low] - 1, limit)


def check_coverage(record: Record) -> Iterator[Finding]:
    """Yield runs that scored another number of targets than their tokenizer's text has, or than the other seeds."""
    counts: dict[int, list[int]] = {}
    for run in one_run_a_seed(record):
        count = run.get("val_tokens")
        if not count:
            continue
        counts.setdefault(count, []).append(run["seed"])
        ratios = _ratios(run)
        if text_of_count(count) or run.get("val_documents_hash") or not ratios:
            continue  # the canonical count, or a text that is known by its hash
        vocab = (run.get("settings") or {}).get("vocab_size", (run.get("hparams") or {}).get("vocab_size"))
        size = count * next(iter(ratios.values())) / math.log(2)
        if abs(size / WHOLE_TEXT_BYTES - 1) < SAME_SIZE_FRAC:
            continue  # another tokenizer, the whole text
        text = text_of_tokenizer(int(str(vocab)) if str(vocab).isdigit() else None, next(iter(ratios.values())))
        if text:
            whole = text.val_tokens[0]
            field = f"{count / whole:.1%} of the validation targets of {text.name} were scored"
            values = {"val_tokens": count, "log_file": run["log_file"]}
            yield Finding(run["seed"], field, values, "val_tokens", count, whole)
    if len(counts) > 1 and max(counts) > min(counts) * (1 + SAME_COUNT_FRAC):
        values = {f"seeds {', '.join(map(str, seeds))}": count for count, seeds in counts.items()}
        field = "the seeds scored different numbers of targets"
        yield Finding(None, field, values, "val_tokens", min(counts), max(counts))


def check_shards(record: Record) -> Iterator[Finding]:
    """Yield runs whose first training losses are those of shards that hold validation documents."""
    runs = [
        run
        for run in one_run_a_seed(record)
        if (text := text_of_count(run.get("val_tokens"))) and "CaseOps" in text.name
    ]
    for mark in (mark for mark in FINGERPRINTS if mark.has_validation_documents):
        known = {
            run["seed"]: loss for run in runs if run["seed"] in mark.losses and (loss := _first_loss(run)) is not None
        }
        if known and all(round(loss, 4) == mark.losses[seed] for seed, loss in known.items()):
            field = f"training losses of step 1 are those of {mark.shards}"
            values = {**{f"seed {seed}": loss for seed, loss in known.items()}, "origin": mark.origin}
            clean = next(other.losses for other in FINGERPRINTS if not other.has_validation_documents)
            seed = next(iter(known))
            yield Finding(None, field, values, "first_loss_of_shards", known[seed], clean[seed])


def _first_loss(run: Run) -> float | None:
    return next((loss for step, loss in run.get("train_losses") or [] if step == 1), None)


def _ratios(run: Run) -> dict[str, float]:
    """Return nats over bits per byte of each stage; of scores with few digits it says nothing."""
    return {
        stage: _nats(run, stage) / run[stage]["val_bpb"]
        for stage in STAGES
        if run.get(stage)
        and run[stage]["val_bpb"]
        and run[stage]["val_loss_nats"]
        and max(_decimals(run[stage]["val_bpb"]), _decimals(run[stage]["val_loss_nats"])) >= FEWEST_DECIMALS
    }


def _nats(run: Run, stage: str) -> float:
    nats: float = run[stage]["val_loss_nats"]
    return nats


def _rounding(run: Run, stage: str) -> float:
    """Return the share of a ratio that the digits of its two figures leave open; one line prints both alike."""
    bpb, nats = run[stage]["val_bpb"], run[stage]["val_loss_nats"]
    half_unit = 0.5 * 10.0 ** -max(_decimals(bpb), _decimals(nats))
    return float(half_unit / bpb + half_unit / nats)


def _decimals(value: float) -> int:
    """Return the decimals of a figure without its last zeros."""
    return len(repr(float(value)).partition(".")[2])
