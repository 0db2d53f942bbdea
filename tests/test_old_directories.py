"""A run directory and a submission folder that an earlier version left can still be read by every command."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

import results
from jobs.cli import main

ARCHIVE = Path(__file__).parent / "data" / "sweep_v1.tar.xz"
POST_TTT = {42: 5.40195, 0: 5.37308}  # as that version's own table printed them


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with out/ and exported/."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_its_table_is_the_one_that_was_printed_then(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(old / "out"), "--format", "json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert {row["seed"]: round(row["post_ttt_bpb"], 5) for row in table["seeds"]} == POST_TTT
    assert main(["status", str(old / "out")]) == 0
    assert capsys.readouterr().out.count("DONE") >= 2


def test_it_can_be_compared_and_shown(old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(old / "out"), str(old / "exported" / "evidence")]) in (0, 1)
    assert "+0.00000" in capsys.readouterr().out
    assert main(["report", str(old / "out"), "-o", str(tmp_path / "page.html")]) == 0
    assert "5.387" in (tmp_path / "page.html").read_text()


def test_its_submission_folder_still_verifies(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(old / "exported")]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert "0 differ" in shown


def test_its_rows_are_of_the_variant_base(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for load in (results.load, results.stages, results.steps, results.documents):
        frame = load(old / "out")
        assert set(frame["variant"]) == {"base"}
        assert set(frame["schema_version"]) == {1}
    assert main(["table", str(old / "out"), "--format", "json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert list(table) == ["schema_version", "sweep", "data_hash", "seeds", "summary"]
    assert table["schema_version"] == 1  # to the byte what was printed then
    assert main(["compare", f"{old / 'out'}#base", str(old / "out")]) == 0
    assert "+0.00000" in capsys.readouterr().out
    assert main(["compare", f"{old / 'out'}#gate", str(old / "out")]) == 2
    assert "has no variant 'gate'; there are base" in capsys.readouterr().err
