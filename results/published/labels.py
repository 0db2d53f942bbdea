"""Labels of score lines: the stage that one means, word by word, and what an extra word makes of it."""

from __future__ import annotations

import re
from typing import NamedTuple

MODE = re.compile(r"\b(?:eval[_ ]?)?(?:mode|method)\s*[:=]\s*([\w+-]+)", re.IGNORECASE)
# Words of a score label that change nothing about its meaning.
PLAIN_WORDS = re.compile(
    r"final|exact|eval|evaluation|val|validation|score|result|results|model|quantized|quantised|quant|quantization|"
    r"quantisation|dequantized|dequant|gptq|full|window|windows|windowed|after|with|on|of|the|metrics|bpb|loss|mixed|"
    r"ternary|binary|qat|int\d+|fp\d+|bf16|nf4|w\d|zlib|zstd\d*|lzma\d*|brotli\d*|xz|roundtrip|rt|"
    r"round|trip|diagnostic|stage|only|weights|standard|compressed|serialized|submission|done|complete|completed|finished|"
    r"end|summary|base"
)
TTT_WORDS = re.compile(
    r"ttt\w*|lora|phased|legal|score|first|doc|docs|document|documents|per|global|sgd|adam|adamw|muon|post|sliding|"
    r"slide|online|adapted|causal"
)
STRIDE_WORDS = re.compile(
    r"s\d+|stride\d*|t|temp|temperature|\d+(?:\.\d+)?|diagnostic|ema|post|swa|e\d+|ep\d+|\d+ep|epochs?|v\d+|r\d+|rank\d*"
)
MIXTURE_WORDS = re.compile(
    r"n?gram|ppm|slot|knn|cache|mix|hedge|unpaid|backoff|oracle|interpol|ensemble|prequant|bigram|dirichlet"
)
BEFORE_QUANTIZATION = re.compile(
    r"\b(?:post|after) ?(?:ema|swa|lawa|average|averaging|avg)\b|\b(?:pre|before) ?(?:quant\w*|gptq)\b|\bunquantized\b|"
    r"^(?:diagnostic )?raw(?: (?:eval|model|weights))?(?: exact)?$|^(?:final )?ema(?: exact)?$"
)
QUANTIZED_WORDS = re.compile(r"(?:de)?quant|int\d|nf4|ternary|binary|zlib|zstd|lzma|brotli")
BEFORE_WORDS = re.compile(
    r"pre|before|post|after|ema|swa|lawa|average|averaging|avg|unquantized|prequant\w*|raw|applied"
)
PROGRESS = re.compile(
    r"(?<![a-z])(?:progress|chunk|batch|running|partial|cumulative)(?![a-z])|\bdocs?\s*[:=]?\s*\d|\d\s*%|\d+\s*/\s*\d+|\biter\b|\bwindow\s+\d|"
    r"\bstep\b|\bepoch\b|\bphase\s*[:=]?\s*\d", re.IGNORECASE,
)  # fmt: skip


class Meaning(NamedTuple):
    """The stage that a label names, None for an unknown one, and whether extra words make it a variant of it."""

    stage: str | None
    is_variant: bool = False


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
    if BEFORE_QUANTIZATION.search(text) or extra == ["ema"] or any(word.startswith("prequant") for word in words):
        return Meaning("post_ema", any(not BEFORE_WORDS.fullmatch(word) for word in extra))
    if "sliding" in words or "slide" in words:
        return Meaning("sliding", any(word not in ("sliding", "slide") for word in extra))
    is_quantized = re.search(r"roundtrip|round trip|\b(?:de)?quanti[sz]ed\b|\bpost ?quant\w*\b|\bgptq\b|\brt\b", text)
    if is_quantized or (not extra and (is_before_ttt or any(QUANTIZED_WORDS.match(word) for word in words))):
        return Meaning("post_quant", any(word not in ("post", "postquant") for word in extra))
    return Meaning(None)


def is_plain_variant(label: str, stage: str) -> bool:
    """Return whether a variant's extra words are only a stride, a temperature or the like."""
    words = re.sub(r"[^a-z0-9.]+", " ", label.lower()).split()
    stage_words = TTT_WORDS if stage == "post_ttt" else re.compile("sliding|slide|post")
    return all(any(form.fullmatch(word) for form in (PLAIN_WORDS, STRIDE_WORDS, stage_words)) for word in words)


def is_mixture(label: str) -> bool:
    """Return whether a label names another way to predict (n-grams, a cache, a mixture), not another setting."""
    return MIXTURE_WORDS.search(label.lower()) is not None


def base_label(label: str) -> str:
    """Return a label without the word that says how many decimals it was printed with."""
    return re.sub(r"[_ ]exact$", "", label, flags=re.IGNORECASE)
