"""results.published.layout: what lies in a folder, what is left out of it, and files that are no text."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from results.findings.importer import read_submission
from tests.made_folders import (
    fields,
    finals,
    made_log,
    readme_table,
    with_prefix,
    write_folder,
)

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
