"""README.md keeps its promises: it is short, its links lead somewhere, its commands exist."""

import re
import shlex
from pathlib import Path

import pytest

from jobs.cli import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_LINES = 150

LINKS = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", README)
CODE_BLOCKS = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    words
    for block in CODE_BLOCKS
    for line in block.splitlines()
    if (words := shlex.split(line.replace("[", "").replace("]", ""), comments=True))
]


def test_it_is_short() -> None:
    assert len(README.splitlines()) < MAX_LINES


@pytest.mark.parametrize("link", [link for link in LINKS if not link.startswith("http")])
def test_a_link_into_the_repository_leads_somewhere(link: str) -> None:
    assert (ROOT / link.split("#")[0]).exists()


@pytest.mark.parametrize("link", [link for link in LINKS if link.startswith("http")])
def test_a_link_to_the_web_is_encrypted_and_whole(link: str) -> None:
    assert re.fullmatch(r"https://[\w.-]+(/[\w./~%-]*)?(#[\w-]+)?", link)


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:model|runner|jobs|results|tests|docs)/[\w./]+)`", README)))
)
def test_a_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    folder, missing = "", []
    for line in tree.strip().splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
        for name in re.findall(r"[\w-]+\.(?:py|md|yaml)\b|\b[a-z]+/", line):
            path = ROOT / name if name == folder else ROOT / folder / name
            if not path.exists() and folder != "runs/":
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_can_be_given_as_written(words: list[str]) -> None:
    program, *arguments = words
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    elif program == "python":
        assert arguments[0] == "-m"
        assert (ROOT / f"{arguments[1].replace('.', '/')}.py").exists()
    else:
        assert program == "seedsweep"
        build_parser(arguments[0]).parse_args(arguments)  # argparse exits, which fails the test, on an unknown option
