"""Reading one training log of the challenge: figures with the line they came from, and which could not be found.

Nothing is guessed: a figure is there when a line of a known form prints it. A log comes out in the form of one `run`
of a published record (see `results.published`), so that both are checked and compared by the same code.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

NUMBER = r"([-+]?[\d.]+(?:e[-+]?\d+)?|nan|inf)"
SCORE_LINE = re.compile(
    rf"^(?P<label>.*?)\s*\bval_loss[:=]\s*{NUMBER}\s+val_bpb[:=]\s*{NUMBER}(?P<rest>.*)$", re.IGNORECASE
)
EVAL_TIME = re.compile(r"eval_time:\s*([\d.]+)\s*(ms|s)\b")
STEP_LABEL = re.compile(r"^(?:step:)?\s*(\d+)/(\d+)$")
TRAIN_LINE = re.compile(
    rf"^(?:step:)?\s*(\d+)/\d+ .*?train_loss:\s*{NUMBER}(?:\s+train_time:\s*([\d.]+)(ms|m|s))?(?:.*?tok/s:\s*([\d.]+))?"
)
STOP_LINE = re.compile(r"stopping_early:\s*(\w+)\s+train_time:\s*([\d.]+)\s*ms\s+step:\s*(\d+)(?:/(\d+))?")
LOOP_LINE = re.compile(r"layer_loop:\s*enabled\s+step:\s*(\d+)")
HYPERPARAMETER = re.compile(r"^\s{2}(\w+): (.*)$")
SEED_IN_NAME = re.compile(r"seed[_-]?(\d+)|(\d+)(?=\.\w+$)", re.IGNORECASE)

# figure -> (form of the line, what to convert the match to); the last match in a log counts
SINGLE_FIGURES: dict[str, tuple[re.Pattern[str], type]] = {
    "model_bytes": (re.compile(r"Serialized model \S+: (\d+) bytes"), int),
    "total_bytes": (re.compile(r"Total submission size \S+: (\d+) bytes"), int),
    "total_eval_s": (re.compile(r"^total_eval_time:\s*([\d.]+)s"), float),
    "total_eval_with_compile_s": (re.compile(r"^total_eval_time_with_compile:\s*([\d.]+)s"), float),
    "ttt_compile_warmup_s": (re.compile(r"compile warmup done \(([\d.]+)s\)"), float),
    "gptq_hessian_s": (re.compile(r"collected (?:\d+ )?Hessians in ([\d.]+)s"), float),
    "gptq_reserve_s": (re.compile(r"gptq:reserving ([\d.]+)s"), float),
    "train_budget_ms": (re.compile(r"effective=(\d+)ms"), int),
    "quantize_s": (re.compile(r"^quantize_time:\s*([\d.]+)s"), float),
    "evaluate_s": (re.compile(r"^plain_eval_time:\s*([\d.]+)s"), float),
    "ttt_s": (re.compile(r"^ttt_time:\s*([\d.]+)s"), float),
    "order0_bpb": (re.compile(r"^order0_bpb:\s*([\d.]+)"), float),
    "peak_mem_mib": (re.compile(r"peak memory allocated:\s*(\d+) MiB"), int),
    "val_tokens": (re.compile(r"(?:^val_tokens:\s*|^val_loader:.*\btokens:)(\d+)"), int),
    "val_bytes": (re.compile(r"^val_bytes:\s*(\d+)"), int),
    "val_documents_hash": (re.compile(r"^val_documents_hash:\s*([0-9a-f]{16,64})\b"), str),
    "train_shards": (re.compile(r"\btrain_shards:\s*(\d+)"), int),
    "model_params": (re.compile(r"^model_params:\s*(\d+)"), int),
    "seed_in_log": (re.compile(r"^\s*seed:\s*(\d+)\s*$"), int),
}
CODE_SIZE = re.compile(r"^(Code size(?: \(\w+\))?): (\d+) bytes")

# what a reader of the log expects: figure -> the line that would show it
EXPECTED = {
    "steps": "stopping_early: wallclock_cap train_time: <ms>ms step: <n>/<N>",
    "post_ema": "pre-quantization post-ema val_loss:.. val_bpb:..",
    "post_quant": "quantized val_loss:.. val_bpb:..",
    "post_ttt": "quantized_ttt_lora val_loss:.. val_bpb:..",
    "model_bytes": "Serialized model <compressor>: <n> bytes",
    "total_bytes": "Total submission size <compressor>: <n> bytes",
    "total_eval_s": "total_eval_time:<s>s",
}


class Log(NamedTuple):
    """A parsed log: the run, the loss curve, where each figure was read, what is missing, and lines not understood."""

    run: dict[str, Any]
    steps: list[dict[str, Any]]
    provenance: dict[str, str]
    missing: list[str]
    unknown: list[str]

    @property
    def is_recognized(self) -> bool:
        """Some line was of a known form."""
        return bool(self.provenance or self.steps)


def stage_of(label: str) -> str | None:
    """Return the stage that a score line's label names, None for a label that is not known."""
    words = label.lower().strip().removesuffix("_exact").replace("_", " ").replace("-", " ")
    if re.search(r"\blr ?0\b", words):
        return "ttt_lr0"
    if "ttt" in words.split() or words.startswith("ttt") or "legal ttt" in words:
        return "post_ttt"
    if "sliding" in words:
        return "sliding"
    if "post ema" in words:
        return "post_ema"
    if "roundtrip" in words or words.removeprefix("diagnostic ").strip() == "quantized":
        return "post_quant"
    return None


