"""results.verify.folder: an exported folder agrees with itself, and every altered figure is found."""

from __future__ import annotations

import base64
import json
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.cli import main
from jobs.evidence.verify import check_score_ledger, hash_config, hash_data_of
from model.bundle.program import is_twin
from results.export.evidence import EVIDENCE, SUMS, write_sums
from results.verify.checks import AGREES, DIFFERS, UNCHECKED, Check, Formulas
from results.verify.folder import verify_folder
from results.verify.seed import check_twin, unpack_program
from tests.fake_runs import fake_sweep
from tests.small_run import small_sweep

FORMULAS = Formulas(hash_config, hash_data_of, check_score_ledger, is_twin)
SEED = f"{EVIDENCE}/seed=42-repeat=0"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported folder; do not write to it."""
    folder = tmp_path_factory.mktemp("exported") / "2026-01-01_Small"
    arguments = ["--author", "A", "--github-id", "a", "-o", str(folder), "--against", "pr:1493"]
    assert main(["export", str(small_sweep()), *arguments]) == 0
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of it that may be altered."""
    shutil.copytree(exported, tmp_path / "folder")
    return tmp_path / "folder"


def differences(folder: Path) -> list[Check]:
    """Return the checks that found a disagreement."""
    return [check for check in verify_folder(folder, FORMULAS) if check.state == DIFFERS]


def flip(path: Path, *, at: float = 0.5) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(bytes(content))


