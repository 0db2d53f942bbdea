"""Reading one training log of the challenge: figures with the line they came from, and which could not be found.

Nothing is guessed: a figure is there when a line of a known form prints it. A log comes out in the form of one `run`
of a published record (see `results.published.records`), so that both are checked and compared by the same code.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from results.published.labels import is_progress, meaning_of
from results.published.lines import (
    COUNT,
    RATE,
    SEED_INSIDE,
    SEED_LINE,
    SEPARATORS,
    SETTING,
    SETTING_LINE,
    STAGE_TIME,
    STEP,
    STEP_AVERAGE,
    STOP,
    STOP_REASON,
    STOP_STEP,
    STOP_TIME,
    TRAIN_LOSS,
    TRAIN_TIME,
    Score,
    count_of,
    flatten_json,
    json_lines,
    read_score,
    seconds_of,
    step_of,
)
from results.published.names import seed_in_name
from results.published.runs import SEED_HEADING, split_runs
from results.published.sizes import Size, choose_sizes, read_sizes
from results.published.stages import STAGES, ScoreBoard
from results.published.text_files import clean_lines

LOOP_LINE = re.compile(r"layer_loop:\s*enabled\s+step:\s*(\d{1,12})")
SECONDS = r"([\d.]*\d)\s*s"
# figure -> (form of the line, what to convert the match to); the last match in a log counts
SINGLE_FIGURES: dict[str, tuple[re.Pattern[str], Any]] = {
    "total_eval_s": (re.compile(rf"^total[_ ]eval[_ ]time\s*[:=]\s*{SECONDS}"), float),
    "total_eval_with_compile_s": (re.compile(rf"^total[_ ]eval[_ ]time[_ ]with[_ ]compile\s*[:=]\s*{SECONDS}"), float),
    "ttt_compile_warmup_s": (re.compile(rf"compile warmup done \({SECONDS}\)"), float),
    "gptq_hessian_s": (re.compile(rf"collected (?:\d+ )?Hessians in {SECONDS}"), float),
    "gptq_reserve_s": (re.compile(rf"gptq:reserving {SECONDS}"), float),
    "train_budget_ms": (re.compile(r"effective=(\d{1,12})ms"), int),
    "quantize_s": (re.compile(rf"^quantize_time:\s*{SECONDS}"), float),
    "evaluate_s": (re.compile(rf"^plain_eval_time:\s*{SECONDS}"), float),
    "ttt_s": (re.compile(rf"^ttt_time:\s*{SECONDS}"), float),
    "order0_bpb": (re.compile(r"^order0_bpb:\s*([\d.]*\d)"), float),
    "peak_mem_mib": (re.compile(r"peak memory(?: allocated)?:\s*(\d{1,12}) MiB"), int),
    "val_tokens": (
        re.compile(rf"(?:(?<![A-Za-z_])val(?:idation)?[_ ]tokens\s*[:=]\s*|^val_loader:.*\btokens:){COUNT}"),
        count_of,
    ),
    "val_bytes": (re.compile(rf"^\s*val[_ ]bytes\s*[:=]\s*{COUNT}"), count_of),
    "val_documents_hash": (re.compile(r"^val_documents_hash:\s*([0-9a-f]{16,64})\b"), str),
    "train_shards": (re.compile(r"\btrain_shards:\s*(\d{1,12})"), int),
    "model_params": (re.compile(rf"^\s*(?:model|num|total)_params(?:eters)?\s*[:=]\s*{COUNT}"), count_of),
}

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

    @property
    def has_scores(self) -> bool:
        """Some stage or some other way to evaluate was scored."""
        return any(self.run[stage] for stage in STAGES) or bool(self.run["other_scores"])


class Live(NamedTuple):
    """A validation during training: bits per byte, nats per token, printed decimals and elapsed training time."""

    bpb: float
    nats: float | None
    decimals: int
    elapsed_ms: float | None
    total: int | None


def stage_of(label: str) -> str | None:
    """Return the stage that a score line's label names, None for an unknown label or a variant of a stage."""
    meaning = meaning_of(label)
    return None if meaning.is_variant else meaning.stage


def parse_runs(text: str, file_name: str) -> list[Log]:
    """Return the runs that a log file holds one after the other, mostly one: all that the known line forms show."""
    parts = split_runs(json_lines(text) or [flatten_json(line) for line in clean_lines(text)])
    names = [
        file_name if len(parts) == 1 else f"{file_name} (run {place + 1} of {len(parts)})"
        for place in range(len(parts))
    ]
    return [_LogReader(name, file_name).read(lines) for name, lines in zip(names, parts)]


