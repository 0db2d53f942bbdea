"""The documentation keeps its promises: links lead somewhere, commands exist, what is quoted stands in the code."""

from __future__ import annotations

import argparse
import ast
import re
import tarfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from jobs.cli import COMMANDS, build_parser, main
from model.presets import PRESETS, published
from results.schema import TABLES
from runner.spec.read import load_spec, parse_spec
from tests import doc_pages, docs
from tests.doc_figures import changes, settings
from tests.doc_pages import PAGES, SPAN, Command, anchors, blocks, links, name_of, prose
from tests.house import HOUSE, PACKAGES, ROOT, arrows, parse, sources
from tests.test_architecture import ALLOWED, WITHOUT_TORCH

# the change log may name commands of earlier versions
COMMAND_LIST = [
    *dict.fromkeys(command for page in PAGES if page.name != "CHANGELOG.md" for command in doc_pages.commands(page))
]
ELSEWHERE = {
    "cat",
    "cd",
    "cp",
    "mkdir",
    "git",
    "ray",
    "pip",
    "torchrun",
    "for",
    "do",
    "done",
    "kubectl",
    "sbatch",
    "docker",
    "tensorboard",
}
RUNNABLE = ("table", "status", "published", "inspect")
ARCHIVE = ROOT / "tests" / "data" / "sweep_v1.tar.xz"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            is_right = re.fullmatch(r"https://[\w.-]+(/[\w./~%-]*)?(#[\w-]+)?", link) is not None
        else:
            target = page.parent / path if path else page
            is_right = target.exists() and (not anchor or anchor in anchors(target))
        broken += [] if is_right else [link]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"`((?:model|runner|jobs|results|tests|docs)/[\w./-]+)`", prose(page)))
    named -= {"results/SHA256SUMS", *(f"results/{table}" for table in TABLES)}  # of a run directory
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_function_stands_in_the_file_that_is_named_with_it() -> None:
    missing = []
    for page in PAGES:
        for name, file in re.findall(r"`([\w.]+)`\s\(`([\w/]+\.py)`\)", prose(page)):
            body: list[ast.stmt] = parse(ROOT / file).body
            for part in name.split("."):
                found = [node for node in body if part == getattr(node, "name", None)]
                if not found:
                    missing.append(f"{page.name}: {name} in {file}")
                    break
                body = getattr(found[0], "body", [])
    assert missing == []


def test_the_architecture_page_names_enough_to_be_tested() -> None:
    text = prose(ROOT / "docs" / "architecture.md")
    assert len(re.findall(r"`[\w.]+`\s\(`[\w/]+\.py`\)", text)) > 40


@pytest.mark.parametrize("name", docs.PARTS)
def test_what_is_made_from_code_and_data_is_up_to_date(name: str) -> None:
    page, render = docs.PARTS[name]
    text = page.read_text(encoding="utf-8")
    assert docs.renew(text, name, render()) == text, "run python -m tests.docs"


def test_another_table_of_rooms_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**HOUSE["results"], "tables": HOUSE["results"]["tables"]._replace(holds="something else")}
    monkeypatch.setitem(HOUSE, "results", changed)
    page, render = docs.PARTS["rooms"]
    assert render() not in page.read_text(encoding="utf-8")


def test_packages_import_what_the_readme_says_they_may() -> None:
    found: dict[str, set[str]] = {package: set() for package in PACKAGES}
    for start, end in arrows():
        found[start.split(".")[0]].add(end.split(".")[0])
    for package, (allowed, _) in docs.OUTSIDE.items():
        assert found[package] - {package} <= set(allowed.split(", ")), package


def test_heavy_packages_are_imported_where_the_readme_says_they_may() -> None:
    named = {f"{package}/{path}" for package, (_, heavy) in docs.OUTSIDE.items() for path in SPAN.findall(heavy)}
    allowed = {pattern for patterns in ALLOWED.values() for pattern in patterns if not pattern.startswith("model/")}
    assert {path for path in named if not path.startswith("model/")} == allowed
    without_torch = {path.removeprefix("model/") for path in named if path.startswith("model/")}
    assert without_torch == set(WITHOUT_TORCH)


# ---- commands -------------------------------------------------------------------------------------------------------


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Return every option of a parser and of the parsers below it."""
    found = set()
    for action in parser._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                found |= options_of(below)
    return found


def strings_in(module: str) -> set[str]:
    """Return the string literals of a module, or of a package that can be run."""
    path = ROOT / module.replace(".", "/")
    file = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    assert file.is_file(), f"no module {module}"
    nodes = ast.walk(parse(file))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def is_blank(word: str) -> bool:
    """Return whether a word stands for something of the reader's: DIR, N, OUT.json."""
    return word.split(".")[0].strip("[]").isupper()


def check_seedsweep(words: tuple[str, ...], *, is_whole: bool) -> None:
    """Fail unless the command line takes these words."""
    words = tuple(word.strip("[]") for word in words)
    if words[1].startswith("-") or is_blank(words[1]):
        assert words[1] in ("--help", "COMMAND"), words[1]
        return
    assert words[1] in COMMANDS, words[1]
    parser = build_parser(words[1])
    unknown = {word.split("=")[0] for word in words[2:] if word.startswith("-")} - options_of(parser)
    assert not unknown, unknown
    if is_whole:
        parser.parse_args(words[1:])
    for word in words[2:]:
        if word.startswith("jobs/specs/") or (word.startswith("docs/bench/") and word.endswith(".yaml")):
            load_spec(ROOT / word)


