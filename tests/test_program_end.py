"""What a finished program left: whose logs count, what is measured, and where its words and its files disagree."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest

from model.config import RunConfig
from runner.errors import ProgramError
from runner.folder.program_end import AS_FILES, PACKED, End, read_end
from runner.folder.program_files import find_files, hash_files
from runner.life.job import Job
from runner.spec.program import Program, parse_program
from runner.spec.sweep import RunKey

SCRIPT = "import helper\nprint('hello')\n"
HELPER = "x = 1\n" * 50
SCORE = "quantized_ttt_lora val_loss:2.000000 val_bpb:0.800000\n"
SIZES = "Serialized model int6+lzma: {model} bytes\nTotal submission size int6+lzma: {total} bytes\n"
RAW = len(SCRIPT) + len(HELPER)
PACKED_BYTES = len(lzma.compress(SCRIPT.encode())) + len(lzma.compress(HELPER.encode()))


class Ended:
    """A run directory whose program has just ended with 0; its folder came with a log of its author's."""

    def __init__(self, tmp_path: Path, **section: Any) -> None:
        self.program: Program = parse_program({"folder": "p", **section})
        self.job = Job(
            key=RunKey(seed=42), attempt=1, config=RunConfig(), world_size=2, threads=1, uses_gpus=False,
            workdir=str(tmp_path), out=str(tmp_path), record={}, program=self.program, secrets={"KEY": "hunter2"},
        )  # fmt: skip
        place = tmp_path / "program" / "attempt=1"
        self.work, self.out = place / "work", place / "out"
        self.out.mkdir(parents=True)
        for name, text in {
            "train_gpt.py": SCRIPT, "helper.py": HELPER, "train_seed42.log": f"seed: 42\n{SCORE.replace('0.8', '0.1')}",
        }.items():  # fmt: skip
            self.write(name, text)
        self.files = hash_files(find_files(self.work))

    def write(self, name: str, text: str | bytes) -> None:
        """Write a file into the working folder."""
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def print(self, text: str, rank: int = 0) -> None:
        """Let a rank have printed something."""
        path = self.job.log_path(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self) -> End:
        """Return the record of its end."""
        values = {"run_id": "r", "seed": "42", "workdir": str(self.work), "out": str(self.out)}
        return read_end(self.job, self.program, self.work, self.out, self.files, values)


