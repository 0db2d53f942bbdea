"""results.findings.importer: the stage, the log and the seed that count, and evaluations kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import results
from jobs.cli import main
from results.compare.sides import open_side
from results.findings.importer import read_submission
from results.published.records import one_run_a_seed
from tests.made_folders import (
    Made,
    fields,
    finals,
    made_log,
    readme_table,
    score_line,
    split_evaluation,
    stage,
    write_folder,
)

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
