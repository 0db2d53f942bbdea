"""The twelve journeys: short pages; a command is run here with a smaller model, or named with the reason why not."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from jobs.sweeps import plan
from runner.life.capacity import Node
from tests import doc_pages
from tests.doc_pages import blocks, links
from tests.house import ROOT
from tests.small_run import SPEC, write_data
from tests.submissions import write_submission

FOLDER = ROOT / "docs" / "journeys"
PAGES = sorted(path for path in FOLDER.glob("*.md") if path.name != "README.md")
MAX_LINES, MAX_COMMANDS = 20, 3
EIGHT_GPUS = Node(node_id="a", name="made-up", resources={"CPU": 96.0, "GPU": 8.0})


def lines_of(page: Path) -> list[tuple[str, ...]]:
    """Return the commands of a page's blocks, as words."""
    return [command.words for command in doc_pages.commands(page) if command.is_whole]


def reasons(page: Path) -> str:
    """Return what a page says of the commands that nobody has run here, as one line."""
    found = re.search(r"^Not run here:.*?(?=\n\n|\Z)", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return " ".join(found[0].split()) if found else ""


def name_of(words: tuple[str, ...]) -> str:
    """Return the command without what follows it."""
    return " ".join(words[:2]) if words[0] in ("seedsweep", "make", "ray") else words[0]


def test_there_are_twelve_and_the_first_page_leads_to_each() -> None:
    assert len(PAGES) == 12
    assert sorted(links(FOLDER / "README.md")) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_short_and_has_at_most_three_commands(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert 1 <= len(lines_of(page)) <= MAX_COMMANDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_command_names_are_there(page: Path) -> None:
    named = [word for words in lines_of(page) for word in words if word.startswith("jobs/")]
    named += re.findall(r"`((?:tests|jobs)/[\w/.]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the specs of the pages have their names, and a model that takes two seconds a seed."""
    folder = tmp_path_factory.mktemp("world")
    small = {**yaml.safe_load(SPEC), "data": write_data(folder / "data")}
    shutil.copytree(ROOT / "jobs" / "specs", folder / "jobs" / "specs")
    variants = {"base": {}, "bits_4": {"quant": {"matrix_bits": 4}}}
    for name, changes in {
        "demo": {"track": {"tensorboard": "runs/boards"}},
        "ablation_demo": {"variants": variants},
    }.items():
        spec = {**small, "name": name, "out": f"runs/{name}", **changes}
        (folder / "jobs" / "specs" / f"{name}.yaml").write_text(json.dumps(spec))
    write_submission(folder / "FOLDER")
    (folder / "FOLDER" / "train_gpt.py").write_text("import os\n\nprint(int(os.environ['SEED']))\n")
    with (folder / "FOLDER" / "README.md").open("a", encoding="utf-8") as readme:
        readme.write("\n```sh\nSEED=42 python train_gpt.py\n```\n")
    return folder


def run_line(words: tuple[str, ...], folder: Path) -> int:
    """Run a command of a page in folder, seeds without Ray; /shared is a folder in it."""
    arguments = [re.sub(r"^/shared/published", "runs/demo", word) for word in words[1:]]
    if words[:2] == ("make", "demo"):  # .ci/run runs it as it stands
        arguments = ["run", "jobs/specs/demo.yaml"]
    if arguments[0] in ("run", "rerun"):
        arguments.append("--local")
    return main(arguments)


@pytest.mark.slow
def test_what_can_be_run_here_runs_as_it_stands_on_the_pages(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard, which a page asks for, is not installed")
    monkeypatch.chdir(world)
    monkeypatch.setattr(plan, "find_nodes", lambda _address: (EIGHT_GPUS,))
    codes, skipped = {}, {}
    for page in sorted(PAGES, key=lambda page: page.stem != "laptop"):  # the others look at what it leaves
        for words in lines_of(page):
            if f"`{name_of(words)}" in reasons(page) or (name_of(words) == "seedsweep run" and "--address" in words):
                skipped[page.stem, name_of(words)] = reasons(page)
            else:
                codes[page.stem, " ".join(words)] = run_line(words, world)
    printed = capsys.readouterr()
    lacks_data = {
        ("eight-gpus", "seedsweep plan jobs/specs/published.yaml"),
        ("spot", "seedsweep plan jobs/specs/spot.yaml"),
    }
    assert {name: code for name, code in codes.items() if code and name not in lacks_data} == {}, printed.err
    assert {codes[name] for name in lacks_data} == {2}, "the shards are not here; the gang fits"
    assert "no node can hold one gang" not in printed.err
    assert "GPU-hours" in printed.out
    assert all(skipped.values()), skipped
    assert len(codes) >= 20, sorted(codes)
    assert list((world / "runs" / "boards").rglob("events.out.tfevents.*")), "the tracker was told"


@pytest.mark.slow
def test_the_lines_for_pandas_run(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    assert main(["run", "jobs/specs/demo.yaml", "--local"]) == 0
    capsys.readouterr()
    (block,) = blocks(FOLDER / "trackers.md", "python")
    exec(compile(block, "trackers.md", "exec"), {})
    assert re.search(r"^DONE +\d\.\d+", capsys.readouterr().out, re.MULTILINE)
