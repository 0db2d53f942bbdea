"""results.submission, scoring and log_joins: whole folders, the stage and the log that count, and files that do not."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

import results
from jobs.cli import main
from results.published import one_run_a_seed, recompute
from results.sides import open_side
from results.submission import Submission, findings_of, read_submission
from tests.made_folders import Made, made_log, readme_table, score_line, split_evaluation, with_prefix, write_folder


def fields(submission: Submission) -> list[str]:
    """Return what the findings of a folder are about."""
    return [finding.field for finding in findings_of(submission.record)]


def finals(submission: Submission) -> dict[int | None, float]:
    """Return the final score of each seed."""
    return {run["seed"]: run["final_bpb"] for run in one_run_a_seed(submission.record)}


def stage(submission: Submission) -> str | None:
    mine = recompute(submission.record)
    return None if mine is None else mine.stage


# --- the stage that the authors report ---


@pytest.mark.parametrize("label", ["final_slot", "ngram_mixed_exact", "final", "baseline", "final_ppm_sliding_window"])
@pytest.mark.parametrize("said", [{"val_bpb": 0.968}, {"seed_results": {"42": {"val_bpb": 0.968}}}])
def test_a_label_that_is_reported_is_the_scored_one(tmp_path: Path, label: str, said: dict[str, Any]) -> None:
    log = made_log(more=score_line(label, 0.968))
    submission = read_submission(write_folder(tmp_path / "r", {"train_seed42.log": log}, submission=said))
    assert finals(submission) == {42: 0.968}
    assert stage(submission) == f"other: {label.removesuffix('_exact')}"
    assert fields(submission) == []
    assert not [note for note in submission.notes if "not used" in note]


def test_a_variant_that_is_not_reported_stays_beside_its_stage(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        "train_seed42.log": made_log(more=score_line("final_ppm_sliding_window_exact", 1.143)),
        "train_seed7.log": made_log(seed=7, sliding=1.116),
    }
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.1155}))
    assert finals(submission) == {42: 1.115, 7: 1.116}
    assert fields(submission) == []


def test_a_stride_in_the_label_of_every_log_is_the_sliding_score(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        f"train_seed{seed}.log": made_log(seed=seed, sliding=None, more=score_line("final_sliding_window_s64", 1.115))
        for seed in (42, 7)
    }
    submission = read_submission(write_folder(tmp_path / "r", logs))
    assert stage(submission) == "sliding"
    logs["train_seed1.log"] = made_log(seed=1, sliding=1.112)
    mixed = read_submission(write_folder(tmp_path / "mixed", logs))
    assert all(run["sliding"] is None for run in mixed.record["runs"] if run["seed"] != 1)


@pytest.mark.parametrize(
    ("label", "stage_name"),
    [
        ("Sliding window eval (stride=64)", "sliding"), ("legal_ttt_e3", "post_ttt"),
        ("quantized_ttt_cosine", "post_ttt"),
        ("final_int6_roundtrip_perchannel", "post_quant"), ("ttt_ngram", None), ("final_ppm_sliding_window", None),
    ],
)  # fmt: skip
def test_the_only_variant_of_a_stage_is_that_stage_unless_it_mixes(
    tmp_path: Path, label: str, stage_name: str | None
) -> None:
    logs: dict[str, str | bytes] = {
        f"train_seed{seed}.log": made_log(seed=seed, sliding=None, quantized=None, more=score_line(label, 1.1))
        for seed in (42, 7)
    }
    logs["train_seed1.log"] = made_log(seed=1, sliding=None, quantized=None)  # without this pass
    runs = read_submission(write_folder(tmp_path / "r", logs)).record["runs"]
    found = {name for run in runs for name in ("post_quant", "sliding", "post_ttt") if run[name]}
    assert found == ({stage_name} if stage_name else set())


TWO = {42: Made(sliding=1.1150, ttt=1.1180), 7: Made(seed=7, sliding=1.1160, ttt=1.1190)}


def two_logs() -> dict[str, str | bytes]:
    return {f"train_seed{seed}.log": made_log(made) for seed, made in TWO.items()}


@pytest.mark.parametrize(
    ("headline", "expected"),
    [
        (1.1155, "sliding"), ("1.1155", "sliding"), (1.1185, "post_ttt"), (1.13, "post_quant"), (1.116, "sliding"),
        (1.118, "post_ttt"), (1.1154, "sliding"), ("1.1190", "post_ema"), (1.05, "post_ttt"),
    ],
)  # fmt: skip
def test_the_headline_chooses_the_stage(tmp_path: Path, headline: object, expected: str) -> None:
    submission = read_submission(write_folder(tmp_path / "r", two_logs(), submission={"val_bpb": headline}))
    assert stage(submission) == expected


def test_a_headline_that_is_the_mean_of_a_stage_is_no_disagreement(tmp_path: Path) -> None:
    assert fields(read_submission(write_folder(tmp_path / "r", two_logs(), submission={"val_bpb": 1.1155}))) == []


def test_the_seeds_of_the_submission_choose_the_stage(tmp_path: Path) -> None:
    said = {"seed_results": {"42": {"val_bpb": 1.115}, "7": {"val_bpb": 1.116}}, "val_bpb": 1.1155}
    assert stage(read_submission(write_folder(tmp_path / "r", two_logs(), submission=said))) == "sliding"


def test_without_a_submission_the_readmes_numbers_choose_the_stage(tmp_path: Path) -> None:
    readme = readme_table([{"Seed": 42, "BPB": "1.1150"}, {"Seed": 7, "BPB": "1.1160"}])
    assert stage(read_submission(write_folder(tmp_path / "a", two_logs(), readme=readme))) == "sliding"
    assert stage(read_submission(write_folder(tmp_path / "b", two_logs()))) == "post_ttt"


# --- the log of a seed that the authors report ---


V1, V2 = made_log(ttt=1.11404), made_log(ttt=1.11203, model_bytes=15_800_000)


@pytest.mark.parametrize(
    "said",
    [
        {"seed_results": {"42": {"val_bpb": 1.1120, "artifact_bytes": 15_820_000}}},
        {"seed_results": {"42": {"val_bpb": 1.1120}}},
        {"seed_results": {"42": {"ttt_val_bpb": 1.11203}}},
        {"seed_results": {"42": {"artifact_bytes": 15_820_000}}},
        {"per_seed": {"42": {"val_bpb": 1.112}}},
        {"val_bpb": 1.1120},
        {"val_bpb": "1.11203"},
    ],
)
@pytest.mark.parametrize("names", [("log_seed42_v1.txt", "log_seed42_v2.txt"), ("b_seed42.log", "a_seed42.log")])
def test_the_log_that_is_reported_counts(tmp_path: Path, said: dict[str, Any], names: tuple[str, str]) -> None:
    logs: dict[str, str | bytes] = {names[0]: V1, names[1]: V2}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission=said))
    assert [run["log_file"] for run in one_run_a_seed(submission.record)] == [names[1]]
    assert fields(submission) == ["several logs of one seed differ"]
    assert any("2 runs" in note and f"{names[1]} is used" in note for note in submission.notes)


def test_the_headline_chooses_among_logs_by_its_mean(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"a_seed42.log": V1, "b_seed42.log": V2, "seed7.log": made_log(seed=7, ttt=1.11301)}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.11252}))
    assert finals(submission) == {42: 1.11203, 7: 1.11301}


def test_artifact_bytes_break_a_tie(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        "a_seed42.log": made_log(ttt=1.11203), "b_seed42.log": made_log(ttt=1.11201, model_bytes=15_800_000)
    }  # fmt: skip
    said = {"seed_results": {"42": {"val_bpb": 1.112, "artifact_bytes": 15_820_000}}}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission=said))
    assert [run["log_file"] for run in one_run_a_seed(submission.record)] == ["b_seed42.log"]


def test_of_two_runs_in_one_file_the_last_is_used_and_said(tmp_path: Path) -> None:
    text = made_log(sliding=1.2) + made_log(steps=4100, sliding=1.115)
    submission = read_submission(write_folder(tmp_path / "r", {"train_seed42.log": text}))
    (run,) = one_run_a_seed(submission.record)
    assert (run["steps"], run["final_bpb"]) == (4100, 1.115)
    assert "train_seed42.log: holds 2 runs, one after the other" in submission.notes


def test_of_two_runs_in_one_file_the_reported_one_counts(tmp_path: Path) -> None:
    text = made_log(sliding=1.2) + made_log(steps=4100, sliding=1.115)
    submission = read_submission(write_folder(tmp_path / "r", {"train_seed42.log": text}, submission={"val_bpb": 1.2}))
    assert finals(submission) == {42: 1.2}


def test_without_a_submission_the_readme_chooses_the_log(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"a_seed42.log": V1, "b_seed42.log": V2}
    readme = readme_table([{"Seed": 42, "Post-TTT BPB": "1.1120"}])
    assert finals(read_submission(write_folder(tmp_path / "r", logs, readme=readme))) == {42: 1.11203}


# --- seeds ---


@pytest.mark.parametrize(
    "said", [{"seed": 42}, {"seeds": [42]}, {"seed_results": {"42": {"val_bpb": 1.115}}}, {"seeds": "42"}]
)
def test_a_log_without_a_seed_takes_the_submissions_only_one(tmp_path: Path, said: dict[str, Any]) -> None:
    folder = write_folder(tmp_path / "r", {"train.log": made_log(seed=None)}, submission=said)
    assert finals(read_submission(folder)) == {42: 1.115}


def test_a_log_without_a_seed_takes_the_readmes_only_one(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "r", {"t.log": made_log(seed=None)}, readme=readme_table([{"Seed": 42, "BPB": 1.115}])
    )
    assert finals(read_submission(folder)) == {42: 1.115}


def test_a_log_without_any_seed_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "r", {"train.log": made_log(seed=None)}, submission={"val_bpb": 1.115})
    for form in ("text", "markdown", "csv", "json"):
        assert main(["import-logs", str(folder), "--out", str(tmp_path / "out"), "--format", form]) == 0
        shown = capsys.readouterr().out
        assert "1.115" in shown
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "\n   ? " in capsys.readouterr().out
    assert len(results.load(tmp_path / "out")) == 1
    assert main(["table", str(tmp_path / "out")]) == 0


def test_logs_without_seeds_are_told_apart_by_their_reported_scores(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        "a.log": made_log(seed=None, sliding=1.115),
        "b.log": made_log(seed=None, sliding=1.117),
    }
    said = {"seed_results": {"7": {"val_bpb": 1.117}, "42": {"val_bpb": 1.115}}}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission=said))
    assert finals(submission) == {7: 1.117, 42: 1.115}
    assert fields(submission) == []


@pytest.mark.parametrize("name", ["run_seq16384.log", "train_v2.txt", "train_rtx4090.log"])
def test_a_number_in_a_name_is_not_held_against_the_seed_in_the_log(tmp_path: Path, name: str) -> None:
    submission = read_submission(write_folder(tmp_path / "r", {name: made_log(seed=1337)}))
    assert (finals(submission), fields(submission)) == ({1337: 1.115}, [])


@pytest.mark.parametrize("said", [
    {"seed_results": {"0": {"val_bpb": 1.115}}}, {"seeds": [0]}, {"seed_results": {"0": {"steps": 4000}}},
])  # fmt: skip
def test_a_log_of_another_seed_than_its_name_is_joined_by_the_name(tmp_path: Path, said: dict[str, Any]) -> None:
    submission = read_submission(
        write_folder(tmp_path / "r", {"train_seed0.log": made_log(seed=1337)}, submission=said)
    )
    assert finals(submission) == {0: 1.115}
    assert fields(submission) == ["seed in the file name vs in the log"]


def test_logs_that_all_print_one_seed_are_told_apart_by_their_names(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        f"train_seed{seed}.log": made_log(seed=1337, sliding=bpb) for seed, bpb in ((42, 1.115), (7, 1.116))
    }
    said = {"seed_results": {"42": {"val_bpb": 1.115}, "7": {"val_bpb": 1.116}}}
    assert finals(read_submission(write_folder(tmp_path / "r", logs, submission=said))) == {42: 1.115, 7: 1.116}


# --- evaluations kept apart ---


def test_the_reported_score_of_an_evaluation_replaces_that_of_the_training(tmp_path: Path) -> None:
    evaluation = "  seed: 42\n" + score_line("quantized_ttt", 1.109, time_ms=400_000) + "\n"
    logs: dict[str, str | bytes] = {"train_seed42.log": made_log(ttt=1.111), "eval_only/seed_42.log": evaluation}
    said = {"val_bpb": 1.109, "seed_results": {"42": {"steps": 4000, "artifact_bytes": 15_920_000, "val_bpb": 1.109}}}
    submission = read_submission(write_folder(tmp_path / "new", logs, submission=said))
    (run,) = submission.record["runs"]
    assert (run["steps"], run["total_bytes"], run["post_quant"]["val_bpb"], run["final_bpb"]) == (
        4000,
        15_920_000,
        1.13,
        1.109,
    )
    assert run["eval_times"]["post_ttt"] == 400_000
    assert set(run["files"]) == {"train_seed42.log", "eval_only/seed_42.log"}
    assert submission.logs["train_seed42.log"].provenance["post_ttt"] == "eval_only/seed_42.log: quantized_ttt"
    assert submission.logs["train_seed42.log"].provenance["post_quant"] == "train_seed42.log: quantized"
    assert fields(submission) == []
    old = read_submission(write_folder(tmp_path / "old", logs, submission={"val_bpb": 1.111}))
    assert finals(old) == {42: 1.111}


def test_an_evaluation_without_a_seed_is_joined_to_the_only_training(tmp_path: Path) -> None:
    train, evaluation = split_evaluation(Made(ttt=1.11))
    text = "\n".join(line for line in evaluation.splitlines() if "seed" not in line)
    submission = read_submission(write_folder(tmp_path / "r", {"train_seed42.log": train, "ttt_eval.log": text}))
    assert [(run["steps"], run["final_bpb"]) for run in submission.record["runs"]] == [(4000, 1.11)]


def test_evaluations_without_a_training_are_joined_to_each_other(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        "eval_sliding_seed42.log": "seed: 42\n" + score_line("sliding_window", 1.115),
        "eval_ttt_seed42.log": "seed: 42\n" + score_line("quantized_ttt", 1.109),
    }
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.109}))
    (run,) = submission.record["runs"]
    assert (run["sliding"]["val_bpb"], run["final_bpb"], len(run["files"])) == (1.115, 1.109, 2)
    assert fields(submission) == []


def test_the_same_log_twice_is_one(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"train_seed42.log": made_log(), "train.log": made_log()}
    submission = read_submission(write_folder(tmp_path / "r", logs))
    assert len(submission.record["runs"]) == 1
    assert set(submission.record["runs"][0]["files"]) == set(logs)


# --- what is compared ---


def test_an_imported_directory_is_compared_as_the_folder_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def log(seed: int, bpb: float, loss: float) -> str:
        return made_log(
            seed=seed, swap={"ttt": f"quantized_ttt val_loss:{loss:.8f} val_bpb:{bpb:.8f} eval_time:250000ms"}
        )

    logs: dict[str, str | bytes] = {
        "train_seed42.log": log(42, 1.07553746, 2.77822412),
        "train_seed7.log": log(7, 1.07805510, 2.78472745),
    }
    folder, out = write_folder(tmp_path / "folder", logs), tmp_path / "out"
    assert main(["import-logs", str(folder), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["compare", str(folder), "pr:1514"]) == 0
    raw = capsys.readouterr().out
    assert main(["compare", str(out), "pr:1514"]) == 0
    assert capsys.readouterr().out == raw
    for name in ("pre_ttt", "sliding"):
        assert open_side(str(out), name) == open_side(str(folder), name)
    (out / "record.json").unlink()  # the tables alone know the text, too
    assert main(["compare", str(out), "pr:1514"]) == 0


# --- layouts ---


def test_several_submissions_in_a_folder_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rec_a", "rec_b"):
        write_folder(tmp_path / "parent" / name, submission={"val_bpb": 1.115})
    assert main(["import-logs", str(tmp_path / "parent"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "rec_a, rec_b" in error
    assert error.count("\n") == 1


def test_folders_with_a_readme_each_are_submissions_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rec_a", "rec_b"):
        write_folder(tmp_path / "parent" / name, readme="# A record\n")
    assert main(["import-logs", str(tmp_path / "parent"), "--out", str(tmp_path / "out")]) == 2
    assert "rec_a, rec_b" in capsys.readouterr().err
    (tmp_path / "parent" / "README.md").write_text("# One record of two seeds\n")
    assert main(["import-logs", str(tmp_path / "parent"), "--out", str(tmp_path / "out")]) == 0


def test_a_submission_inside_another_is_left_out_and_said(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r", submission={"val_bpb": 1.115})
    write_folder(folder / "old", {"train_seed7.log": made_log(seed=7)}, submission={"val_bpb": 1.2})
    submission = read_submission(folder)
    assert finals(submission) == {42: 1.115}
    assert any(note.startswith("old: has a submission.json of its own") for note in submission.notes)


def test_a_folder_around_one_submission_is_that_submission(tmp_path: Path) -> None:
    write_folder(tmp_path / "parent" / "rec", submission={"val_bpb": 1.115})
    submission = read_submission(tmp_path / "parent")
    assert submission.record["folder"] == "rec"
    assert finals(submission) == {42: 1.115}


@pytest.mark.parametrize(
    ("line", "bpb"),
    [
        ("val_bpb: 1.312500", 1.3125),
        ("Step 9000/9000 | val_loss:2.1012 | val_bpb:1.2441 | train_time:598000ms", 1.2441),
        ("Quantized BPB: 1.045200", 1.0452), ("ttt vl:0.8112 bpb:0.4801 t:412000ms", 0.4801),
        ('{"event": "final", "val_loss": 2.1, "val_bpb": 1.25}', 1.25), ('{\n "seed": 42,\n "val_bpb": 1.25\n}', 1.25),
    ],
)  # fmt: skip
def test_a_log_of_another_kind_gives_its_reported_score(tmp_path: Path, line: str, bpb: float) -> None:
    folder = write_folder(tmp_path / "r", {"train_seed42.log": f"starting\n{line}\n"}, submission={"val_bpb": bpb})
    assert finals(read_submission(folder)) == {42: bpb}
    out = tmp_path / "out"
    assert main(["import-logs", str(folder), "--out", str(out)]) == 0
    assert main(["compare", str(out), str(folder), "--force"]) == 0


ASIDE = ["ablations/no_ttt_seed{}.log", "smoke_test_seed{}.log", "old/train_seed{}.log", "failed_seed{}.log"]


@pytest.mark.parametrize("name", ASIDE)
@pytest.mark.parametrize("seed", [42, 3])
def test_logs_that_their_names_set_apart_are_left_out_and_said(tmp_path: Path, name: str, seed: int) -> None:
    logs: dict[str, str | bytes] = {"train_seed42.log": made_log(), name.format(seed): made_log(seed=seed, sliding=1.3)}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.115}))
    assert (finals(submission), fields(submission)) == ({42: 1.115}, [])
    assert f"{name.format(seed)}: by its name not a run of this submission; left out" in submission.notes


@pytest.mark.parametrize("name", ASIDE)
def test_a_log_set_apart_counts_where_it_is_reported_or_alone(tmp_path: Path, name: str) -> None:
    alone: dict[str, str | bytes] = {name.format(42): made_log()}
    assert finals(read_submission(write_folder(tmp_path / "alone", alone))) == {42: 1.115}
    both = {"train_seed42.log": made_log(sliding=1.2), **alone}
    said = {"seed_results": {"42": {"val_bpb": 1.115}}}
    assert finals(read_submission(write_folder(tmp_path / "both", both, submission=said))) == {42: 1.115}


def test_seeds_that_the_submission_does_not_list_are_named_and_not_in_its_mean(tmp_path: Path) -> None:
    scores = {42: 1.115, 7: 1.116, 3: 1.13}
    logs: dict[str, str | bytes] = {f"seed{seed}.log": made_log(seed=seed, sliding=bpb) for seed, bpb in scores.items()}
    said: dict[str, Any] = {"val_bpb": 1.1155, "seeds": [42, 7]}
    submission = read_submission(write_folder(tmp_path / "listed", logs, submission=said))
    assert finals(submission) == {42: 1.115, 7: 1.116}
    assert "seed 3: has a log but is not among the seeds of submission.json: not in the mean" in submission.notes
    other = read_submission(write_folder(tmp_path / "other", logs, submission={**said, "val_bpb": 1.1203}))
    assert finals(other) == scores  # the headline is the mean over all of them


def test_a_crashed_log_beside_a_finished_one_is_only_a_note(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"a_seed42.log": made_log(quantized=None, sliding=None), "b_seed42.log": made_log()}
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.115}))
    assert (finals(submission), fields(submission)) == ({42: 1.115}, [])
    assert any(note.startswith("a_seed42.log: does not show stage sliding") for note in submission.notes)


@pytest.mark.parametrize(
    "content",
    [
        {"seed": 42, "val_bpb": 1.115},
        {"seed": 42, "steps": 4000, "sliding": {"val_loss": 2.88, "val_bpb": 1.115}},
        [{"seed": 42, "stage": "sliding", "val_loss": 2.88, "val_bpb": 1.115}],
    ],
)
def test_scores_in_a_json_file_count_where_no_log_has_any(tmp_path: Path, content: object) -> None:
    logs: dict[str, str | bytes] = {"train.log": "hello\n", "results.json": json.dumps(content)}
    assert finals(read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.115}))) == {42: 1.115}


def test_configurations_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {
        f"run_seq{length}.log": made_log(settings=(("train_seq_len", str(length)),), sliding=bpb)
        for length, bpb in ((8192, 1.115), (16384, 1.112), (32768, 1.111))
    }
    submission = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.112}))
    assert finals(submission) == {42: 1.112}
    assert any("of different settings (train_seq_len)" in note for note in submission.notes)


# --- files that cannot be read ---


BAD_FILES: dict[str, bytes] = {
    "smoke_test.log": b"\xff\xfe" + "nothing here\n".encode("utf-16-le"), "core.log": bytes(range(256)) * 20,
    "empty.log": b"", "zeros.log": b"\0" * 5000, "half.log": b"\xff\xfeA", "latin.txt": "Größe\n".encode("latin-1"),
    "marks.log": b"\xef\xbb\xbf", "numbers.log": b"step:" + b"9" * 6000 + b"/1 val_loss:1 val_bpb:1\nseed:" + b"9" * 40,
    "signs.log": "seed: ²\nval_tokens: ٣\nquantized val_loss:1.1.1 val_bpb:.\n".encode(),
    "dots.log": b"#   final_roundtrip_exact val_loss:... val_bpb:...\nquantized val_loss:... val_bpb:...\n",
    "deep.jsonl": b"{\"a\":" * 20_000, "json.log": b'{"val_bpb": {"a": []}, "stage": 3}\n{"val_bpb": 1e999}\n{}',
    "infinite.log": b"quantized val_loss:inf val_bpb:-inf\nquantized val_loss:1e400 val_bpb:1e400\n",
    "README.md": b"\xff\xfe\x00|a|\n| Seed | |\n|---|\n| 42 |\n| x | y | z |\n",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_beside_good_ones_is_left_out(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "r", submission={"val_bpb": 1.115})
    (folder / name).write_bytes(BAD_FILES[name])
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "sliding bpb: mean 1.11500" in capsys.readouterr().out


def test_a_binary_log_is_named_in_a_note(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r")
    (folder / "core.log").write_bytes(BAD_FILES["core.log"])
    assert "core.log: left out (not a text file (it holds zero bytes))" in read_submission(folder).notes


@pytest.mark.parametrize("content", [
    "{", "[]", "null", "3", "", '{"val_bpb": NaN}', '{"val_bpb_std": ""}', '{"val_bpb": ""}', '{"seeds": {"²": {}}}',
    '{"val_bpb": {"seed_42": 1.115, "mean": 1.115}}', '{"val_bpb": {}}', '{"val_bpb": []}', '{"val_bpb": [1.115]}',
    '{"val_bpb": null, "seeds": null, "seed": null}', '{"seed_results": {"42": {"val_bpb": ""}}}',
    '{"seed_results": {"42": {"val_bpb": [], "steps": {}, "artifact_bytes": "?"}}}', '{"seed": 99999999999999999999}',
    '{"seed_results": []}', '{"seed_results": {"42": null}}', '{"val_bpb_std": "n/a", "val_bpb": "about 1.1"}',
    '{"val_bpb_std": {}, "std_bpb": []}', '{"val_bpb": true}', '{"bytes_total": "15.9 MB", "val_loss": {"mean": ""}}',
    '{"seeds": [[42], {"a": 1}, null]}', '{"metrics": {"val_bpb": 1.115}}', '{"val_bpb": 1e999}', "\ufeff{}",
])  # fmt: skip
def test_no_submission_json_ends_in_a_traceback(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "r", {f"train_seed{seed}.log": made_log(seed=seed) for seed in (42, 7)})
    (folder / "submission.json").write_text(content)
    for form in ("text", "json"):
        assert main(["import-logs", str(folder), "--out", str(tmp_path / "out"), "--format", form]) == 0
    assert capsys.readouterr().err.count("\n") <= 5


def test_the_mean_in_an_object_of_scores_is_the_headline(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"train_seed42.log": made_log(), "train_seed7.log": made_log(seed=7, sliding=1.116)}
    said = {"val_bpb": {"seed_42": 1.115, "seed_7": 1.116, "mean": 1.1155}}
    assert fields(read_submission(write_folder(tmp_path / "r", logs, submission=said))) == []


def test_a_refusal_quotes_the_last_line_that_speaks_of_bpb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "r", {"train_seed1.log": "epoch 1\nwe reach about 1.2 bpb here\nbye\n"})
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "we reach about 1.2 bpb here" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", range(40))
def test_damaged_folders_never_end_in_a_traceback(
    tmp_path: Path, value: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(value)
    said = {
        "val_bpb": 1.11,
        "val_bpb_std": 0.001,
        "seed_results": {"42": {"val_bpb": 1.11, "steps": 4000}},
        "seeds": [42, 7],
    }
    readme = readme_table([{"Seed": 42, "Steps": 4000, "BPB": 1.11}, {"Seed": "Mean", "Steps": 4000, "BPB": 1.11}])
    logs: dict[str, str | bytes] = {f"train_seed{seed}.log": made_log(seed=seed, ttt=1.11) for seed in (42, 7)}
    folder = write_folder(tmp_path / "r", logs, submission=said, readme=readme)
    for path in sorted(folder.iterdir()):
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 30)):
            place = rng.randrange(len(content))
            content[place : place + rng.randrange(3)] = rng.choice(
                [b"", b"0", b"...", b"\xff", b"\0", b"\n", b"e9", b'"', b"|"]
            )
        path.write_bytes(bytes(content))
    code = main(
        ["import-logs", str(folder), "--out", str(tmp_path / "out"), "--format", rng.choice(["text", "json", "csv"])]
    )
    assert code in (0, 1, 2)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r")
    (folder / "secret.log").write_text("x")
    (folder / "secret.log").chmod(0)
    assert any("secret.log: left out (cannot be read" in note for note in read_submission(folder).notes)


def test_strange_things_in_a_folder_do_no_harm(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r")
    (folder / "folder.log").mkdir()
    (folder / "gone.log").symlink_to(tmp_path / "nowhere")
    (folder / "loop").symlink_to(folder)
    assert finals(read_submission(folder)) == {42: 1.115}


# --- notes ---


def test_a_stage_that_no_log_has_is_not_missed(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"train_seed42.log": with_prefix(made_log(post_ema=None, sliding=None), "rank")}
    notes = read_submission(write_folder(tmp_path / "r", logs, submission={"val_bpb": 1.13})).notes
    assert not [note for note in notes if "not found" in note]


def test_steps_and_sizes_are_missed(tmp_path: Path) -> None:
    logs: dict[str, str | bytes] = {"train_seed42.log": made_log(swap={"stop": [], "sizes": []})}
    notes = read_submission(write_folder(tmp_path / "r", logs, submission={})).notes
    assert [note.split(" (")[0] for note in notes] == [
        f"train_seed42.log: {name} not found" for name in ("steps", "model_bytes", "total_bytes")
    ]


def test_the_record_of_an_import_is_json_without_nan(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "r", {"train_seed42.log": made_log(more="9/20000 train_loss: nan")})
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "record.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in record.json"))
