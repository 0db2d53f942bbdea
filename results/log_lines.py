"""What one line of a training log says: steps, scores, sizes, seeds. Forms differ by author; meanings are these."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

NUMBER = r"([-+]?(?:\d+\.\d+|\d+\.?|\.\d+)(?:e[-+]?\d{1,3})?|[-+]?(?:nan|inf)\b)"
COUNT = r"(\d{1,3}(?:,\d{3})+|\d{1,15})(?![\d,]*\.?\d)"
TIME = r"([\d.]*\d)\s*(ms|s|sec|secs|seconds|m|min|mins|minutes|h)?\b"
UNIT_S = {"ms": 1e-3, "m": 60.0, "min": 60.0, "mins": 60.0, "minutes": 60.0, "h": 3600.0}

LOSS = re.compile(rf"(?<![A-Za-z])(?:val[_ ]?loss|(?<![_])(?:loss|vl|nll|nats))[\"']?\s*[:=]\s*{NUMBER}", re.IGNORECASE)
BPB = re.compile(
    rf"\b([A-Za-z][\w-]*?)?(?:val[_ ]?)?bpb(?:_exact)?[\"']?\s*(?:\([^)]*\)\s*)?[:=]\s*{NUMBER}", re.IGNORECASE
)
SEPARATORS = " \t:=|,;-"
STEP = re.compile(
    r"^[\[(]?(?:(?:train|val|eval|validation)\s+)?(?:(?:step|iter|iteration|it)\s*[:=#]?\s*(\d{1,12})"
    r"(?:\s*(?:/|of)\s*(\d{1,12}))?|(\d{1,12})\s*/\s*(\d{1,12}))[\])]?(?=$|[\s:|,;-])",
    re.IGNORECASE,
)
TRAIN_LOSS = re.compile(rf"(?<![A-Za-z_])(?:train[_ ]?loss|loss)\s*[:=]\s*{NUMBER}", re.IGNORECASE)
TRAIN_TIME = re.compile(rf"\btrain[_ ]?time\s*[:=]\s*{TIME}", re.IGNORECASE)
STEP_AVERAGE = re.compile(rf"\bstep[_ ]?avg\s*[:=]\s*{TIME}", re.IGNORECASE)
RATE = re.compile(r"tok(?:ens)?/s(?:ec)?\s*[:=]\s*([\d,]*\d(?:\.\d+)?)", re.IGNORECASE)
EVAL_TIME = re.compile(
    rf"(?<![A-Za-z])(?:(?:eval|total|ttt|elapsed)[_ ]?time|time|elapsed|t)\s*[:=]\s*{TIME}", re.IGNORECASE
)
MODE = re.compile(r"\b(?:eval[_ ]?)?(?:mode|method)\s*[:=]\s*([\w+-]+)", re.IGNORECASE)
STOP = re.compile(r"stop(?:ping|ped)?[_ ]early|early[_ ]stop|stopping\s*:|wall_?clock[_ ](?:cap|limit)", re.IGNORECASE)
STOP_STEP = re.compile(r"\bstep\s*[:=]?\s*(\d{1,12})\b", re.IGNORECASE)
STOP_REASON = re.compile(r"stopp(?:ing|ed)[_ ]early\s*:\s*([A-Za-z_]+)", re.IGNORECASE)
SETTING_LINE = re.compile(r"^\s{2,4}([A-Za-z]\w*): (.*)$")
SETTING = re.compile(r"(?:^|(?<=[\s,(]))([A-Za-z][\w.]*)[:=]([^\s:=,()]+)(?=$|[\s,)])")
SEED_LINE = re.compile(r"^\s*(?:random_?)?seed\s*[:=]\s*(\d{1,18})\s*$", re.IGNORECASE)
SEED_INSIDE = re.compile(
    r"(?:^|[\s,({\['\"]|--)(?:(?:random|train|global|training)[_ ])?seed['\"]?\s*(?:[:=]\s*|\s)(\d{1,18})"
    r"(?=$|[\s,;)}\]=|.'\"])",
    re.IGNORECASE,
)

# Words of a score label that change nothing about its meaning.
PLAIN_WORDS = re.compile(
    r"final|exact|eval|evaluation|val|validation|score|result|results|model|quantized|quantised|quant|quantization|"
    r"quantisation|dequantized|dequant|gptq|full|window|windows|windowed|after|with|on|of|the|metrics|bpb|loss|mixed|"
    r"ternary|binary|qat|int\d+|fp\d+|bf16|nf4|w\d|zlib|zstd\d*|lzma\d*|brotli\d*|xz|roundtrip|rt|"
    r"round|trip|diagnostic|stage|only|weights|standard|compressed|serialized|submission"
)
TTT_WORDS = re.compile(
    r"ttt\w*|lora|phased|legal|score|first|doc|docs|document|documents|per|global|sgd|adam|adamw|muon|post|sliding|"
    r"slide|online|adapted|causal"
)
STRIDE_WORDS = re.compile(r"s\d+|stride\d*|t|temp|temperature|\d+(?:\.\d+)?|diagnostic|ema|post|swa")
BEFORE_QUANTIZATION = re.compile(
    r"\b(?:post|after) ?(?:ema|swa|lawa|average|averaging|avg)\b|\b(?:pre|before) ?(?:quant\w*|gptq)\b|\bunquantized\b|"
    r"^(?:diagnostic )?raw(?: (?:eval|model|weights))?(?: exact)?$|^(?:final )?ema(?: exact)?$"
)
BEFORE_WORDS = re.compile(
    r"pre|before|post|after|ema|swa|lawa|average|averaging|avg|unquantized|prequant\w*|raw|applied"
)
PROGRESS = re.compile(
    r"progress|chunk|batch|running|partial|cumulative|\bdocs?\s*[:=]?\s*\d|\d\s*%|\d+\s*/\s*\d+|\biter\b|\bwindow\s+\d|"
    r"\bstep\b|\bepoch\b|\bphase\s*[:=]?\s*\d", re.IGNORECASE,
)  # fmt: skip
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


class Meaning(NamedTuple):
    """The stage that a label names, None for an unknown one, and whether extra words make it a variant of it."""

    stage: str | None
    is_variant: bool = False


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


def is_progress(label: str) -> bool:
    """Return whether a label is that of an unfinished pass, such as `ttt_chunk 3/90`."""
    return PROGRESS.search(label) is not None


def meaning_of(label: str, rest: str = "") -> Meaning:
    """Return what a score label means; the rest of its line may name an evaluation mode."""
    mode = MODE.search(rest)
    words = re.sub(r"[^a-z0-9.]+", " ", f"{label} {mode.group(1) if mode else ''}".lower()).split()
    text = " ".join(words)
    if re.search(r"\blr ?0\b", text):
        return Meaning("ttt_lr0")
    has_ttt = any(word.startswith("ttt") for word in words)
    is_before_ttt = re.search(r"\b(?:pre|before|no|without) ttt\b", text) is not None
    if has_ttt and not is_before_ttt:
        extra = [word for word in words if not TTT_WORDS.fullmatch(word) and not PLAIN_WORDS.fullmatch(word)]
        return Meaning("post_ttt", bool(extra) or "diagnostic" in words)
    words = [word for word in words if not (is_before_ttt and word in ("pre", "before", "no", "without", "ttt"))]
    extra = [word for word in words if not PLAIN_WORDS.fullmatch(word)]
    if BEFORE_QUANTIZATION.search(text) or any(word.startswith("prequant") for word in words):
        return Meaning("post_ema", any(not BEFORE_WORDS.fullmatch(word) for word in extra))
    if "sliding" in words or "slide" in words:
        return Meaning("sliding", any(word not in ("sliding", "slide") for word in extra))
    is_quantized = re.search(r"roundtrip|round trip|\b(?:de)?quanti[sz]ed\b|\bpost ?quant\w*\b|\bgptq\b|\brt\b", text)
    if is_quantized or (is_before_ttt and not extra) or re.fullmatch(r"final int\d+(?: \w+)?(?: exact)?", text):
        return Meaning("post_quant", any(word not in ("post", "postquant", "base") for word in extra))
    return Meaning(None)


def is_plain_variant(label: str, stage: str) -> bool:
    """Return whether a variant's extra words are only a stride or a temperature, not another way to predict."""
    words = re.sub(r"[^a-z0-9.]+", " ", label.lower()).split()
    stage_words = TTT_WORDS if stage == "post_ttt" else re.compile("sliding|slide|post")
    return all(any(form.fullmatch(word) for form in (PLAIN_WORDS, STRIDE_WORDS, stage_words)) for word in words)


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
    return int(step), int(total) if total else None


def flatten_json(line: str) -> str:
    """Return a line that holds a JSON object as `label name:value ...`; other lines unchanged."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return line
    return " ".join(_pairs(content)) if isinstance(content, dict) else line


def _pairs(content: dict[str, Any]) -> list[str]:
    names = ("stage", "label", "phase", "name", "event", "key", "type", "split")
    label = next((str(content[name]) for name in names if isinstance(content.get(name), str)), "")
    pairs = [f"{name}:{value}" for name, value in content.items() if isinstance(value, int | float | str)]
    step = [pair for pair in pairs if pair.startswith("step:")]
    return [*step, label, *(pair for pair in pairs if pair not in step and pair.partition(":")[0] not in names)]