class _LogReader:
    """Reads the lines of one run in order."""

    def __init__(self, name: str, file_name: str) -> None:
        run: dict[str, Any] = {"log_file": name, "code_bytes_printed": {}, "hparams": {}, "settings": {}}
        run |= dict.fromkeys(
            ("steps", "train_ms", "stop_reason", "live_weights_bpb_at_stop", "model_bytes", "total_bytes")
        )
        run |= dict.fromkeys((*SINGLE_FIGURES, "seed_in_log", "step_avg_ms"))
        run |= dict.fromkeys(STAGES)
        self.log = Log(run, [], {}, [], [])
        self.file_name = file_name
        self.scores = ScoreBoard(name)
        self.live: dict[int, Live] = {}
        self.clock: list[list[float]] = []
        self.sizes: list[Size] = []
        self.seeds_inside: list[int] = []
        self.stage_times: dict[str, float | None] = {}
        self.looped_from: int | None = None
        self.last_step: tuple[int, int | None] | None = None

    def read(self, lines: list[str]) -> Log:
        """Return the log of these lines."""
        self.log.run["num_lines"] = len(lines)
        for line in lines:
            self._take(line)
        self._finish()
        return self.log

    def _take(self, line: str) -> None:
        if match := LOOP_LINE.search(line):
            self.looped_from = int(match.group(1))
        elif line.lstrip().startswith(("#", "//")):  # a heading, or a comment of a script printed into the log
            self.seeds_inside += [int(match.group(1))] if (match := SEED_HEADING.match(line)) else []
        elif (step := step_of(line)) is not None:
            self._take_step(line, *step)
        elif STOP.search(line) and self._take_stop(line):
            return
        elif (score := read_score(line)) is not None:
            if not is_progress(score.label):
                self.scores.take(score)
        else:
            self._take_single(line)

    def _take_step(self, line: str, step: int, total: int | None) -> None:
        """Take a line of the training loop; once a stage was scored, steps are those of something else."""
        if self.scores.is_past_training:
            return
        score, loss, time = read_score(line), TRAIN_LOSS.search(line), TRAIN_TIME.search(line)
        if score is None and loss is None:
            return
        elapsed_s = seconds_of(*time.groups()) if time else None
        words = STEP.sub("", score.label).strip(SEPARATORS) if score is not None else ""
        if score is not None and (meaning := meaning_of(words)).stage is not None:
            if not meaning.is_variant:
                self.scores.at_steps[meaning.stage] = score._replace(label=words)  # not of the live weights
        elif score is not None and math.isfinite(score.bpb):
            self._take_live(score, step, total, elapsed_s)
        elif loss is not None and score is None:
            rate = RATE.search(line)
            tokens_per_s = float(rate.group(1).replace(",", "")) if rate else None
            self.log.steps.append(
                {"step": step, "loss": float(loss.group(1)), "elapsed_s": elapsed_s, "tokens_per_s": tokens_per_s}
            )
        if elapsed_s is not None:
            self.clock.append([step, round(1000 * elapsed_s, 3)])
        if average := STEP_AVERAGE.search(line):
            seconds = seconds_of(*average.groups())
            self.log.run["step_avg_ms"] = None if seconds is None else round(1000 * seconds, 6)
        self.last_step = (step, total)

    def _take_live(self, score: Score, step: int, total: int | None, elapsed_s: float | None) -> None:
        elapsed_ms = None if elapsed_s is None else 1000 * elapsed_s
        self.live[step] = Live(score.bpb, score.nats, score.decimals, elapsed_ms, total)

    def _take_stop(self, line: str) -> bool:
        """Take the line that says where training stopped; return whether it was one."""
        step, time = STOP_STEP.search(line), TRAIN_TIME.search(line) or STOP_TIME.search(line)
        if step is None or time is None or self.scores.is_past_training:
            return False
        seconds = seconds_of(*time.groups())
        reason = STOP_REASON.search(line)
        self.log.run.update(
            stop_reason=reason.group(1) if reason else "stopped",
            train_ms=None if seconds is None else round(1000 * seconds),
            steps=int(step.group(1) or step.group(2)),
        )
        self.log.provenance["steps"] = f"{self.log.run['log_file']}: stopping_early"
        return True

    def _take_single(self, line: str) -> None:
        """Take a line that prints figures other than scores."""
        run = self.log.run
        for size in read_sizes(line):
            self.sizes.append(size)
            if size.kind == "code":
                run["code_bytes_printed"][size.label] = size.num_bytes
        for name, (form, convert) in SINGLE_FIGURES.items():
            if match := form.search(line):
                run[name] = convert(match.group(1))
                self.log.provenance[name] = f"{run['log_file']}: {line.strip().partition(':')[0]}"
        if (match := STAGE_TIME.match(line)) and (stage := stage_of(match.group(1))):
            self.stage_times[stage] = seconds_of(*match.groups()[1:])
        if match := SEED_LINE.match(line):
            run["seed_in_log"] = int(match.group(1))
        else:
            self.seeds_inside += [int(match.group(1)) for match in SEED_INSIDE.finditer(line)]
        if match := SETTING_LINE.match(line):
            run["hparams"][match.group(1)] = match.group(2).strip()
        if not self.log.steps and not self.live and not self.scores.has_any and len(line) < 500:
            run["settings"] |= dict(SETTING.findall(line))

    def _finish(self) -> None:
        """Fill in what follows from several lines, and list what was not found."""
        run, log = self.log.run, self.log
        self.scores.write_to(run, log.provenance, log.unknown)
        for stage, seconds in self.stage_times.items():
            if run[stage] and run[stage]["seconds"] is None and seconds is not None:
                run[stage]["seconds"], run["eval_times"][stage] = seconds, round(1000 * seconds, 3)
        self._finish_steps()
        sizes = choose_sizes(self.sizes)
        for name, size in (("model_bytes", sizes.model), ("total_bytes", sizes.total)):
            if size is not None:
                run[name] = size.num_bytes
                log.provenance[name] = f"{run['log_file']}: {size.label}"
        if run["total_bytes"] is not None and run["model_bytes"] is not None:
            run["code_bytes_implied"] = run["total_bytes"] - run["model_bytes"]
        for point in log.steps:
            point["is_looped"] = None if self.looped_from is None else point["step"] > self.looped_from
        run["train_losses"] = [[point["step"], _finite(point["loss"])] for point in log.steps]
        rates = [(point["step"], point["tokens_per_s"]) for point in log.steps]
        run["token_rates"] = [[step, rate] for step, rate in rates if rate is not None]
        run["clock"] = self.clock
        run["settings"] |= run["hparams"]
        named = seed_in_name(self.file_name)
        if run["seed_in_log"] is None and len(set(self.seeds_inside)) == 1 and named in (None, self.seeds_inside[0]):
            run["seed_in_log"] = self.seeds_inside[0]  # a word in passing does not stand against the file's name
        if run["seed_in_log"] is not None:
            log.provenance["seed"] = f"{run['log_file']}: seed"
        run["seed_in_filename"] = named
        run["seed"] = run["seed_in_log"] if run["seed_in_log"] is not None else run["seed_in_filename"]
        run["files"] = {self.file_name: sorted(log.provenance)}
        for name, form in EXPECTED.items():
            if run[name] is None:
                log.missing.append(f"{run['log_file']}: {name} not found (no line {form!r})")

    def _finish_steps(self) -> None:
        """Fill in steps, training time and the live weights' score; a run that ended by its steps has no stop line."""
        run = self.log.run
        if run["steps"] is None and self.live:
            step, last = max(self.live.items())
            is_last = self.log.has_scores and self.last_step is not None and step >= self.last_step[0]
            is_end = last.total == step or (is_last and last.elapsed_ms is not None)
            if is_end and step > 0:
                run["steps"], run["stop_reason"] = step, "all_steps" if last.total == step else None
                run["train_ms"] = None if last.elapsed_ms is None else round(last.elapsed_ms)
                self.log.provenance["steps"] = f"{run['log_file']}: validation at step {step}"
        if run["steps"] is None and self.last_step is not None and self.last_step[0] == self.last_step[1]:
            run["steps"], run["stop_reason"] = self.last_step[0], "all_steps"
            self.log.provenance["steps"] = f"{run['log_file']}: training at step {self.last_step[0]}"
        if run["train_ms"] is None and self.clock and self.clock[-1][0] == run["steps"]:
            run["train_ms"] = round(self.clock[-1][1])
        if run["steps"] in self.live:
            live = self.live[run["steps"]]
            run["live_weights_bpb_at_stop"], run["live_weights_nats_at_stop"] = live.bpb, live.nats
            run["score_decimals"]["live"] = live.decimals
            self.log.provenance["live"] = f"{run['log_file']}: validation at step {run['steps']}"
        if run["train_ms"] is not None and run["steps"]:
            run["train_seconds"] = run["train_ms"] / 1000
            run["ms_per_step"] = round(run["train_ms"] / run["steps"], 3)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