def parse_log(text: str, file_name: str) -> Log:
    """Return everything that the known line forms show in a log."""
    run: dict[str, Any] = {"log_file": file_name, "code_bytes_printed": {}, "hparams": {}}
    run |= dict.fromkeys(("steps", "train_ms", "stop_reason", "live_weights_bpb_at_stop", *SINGLE_FIGURES))
    run |= dict.fromkeys(("post_ema", "post_quant", "sliding", "ttt_lr0", "post_ttt"))
    log = Log(run, [], {}, [], [])
    live: dict[int, tuple[float, float | None]] = {}
    looped_from: int | None = None
    for line in text.splitlines():
        if match := LOOP_LINE.search(line):
            looped_from = int(match.group(1))
        elif match := TRAIN_LINE.match(line):
            log.steps.append(_train_point(match))
        elif match := SCORE_LINE.match(line):
            _take_score(log, match, live)
        else:
            _take_single(log, line)
    _finish(log, live, looped_from)
    return log


def seed_in_name(file_name: str) -> int | None:
    """Return the seed in a log's file name: train_seed42.log, train0.txt; None for train.log."""
    match = SEED_IN_NAME.search(file_name.rsplit("/", 1)[-1])
    return int(match.group(1) or match.group(2)) if match else None


def _train_point(match: re.Match[str]) -> dict[str, Any]:
    step, loss, time, unit, rate = match.groups()
    scale = {"ms": 1e-3, "s": 1.0, "m": 60.0, None: 0.0}[unit]
    return {
        "step": int(step),
        "loss": float(loss),
        "elapsed_s": float(time) * scale if time else None,
        "tokens_per_s": float(rate) if rate else None,
    }


def _take_score(log: Log, match: re.Match[str], live: dict[int, tuple[float, float | None]]) -> None:
    """Take one line with val_loss and val_bpb: a validation during training, a stage, or something unknown."""
    label = match.group("label").strip().rstrip(":")
    nats, bpb = float(match.group(2)), float(match.group(3))
    if step := STEP_LABEL.match(label):
        live[int(step.group(1))] = (bpb, nats)
        return
    stage = stage_of(label)
    if stage is None:
        log.unknown.append(f"{log.run['log_file']}: score line with an unknown label {label!r}: not used")
        return
    if not (math.isfinite(nats) and math.isfinite(bpb)):
        log.unknown.append(f"{log.run['log_file']}: stage {stage} is not a number ({nats}, {bpb}): not used")
        return
    known, is_exact = log.run[stage], label.endswith("_exact")
    if known and known["label"].endswith("_exact") and not is_exact:
        return
    if known and not is_exact and known["val_bpb"] != bpb:
        log.unknown.append(
            f"{log.run['log_file']}: stage {stage} is printed more than once ({known['val_bpb']} as "
            f"{known['label']!r}, {bpb} as {label!r}): the last one is used"
        )
    time = EVAL_TIME.search(match.group("rest"))
    seconds = float(time.group(1)) * (1e-3 if time.group(2) == "ms" else 1.0) if time else None
    if seconds is None and known:
        seconds = known["seconds"]  # the exact line repeats the figures without the time
    log.run[stage] = {"val_bpb": bpb, "val_loss_nats": nats, "seconds": seconds, "label": label}
    log.provenance[stage] = f"{log.run['log_file']}: {label}"


def _take_single(log: Log, line: str) -> None:
    """Take a line that prints one figure."""
    if match := STOP_LINE.search(line):
        ms, step = round(float(match.group(2))), int(match.group(3))
        log.run.update(stop_reason=match.group(1), train_ms=ms, steps=step)
        log.provenance["steps"] = f"{log.run['log_file']}: stopping_early"
        return
    if match := CODE_SIZE.match(line):
        log.run["code_bytes_printed"][match.group(1)] = int(match.group(2))
        return
    for name, (form, convert) in SINGLE_FIGURES.items():
        if match := form.search(line):
            log.run[name] = convert(match.group(1))
            log.provenance[name] = f"{log.run['log_file']}: {line.strip().partition(':')[0]}"
    if match := HYPERPARAMETER.match(line):
        log.run["hparams"][match.group(1)] = match.group(2).strip()


def _finish(log: Log, live: dict[int, tuple[float, float | None]], looped_from: int | None) -> None:
    """Fill in what follows from several lines, and list what was not found."""
    run = log.run
    if run["steps"] in live:
        run["live_weights_bpb_at_stop"], run["live_weights_nats_at_stop"] = live[run["steps"]]
        log.provenance["live"] = f"{run['log_file']}: validation at step {run['steps']}"
    if run["train_ms"] is not None and run["steps"]:
        run["train_seconds"] = run["train_ms"] / 1000
        run["ms_per_step"] = round(run["train_ms"] / run["steps"], 3)
    if run["total_bytes"] is not None and run["model_bytes"] is not None:
        run["code_bytes_implied"] = run["total_bytes"] - run["model_bytes"]
    for point in log.steps:
        point["is_looped"] = None if looped_from is None else point["step"] > looped_from
    run["seed_in_filename"] = seed_in_name(run["log_file"])
    run["seed"] = run["seed_in_log"] if run["seed_in_log"] is not None else run["seed_in_filename"]
    for name, form in EXPECTED.items():
        if run[name] is None:
            log.missing.append(f"{run['log_file']}: {name} not found (no line {form!r})")
