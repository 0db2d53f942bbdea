"""results.published.log, submission and export: reading submission folders, and reading back what we write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import results
from jobs.cli import main
from results.export.folder import judge_compliance
from results.findings.importer import read_submission
from results.findings.review import find_disagreements
from results.published.log import seed_in_name, stage_of
from tests.fake_runs import commit_failed, commit_fake, fake_sweep
from tests.made_folders import parse_log
from tests.submissions import SEEDS, log_lines, write_log, write_submission

STAGES = ("post_ema", "post_quant", "post_ttt")


def test_every_line_form_is_read() -> None:
    run = parse_log("\n".join(log_lines(42).values()), "train_seed42.log").run
    assert (run["seed"], run["steps"], run["train_ms"]) == (42, 4826, 588119)
    for stage in STAGES:
        assert (run[stage]["val_loss_nats"], run[stage]["val_bpb"]) == SEEDS[42][stage]
    assert (run["live_weights_bpb_at_stop"], run["model_bytes"], run["total_bytes"]) == (1.0756, 15965977, 15992482)
    assert (run["code_bytes_implied"], run["total_eval_s"], run["ttt_compile_warmup_s"]) == (26505, 393.6, None)
    assert run["post_ttt"]["seconds"] == pytest.approx(252.222)
    assert (run["val_tokens"], run["model_params"], run["hparams"]["vocab_size"]) == (40540160, 35944537, "8192")


@pytest.mark.parametrize(
    "name", ["steps", "post_ema", "post_quant", "post_ttt", "model_bytes", "total_bytes", "total_eval_s"]
)
def test_a_missing_line_is_said_and_nothing_is_guessed(name: str) -> None:
    text = "\n".join(line for key, line in log_lines(42).items() if key != name)
    log = parse_log(text, "train_seed42.log")
    assert log.run[name] is None
    assert [line for line in log.missing if line.startswith(f"train_seed42.log: {name} not found (no line ")]
    assert len(log.missing) == 1


def test_early_log_forms_are_read() -> None:
    # forms of the launch baseline's log
    text = """step:13780/20000 val_loss:2.0606 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
