"""`seedsweep data`: exit codes and what is printed."""

import io
import json
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.sweeps.data import ProgressLine

SP8192 = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {number}"}) + "\n" for number in range(4)))
    return path


def test_text_prints_documents_tokens_and_bytes(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["data", "text", str(lines), "--out", str(out), "--tokenizer", str(SP8192)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["split", "documents", "tokens", "bytes"] in rows
    assert rows[-1][:2] == ["val", "4"]
    assert rows[-1][3] == str(4 * len("text number 0"))


def test_a_second_output_into_the_folder_exits_with_2_and_one_line(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["data", "text", str(lines), "--out", str(tmp_path / "out"), "--tokenizer", str(SP8192)]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    assert main(["data", "builtin", "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_tokenizer_trained_on_validation_documents_is_said(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "text", str(lines), "--out", str(tmp_path / "out")]) == 0
    assert "trained on the validation documents" in capsys.readouterr().out


def test_an_intact_corpus_can_be_kept_and_another_one_cannot(
    tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "text", str(lines), "--out", out, "--tokenizer", str(SP8192), "--name", "other"]) == 0
    assert main(["data", "builtin", "--out", out, "--reuse"]) == 2
    kept = str(tmp_path / "kept")
    assert main(["data", "text", str(lines), "--out", kept, "--tokenizer", str(SP8192), "--name", "builtin"]) == 0
    assert main(["data", "builtin", "--out", kept, "--reuse"]) == 0
    assert "intact corpus kept" in capsys.readouterr().out


def test_progress_is_a_line_per_phase_in_a_log() -> None:
    stream = io.StringIO()
    progress = ProgressLine(stream)
    for step in range(100):
        progress("encode", step, 100, {"split": "train"})
    progress("check", 1, None, {})
    progress.close()
    assert stream.getvalue().splitlines() == ["encode: 0/100 (0%) split=train", "check: 1"]


def test_what_a_score_would_not_say_is_printed(tmp_path: Path, lines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "a.txt").write_text("text  number 0")
    (folder / "b.md").write_text("not read")
    arguments = ["data", "text", str(folder), str(lines), "--out", str(tmp_path / "out"), "--val-documents", "1"]
    assert main([*arguments, "--tokenizer", str(SP8192)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"note: 1 files of other kinds are left out (1 .md, such as {folder / 'b.md'})" in printed
    assert printed[1].startswith("warning: 1 of 1 validation documents are training documents too")
    assert printed[2] == (
        "note: bits per byte count the 13 bytes that the tokenizer gives back of the 14 bytes of validation text"
    )
