"""Our own exported program, run as anybody's: over two seeds it scores what the pipeline scored, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.cli import main
from results import load
from tests.small_run import SEEDS, TOKENIZER, small_sweep, validation_glob

pytestmark = pytest.mark.slow
SCORES = ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep that ran the bundle of the small sweep as somebody else's program."""
    folder, out = tmp_path_factory.mktemp("own"), small_sweep()
    assert main(["bundle", str(out), "-o", str(folder / "bundle")]) == 0
    train, val = f"{out.parent}/data/toy_train_*.bin", validation_glob(out)
    program = {
        "folder": str(folder / "bundle"),
        "command": [
            "python", "train_gpt.py", "--train", train, "--val", val, "--tokenizer", str(TOKENIZER), "--seed", "{seed}",
            "--out", "{out}", "--json", "{out}/results.json",
        ],
        "inputs": [train, val, str(TOKENIZER)], "outputs": {"model": "model.ssq"},
    }  # fmt: skip
    plain = {"name": "own", "program": program, "seeds": list(SEEDS), "gang": {"cpus": 1}, "out": str(folder / "out")}
    spec = folder / "own.yaml"
    spec.write_text(yaml.safe_dump(plain))
    assert main(["run", str(spec), "--local", "--progress", "plain"]) == 0
    return folder / "out"


def test_every_score_is_the_pipelines_to_the_last_bit(ours: Path) -> None:
    theirs = load(small_sweep()).set_index("seed")
    for seed, row in load(ours).set_index("seed").iterrows():
        for stage in SCORES:
            for figure in ("nats", "tokens", "bytes", "bpb"):
                name = f"{stage}_{figure}"
                assert row[name] == theirs.loc[seed, name], name  # type: ignore[index]
        for name in ("steps", "val_documents_hash", "val_bytes", "tokenizer_hash"):
            assert row[name] == theirs.loc[seed, name], name  # type: ignore[index]
        assert row["artifact_bytes"] == pytest.approx(theirs.loc[seed, "artifact_bytes"], rel=0.01)  # type: ignore[index]
        assert row["source"] == "program"


def test_the_two_can_be_compared_and_shown_beside_each_other(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(ours), str(small_sweep())]) in (0, 1)
    assert "+0.00000" in capsys.readouterr().out
    assert main(["compare", str(ours), str(small_sweep()), "--reproduces"]) == 0
    assert "reproduced" in capsys.readouterr().out
    assert main(["report", str(ours), "-o", str(ours.parent / "page.html")]) == 0
    assert main(["table", str(ours)]) == 0
    assert "2 of 2 runs finished" in capsys.readouterr().out
