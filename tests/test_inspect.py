"""`seedsweep inspect`: says what an artifact holds, and refuses a broken one with one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from model.banks import tensor_shapes
from model.quant.artifact import save_artifact
from tests.test_artifact import META, SMALL, corrected, random_quantized


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """Return the path of a small artifact."""
    path = tmp_path / "model.ssq"
    save_artifact(path, random_quantized(SMALL, 0, keep=("v",)), SMALL, META)
    return path


def test_json_lists_every_tensor_and_adds_up(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == 1
    assert content["model"]["num_layers"] == SMALL.num_layers
    assert content["meta"] == META
    assert {row["name"]: tuple(row["shape"]) for row in content["tensors"]} == tensor_shapes(SMALL)
    by_name = {row["name"]: row for row in content["tensors"]}
    assert (by_name["layers.0.q"]["bits"], by_name["layers.0.v"]["bits"], by_name["embedding"]["bits"]) == (6, 16, 8)
    assert 2.5 < by_name["layers.1.up"]["entropy_bits"] < 3.5
    totals = content["totals"]
    assert totals["total_bytes"] == artifact.stat().st_size
    assert totals["total_bytes"] == totals["header_bytes"] + sum(row["bytes"] for row in content["streams"])
    assert totals["raw_bytes"] == sum(row["raw_bytes"] for row in content["tensors"])


def test_text_shows_model_tensors_and_total(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    text = capsys.readouterr().out
    for expected in ("format 1", "num_layers=2", "meta: seed=7", "layers.1.down", "lane_merge", "scalar", "rans"):
        assert expected in text
    assert f"{artifact.stat().st_size:,}" in text.splitlines()[-1]


def test_a_correction_is_shown_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "corrected.ssq"
    save_artifact(path, corrected(random_quantized(SMALL, 0), 0, rank=4, group=16), SMALL, META)
    assert main(["inspect", str(path), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["format"] == 2
    found = {row["name"]: row["correction"] for row in content["tensors"] if "correction" in row}
    assert found == {"embedding": {"rank": 4, "group": 16}}
    assert content["totals"]["raw_bytes"] == sum(row["raw_bytes"] for row in content["tensors"])
    assert main(["inspect", str(path)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("embedding")]
    assert line.endswith("and a correction of rank 4")


@pytest.mark.parametrize("content", [b"", b"not an artifact", b"SSQMODEL"])
def test_a_broken_file_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    path = tmp_path / "broken.ssq"
    path.write_bytes(content)
    assert main(["inspect", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"seedsweep: error: artifact {path}: ")
    assert captured.err.count("\n") == 1


def test_a_missing_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "absent.ssq")]) == 2
    assert "absent.ssq" in capsys.readouterr().err
