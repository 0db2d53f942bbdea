"""Reads the pages of the documentation: their links, headings, code blocks and commands, for tests/test_docs.py."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.house import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("README.md")],
    key=lambda path: path.relative_to(ROOT).parts,
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(([^)\s]+)\)")
ENDS = {"|", ">", ">>", "&&", "||", ";", "&", "<"}
PROGRAMS = ("seedsweep", "make", "python", "pytest")


class Command(NamedTuple):
    """One command as a page has it: whole where it stands in a block, perhaps only its name in running text."""

    page: Path
    words: tuple[str, ...]
    is_whole: bool

    def __str__(self) -> str:
        return f"{self.page.name}: {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    """Return a page's path from the root of the repository."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """Return the contents of a page's code blocks in one language."""
    return [body for kind, body in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def links(page: Path) -> list[str]:
    """Return the targets of a page's links and pictures; what stands in code is no link."""
    return LINK.findall(SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def split_line(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands of a shell line; comments, redirections and variables set before a command are left out."""
    line = re.sub(r"(^|\s)#.*", "", line)  # a comment begins a word; runs/demo#base is one
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.commenters = ""
    lexer.wordchars += "{}[]@:,$%!^#"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word not in ENDS:
            words.append(word)
            continue
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words.pop(0)
        if words:
            yield tuple(words)
        words = []
        if word in (">", ">>", "<"):
            words = ["cat"]  # what follows is a file


def commands(page: Path) -> Iterator[Command]:
    """Yield the commands of a page: the lines of its sh blocks, and code in running text that starts with a program."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for words in split_line(line):
                yield Command(page, words, is_whole=True)
    for span in SPAN.findall(prose(page)):
        for words in split_line(span) if span.split()[0] in PROGRAMS and span not in PROGRAMS else ():
            if words[0] in PROGRAMS:
                yield Command(page, words, is_whole=False)
