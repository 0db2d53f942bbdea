"""Size lines of a training log: bytes of the compressed model, of the code, and of the whole submission.

The same words are printed before compression, for raw weights, and after it; the order of the lines tells them apart.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from results.published.lines import COUNT, count_of

BYTES = rf"\s*[:=]\s*(?:[\d.]+\s*[MKG]i?B\s*[(/|,=]\s*)?{COUNT}\s*(bytes|byte|B)?\b"
COMPRESSOR = re.compile(
    r"int\d|zlib|zstd|brotli|lzma|\bxz|quant|compress|ternary|binary|packed|gptq|\+|\bbr\b|fp\d|nf4|rans|ans\b",
    re.IGNORECASE,
)
MODEL = re.compile(
    r"\b((?:serialized|compressed|quantized|packed|final)[ _](?:\w+[ _])?model(?:[ _](?:size|bytes))?|"
    rf"compressed[ _]size|model[ _](?:bytes|size)|bytes_model)([^:=]{{0,60}}){BYTES}",
    re.IGNORECASE,
)
CODE = re.compile(rf"\b(code(?:[ _](?:size|bytes))?(?:\s*\(\w+\))?|bytes_code){BYTES}", re.IGNORECASE)
TOTAL = re.compile(
    r"\b(total[ _](?:submission|artifact|compressed|packed)(?:[ _](?:size|bytes))*|"
    r"(?:submission|artifact)[ _](?:size|bytes)|"
    rf"total[ _](?:size|bytes)|bytes_total|total|artifact|submission)([^:=\d]{{0,4}}[^:=]{{0,56}}?){BYTES}",
    re.IGNORECASE,
)
BESIDE_CODE = re.compile(rf"\b(artifact|model|weights|payload)\s*[:=]\s*{COUNT}", re.IGNORECASE)
OF_LIMIT = re.compile(rf"(?<![\d,]){COUNT}\s*(?:bytes)?\s*/\s*16[,_]?000[,_]?000\b", re.IGNORECASE)
LIMIT = re.compile(r"\b16[,_]?000[,_]?000\b")
OF_OTHER_THINGS = re.compile(r"mem|token|param|val|train|text|cache", re.IGNORECASE)
OTHER_BYTES = re.compile(r"code|raw|val|text|data|train|token|param|mem|payload|uncompressed|header", re.IGNORECASE)


class Size(NamedTuple):
    """One printed size: what it is of (model, code or total), its label, and whether it names a compressed form."""

    kind: str
    label: str
    num_bytes: int
    is_compressed: bool


class Sizes(NamedTuple):
    """The sizes of one run that count: compressed model and whole submission, with the label each was printed under."""

    model: Size | None
    total: Size | None


def read_sizes(line: str) -> list[Size]:
    """Return the sizes that a line prints, in bytes."""
    found = []
    code = CODE.search(line)
    if code and (code.group(3) or "bytes" in code.group(1).lower()):
        found.append(Size("code", code.group(1), count_of(code.group(2)), False))
    model = MODEL.search(line)
    if model and (model.group(4) or "bytes" in model.group(1).lower()):
        label = (model.group(1) + model.group(2)).strip()
        is_compressed = bool(COMPRESSOR.search(label)) and "uncompressed" not in label.lower()
        found.append(Size("model", label, count_of(model.group(3)), is_compressed))
    totals = [match for match in TOTAL.finditer(line) if _is_total(match)]
    part = BESIDE_CODE.search(line)
    if code and part and totals and model is None and totals[-1].start() != part.start():
        found.append(Size("model", part.group(1), count_of(part.group(2)), True))
    if totals:
        label = totals[-1].group(1) + totals[-1].group(2)
        is_compressed = bool(COMPRESSOR.search(label)) or any(size.is_compressed for size in found)
        found.append(Size("total", label.strip(), count_of(totals[-1].group(3)), is_compressed))
    elif limit := OF_LIMIT.search(line):
        found.append(
            Size("total", line[: limit.start()].strip(" :=") or "of 16,000,000", count_of(limit.group(1)), True)
        )
    return found


def choose_sizes(sizes: list[Size]) -> Sizes:
    """Return the compressed model and the submission of one run; the last ones count, and raw weights do not."""
    models = [place for place, size in enumerate(sizes) if size.kind == "model" and size.is_compressed]
    totals = [place for place, size in enumerate(sizes) if size.kind == "total"]
    raw = {size.num_bytes for size in sizes if size.kind == "model" and not size.is_compressed}
    codes = {size.num_bytes for size in sizes if size.kind == "code"} | {0}
    raw_totals = {model + code for model in raw for code in codes}
    kept = [place for place in totals if sizes[place].is_compressed or sizes[place].num_bytes not in raw_totals]
    if models:
        after = [place for place in kept if place > models[0] or sizes[place].is_compressed]
        kept = after or [place for place in kept if sizes[place].num_bytes >= sizes[models[-1]].num_bytes][:0]
    return Sizes(sizes[models[-1]] if models else None, sizes[kept[-1]] if kept else None)


def _is_total(match: re.Match[str]) -> bool:
    label = match.group(1).lower()
    if OF_OTHER_THINGS.search(match.string[max(0, match.start() - 16) : match.start()]):
        return False
    has_unit = bool(match.group(4)) or "bytes" in label or "size" in label or LIMIT.search(match.string)
    is_other = OTHER_BYTES.search(match.group(2)) and "model" not in match.group(2).lower()
    return bool(has_unit) and not is_other and count_of(match.group(3)) >= 1000
