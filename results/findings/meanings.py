"""Which figure a README column or a submission.json key holds, by its words, and what a log shows of that figure."""

from __future__ import annotations

import re
from itertools import combinations
from typing import Any

from results.published.records import Run
from results.published.stages import STAGES
from results.stats import summarize

SCORE_STAGES = ("post_ttt", "sliding", "ttt_lr0", "post_quant", "post_ema")
# words of a figure that is not one of this record's own logs, or not a figure of a run at all
FOREIGN = re.compile(
    r"\b(baseline|base|previous|prev|prior|sota|delta|δ|Δ|diff|difference|improvement|improve|vs|versus|target|merged|"
    r"parent|reference|ref|limit|budget|cap|headroom|margin|left|rate|lr|warmup|warm up|compile|reserve|hash|date|std|"
    r"stdev|var|min|best|rank|gap|cost|hedge|unigram|uniform|floor|expected|claimed|estimated|projected|original|"
    r"calibration|sha|sha256|md5|hash|commit|url|path|file|name|version|params|parameters|tokens|type|format|frac|ratio|pct|percent|warmdown|per|lines?|valid|method|p|delay|at)\b|%|Δ"
)
BYTES_WORDS = re.compile(
    r"\b(artifact|total submission|submission size|submission bytes|total size|total bytes|bytes total)\b|"
    r"^total( \(?(bytes|mb|mib)\)?)?$"
)
CODE_WORDS = re.compile(r"\b(code size|code bytes|bytes code)\b|^code( \(?(bytes|b|kb)\)?)?$")
MODEL_WORDS = re.compile(r"\b(bytes model|model bytes|model size|compressed model|compressed weights|weight bytes)\b")
TIME_WORDS = re.compile(r"\b(time|seconds|secs?|ms|s|duration|wallclock|wall clock|wall)\b")


def column_meaning(column: str) -> str | None:
    """Return which figure a README column or a key holds, None for one that we do not know."""
    words = re.sub(r"\s+", " ", re.sub(r"[_\-/–]", " ", column.lower().replace("ms/step", "ms per step"))).strip(" *`:")
    if re.search(r"\bgain\b", words):
        others = re.search(r"\b(cache|gram|ngram|slot|ppm|knn|mix\w*|quant|sliding|etlb)\b", words)
        return None if others else "TTT gain"
    if re.search(r"\bms per step\b|\bstep avg\b|\bstep average\b|\bstep time\b|\bms step\b", words):
        return "ms/step"
    if FOREIGN.search(re.sub(r"\bttt lora\b|\blora ttt\b|\bpre ?quant\w*\b", "ttt", words)):
        return None
    if meaning := _score_meaning(words):
        return meaning
    if re.match(r"(train(ing)? )?steps?( (stop|count|completed|reached))?( mean| \(.*\))?$|(num|final) steps$", words):
        return "steps"
    if TIME_WORDS.search(words) and "step" not in words and not re.search(r"\bbytes?\b|\bmb\b", words):
        return _time_meaning(words)
    return _size_meaning(words)


def _score_meaning(words: str) -> str | None:
    """Return the meaning of a column about bits per byte or nats."""
    if re.search(r"\b(train loss|loss step|step loss)\b", words):
        return None
    is_nats = re.search(r"\b(loss|nats|nll)\b", words) is not None
    if not is_nats and not re.search(r"bpb|bpp|\bbits per byte\b", words):
        return None
    kind = "nats" if is_nats else "bpb"
    stage = _stage_meaning(words)
    if is_nats:
        stage = stage or ("final" if "val" in words.split() else None)
    return None if stage is None else f"{stage} {kind}"


def stage_meaning(column: str) -> str | None:
    """Return the stage that a heading's words name, None where they name none or are about something else."""
    words = re.sub(r"\s+", " ", re.sub(r"[_\-/–]", " ", column.lower())).strip(" *`:")
    stage = None if FOREIGN.search(words) or "gain" in words else _stage_meaning(words)
    return None if stage == "final" and not words.strip() else stage


def _stage_meaning(words: str) -> str | None:
    without = re.search(r"\b(no|without|w o|before|pre|ttt off) ttt\b|\bttt off\b", words)
    if re.search(r"\bpre ema\b|\blive\b|\braw\b|\bnon ema\b", words):
        return "live"
    if re.search(r"\bpre quant\w*\b|\bpost ema\b|\bema\b|\bbf16\b|\bfp32\b|\bfloat\b|\bunquantized\b|\bswa\b", words):
        return "post_ema"
    if re.search(r"\b(n ?gram|ngram|slot|ppm|knn|cache|mix\w*|etlb|hedge|bigram)\b", words):
        return "other"
    if without and not re.search(r"\b(quant\w*|sliding|slide|rt|roundtrip)\b", words):
        return "post_quant/sliding"
    if "ttt" in words.split() and not without:
        return "post_ttt"
    if re.search(r"\b(sliding|slide|sw|sliding window|stride)\b|\bs(16|32|64)\b", words):
        return "sliding"
    if re.search(r"\b(roundtrip|round trip|rt)\b", words):
        return "roundtrip"
    if re.search(r"\b(quant\w*|int[4568]|gptq)\b", words):
        return "post_quant"
    plain = re.sub(
        r"\b(val|bpb|bpp|loss|nats|nll|final|score|mean|validation|avg|value|exact|bits|byte|token)\b|\W", " ", words
    )
    return "final" if not plain.strip() else None


