"""What one line of a training log says: steps, scores, sizes, seeds. Forms differ by author; meanings are these."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from results.published.labels import PROGRESS
from results.published.text_files import strip_prefixes

NUMBER = r"([-+]?(?:\d+\.\d+|\d+\.?|\.\d+)(?:e[-+]?\d{1,3})?|[-+]?(?:nan|inf)\b)"
COUNT = r"(\d{1,3}(?:,\d{3})+|\d{1,15})(?![\d,]*\.?\d)"
TIME = r"([\d.]*\d)\s*(ms|s|sec|secs|seconds|m|min|mins|minutes|h)?\b"
UNIT_S = {"ms": 1e-3, "m": 60.0, "min": 60.0, "mins": 60.0, "minutes": 60.0, "h": 3600.0}

LOSS = re.compile(rf"(?<![A-Za-z])(?:val[_ ]?loss|(?<![_])(?:loss|vl|nll|nats))[\"']?\s*[:=]\s*{NUMBER}", re.IGNORECASE)
BPB = re.compile(
    r"\b([A-Za-z][\w-]*?)?(?:val[_ ]?)?bpb(?:_exact)?[\"']?\s*(?:\([^)]*\)\s*)?"
    rf"(?:[:=]\s*|\s(?=\d\.\d{{3}})){NUMBER}",
    re.IGNORECASE,
)
STAGE_TIME = re.compile(rf"^\s*([\w -]*?)[_ ](?:eval(?:uation)?[_ ])?time\s*[:=]\s*{TIME}\s*$", re.IGNORECASE)
NAMES = ("stage", "label", "phase", "name", "event", "key", "type", "split")  # what JSON calls a score's label
SEPARATORS = " \t:=|,;-"
STEP = re.compile(
    r"^[\[(]?(?:(?:train|val|eval|validation)\s+)?(?:(?:step|iter|iteration|it)\s*[:=#]?\s*(\d[\d,]{0,14})"
    r"(?:\s*(?:/|of)\s*(\d[\d,]{0,14}))?|(\d[\d,]{0,14})\s*/\s*(\d[\d,]{0,14}))[\])]?(?=$|[\s:|,;-])",
    re.IGNORECASE,
)
TRAIN_LOSS = re.compile(rf"(?<![A-Za-z_])(?:train[_ ]?loss|loss)\s*[:=]\s*{NUMBER}", re.IGNORECASE)
TRAIN_TIME = re.compile(rf"\btrain[_ ]?time\s*[:=]\s*{TIME}", re.IGNORECASE)
STEP_AVERAGE = re.compile(rf"\bstep[_ ]?avg\s*[:=]\s*{TIME}", re.IGNORECASE)
RATE = re.compile(r"tok(?:ens)?/s(?:ec)?\s*[:=]\s*([\d,]*\d(?:\.\d+)?)", re.IGNORECASE)
EVAL_TIME = re.compile(
    rf"(?<![A-Za-z_])(?:(?:eval|total|ttt|elapsed)[_ ]?time|time|elapsed|t)\s*[:=]\s*{TIME}", re.IGNORECASE
)
STOP = re.compile(
    r"stop(?:ping|ped)?[_ ]early|early[_ ]stop|stopp(?:ing|ed)\b|wall_?clock[_ ](?:cap|limit)|"
    r"\btrain(?:ing)?[_ ](?:is[_ ])?(?:complete|done|finish|stop|end)", re.IGNORECASE,
)  # fmt: skip
STOP_STEP = re.compile(r"\bsteps?\s*[:=]?\s*(\d{1,12})\b|(?<![\d/.])(\d{1,12}) steps\b", re.IGNORECASE)
STOP_TIME = re.compile(
    r"(?:\b(?:train[_ ]?time|time|elapsed|in|after|at)\s*[:=]?\s*|[(,]\s*)"
    r"([\d.]*\d)\s*(ms|s|sec|seconds|m|min|minutes)\b",
    re.IGNORECASE,
)
STOP_REASON = re.compile(r"stopp(?:ing|ed)[_ ]early\s*:\s*([A-Za-z_]+)", re.IGNORECASE)
SETTING_LINE = re.compile(r"^\s{2,4}([A-Za-z]\w*): (.*)$")
SETTING = re.compile(r"(?:^|(?<=[\s,(]))([A-Za-z][\w.]*)[:=]([^\s:=,()]+)(?=$|[\s,)])")
SEED_LINE = re.compile(r"^\s*(?:random_?)?seed\s*[:=]\s*(\d{1,18})\s*$", re.IGNORECASE)
SEED_INSIDE = re.compile(
    r"(?:^|[\s,({\['\"]|--)(?:(?:random|train|global|training)[_ ])?seed['\"]?\s*(?:[:=]\s*|\s)(\d{1,18})"
    r"(?=$|[\s,;)}\]=|.'\"])",
    re.IGNORECASE,
)

NOT_A_SCORE = re.compile(
    r"\b(?:mean|avg|std|gain|delta|diff|improvement|target|sota|record|vs|expected|reported|baseline|train|best|gap|"
    r"cost|threshold|reference|previous|order ?0)\b", re.IGNORECASE,
)  # fmt: skip


class Score(NamedTuple):
    """A score line: its label, nats per token (None where only bits per byte are printed), bpb, decimals, seconds."""

    label: str
    nats: float | None
    bpb: float
    decimals: int
    seconds: float | None
    rest: str


def read_score(line: str) -> Score | None:
    """Return the score that a line prints with bits per byte, None for progress, differences and other lines."""
    if "bpb" not in line.lower() or line.lstrip().startswith(("#", "//")):
        return None
    bpb = next((match for match in BPB.finditer(line) if not PROGRESS.search(match.group(1) or "")), None)
    if bpb is None:
        return None
    loss = LOSS.search(line)
    first, last = (bpb, bpb) if loss is None else sorted((loss, bpb), key=lambda match: match.start())
    name = re.sub(r"[_-]?val$", "", (bpb.group(1) or "").strip("_- "), flags=re.IGNORECASE)
    parts = [line[: first.start()], name]
    if loss is not None:
        parts.insert(1, line[first.end() : last.start()])
    label = ""
    for part in (part.strip(SEPARATORS + "{}()\"'") for part in parts):
        if part and part.lower() not in label.lower():  # some repeat the label before each figure
            label = f"{label} {part}".strip()
    if loss is None and (
        NOT_A_SCORE.search(label.replace("_", " ")) or (PROGRESS.search(label) and not STEP.match(label))
    ):
        return None
    rest = line[last.end() :]
    time = EVAL_TIME.search(rest)
    return Score(
        label.strip() or "val_bpb",
        None if loss is None else float(loss.group(1)),
        float(bpb.group(2)),
        len(bpb.group(2).lower().partition(".")[2].partition("e")[0]),
        seconds_of(*time.groups()) if time else None,
        rest,
    )


def seconds_of(number: str, unit: str | None) -> float | None:
    """Return a printed time in seconds; a bare number is seconds; None where it is no number."""
    try:
        value = float(number)
    except ValueError:
        return None
    return value * UNIT_S.get((unit or "s").lower(), 1.0) if math.isfinite(value) else None


def count_of(text: str) -> int:
    """Return a printed count, with or without commas."""
    return int(text.replace(",", ""))


def step_of(line: str) -> tuple[int, int | None] | None:
    """Return step and number of steps of a line such as `step:4000/20000 ...`, None for other lines."""
    match = STEP.match(line.lstrip())
    if not match:
        return None
    step, total = (match.group(1), match.group(2)) if match.group(1) else (match.group(3), match.group(4))
    return count_of(step), count_of(total) if total else None


def flatten_json(line: str) -> str:
    """Return a line that holds a JSON object as `label name:value ...`, or the line that it wraps; others unchanged."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return line
    if not isinstance(content, dict):
        return line
    wrapped = next(
        (content[name] for name in ("log", "message", "msg", "line") if isinstance(content.get(name), str)), None
    )
    return strip_prefixes(wrapped.rstrip()) if wrapped is not None else " ".join(_pairs(content))


