"""Made-up submission folders: one normal log, and every form in which authors have printed, encoded and placed it.

`made_log` gives the lines of a log, `write_folder` a folder of them; PREFIXES, ENCODINGS and LAYOUTS are forms that
change nothing about what a folder says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from results.findings.importer import Submission
from results.findings.review import find_disagreements
from results.published.log import Log, parse_runs
from results.published.records import one_run_a_seed, recompute

BYTES_PER_TOKEN = 3.7266252  # times VAL_TOKENS: the challenge's 151.08 MB of validation text
VAL_TOKENS = 40_540_160


@dataclass(frozen=True, kw_only=True)
class Made:
    """The figures of one made-up run; None leaves a stage out."""

    seed: int | None = 42
    steps: int = 4000
    train_ms: int = 598_000
    live: float | None = 1.1200
    post_ema: float | None = 1.1190
    quantized: float | None = 1.1300
    sliding: float | None = 1.1150
    ttt: float | None = None
    model_bytes: int | None = 15_900_000
    code_bytes: int = 20_000
    settings: tuple[tuple[str, str], ...] = (("vocab_size", "8192"), ("world_size", "8"), ("matrix_lr", "0.022"))

    @property
    def total_bytes(self) -> int:
        """Model and code together."""
        return (self.model_bytes or 0) + self.code_bytes


def nats(bpb: float) -> float:
    """Return nats per token of a score in bits per byte."""
    return bpb * math.log(2) * BYTES_PER_TOKEN


def score_line(label: str, bpb: float, *, places: int = 8, time_ms: int | None = 20_000) -> str:
    """Return a score line of the usual form."""
    time = "" if time_ms is None else f" eval_time:{time_ms}ms"
    return f"{label} val_loss:{nats(bpb):.{places}f} val_bpb:{bpb:.{places}f}{time}"


def made_lines(made: Made) -> dict[str, list[str]]:
    """Return the lines of one log by what they show, in order."""
    lines = {
        "head": ["Hyperparameters:", *(f"  {name}: {value}" for name, value in made.settings)],
        "seed": [] if made.seed is None else [f"  seed: {made.seed}"],
        "val_tokens": [f"val_tokens: {VAL_TOKENS}", "model_params:35944537"],
        "curve": [
            "1/20000 train_loss: 9.0072 train_time: 0.0m tok/s: 16241731",
            f"{made.steps // 2}/20000 train_loss: 3.0036 train_time: {made.train_ms / 120000:.1f}m tok/s: 8148031",
        ],
        "live": [] if made.live is None else [score_line(f"{made.steps}/20000", made.live, places=4, time_ms=None)],
        "stop": [f"stopping_early: wallclock_cap train_time: {made.train_ms}ms step: {made.steps}/20000"],
        "memory": ["peak memory allocated: 40019 MiB reserved: 44090 MiB"],
        "post_ema": [] if made.post_ema is None else [score_line("pre-quantization post-ema", made.post_ema)],
        "raw": ["Serialized model: 135408623 bytes", f"Code size: {made.code_bytes} bytes"],
        "sizes": [],
        "quantized": [] if made.quantized is None else [score_line("quantized", made.quantized)],
        "sliding": [] if made.sliding is None else [score_line("quantized_sliding_window", made.sliding)],
        "progress": ["ttt_progress: batch 779/782 batch_loss:2.6576 batch_bpb:1.0825 running_loss:2.6576"],
        "ttt": [] if made.ttt is None else [score_line("quantized_ttt", made.ttt, time_ms=250_000)],
    }
    if made.model_bytes is not None:
        lines["sizes"] = [
            f"Serialized model quantized+brotli: {made.model_bytes} bytes",
            f"Total submission size quantized+brotli: {made.total_bytes} bytes",
        ]
    return lines


def made_log(
    made: Made | None = None, *, swap: dict[str, str | list[str]] | None = None, more: str = "", **changes: Any
) -> str:
    """Return the text of a log; `swap` puts other lines in the place of some, `more` adds lines at the end."""
    lines: dict[str, Any] = made_lines(replace(made or Made(), **changes))
    lines |= {name: [text] if isinstance(text, str) else text for name, text in (swap or {}).items()}
    text = "\n".join(line for part in lines.values() for line in part) + "\n"
    return text + (more + "\n" if more else "")


def write_folder(
    folder: Path,
    logs: dict[str, str | bytes] | None = None,
    *,
    submission: dict[str, Any] | None = None,
    readme: str | None = None,
) -> Path:
    """Write a folder of logs by their paths (default: train_seed42.log, a normal one)."""
    for name, text in (logs if logs is not None else {"train_seed42.log": made_log()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    folder.mkdir(parents=True, exist_ok=True)
    if submission is not None:
        (folder / "submission.json").write_text(json.dumps(submission))
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def parse_log(text: str, file_name: str) -> Log:
    """Return what a log shows; of several runs in it the last one."""
    return parse_runs(text, file_name)[-1]


def readme_table(rows: list[dict[str, object]]) -> str:
    """Return a README with one Markdown table; the keys of the first row are its columns."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(str(row[name]) for name in columns)} |" for row in rows]
    return "# A record\n\n" + "\n".join(lines) + "\n"