def _time_meaning(words: str) -> str | None:
    if "ttt" in words.split():
        return "TTT time"
    if re.search(r"\b(eval|evaluation|sliding)\b", words):
        return "eval time"
    return "train time" if re.search(r"\b(train|training|wallclock|wall clock)\b", words) else None


def _size_meaning(words: str) -> str | None:
    if CODE_WORDS.search(words):
        return "code bytes"
    if MODEL_WORDS.search(words):
        return "model bytes"
    return "artifact bytes" if BYTES_WORDS.search(words) else None


def log_values(run: Run, meaning: str) -> list[float]:
    """Return the log's values that a figure of this meaning may have, the likeliest first."""
    if meaning.endswith((" bpb", " nats")):
        stage, _, kind = meaning.rpartition(" ")
        return _scores(run, stage, "val_bpb" if kind == "bpb" else "val_loss_nats")
    if meaning.endswith("time"):
        return _times(run, meaning)
    printed = list((run.get("code_bytes_printed") or {}).values())
    choices: dict[str, list[Any]] = {
        "steps": [run.get("steps")],
        "ms/step": [run.get("step_avg_ms"), run.get("ms_per_step")],
        "artifact bytes": [run.get("total_bytes")],
        "model bytes": [run.get("model_bytes")],
        "code bytes": [run.get("code_bytes_implied"), *printed],
        "TTT gain": _gains(run),
    }
    return [value for value in choices[meaning] if value is not None]


def _scores(run: Run, stage: str, kind: str) -> list[float]:
    live = run.get("live_weights_bpb_at_stop" if kind == "val_bpb" else "live_weights_nats_at_stop")
    final = run.get("final_bpb" if kind == "val_bpb" else "final_nats")
    shown = {name: run[name][kind] for name in SCORE_STAGES if run.get(name)}
    shown |= {"live": live, "final": final}
    others = [other.get("bpb" if kind == "val_bpb" else "nats") for other in run.get("other_scores") or []]
    every = [final, *(shown.get(name) for name in SCORE_STAGES), live, *others]
    orders: dict[str, list[float | None]] = {
        "post_ttt": [shown.get("post_ttt"), *others],
        "sliding": [shown.get("sliding", shown.get("post_quant")), *others],
        "post_quant": [shown.get("post_quant"), shown.get("ttt_lr0"), shown.get("sliding")],
        "roundtrip": [shown.get("post_quant"), live, shown.get("post_ema"), shown.get("sliding")],
        "post_quant/sliding": [shown.get(name) for name in ("post_quant", "sliding", "ttt_lr0", "live", "post_ema")],
        "post_ema": [shown.get("post_ema"), live, *others],
        "live": [live, shown.get("post_ema"), *others],
        "other": [*others, *([final] if others else [])],  # a log without such a score shows nothing of it
        "final": every,
    }
    return [value for value in orders.get(stage, every) if value is not None]


def _times(run: Run, meaning: str) -> list[float]:
    """Return seconds: of the passes, their sums and the printed totals (evaluation), or of training and its budget."""
    if meaning == "train time":
        trained = run.get("train_seconds") or (run["train_ms"] / 1000 if run.get("train_ms") else None)
        budget = (run.get("train_budget_ms") or 0) / 1000 or None
        spent = [run.get("gptq_reserve_s"), run.get("gptq_hessian_s"), run.get("quantize_s")]
        sums = [trained + part for part in spent if trained is not None and part]
        return [value for value in (trained, *sums, budget) if value is not None]
    passes = evaluation_seconds(run)
    totals = [run.get(name) for name in ("ttt_s", "total_eval_s", "total_eval_with_compile_s", "evaluate_s")]
    warm = run.get("ttt_compile_warmup_s")
    main = passes.get("post_ttt") or passes.get("sliding") or passes.get("post_quant")
    parts = list(passes.values())[:6]
    sums = [sum(some) for size in range(2, len(parts) + 1) for some in combinations(parts, size)]
    with_warm_up = [main + warm] if main and warm else []
    return [value for value in (main, *totals, *parts, *sums, *with_warm_up) if value is not None]


def evaluation_seconds(run: Run) -> dict[str, float]:
    """Return the seconds of each evaluation pass of a log, by stage or label."""
    passes = {stage: run[stage]["seconds"] for stage in STAGES if run.get(stage)}
    passes |= {stage: ms / 1000 for stage, ms in (run.get("eval_times") or {}).items() if ms is not None}
    for other in run.get("other_scores") or []:
        if other.get("time_ms"):
            passes.setdefault(str(other.get("label")), other["time_ms"] / 1000)
    return {stage: seconds for stage, seconds in passes.items() if seconds}


def _gains(run: Run) -> list[float]:
    """Return what adaptation gained over each earlier pass."""
    after = run.get("post_ttt")
    if not after:
        return []
    gains = [run.get("ttt_gain_vs_post_quant_bpb"), run.get("ttt_gain_vs_sliding_bpb")]
    before = [run[stage]["val_bpb"] for stage in ("post_quant", "sliding", "ttt_lr0", "post_ema") if run.get(stage)]
    if run.get("live_weights_bpb_at_stop"):
        before.append(run["live_weights_bpb_at_stop"])
    return [gain for gain in gains if gain is not None] + [after["val_bpb"] - score for score in before]


def average_runs(runs: list[Run], meaning: str) -> list[float]:
    """Return the mean over the seeds of each value that a figure of this meaning may have; [] unless all show it."""
    per_seed = [log_values(run, meaning) for run in runs]
    if not per_seed or any(len(values) != len(per_seed[0]) for values in per_seed):
        return []
    found = [summarize(list(values)).mean for values in zip(*per_seed)]
    return [mean for mean in found if mean is not None]
