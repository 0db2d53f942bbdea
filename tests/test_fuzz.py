"""python -m tests.fuzz: a short run over every loader, controls it must catch, and files it once tripped over."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest

from tests.fuzz import drive as fuzz
from tests.fuzz.__main__ import main
from tests.fuzz.cases import CASES, make_case
from tests.fuzz.drive import LOADERS, fuzz_loader
from tests.fuzz_controls import BAD_SEED, CONTROLS

REGRESSIONS = Path(__file__).parent / "regressions"
SHORT = {"artifact": 150, "shard": 150, "manifest": 150, "checkpoint": 100, "spec": 100, "parquet": 40, "tokenizer": 4}


@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_files_are_refused_in_one_line_or_load_right(tmp_path: Path, loader: str) -> None:
    case = make_case(loader, tmp_path / loader)
    refusals = [case.run(seed) for seed in range(10_000, 10_000 + SHORT[loader])]
    assert any(refusals)


def test_the_command_says_what_came_of_each_loader(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--loader", "shard", "--count", "60", "--seed", "5", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["seed"] == 5
    (found,) = content["loaders"]
    assert (found["loader"], found["files"], found["faults"]) == ("shard", 60, {})
    assert 0 < found["refused"] < 60
    assert found["refused"] + found["loaded"] == 60
    assert main(["--count", "0"]) == 2


def test_the_same_seed_damages_files_in_the_same_ways(tmp_path: Path) -> None:
    for loader in CASES:
        case = make_case(loader, tmp_path / loader)
        first, second, other = (case.mutated(random.Random(seed))[1] for seed in (1, 1, 2))
        assert first == second != other


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("crash", "crashed: signal 6"),
        ("memory", "MemoryError"),
        pytest.param("traceback", "KeyError", marks=SLOW),
        pytest.param("many-lines", "several lines", marks=SLOW),
        ("execution", "os.system"),
        pytest.param("outside", "open outside", marks=SLOW),
        pytest.param("hang", "hung: no answer in 2 s", marks=SLOW),
    ],
)
def test_every_kind_of_fault_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, control: str, message: str
) -> None:
    monkeypatch.setattr(fuzz, "FILE_TIMEOUT_S", 2.0)
    assert control in CONTROLS
    outcome = fuzz_loader(control, tmp_path, seed=1, count=6, module="tests.fuzz_controls")
    assert list(outcome.faults) == [BAD_SEED]
    assert message in outcome.faults[BAD_SEED]
    assert (outcome.num_files, outcome.num_refused) == (6, 5)


@pytest.mark.parametrize("path", sorted(REGRESSIONS.glob("*")), ids=lambda path: path.name)
def test_files_that_once_caused_a_fault_no_longer_do(tmp_path: Path, path: Path) -> None:
    """A regression file is named LOADER-WHAT.ENDING and stands in for that loader's file of this ending."""
    if path.suffix == ".md":
        return
    case = make_case(path.name.partition("-")[0], tmp_path / "case")
    target = next(
        place for place, _ in (case.mutated(random.Random(seed)) for seed in range(200)) if place.suffix == path.suffix
    )
    case.run_content(target, path.read_bytes())


def test_guided_fuzzing_needs_atheris_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("atheris") is None:
        assert main(["--guided", "--loader", "shard", "--count", "10"]) == 2
        assert "pip install atheris" in capsys.readouterr().err
    else:
        assert main(["--guided", "--loader", "shard", "--count", "200"]) == 0
    assert main(["--guided", "--loader", "parquet"]) == 2
    assert "--guided is for" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("loader", LOADERS)
def test_many_damaged_files_cause_no_fault(tmp_path: Path, loader: str) -> None:
    count = 100 if loader in fuzz.THIRD_PARTY else 1500
    assert fuzz_loader(loader, tmp_path, seed=77, count=count).faults == {}
