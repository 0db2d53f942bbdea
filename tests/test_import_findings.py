"""results.findings.review on made-up folders: what contradicts the logs is said once, and what does not is not said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from results.findings.findings import Finding
from results.findings.importer import read_submission
from results.findings.review import review
from tests.made_folders import Made, made_log, readme_table, write_folder

TWO = (Made(seed=42, sliding=1.115), Made(seed=7, sliding=1.117))
THREE = (*TWO, Made(seed=1337, sliding=1.119))
STEP = "step:{step}/20000 train_loss:{loss} train_time:{ms}ms step_avg:{average}ms"


def table_of(*rows: str) -> str:
    """Return a Markdown table of these rows, the first one its headings."""
    return (
        "\n".join([f"| {rows[0]} |", "|" + "---|" * (rows[0].count("|") + 1), *(f"| {row} |" for row in rows[1:])])
        + "\n"
    )


SCORES = table_of("Seed | Steps | Sliding BPB", "42 | 4000 | 1.1150", "7 | 4000 | 1.1170")


def folder_of(
    path: Path,
    runs: tuple[Made, ...] = (Made(),),
    submission: dict[str, Any] | None = None,
    table: list[dict[str, object]] | str | None = None,
    **logs: Any,
) -> Path:
    """Write a folder with one log a run; `table` is its README, as rows or as text."""
    readme = readme_table(table) if isinstance(table, list) else table
    texts: dict[str, str | bytes] = {f"train_seed{made.seed}.log": made_log(made, **logs) for made in runs}
    return write_folder(path / "record", texts, submission=submission, readme=readme)


def found(folder: Path) -> list[Finding]:
    """Return the findings of a folder."""
    return review(read_submission(folder).record).findings


def checks(folder: Path) -> list[tuple[int | None, str]]:
    """Return seed and check of every finding."""
    return [(finding.seed, finding.check) for finding in found(folder)]


# --- what agrees -----------------------------------------------------------------------------------------------------

AGREE: dict[str, tuple[tuple[Made, ...], dict[str, Any], list[dict[str, object]] | str]] = {
    "live score under names of the weights before quantization": (
        (Made(),), {},
        [{"Seed": 42, "Pre-quant BPB": "1.12", "val_bpb": "1.1200", "RT BPB": "1.1200", "Pre-TTT BPB": "1.1200"}],
    ),
    "gain of rounded columns": (
        (Made(quantized=1.13467, sliding=None, ttt=1.13223),), {"val_bpb": 1.13223},
        [{"Seed": 42, "Pre-TTT BPB": 1.1347, "Post-TTT BPB": 1.1322, "TTT gain": "-0.0025"}],
    ),
    "quantized without TTT": (
        (Made(ttt=1.111),), {"val_bpb": 1.111}, [{"Seed": 42, "Quant no-TTT BPB": "1.13000000", "Post-TTT BPB": 1.111}],
    ),
    "columns of other things": (
        (Made(ttt=1.111),), {"val_bpb": 1.111},
        [{"Seed": 42, "Cache gain": "-0.0400", "Total eval time": "250.0s", "Baseline BPB": "1.2244"}],
    ),
    "approximate cells": ((Made(steps=7204),), {}, [{"Seed": 42, "Steps": "~7200", "Artifact": "~15.9 MB"}]),
    "limits, ranges and changes in a cell": (
        (Made(ttt=1.111),), {"val_bpb": 1.111},
        [{"Seed": 42, "Artifact": "< 16,000,000", "Eval time": "<600s", "TTT BPB": "1.1150 → 1.111", "Steps": "4k+"}],
    ),
    "a score that the log does not have": ((Made(),), {}, [{"Seed": 42, "N-gram BPB": "0.9680"}]),
    "steps in thousands": ((Made(steps=7204),), {}, [{"Seed": 42, "Steps": "7.2k"}]),
    "MiB": ((Made(),), {}, [{"Seed": 42, "Artifact": "15.18 MiB"}]),
    "MB cut instead of rounded": ((Made(model_bytes=15_975_000),), {}, [{"Seed": 42, "Artifact": "15.99 MB"}]),
    "no number of that kind in a cell": (
        TWO, {}, table_of("Seed | Sliding BPB | Artifact", "42 | 1.1150 | 15,920,000", "7 | 1.1170 | 15,920,000",
                          "Mean | 1.1160 | std: 0.0014"),
    ),
    "one column a seed": (
        TWO, {}, "| Metric | Seed 42 | Seed 7 | Mean |\n|---|---|---|---|\n| Steps | 4000 | 4000 | 4000 |\n"
        "| Sliding BPB | 1.1150 | 1.1170 | 1.1160 |\n",
    ),
    "headings that are bare seeds": (
        TWO, {}, "| Metric | 42 | 7 |\n|---|---|---|\n| Steps | 4000 | 4000 |\n| Sliding BPB | 1.1150 | 1.1170 |\n",
    ),
    "empty std": (TWO, {"val_bpb": 1.116, "val_bpb_std": ""}, ""),
    "headline with a mean beside its seeds": (
        TWO, {"val_bpb": {"seed_42": 1.115, "seed_7": 1.117, "mean": 1.116}}, "",
    ),
    "mean of rounded scores": (
        (Made(seed=1, sliding=1.11504), Made(seed=2, sliding=1.11604)), {"val_bpb": 1.1155, "seeds": [1, 2]}, "",
    ),
    "sample std in every place": (
        THREE, {"val_bpb": 1.117, "val_bpb_std": 0.002},
        "val_bpb 1.1170 ± 0.0020\n\n"
        + table_of("Seed | Sliding BPB", "42 | 1.1150", "7 | 1.1170", "1337 | 1.1190", "Std | 0.0020"),
    ),
    "a table about other runs beside one about these": (
        TWO, {}, SCORES + "\nEarlier:\n\n"
        + table_of("Seed | Steps | Sliding BPB", "42 | 3800 | 1.2150", "7 | 3801 | 1.2170"),
    ),
    "times, cut and rounded, and budgets": (
        (Made(ttt=1.111, train_ms=599_613),), {"val_bpb": 1.111, "train_time_seconds": 600, "eval_time_ms": 250_000},
        [{"Seed": 42, "Train time": "599s", "TTT time": "4m 10s", "Eval time": "250.0 s"}],
    ),
    "its own kinds of bytes": (
        (Made(),),
        {"bytes_total": 15_920_000, "bytes_model": 15_900_000, "bytes_code": 20_000, "pre_quant_val_bpb": 1.119}, "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", AGREE)
def test_what_agrees_is_not_listed(tmp_path: Path, name: str) -> None:
    runs, submission, table = AGREE[name]
    folder = folder_of(tmp_path, runs, submission or None, table or None)
    assert [str(finding) for finding in found(folder)] == []


def test_what_no_log_shows_is_a_note_and_no_disagreement(tmp_path: Path) -> None:
    table: list[dict[str, object]] = [{"Seed": 42, "Sliding BPB": "1.1150", "Artifact": "15,920,000"}]
    folder = folder_of(tmp_path, (Made(model_bytes=None),), {"artifact_bytes": 15_920_000}, table)
    submission = read_submission(folder)
    assert review(submission.record).findings == []
    assert any("artifact bytes of seed 42 cannot be checked" in note for note in submission.notes)


def test_a_logged_step_average_agrees(tmp_path: Path) -> None:
    more = STEP.format(step=6400, loss=2.0, ms=596_000, average=93.12)
    made = Made(steps=6430, train_ms=600_500)
    table: list[dict[str, object]] = [{"Seed": 42, "ms/step": "93.1"}]
    assert checks(folder_of(tmp_path, (made,), None, table, swap={"curve": more})) == [(42, "train_seconds")]


# --- what does not ---------------------------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "seed_results of numbers": {"seed_results": {"42": 1.1100, "7": 1.1220}},
    "val_bpb_seeds by seed": {"val_bpb_seeds": {"42": 1.1100, "7": 1.1220}},
    "val_bpb_seeds in order": {"seeds": [42, 7], "val_bpb_seeds": [1.1100, 1.1220]},
    "a key a seed": {"seed_42": {"val_bpb": 1.1100}, "seed_7": {"val_bpb": 1.1220}},
    "a list of objects": {"results": [{"seed": 42, "val_bpb": 1.1100}, {"seed": 7, "val_bpb": 1.1220}]},
    "numbers as text": {"seed_results": {"42": {"val_bpb": "1.1100"}, "7": {"val_bpb": "1.1220"}}},
    "per_seed with longer keys": {"per_seed": {"seed_42": {"val_bpb": 1.1100}, "seed_7": {"val_bpb": 1.1220}}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_by_seed_are_compared_in_every_shape(tmp_path: Path, shape: str) -> None:
    folder = folder_of(tmp_path, TWO, SHAPES[shape])
    listed = {finding.seed: finding.value for finding in found(folder) if finding.check == "printed_figure"}
    assert {seed: float(value) for seed, value in listed.items()} == {42: 1.11, 7: 1.122}


def test_scores_in_a_list_without_seeds_are_compared(tmp_path: Path) -> None:
    (finding,) = found(folder_of(tmp_path, TWO, {"val_bpb_seeds": [1.115, 1.122]}))
    assert float(finding.value) == 1.122


def test_one_fact_in_three_places_is_one_finding(tmp_path: Path) -> None:
    readme = table_of("Seed | Steps", "42 | 4100") + "\n" + table_of("Seed | Steps | Sliding BPB", "42 | 4100 | 1.1150")
    text = made_log(Made(train_ms=600_050))
    folder = write_folder(
        tmp_path / "record", {"train.log": text, "train_seed42.log": text},
        submission={"val_bpb": 1.115, "steps": 4100}, readme=readme,
    )  # fmt: skip
    limit, steps = found(folder)
    assert (limit.check, limit.value, limit.limit) == ("train_seconds", 600.05, 600.0)
    assert [place for place, value in steps.values.items() if "4100" in str(value)] == [
        "submission.json steps", 'README table 1 "Steps"', 'README table 2 "Steps"',
    ]  # fmt: skip
    assert steps.limit == 4000


def test_a_table_of_metrics_and_values_is_compared(tmp_path: Path) -> None:
    rows = (
        "Metric | Value",
        "Sliding val_bpb | 1.1150",
        "Steps | 4,100",
        "Artifact size | 15,920,000 bytes",
        "GPUs | 8",
    )
    (finding,) = found(folder_of(tmp_path, (Made(),), {"val_bpb": 1.115}, table_of(*rows)))
    assert (finding.seed, finding.value, finding.limit) == (42, "4,100", 4000)
    other = table_of("Metric | Value", "val_bpb | 1.2244", "Steps | 13,780")
    assert found(folder_of(tmp_path / "baseline", (Made(),), {"val_bpb": 1.115}, other)) == []


def test_a_wrong_transposed_cell_is_found(tmp_path: Path) -> None:
    table = "| Metric | Seed 42 | Seed 7 |\n|---|---|---|\n| Steps | 4000 | 4003 |\n"
    (finding,) = found(folder_of(tmp_path, TWO, None, table))
    assert (finding.seed, finding.value, finding.limit) == (7, "4003", 4000)


def test_an_approximation_that_is_too_far_is_found(tmp_path: Path) -> None:
    (finding,) = found(folder_of(tmp_path, (Made(steps=8552),), None, [{"Seed": 42, "Steps": "~8,300"}]))
    assert (finding.value, finding.limit) == ("~8,300", 8552)


def test_a_gain_that_follows_from_a_wrong_score_is_not_said_again(tmp_path: Path) -> None:
    table: list[dict[str, object]] = [
        {"Seed": 42, "Pre-TTT BPB": "1.1400", "Post-TTT BPB": "1.1110", "TTT gain": "-0.0290"}
    ]
    (finding,) = found(folder_of(tmp_path, (Made(ttt=1.111, sliding=None),), {"val_bpb": 1.111}, table))
    assert finding.value == "1.1400"


def test_evaluation_over_its_limit_and_other_times_are_found(tmp_path: Path) -> None:
    swap = {"ttt": "quantized_ttt val_loss:2.87000000 val_bpb:1.11109000 eval_time:648700ms"}
    folder = folder_of(
        tmp_path, (Made(ttt=1.11109),), {"val_bpb": 1.11109, "eval_time_ms": 512_000},
        [{"Seed": 42, "TTT time": "512.0s"}], swap=swap,
    )  # fmt: skip
    by_check = {finding.check: finding for finding in found(folder)}
    assert (by_check["evaluation_seconds"].value, by_check["evaluation_seconds"].limit) == (648.7, 600.0)
    said = [finding for finding in found(folder) if finding.check == "printed_figure"]
    assert {place for finding in said for place in finding.values} >= {
        "submission.json eval_time_ms",
        'README table 1 "TTT time"',
    }
    assert len(said) == 1


def test_evaluation_passes_that_are_over_the_limit_together_are_found(tmp_path: Path) -> None:
    swap = {
        "sliding": "quantized_sliding_window val_loss:2.88015000 val_bpb:1.11500000 eval_time:150000ms",
        "ttt": "quantized_ttt val_loss:2.86981751 val_bpb:1.11100000 eval_time:480000ms",
    }
    (finding,) = found(folder_of(tmp_path, (Made(ttt=1.111),), {"val_bpb": 1.111}, swap=swap))
    assert (finding.check, finding.value) == ("evaluation_seconds_together", 650.0)


STDS: dict[str, tuple[dict[str, Any], str]] = {
    "submission.json under another name": ({"std_val_bpb": 0.00163}, ""),
    "a README row": ({}, table_of("Seed | Sliding BPB", "42 | 1.1150", "7 | 1.1170", "1337 | 1.1190", "Std | 0.00163")),
    "text": ({}, "The mean is 1.1170 +- 0.0016 bpb.\n"),
    "a mean cell": (
        {}, table_of("Seed | Sliding BPB", "42 | 1.1150", "7 | 1.1170", "1337 | 1.1190", "Mean | 1.1170 ± 0.0016"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", STDS)
def test_a_population_std_is_found_wherever_it_stands(tmp_path: Path, place: str) -> None:
    submission, readme = STDS[place]
    (finding,) = found(folder_of(tmp_path, THREE, {"val_bpb": 1.117, **submission}, readme or None))
    assert (finding.check, finding.values["convention"]) == ("std_convention", "ddof=0")


def test_a_population_std_in_several_places_is_one_finding(tmp_path: Path) -> None:
    readme = STDS["a README row"][1] + "\n1.1170 ± 0.0016\n"
    (finding,) = found(folder_of(tmp_path, THREE, {"val_bpb": 1.117, "std_val_bpb": 0.00163}, readme))
    assert len([value for value in finding.values.values() if str(value).startswith("0.0016")]) == 4  # 3 places, ddof=0


def test_a_std_with_an_exponent_is_read(tmp_path: Path) -> None:
    (finding,) = found(folder_of(tmp_path, THREE, {"val_bpb": 1.117, "val_bpb_std": 6.4e-05}))
    assert finding.values["convention"] == "neither"
    assert finding.limit == pytest.approx(0.002)


def test_details_of_submission_json_are_compared(tmp_path: Path) -> None:
    submission = {"val_bpb": 1.115, "bytes_code": 19_000, "bytes_model": 15_901_000, "pre_quant_val_bpb": 1.115}
    listed = {
        finding.field.partition(":")[0]: finding.limit for finding in found(folder_of(tmp_path, (Made(),), submission))
    }
    assert listed == {"code bytes": 20_000, "model bytes": 15_900_000, "post_ema bpb": 1.119}


def test_a_headline_that_is_one_seeds_score_says_so(tmp_path: Path) -> None:
    (finding,) = found(folder_of(tmp_path, TWO, {"val_bpb": 1.115}))
    assert finding.field == "headline is seed 42's score, not the mean over 2 seeds"
    assert (finding.value, finding.limit) == (1.115, pytest.approx(1.116))


def test_a_headline_that_no_log_shows_is_found_once(tmp_path: Path) -> None:
    readme = table_of("Seed | Sliding BPB", "42 | 1.1150", "7 | 1.1170", "1337 | 1.1190", "Mean | 1.1234")
    (finding,) = found(folder_of(tmp_path, THREE, {"val_bpb": 1.1234}, readme))
    assert finding.values['README table 1 "Sliding BPB"'] == "1.1234"
    assert (finding.check, finding.value, finding.limit) == ("headline", 1.1234, pytest.approx(1.117))


def test_a_seed_named_by_its_file_is_found_there(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "record", {"train_seed0.log": made_log(Made(seed=1337)), "train_seed7.log": made_log(TWO[1])},
        submission={"seed_results": {"0": {"val_bpb": 1.115, "steps": 4000}, "7": {"val_bpb": 1.117}}},
        readme=readme_table([{"Seed": 0, "Steps": 4000}, {"Seed": 7, "Steps": 4000}]),
    )  # fmt: skip
    (finding,) = found(folder)
    assert (finding.check, finding.value, finding.limit) == ("seed_name", 0, 1337)


def test_a_listed_seed_whose_log_has_no_score_is_said_once(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO, {"seed_results": {"42": {"val_bpb": 1.115}, "7": {"val_bpb": 1.117}}},
                       [{"Seed": 42, "Sliding BPB": 1.115}, {"Seed": 7, "Sliding BPB": 1.117}])  # fmt: skip
    unscored = made_log(TWO[1], live=None, post_ema=None, quantized=None, sliding=None)
    (folder / "train_seed7.log").write_text(unscored)
    (finding,) = found(folder)
    assert (finding.seed, finding.field) == (7, "log has no final score of the scored stage")


def test_text_and_json_show_the_same_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (("vocab_size", "8192"), ("matrix_lr", "0.03"))
    other = Made(seed=7, sliding=1.117, settings=settings)
    folder = folder_of(tmp_path, (TWO[0], other), {"val_bpb": 1.115})
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out"), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out.partition("\nwritten to")[0])
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert len(content["disagreements"]) == 2
    assert f"disagreements: {len(content['disagreements'])}" in shown
    for entry in content["disagreements"]:
        assert f"  {entry['text']}\n" in shown
        assert entry["check"] in entry["text"]
    stored = json.loads((tmp_path / "out" / "record.json").read_text())["disagreements"]
    assert [entry["field"] for entry in stored] == [entry["field"] for entry in content["disagreements"]]


STRANGE: list[Any] = [
    None, True, "", "n/a", [], {}, [[]], [None], {"mean": None}, {"42": None}, {"42": [1.1]}, {"seed": 42}, [1.1, None],
    [{"seed": None}], [{"seed": 42, "val_bpb": {}}], -1, 0, 1e308, "1e999", "∞", "1.1.1", "--", {"42": {"val_bpb": []}},
    10**400, "9" * 400, {"": 1}, {"seed_42": {"val_bpb": "about 1.1"}},
]  # fmt: skip
KEYS = ("val_bpb", "val_loss", "val_bpb_std", "seeds", "seed_results", "val_bpb_seeds", "steps", "bytes_total",
        "eval_time_ms", "results", "seed_42", "bytes_code", "metrics")  # fmt: skip


def test_strange_values_in_submission_json_and_cells_are_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, TWO, {"val_bpb": 1.116})
    record = read_submission(folder).record
    for value in STRANGE:
        submission = {**dict.fromkeys(KEYS, value), "mean_val_bpb": 1.116}
        assert isinstance(review({**record, "submission_json": submission}).findings, list)
    columns = ["Seed", "Steps", "Artifact", "TTT BPB", "TTT gain", "Eval time", "ms/step", "val_loss"]
    for cell in (
        "",
        "-",
        "±",
        "| x",
        "1e999",
        "9" * 400,
        "~",
        "0",
        "-0",
        "1:2:3",
        "nan",
        "∞ MB",
        "1.1 ±",
        "((",
        "42 42",
    ):
        rows = [dict.fromkeys(columns, cell) | {"Seed": first} for first in ("42", "Mean", "Std", "", cell)]
        tables = [{"columns": columns, "rows": rows}]
        assert isinstance(review({**record, "readme_seed_tables": tables}).findings, list)