seed:1337
val_loader:shards pattern=/data/fineweb_val_*.bin tokens:63779840
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
step:13750/20000 train_loss:1.9910 train_time:598726ms step_avg:43.54ms
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2244 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
"""
    log = parse_log(text, "train.log")
    run = log.run
    assert (run["seed"], run["steps"], run["live_weights_bpb_at_stop"]) == (1337, 13780, 1.2172)
    assert (run["model_bytes"], run["total_bytes"], run["val_tokens"]) == (15815847, 15863489, 63779840)
    assert run["post_quant"] == {
        "val_bpb": 1.2243657, "val_loss_nats": 2.07269931, "seconds": 1.401, "label": "final_int8_zlib_roundtrip_exact"
    }  # fmt: skip
    assert log.steps == [{"step": 13750, "loss": 1.991, "elapsed_s": 598.726, "tokens_per_s": None, "is_looped": None}]


@pytest.mark.parametrize(
    ("label", "stage"),
    [
        ("pre-quantization post-ema", "post_ema"), ("DIAGNOSTIC post_ema", "post_ema"), ("quantized", "post_quant"),
        ("diagnostic quantized", "post_quant"), ("final_int6_roundtrip_exact", "post_quant"),
        ("final_int6_sliding_window", "sliding"), ("quantized_sliding_window", "sliding"), ("final_sliding", "sliding"),
        ("quantized_ttt_lora", "post_ttt"), ("quantized_ttt_phased", "post_ttt"), ("legal_ttt_exact", "post_ttt"),
        ("final_int6_ttt", "post_ttt"), ("diagnostic quantized_ttt_lr0", "ttt_lr0"), ("swa", None), ("etlb", None),
    ],
)  # fmt: skip
def test_labels_name_their_stage(label: str, stage: str | None) -> None:
    assert stage_of(label) == stage


def test_an_unknown_score_line_is_said() -> None:
    log = parse_log("mystery_eval val_loss:2.1 val_bpb:1.1 eval_time:3ms\n", "train_seed1.log")
    assert log.unknown == ["train_seed1.log: score line with an unknown label 'mystery_eval': not used"]


def test_a_score_that_is_not_a_number_is_not_used() -> None:
    log = parse_log("quantized val_loss:nan val_bpb:nan\n", "train_seed1.log")
    assert log.run["post_quant"] is None
    assert "is not a number" in log.unknown[0]


@pytest.mark.parametrize(
    ("name", "seed"),
    [("train_seed42.log", 42), ("logs/train0.txt", 0), ("train.log", None), ("train_seed1234_rerun_8s.log", 1234)],
)
def test_seeds_are_in_file_names(name: str, seed: int | None) -> None:
    assert seed_in_name(name) == seed


def test_importing_gives_the_published_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_submission(tmp_path / "2026-04-11_Record", val_bpb_std=0.00064)
    out = tmp_path / "out"
    assert main(["import-logs", str(folder), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "mean 1.07747, sample std 0.00078 (ddof=1), population std 0.00064 (ddof=0), n = 3" in shown
    assert "record: std convention: stated 0.00064" in shown
    rows = results.load(out).set_index("seed")
    for seed, run in SEEDS.items():
        assert rows.loc[seed, "post_ttt_bpb"] == run["post_ttt"][1]
        assert rows.loc[seed, "pre_ttt_nats_per_token"] == run["post_quant"][0]
        assert rows.loc[seed, "artifact_bytes"] == run["model"] + 26505
        provenance = json.loads(str(rows.loc[seed, "provenance_json"]))
        assert provenance["post_ttt"] == f"train_seed{seed}.log: quantized_ttt_lora"
    assert results.steps(out).groupby("seed")["is_looped"].sum().tolist() == [1, 1, 1]
    assert main(["compare", str(out), "pr:1493", "--margin-nats", "0.005"]) == 0
    assert "p_margin_0.005 = 0.0314" in capsys.readouterr().out


def test_a_correct_folder_has_no_disagreements(tmp_path: Path) -> None:
    assert find_disagreements(read_submission(write_submission(tmp_path / "record")).record) == []


@pytest.mark.parametrize(
    ("cell", "value", "field"),
    [
        ((42, "Pre-TTT BPB"), "1.0849", "post_quant/sliding bpb: README vs log"),
        ((0, "TTT gain"), "-0.00800", "TTT gain: README vs log"),
        ((1337, "Post-TTT BPB"), "1.07853", "post_ttt bpb: README vs log"),
        ((42, "Steps"), "4,827", "steps: README vs log"),
        ((42, "Artifact"), "15,992,483", "artifact bytes: README vs log"),
    ],
)
def test_an_altered_readme_cell_is_listed(tmp_path: Path, cell: tuple[int, str], value: str, field: str) -> None:
    record = read_submission(write_submission(tmp_path / "record", readme={cell: value})).record
    found = find_disagreements(record)
    assert [(finding.seed, finding.field) for finding in found] == [(cell[0], field)]
    assert value in found[0].values.values()
    assert found[0].value == value


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"val_bpb": 1.0773}, "headline val_bpb: submission.json vs mean of logs"),
        ({"val_loss": 2.781}, "headline val_loss: submission.json vs mean of logs"),
        ({"val_bpb_std": 0.0005}, "std convention"),
        ({"bytes_total": 15_999_999}, "artifact bytes: submission.json vs logs"),
        ({"seed_results": {"42": {"steps": 4900}}}, "steps: submission.json vs log"),
        ({"seed_results": {"42": {"artifact_bytes": 1}}}, "artifact bytes: submission.json vs log"),
        ({"seed_results": {"42": {"val_bpb": 1.07}}}, "final bpb: submission.json vs log"),
        ({"seed_results": {"7": {"val_bpb": 1.07}}}, "submission.json lists a seed without a log"),
    ],
)
def test_an_altered_submission_json_is_listed(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    record = read_submission(write_submission(tmp_path / "record", **change)).record
    assert [finding.field for finding in find_disagreements(record)] == [field]


def test_an_altered_mean_row_is_listed(tmp_path: Path) -> None:
    folder = write_submission(tmp_path / "record")
    path = folder / "README.md"
    path.write_text(path.read_text().replace("| 1.07747 | | |", "| 1.07737 | | |"))
    found = find_disagreements(read_submission(folder).record)
    assert [finding.field for finding in found] == ["mean of post_ttt bpb: README vs logs"]
    assert found[0].value == "1.07737"


def test_settings_that_differ_between_seeds_are_listed(tmp_path: Path) -> None:
    folder = write_submission(tmp_path / "record")
    path = folder / "train_seed0.log"
    path.write_text(path.read_text().replace("matrix_lr: 0.022", "matrix_lr: 0.03"))
    findings = find_disagreements(read_submission(folder).record)
    assert [finding.field for finding in findings] == ["hyperparameter matrix_lr differs between the seeds"]


def test_a_log_without_its_final_stage_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_submission(tmp_path / "record")
    write_log(folder, 42, without="post_ttt")
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert "train_seed42.log: stage post_ttt, on which the others are scored, not found: left out" in shown
    assert results.load(tmp_path / "out").set_index("seed")["state"].to_dict() == {
        0: "DONE",
        42: "FAILED",
        1337: "DONE",
    }


def test_bad_folders_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "train_seed1.log").write_text("epoch 1 loss 3.0\n")
    cases = {
        tmp_path / "absent": "no such folder",
        empty: "no training log with a line of a known form",
        strange: "train_seed1.log: no line of a known form",
    }
    for folder, message in cases.items():
        assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_files_that_cannot_be_read_are_left_out_and_named(tmp_path: Path) -> None:
    folder = write_submission(tmp_path / "record")
    path = folder / "train_seed42.log"
    path.write_bytes("Größe\n".encode("latin-1") + path.read_bytes())
    (folder / "submission.json").write_text("{")
    submission = read_submission(folder)
    assert "train_seed42.log: not UTF-8 text (byte 0xf6 at 2); read as Latin-1" in submission.notes
    assert [note for note in submission.notes if note.startswith("submission.json: not JSON")]
    finals = {run["seed"]: run["final_bpb"] for run in submission.record["runs"]}
    assert finals == {seed: run["post_ttt"][1] for seed, run in SEEDS.items()}


def test_an_import_does_not_replace_results_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = write_submission(tmp_path / "record"), fake_sweep(tmp_path / "runs", (42,))
    assert main(["import-logs", str(folder), "--out", str(out)]) == 2
    assert "holds the results of runs" in capsys.readouterr().err


def test_an_exported_folder_imports_to_the_same_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_sweep(tmp_path / "runs", (42, 0, 1337))
    folder = tmp_path / "2026-04-11_Fake"
    assert main(["export", str(out), "--author", "A", "--github-id", "a", "-o", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} >= {
        "README.md", "submission.json", "requirements.txt", "train_seed0.log", "train_seed42.log", "train_seed1337.log",
        "SHA256SUMS", "evidence",
    }  # fmt: skip
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "back")]) == 0
    assert "no disagreements found" in capsys.readouterr().out
    assert main(["compare", str(folder), str(out)]) == 0  # the same validation text, known by its hash
    before, after = (results.load(place).sort_values("seed") for place in (out, tmp_path / "back"))
    for stage in ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt"):
        for figure in ("bpb", "nats_per_token"):
            column = f"{stage}_{figure}"
            pd.testing.assert_series_equal(
                before[column].reset_index(drop=True), after[column].reset_index(drop=True), atol=6e-9, rtol=0
            )
    for column in (
        "steps",
        "artifact_bytes",
        "model_bytes",
        "code_bytes",
        "train_s",
        "evaluate_s",
        "ttt_s",
        "quantize_s",
    ):
        assert before[column].tolist() == pytest.approx(after[column].tolist(), abs=1e-3), column


def test_the_exported_submission_states_what_the_rows_show(tmp_path: Path) -> None:
    out = fake_sweep(tmp_path / "runs", (42, 0, 1337), num_documents=0)
    folder = tmp_path / "folder"
    assert main(["export", str(out), "--author", "A. Author", "--github-id", "aa", "-o", str(folder)]) == 0
    content = json.loads((folder / "submission.json").read_text())
    rows = results.load(out)
    assert content["val_bpb"] == pytest.approx(rows["post_ttt_bpb"].mean(), abs=1e-8)
    assert content["val_bpb_std"] == pytest.approx(rows["post_ttt_bpb"].std(ddof=1), abs=1e-8)
    assert (content["author"], content["github_id"], content["seeds"]) == ("A. Author", "aa", [0, 42, 1337])
    assert content["bytes_total"] == rows["artifact_bytes"].max()
    assert content["compliance"] == {
        "train_under_600s": True, "eval_under_600s": True, "artifact_under_16mb": True, "three_seeds": True,
        "one_configuration": True, "code_unchanged_while_running": True,
    }  # fmt: skip
    text = (folder / "README.md").read_text()
    assert f"**val_bpb {rows['post_ttt_bpb'].mean():.5f}**" in text
    assert "p_margin_0.005 = " in text
    assert "torch==2.13.0" in (folder / "requirements.txt").read_text()


FIT = {"quant": {"on_oversize": "fit"}}


@pytest.mark.parametrize(
    ("row", "is_under"),
    [
        ({"hessian_s": 3.5, "sensitivity_s": 8.3}, True),  # 588.1 + 11.8
        ({"hessian_s": 3.5, "sensitivity_s": 8.5, "config_json": FIT}, False),
        ({"hessian_s": 3.5}, True),
        (
            {"hessian_s": 3.5, "config_json": FIT},
            None,
        ),  # measured by an earlier version, which did not say for how long
    ],
)
def test_what_fit_measures_counts_as_training(tmp_path: Path, row: dict[str, Any], is_under: bool | None) -> None:
    rows = results.load(fake_sweep(tmp_path, (42,), **row))
    assert judge_compliance(rows)["train_under_600s"] is is_under


def test_the_exported_log_has_the_lines_reviewers_read(tmp_path: Path) -> None:
    out = fake_sweep(tmp_path / "runs", (42,))
    assert main(["export", str(out), "--author", "A", "--github-id", "a", "-o", str(tmp_path / "f")]) == 0
    text = (tmp_path / "f" / "train_seed42.log").read_text()
    for form in (
        r"stopping_early: wallclock_cap train_time: \d+ms step: \d+/\d+",
        r"^pre-quantization post-ema val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms$",
        r"^quantized val_loss:[\d.]+ val_bpb:[\d.]+",
        r"^quantized_ttt_lora val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms$",
        r"^Serialized model quantized\+brotli: \d+ bytes$",
        r"^Total submission size quantized\+brotli: \d+ bytes$",
        r"^total_eval_time:[\d.]+s$",
    ):
        assert pd.Series(text.splitlines()).str.contains(form).any(), form


def test_an_export_lists_seeds_that_are_not_in_its_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_sweep(tmp_path / "runs", (42, 0))
    commit_failed(out, 7)
    assert main(["export", str(out), "--author", "A", "--github-id", "a", "-o", str(tmp_path / "f")]) == 1
    assert "seed=7 repeat=0 is not in the mean: FAILED (rank 3: out of memory)" in capsys.readouterr().out
    assert "seed=7 repeat=0 is not in the mean" in (tmp_path / "f" / "README.md").read_text()


def test_export_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed, partial, whole = tmp_path / "failed", tmp_path / "partial", tmp_path / "whole"
    commit_failed(failed, 42)
    commit_fake(partial, 42, post_ttt_bpb=None)
    fake_sweep(whole, (42,))
    cases = {
        (failed, tmp_path / "new"): "no finished seed to export",
        (partial, tmp_path / "new"): "post_ttt_bpb is missing for seed 42",
        (whole, whole): "is not empty; name a new one",
    }
    for (out, folder), message in cases.items():
        assert main(["export", str(out), "--author", "A", "--github-id", "a", "-o", str(folder)]) == 2
        assert message in capsys.readouterr().err