def said_of(end: End) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the metrics, the findings and the notes of a record."""
    metrics = end.record["metrics"]
    return metrics, metrics["provenance_json"]["findings"], metrics["provenance_json"]["notes"]


def test_logs_that_came_with_the_folder_are_not_the_programs_own(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.print("nothing to see\n")
    with pytest.raises(ProgramError, match=r"ended with 0, but no score: no line of output of rank 0"):
        ended.read()
    ended.print(SCORE)
    assert ended.read().record["metrics"]["post_ttt_bpb"] == 0.8


def test_a_log_that_is_too_long_to_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("results.published.layout.MAX_LOG_BYTES", 100)
    ended, words = Ended(tmp_path), "output of rank 1: 0 MB is too long for a log; left out"
    ended.print(SCORE + "on and on\n" * 20, rank=1)
    with pytest.raises(ProgramError, match=rf"ended with 0, but no score: .*; {words}"):
        ended.read()
    ended.print(SCORE)
    assert any(note.startswith(words) for note in said_of(ended.read())[2])


@pytest.mark.parametrize("place", ["logs/r.txt", "other/deep.log", "rank 1"])
def test_a_score_is_found_wherever_the_program_left_it(tmp_path: Path, place: str) -> None:
    ended = Ended(tmp_path, log="logs/{run_id}.txt")
    ended.print("hello\n")
    if place == "rank 1":
        ended.print(SCORE, rank=1)
    else:
        ended.write(place, SCORE)
    assert ended.read().record["metrics"]["post_ttt_bpb"] == 0.8


@pytest.mark.parametrize("log", ["logs/*.txt", "{workdir}/logs/{run_id}.txt"])
def test_a_log_that_the_spec_names_comes_before_what_was_printed(tmp_path: Path, log: str) -> None:
    ended = Ended(tmp_path / "odd[1]", log=log)
    ended.print("step:1/1 train_loss:3.0 train_time:10ms\n" + SCORE.replace("0.8", "0.9"))
    ended.write("logs/r.txt", SCORE)
    end = ended.read()
    assert end.record["metrics"]["post_ttt_bpb"] == 0.8
    assert end.steps["loss"].tolist() == [3.0]  # only what it printed has the curve


@pytest.mark.parametrize(
    ("counted", "convention"), [(RAW, AS_FILES), (PACKED_BYTES, PACKED), (7, f"as files {RAW} bytes, packed by lzma")]
)
def test_the_model_is_measured_and_code_counted_as_the_program_does(
    tmp_path: Path, counted: int, convention: str
) -> None:
    ended = Ended(tmp_path)
    ended.write("final.ptz", b"m" * 2000)
    ended.print(SIZES.format(model=2000, total=2000 + counted) + SCORE)
    metrics, findings, _ = said_of(ended.read())
    assert (metrics["model_bytes"], metrics["code_bytes"], metrics["artifact_bytes"]) == (2000, counted, 2000 + counted)
    assert (metrics["code_bytes_readable"], metrics["code_bytes_packed"]) == (RAW, PACKED_BYTES)
    assert convention in metrics["code_bytes_convention"]
    assert findings == []
    (output,) = ended.read().record["outputs"].items()
    assert output[0] == "program/attempt=1/work/final.ptz"
    assert output[1]["bytes"] == 2000


def test_a_model_of_another_size_than_was_said_is_a_finding(tmp_path: Path) -> None:
    ended = Ended(tmp_path, outputs={"model": "*.ptz", "code": ["train_gpt.py"]})
    ended.write("final.ptz", b"m" * 2020)
    ended.print(SIZES.format(model=2000, total=2000 + len(SCRIPT)) + SCORE)
    metrics, findings, _ = said_of(ended.read())
    assert metrics["artifact_bytes"] == 2020 + len(SCRIPT)
    assert findings == [
        "model_bytes: the program says 2000, its artifact has 2020",
        f"artifact_bytes: the program says {2000 + len(SCRIPT)}, model and code are 2020 + {len(SCRIPT)}",
    ]


def test_what_is_missing_is_listed_and_no_secret_with_it(tmp_path: Path) -> None:
    ended = Ended(tmp_path, outputs="*.ptz")
    ended.print(SCORE + "hunter2 mixture val_loss:1.0 val_bpb:0.5\n")
    metrics, findings, notes = said_of(ended.read())
    assert "model_bytes" not in metrics
    assert "within_limit" not in metrics
    assert findings == []
    assert "program.outputs: no new file is *.ptz" in notes
    assert "which validation text it scored is not known: it gave no val_documents_hash" in notes
    assert "not found in what it printed or wrote: steps, train_s, model_bytes, artifact_bytes" in notes
    assert "hunter2" not in str(metrics)


def test_an_artifact_over_the_limit_is_marked(tmp_path: Path) -> None:
    ended = Ended(tmp_path, outputs="*.ptz")
    ended.write("final.ptz", b"\0" * 16_000_000)
    ended.print(SCORE)
    assert said_of(ended.read())[0]["within_limit"] is False


def test_a_changed_script_marks_the_row(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.print(SCORE)
    ended.write("train_seed42.log", "appended")
    metrics, findings, _ = said_of(ended.read())
    assert metrics["code_changed"] is False
    assert findings == ["the program changed or removed files of its own folder: train_seed42.log"]
    (ended.work / "helper.py").unlink()
    assert said_of(ended.read())[0]["code_changed"] is True