def json_lines(text: str) -> list[str] | None:
    """Return a file that is one JSON document as lines of a log, None for other files."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return list(_document_lines(json.loads(text), ""))
    except (ValueError, RecursionError):
        return None


def _document_lines(content: Any, label: str) -> Iterator[str]:
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    scores = []
    for name, value in entries:
        if isinstance(value, dict | list):
            yield from _document_lines(value, str(name) if isinstance(content, dict) else label)
        elif re.search("bpb|loss", str(name)) and isinstance(value, int | float):
            scores.append(f"{name}:{value}")
        elif isinstance(value, int | float | str):
            yield f"{name}: {value}"
    if scores:
        named = content if isinstance(content, dict) else {}
        label = next((str(named[name]) for name in NAMES if isinstance(named.get(name), str)), label)
        yield f"{label} {' '.join(scores)}"


def _pairs(content: dict[str, Any]) -> list[str]:
    label = next((str(content[name]) for name in NAMES if isinstance(content.get(name), str)), "")
    pairs = [f"{name}:{value}" for name, value in content.items() if isinstance(value, int | float | str)]
    step = [pair for pair in pairs if pair.startswith("step:")]
    return [*step, label, *(pair for pair in pairs if pair not in step and pair.partition(":")[0] not in NAMES)]