def check_python(words: tuple[str, ...]) -> None:
    """Fail unless `python -m` finds the module, and the module knows the options and lower-case words that follow."""
    if words[1] != "-m":
        assert words[1] == "train_gpt.py", words
        known = strings_in("model.standalone")
    elif words[2] in ("venv", "pip"):
        return
    elif words[2] == "pytest":
        check_pytest(words[3:])
        return
    else:
        known = strings_in(words[2])
    for word in words[3:]:
        if "/" in word and word.split("/")[0] in ("tests", "docs"):
            assert (ROOT / word).exists(), word
        elif word.startswith("-") or (word.isalpha() and word.islower()):
            assert word.split("=")[0] in known, word


def check_pytest(words: tuple[str, ...]) -> None:
    """Fail unless the files exist and the marker is one of ours."""
    config = (ROOT / "pyproject.toml").read_text()
    for before, word in zip(("", *words), words):
        if before == "-m":
            assert f'"{word}: ' in config, word
        elif word.startswith("tests/"):
            path, _, test = word.partition("::")
            assert (ROOT / path).is_file(), path
            assert f"def {test}(" in (ROOT / path).read_text() or not test, test


def check_make(words: tuple[str, ...]) -> None:
    """Fail unless the Makefile has the targets."""
    text = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        assert "=" in word or re.search(rf"^{word}:", text, re.MULTILINE), word


def check(words: tuple[str, ...], *, is_whole: bool) -> None:
    """Fail unless a command can be given as it is written."""
    program = words[0].removeprefix(".venv/bin/")
    if program == "seedsweep":
        check_seedsweep(words, is_whole=is_whole)
    elif program in ("python", "python3"):
        check_python(words)
    elif program == "pytest":
        check_pytest(words[1:])
    elif program == "make":
        check_make(words)
    elif program == "torchrun":
        script = words.index("train_gpt.py")
        check_python(("python", *words[script:]))
    else:
        assert program in ELSEWHERE or program.startswith(".ci/"), program


@pytest.mark.parametrize("command", COMMAND_LIST, ids=str)
def test_a_command_can_be_given_as_written(command: Command) -> None:
    check(command.words, is_whole=command.is_whole)


@pytest.mark.parametrize(
    "line",
    [
        "seedsweep fuzz", "seedsweep run spec.yaml --locale", "seedsweep run", "make demonstrate", "nonesuch --help",
        "python -m tests.paritee", "python -m tests.fuzz --cuont 3", "python -m tests.bench sweeep",
        "python -m pytest tests/test_nothing.py", "python -m pytest -m gpus", "python train_gpt.py --evaluate x",
        "seedsweep data text notes --out x --vocabsize 3", "seedsweep table a --format htm",
    ],
)  # fmt: skip
def test_a_misspelled_command_is_noticed(line: str) -> None:
    (words,) = doc_pages.split_line(line)
    with pytest.raises((AssertionError, SystemExit)):
        check(words, is_whole=True)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run directory of a finished sweep."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "out"


@pytest.mark.parametrize(
    "command",
    [command for command in COMMAND_LIST if command.is_whole and command.words[1:2] and command.words[1] in RUNNABLE],
    ids=str,
)
def test_a_command_that_only_looks_does_run(command: Command, old_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [
        str(old_run) if word.startswith(("runs/", "/shared/", "s3://your-")) else word for word in command.words[1:]
    ]
    assert main(words) == 0


# ---- what is quoted from the code ------------------------------------------------------------------------------------


def recipe_tables() -> dict[str, dict[str, str]]:
    """Return the tables of settings of docs/recipe.md, joined by what their second column is called."""
    found: dict[str, dict[str, str]] = {}
    kind = ""
    for line in (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            kind = ""  # the table is over
        elif cells[0] == "setting":
            kind = cells[1]
        elif line.startswith("| `"):
            found.setdefault(kind, {})[cells[0].strip("`")] = cells[1]
    return found


def test_the_recipe_page_has_every_setting_with_its_value() -> None:
    assert recipe_tables()["value"] == settings(published())


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "published"])
def test_the_recipe_page_lists_what_a_preset_changes(preset: str) -> None:
    assert recipe_tables()[preset] == changes(preset)


@cache
def texts_of_the_code() -> list[str]:
    """Return every string of the four packages, what is filled in left out as \0."""
    found = []
    for path in (path for package in PACKAGES for path in sources(package)):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_error_on_the_troubleshooting_page_stands_in_the_code() -> None:
    lines = re.findall(r"^\| `([^`]+)` ", prose(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(lines) > 30
    code = "\n".join(texts_of_the_code())
    patterns = {line: "[^\n]*".join(re.escape(part.strip()) for part in line.split("...")) for line in lines}
    assert [line for line, pattern in patterns.items() if not re.search(pattern, code)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name_of)
def test_a_spec_on_a_page_is_one_that_runs(page: Path) -> None:
    for block in blocks(page, "yaml"):
        plain = yaml.safe_load(block)
        assert parse_spec(plain).seeds


def test_a_word_of_the_glossary_stands_once_and_in_order() -> None:
    words = re.findall(r"^\*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert words == sorted(set(words), key=lambda word: word.lower().replace("-", " "))