def replace(path: Path, old: str, new: str) -> None:
    """Change one piece of text in a file."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def test_an_exported_folder_agrees_with_itself(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert "0 differ" in shown
    assert shown.count("not checked") == 2  # the weights before quantization are not exported
    assert main(["verify", str(exported), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["counts"]["agrees"] > 300
    assert {check["state"] for check in content["checks"]} == {"agrees", UNCHECKED}


def test_the_readme_says_how_to_verify_and_counts_code_both_ways(exported: Path) -> None:
    readme = (exported / "README.md").read_text()
    submission = json.loads((exported / "submission.json").read_text())
    assert "seedsweep verify ." in readme
    assert "python train_gpt.py --eval" in readme
    for name, key in (("train_gpt_packed.py", "bytes_code"), ("train_gpt.py", "bytes_code_readable")):
        size = (exported / name).stat().st_size
        assert submission[key] == size
        assert f"{size:,}" in readme


def test_verifying_needs_no_torch(exported: Path) -> None:
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'ray'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"from jobs.cli import main\nsys.exit(main(['verify', {str(exported)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr + done.stdout


def test_every_digit_of_submission_json_counts(folder: Path) -> None:
    path = folder / "submission.json"
    original = path.read_text()
    start = original.index('"val_bpb"')
    digits = [place for place in range(start, len(original)) if original[place].isdigit()]
    for place in digits[:: max(1, len(digits) // 6)]:
        changed = str((int(original[place]) + 1) % 10)
        path.write_text(original[:place] + changed + original[place + 1 :])
        write_sums(folder)  # whoever alters a figure can write new sums
        assert any("submission.json" in check.where for check in differences(folder)), original[place - 30 : place + 5]


@pytest.mark.parametrize("name", ["train.json", "quantize.json", "evaluate.json", "ttt.json", "prepare.json"])
def test_one_byte_of_a_ledger_is_found(folder: Path, name: str) -> None:
    flip(folder / SEED / "ledger" / name)
    assert any(name in check.where for check in differences(folder))


@pytest.mark.parametrize(
    "name",
    ["README.md", "train_seed0.log", "requirements.txt", "train_gpt.py", "train_gpt_packed.py", f"{SEED}/model.ssq",
     f"{SEED}/ttt_scores.npz", f"{SEED}/evaluate.npz", f"{SEED}/stages/ttt.json", f"{SEED}/run.json",
     f"{EVIDENCE}/results/runs/seed=42-repeat=0-attempt=1.parquet", f"{EVIDENCE}/sweep.json"],
)  # fmt: skip
def test_one_byte_of_any_file_is_found(folder: Path, name: str) -> None:
    flip(folder / name, at=0.3)
    assert any(name.rpartition("/")[2] in check.where for check in differences(folder))


def test_new_sums_do_not_hide_an_altered_figure(folder: Path) -> None:
    """Each forgery is consistent with SHA256SUMS, and with its own stage record where it has one."""

    def forge_times(content: dict[str, Any]) -> None:
        content["spans"][0]["end_s"] += 1.0

    forgeries: list[tuple[str, Callable[[], None], str]] = [
        ("log", lambda: replace(folder / "train_seed42.log", "val_bpb:", "val_bpb:1"), "train_seed42.log"),
        ("readme", lambda: replace(folder / "README.md", "**val_bpb ", "**val_bpb 0"), "README.md"),
        ("ledger", lambda: edit_json(folder / SEED / "ledger" / "ttt.json", forge_times), "seed=42 ttt"),
        ("metric", lambda: edit_json(folder / SEED / "stages" / "ttt.json",
                                     lambda c: c["metrics"].update(post_ttt_bpb=1.0)), "post_ttt_bpb"),
        ("config", lambda: edit_json(folder / SEED / "run.json",
                                     lambda c: c["config"]["ttt"].update(lr=0.5)), "config_hash"),
        ("scores", lambda: forge_scores(folder / SEED / "ttt.npz"), "row post_ttt_nats"),
        ("order", lambda: forge_order(folder / SEED / "ttt_scores.npz"), "ttt_scores.npz"),
        ("seeds", lambda: edit_json(folder / EVIDENCE / "sweep.json",
                                    lambda c: c["announcements"][0]["seeds"].append(7)), "seed=7"),
    ]  # fmt: skip
    for name, forge, where in forgeries:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        forge()
        for stage in ("train", "quantize", "evaluate", "ttt"):
            record = json.loads((folder / SEED / "stages" / f"{stage}.json").read_text())
            for output, facts in record["outputs"].items():
                if (folder / SEED / output).is_file():
                    facts |= facts_of(folder / SEED / output)
            (folder / SEED / "stages" / f"{stage}.json").write_text(json.dumps(record))
        write_sums(folder)
        assert any(where in check.where for check in differences(folder)), name
        for path, content in before.items():
            path.write_bytes(content)


def facts_of(path: Path) -> dict[str, object]:
    """Return what a stage record says of an output."""
    from results.store.guard import file_sha256

    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def forge_scores(path: Path) -> None:
    """Make one document look a little better."""
    arrays = dict(np.load(path))
    arrays["nats_ttt"][1] *= 0.999
    np.savez(path, **arrays)


def forge_order(path: Path) -> None:
    """Let the ledger say that an update came before its score."""
    arrays = dict(np.load(path))
    for values in arrays.values():
        if values.shape == arrays["kind"].shape:
            values[[0, 1]] = values[[1, 0]]
    np.savez(path, **arrays)


def test_missing_and_added_files_are_found(folder: Path) -> None:
    (folder / SEED / "steps.npz").unlink()
    (folder / "train_seed7.log").write_text("quantized_ttt_lora val_loss:1 val_bpb:1\n")
    found = {check.where for check in differences(folder)}
    assert {f"{SEED}/steps.npz", "train_seed7.log"} <= found
    (folder / SUMS).unlink()
    assert SUMS in {check.where for check in differences(folder)}


def test_rows_without_run_directories_are_said_to_be_unchecked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    out = fake_sweep(tmp_path / "runs", (1, 2, 3))
    assert main(["export", str(out), "--author", "A", "--github-id", "a", "-o", str(folder)]) == 0
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not checked: seed=") == 3
    assert "not checked: announced seeds" in shown


def test_a_folder_without_evidence_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "has no evidence/ folder" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "gone")]) == 2


def test_a_packed_program_of_other_modules_is_a_disagreement(exported: Path, tmp_path: Path) -> None:
    readable, packed = ((exported / name).read_bytes() for name in ("train_gpt.py", "train_gpt_packed.py"))
    assert check_twin("twin", readable, packed, FORMULAS).state == AGREES
    altered = readable.replace(b"RMS_EPS = 2.0**-23", b"RMS_EPS = 2.0**-22")
    assert check_twin("twin", altered, packed, FORMULAS).state == DIFFERS
    elsewhere = readable.replace(b"Twin made with Python 3.", b"Twin made with Python 2.")
    assert check_twin("twin", elsewhere, packed, FORMULAS).state == UNCHECKED


def test_a_program_of_an_older_version_is_unpacked_without_running_it() -> None:
    packed = b'exec(lzma.decompress(base64.b85decode("%s")))' % base64.b85encode(lzma.compress(b"source"))
    assert unpack_program(packed) == b"source"
    with pytest.raises(ValueError, match="no compressed source"):
        unpack_program(b"raise SystemExit")
