"""model/bundle/ahead.py: the program that another process makes is the one that this process would have made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from model.bundle import ahead, program
from model.bundle.ahead import making_program
from model.bundle.program import Program, code_program
from model.presets import published, tiny
from tests.test_bundle import make_package

OURS = "def main(argv, settings, code_bytes):\n    greeting = 'ours'\n    print(greeting, argv)\n"


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let this process know of no program yet; return the processes that are started."""
    monkeypatch.setattr(program, "programs", {})
    monkeypatch.setattr(program, "minified", {})
    monkeypatch.setattr(ahead, "programs", program.programs)
    monkeypatch.setattr(ahead, "minified", program.minified)
    started: list[Any] = []
    start = ahead.subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(ahead.subprocess, "Popen", popen)
    return started


def make_ahead(root: Path) -> Program:
    """Return the program as the stage gets it."""
    with making_program(tiny(), root=root) as wait:
        wait()
    return code_program(tiny(), root=root)


def test_another_process_makes_the_same_program_and_nothing_is_left_to_do(
    tmp_path: Path, children: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_package(tmp_path, standalone=OURS)
    here = code_program(tiny(), root=root)
    program.programs.clear()
    program.minified.clear()
    with monkeypatch.context() as patch:
        patch.setattr(program, "make_program", lambda *_: pytest.fail("made here"))
        assert make_ahead(root) == here
    monkeypatch.setattr(program, "minify_module", lambda *_, **__: pytest.fail("minified here"))
    other = code_program(published(), root=root)  # other settings, the same modules
    assert other.readable != here.readable
    assert len(children) == 1


def test_a_process_that_knows_its_modules_starts_no_other(tmp_path: Path, children: list[Any]) -> None:
    root = make_package(tmp_path, standalone=OURS)
    assert make_ahead(root) == make_ahead(root)
    assert len(children) == 1


def test_it_does_not_outlive_a_block_that_ends_early(tmp_path: Path, children: list[Any]) -> None:
    root = make_package(tmp_path, standalone=OURS)
    with pytest.raises(KeyError), making_program(tiny(), root=root):
        raise KeyError
    assert children[0].returncode is not None
    assert not program.programs
    assert code_program(tiny(), root=root).num_bytes > 0


def test_what_fails_there_is_done_here_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_package(tmp_path, standalone="from model.gone import x\n")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match=r"model\.gone is imported, but .* is not there"),
    ):
        make_ahead(root)
    assert "another one failed: ValueError: model.gone" in caplog.text
    (root / "model" / "standalone.py").write_text(OURS)
    monkeypatch.setattr(ahead, "WAIT_S", 0.0)
    assert make_ahead(root).num_bytes > 0
    assert "another one took over 0 s" in caplog.text

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError("no more processes")

    program.minified.clear()
    program.programs.clear()
    monkeypatch.setattr(ahead.subprocess, "Popen", refuse)
    assert make_ahead(root).num_bytes > 0
    assert "made later, in this process: no more processes" in caplog.text