# what stands before every line of a log, by who put it there; the argument is the line's number
PREFIXES: dict[str, Callable[[int], str]] = {
    "none": lambda line: "",
    "epoch seconds": lambda line: f"{1770000000 + line}.{line % 1000:03d} ",
    "epoch milliseconds": lambda line: f"{1770000000000 + line} ",
    "date and level": lambda line: f"[2026-03-20 12:{line // 60 % 60:02d}:{line % 60:02d}] INFO: ",
    "logging": lambda line: f"2026-03-20 12:00:{line % 60:02d},123 - __main__ - INFO - ",
    "iso time": lambda line: f"2026-03-20T12:00:{line % 60:02d}.123456Z ",
    "clock": lambda line: f"[12:00:{line % 60:02d}] ",
    "rank": lambda line: "rank 0: ",
    "rank in brackets": lambda line: "[rank0]: ",
    "torchrun": lambda line: "[default0]:",
    "mpirun": lambda line: "[1,0]<stdout>:",
    "srun": lambda line: "0: ",
    "ray": lambda line: "(RayTask pid=4711, ip=10.0.0.2) ",
    "ray with a name": lambda line: "\x1b[36m(train_seed pid=4711)\x1b[0m ",
    "level": lambda line: "INFO:root:",
    "colors": lambda line: "\x1b[32m",
    "seconds since the start": lambda line: f"[{line:6.1f}s] ",
    "glog": lambda line: f"I0320 12:00:{line % 60:02d}.123456  4711 train_gpt.py:99] ",
    "syslog": lambda line: f"Mar 20 12:00:{line % 60:02d} node-1 train[4711]: ",
    "loguru": lambda line: f"2026-03-20 12:00:{line % 60:02d}.123 | INFO     | __main__:main:{line} - ",
    "rich": lambda line: f"[12:00:{line % 60:02d}] INFO     ",
    "kubernetes": lambda line: f"2026-03-20T12:00:{line % 60:02d}.123456789Z stdout F ",
    "host name": lambda line: "gpu-node-12.cluster: ",
    "another word": lambda line: "trainer_0 | ",
    "line numbers": lambda line: f"{line + 1:6d}\t",
    "grep": lambda line: f"{line + 1}:",
    "rank and time": lambda line: f"[rank0]: 2026-03-20 12:00:{line % 60:02d} INFO ",
    "progress bar": lambda line: f" {line % 100}%|####    | {line}/100 [00:01<00:02, 3.1it/s]\r",
    "progress bar without an end": lambda line: f"{line % 100}%|####    | {line}/100 [00:01<00:02, 3.1it/s]",
}


def with_prefix(text: str, name: str) -> str:
    """Return a log with a prefix of PREFIXES before every line."""
    return "".join(f"{PREFIXES[name](place)}{line}\n" for place, line in enumerate(text.splitlines()))


ENCODINGS: dict[str, Callable[[str], bytes]] = {
    "utf-8": lambda text: text.encode(),
    "utf-8 with a mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "utf-16 little-endian": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "utf-16 big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-16 without a mark": lambda text: text.encode("utf-16-le"),
    "windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "latin-1": lambda text: f"Größe\n{text}".encode("latin-1"),
}

# path of a seed's log
LAYOUTS: dict[str, Callable[[int], str]] = {
    "flat": lambda seed: f"train_seed{seed}.log",
    "text files": lambda seed: f"log_seed_{seed}.txt",
    "logs": lambda seed: f"logs/seed{seed}.log",
    "deep": lambda seed: f"runs/seed_{seed}/logs/train_seed{seed}.txt",
    "seed in the folder": lambda seed: f"runs/seed_{seed}/train.log",
    "bare number": lambda seed: f"train_{seed}.log",
    "short": lambda seed: f"train_s{seed}.log",
    "other numbers": lambda seed: f"run_seq16384_v2_seed{seed}_8xh100.log",
}


def split_evaluation(made: Made) -> tuple[str, str]:
    """Return the log of a training and the log of its evaluation, for folders that keep them apart."""
    lines = made_lines(made)
    after = ("quantized", "sliding", "progress", "ttt")
    train = {name: text for name, text in lines.items() if name not in after}
    evaluation = {name: text for name, text in lines.items() if name in ("seed", "val_tokens", *after)}
    train_text, evaluation_text = (
        "\n".join(line for part in log.values() for line in part) for log in (train, evaluation)
    )
    return train_text + "\n", evaluation_text + "\n"


def fields(submission: Submission) -> list[str]:
    """Return what the findings of a folder are about."""
    return [finding.field for finding in find_disagreements(submission.record)]


def finals(submission: Submission) -> dict[int | None, float]:
    """Return the final score of each seed."""
    return {run["seed"]: run["final_bpb"] for run in one_run_a_seed(submission.record)}


def stage(submission: Submission) -> str | None:
    """Return the stage that a folder is scored on."""
    mine = recompute(submission.record)
    return None if mine is None else mine.stage
