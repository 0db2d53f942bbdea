"""Text files of unknown origin: bytes to text by what they hold, and log lines without what launchers put before."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

MAX_LINE_CHARS = 4000  # no figure stands farther out
MAX_PREFIXES = 8  # a launcher, a scheduler and a logger may each put one before a line
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*(?:\x07|\x1b\\)|[\x00-\x08\x0e-\x1b\x7f\ufeff\u200b]")
LINE_ENDS = re.compile(r"\r\n|[\n\r\x0b\x0c]")
PREFIX = re.compile(
    r"""^(?:
     \s*\((?:[\w.+:<>-]+(?:\([^)]*\))?\s+)?pid=\d+[^)]*\)                                # (RayTask pid=12, ip=..)
    |\s*[\[(]?\b(?:local[_ ])?(?:rank|gpu|node|default|worker)[\s_=:-]?\d+[\])]?\s?[:|>-]?(?=\s)     # rank 0:
    |\s*\[(?:local[_ ])?(?:rank|gpu|node|default|worker)[\s_=:-]?\d+\]:?
    |\s*\[\d+,\d+\]<std(?:out|err)>:?                                                   # mpirun --tag-output
    |\s*[\[(<]?\d{4}[-/.]\d{2}[-/.]\d{2}(?:[T_\s,]+\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?
        (?:\s?Z|\s?[+-]\d{2}:?\d{2}|\s?UTC)?)?[\])>]?\s?[:|,-]?(?=\s)                   # [2026-03-20 12:34:56,789]
    |\s*[\[(]?\d{1,2}:\d{2}:\d{2}(?:[.,]\d+)?[\])]?\s?[:|-]?(?=\s)                      # 12:34:56
    |\s*[\[(]?1[5-9]\d{8}(?:\.\d+|\d{3})?[\])]?\s?[:|-]?(?=\s)                          # seconds or ms since 1970
    |\s*(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)\s(?=[A-Z][a-z]{2}\s)
    |\s*[\[(]?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)\s+\d{1,2}\s\d{2}:\d{2}:\d{2}(?:\s\d{4})?[\])]?
        (?:\s[\w.-]+\s[\w./-]+(?:\[\d+\])?:)?(?=\s)                                     # syslog
    |\s?[-|]?\s?[\[(]?(?:DEBUG|INFO|SUCCESS|TRACE|WARNING|WARN|ERROR|NOTICE|CRITICAL)\b[\])]?(?::(?:root|__main__|\w+\.[\w.]+):|\s?[:|>-]?)
    |\s*[DIWE]\d{4}\s\d{2}:\d{2}:\d{2}[.\d]*\s+\d+\s[\w./-]+:\d+\]
    |\s*[\[(]\s*\+?\d+(?:\.\d+)?\s?(?:ms|s|m)?[\])]:?(?=\s)                             # [ 12.3s] and [0]
    |\s?(?:std(?:out|err)|wandb|trainer|main|__main__|root|logger|[\w/.-]+\.py(?::\d+)?)\s?(?:[|:>]|-(?=\s))(?=\s)
    |\d{1,3}:(?=\s)                                                                     # srun --label
    |\s*\d{1,7}\t                                                                       # cat -n
    |\s?std(?:out|err)\s[FP](?=\s)                                                      # Kubernetes
    |\s*\|\s(?:__main__|[\w.]+):[\w.<>]+:\d+\s-(?=\s)                                    # loguru
    |[>|-]\s(?=\S)
    |.*?\d{1,3}%\|[^|]*\|[^\]]*\]                                                       # a bar that ended no line
    )[ \t]?""",
    re.VERBOSE,
)


class Decoded(NamedTuple):
    """The text of a file, and a remark on how it was read where it was not UTF-8 (None: nothing to say)."""

    text: str
    remark: str | None


def read_text(path: Path) -> Decoded:
    """Return a file's text: by its byte order mark, as UTF-16 without one, as UTF-8, else byte for byte as Latin-1.

    Figures are ASCII in all of them. Raises ValueError naming the file when it cannot be read or is no text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _decode(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _decode(content: bytes) -> Decoded:
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
    ):  # fmt: skip
        if content.startswith(mark):
            return Decoded(content.decode(encoding, errors="replace"), None)
    zeros = [content[start:4000:2].count(0) for start in (0, 1)]
    if max(zeros) > 0.3 * len(content[:4000:2]) and min(zeros) < 0.1 * max(zeros):  # ASCII letters in two bytes each
        return Decoded(content.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", errors="replace"), None)
    if content[:4000].count(0) > 8:
        raise ValueError("not a text file (it holds zero bytes)")
    try:
        return Decoded(content.decode("utf-8"), None)
    except UnicodeDecodeError as error:
        place = f"byte 0x{content[error.start]:02x} at {error.start}"
        return Decoded(content.decode("latin-1"), f"not UTF-8 text ({place}); read as Latin-1")


def clean_lines(text: str) -> list[str]:
    """Return a log's lines without colors, prefixes of launchers and loggers, and source code printed before the run.

    What a carriage return overwrote is a line of its own. Indentation behind a prefix is kept.
    """
    lines = [ESCAPES.sub("", line[:MAX_LINE_CHARS]) for line in LINE_ENDS.split(_without_source(text))]
    shared = _shared_prefix(lines)
    return [strip_prefixes(shared.sub("", line, count=1) if shared else line).rstrip() for line in lines]


def _shared_prefix(lines: list[str]) -> re.Pattern[str] | None:
    """Return what stands before most lines: one word, such as a host's name and a colon, or the line's number."""
    filled = [line for line in lines if line.strip()]
    words = Counter(match.group() for line in filled if (match := re.match(r"[^\s{\"]{1,60} ?[:|>\]] ", line)))
    word, count = words.most_common(1)[0] if words else ("", 0)
    if count >= 10 and count >= 0.8 * len(filled):
        return re.compile("^" + re.escape(word))
    numbers = [int(match.group(1)) for line in filled if (match := re.match(r"(\d{1,7}):", line))]
    is_numbered = len(numbers) >= 10 and len(numbers) == len(filled) and numbers == sorted(set(numbers))
    return re.compile(r"^\d{1,7}:") if is_numbered else None


def strip_prefixes(line: str) -> str:
    """Return a line without times, ranks, log levels, worker names and progress bars before it."""
    for _ in range(MAX_PREFIXES):
        match = PREFIX.match(line)
        if not match or match.end() == 0:
            break
        line = line[match.end() :]
    return line


def _without_source(text: str) -> str:
    """Return the text behind the script that some logs print first, set off by a line of equals signs."""
    rule = re.search(r"^={20,}\s*$", text, re.MULTILINE)
    if rule and len(re.findall(r"^(?:import|from) \w+", text[: rule.start()], re.MULTILINE)) >= 3:
        return text[rule.end() :]
    return text
