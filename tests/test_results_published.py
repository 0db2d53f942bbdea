"""results.published.records and disagreements: every record recomputes itself, and contradictions are found again."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from results.findings.findings import Finding
from results.findings.meanings import column_meaning
from results.findings.review import find_disagreements, review
from results.published import records as published
from results.published.printed import agrees, printed_number
from results.published.records import find_record, load_published, one_run_a_seed, recompute, validation_bytes

RECORDS = load_published()["records"]

# mean, sample std of the final score, copied from computed_from_logs of the shared comparison set
COMPUTED = {
    42: (1.2198948, 0.00024011), 60: (1.17475315, 0.0007271), 52: (1.20136009, 0.00187313),
    180: (1.1427666, 0.00019604), 162: (1.14581692, 0.00083251), 414: (1.12331641, 0.00046473),
    640: (1.15703333, 0.00068069), 1060: (1.11222462, 0.00044773), 1204: (1.10625353, 0.00167769),
    1218: (1.0978503, 0.00037228), 1334: (1.08971631, 0.00028794), 1394: (1.0856248, 0.00072006),
    1412: (1.08354259, 0.00049514), 1514: (1.07983273, 0.00049601), 1493: (1.08100288, 0.0001968),
    1530: (1.07336388, 0.00084633), 1610: (1.07280628, 0.00056869), 1626: (1.07192712, 0.00077135),
    1736: (1.06548618, 0.00069613), 1868: (1.06145092, 0.00068303), 1536: (1.07746772, 0.00077799),
    1560: (1.07405954, 0.00131881), 1540: (1.07769581, 0.0002506),
}  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record["pr"]))
def test_every_record_recomputes_its_own_mean_and_std(record: dict[str, Any]) -> None:
    mine = recompute(record)
    assert mine is not None
    scores = [run["final_bpb"] for run in one_run_a_seed(record)]
    assert mine.bpb.mean == pytest.approx(statistics.mean(scores), abs=1e-12)
    if record["pr"] in COMPUTED:
        mean, std = COMPUTED[record["pr"]]
        assert mine.bpb.mean == pytest.approx(mean, abs=6e-9)
        assert mine.bpb.std_ddof1 == pytest.approx(std, abs=6e-9)
    else:
        assert mine.bpb.n == 1
        assert mine.bpb.std_ddof1 is None


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: str(record["pr"]))
def test_every_listed_disagreement_is_found(record: dict[str, Any]) -> None:
    listed = {
        (entry["seed"], entry["field"])
        for entry in load_published()["disagreements"]
        if entry["folder"] == record["folder"]
    }
    found = review(record)
    unsaid = [entry for entry in listed if not any(is_said(*entry, finding) for finding in found.findings)]
    cannot_be_checked = " ".join(found.unchecked)
    assert [
        entry for entry in unsaid if f"{entry[1].partition(':')[0]} of seed {entry[0]}" not in cannot_be_checked
    ] == []


def is_said(seed: int | None, field: str, finding: Finding) -> bool:
    """Return whether a finding says what an entry of the list says: one finding may name several places and seeds."""
    figure, _, places = field.partition(": ")
    if figure.startswith(("headline", "leaderboard")):
        name = {"headline val_bpb": "submission.json val_bpb", "headline val_loss": "submission.json val_loss"}
        return finding.check == "headline" and name.get(figure, "leaderboard") in finding.values
    if figure == "code bytes":
        return finding.check == "committed_code_bytes" and seed in finding.values["seeds"]
    if places.endswith("vs log") and places.startswith(("README", "submission.json")):
        kind = {"artifact/total bytes": "artifact bytes"}.get(figure, figure)
        named = [place for place in finding.values if place.startswith(places.removesuffix(" vs log"))]
        is_score = finding.field.partition(":")[0].endswith("bpb") and kind.endswith("bpb")
        is_gain_of_it = kind == "TTT gain" and finding.field.startswith("post_quant")  # a gain that follows from it
        is_same = finding.field.startswith(kind) or is_score or is_gain_of_it
        return finding.seed == seed and bool(named) and is_same
    if figure.startswith("pre-TTT"):
        return finding.seed == seed and finding.field.startswith(figure)
    return (finding.seed, finding.field) == (seed, field)


def test_a_record_without_contradictions_has_none() -> None:
    assert find_disagreements(find_record("1514")) == []


def test_pr_1536s_pull_request_text_is_flagged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "show", "1536"]) == 0
    shown = capsys.readouterr().out
    assert "mean 1.07747, sample std 0.00078 (ddof=1), population std 0.00064 (ddof=0), n = 3" in shown
    assert "stated std: 0.00064 (the population one, ddof=0)" in shown
    assert "seed 42: pre-TTT bpb and TTT gain: PR text vs log: pr_text says (pre_ttt_bpb 1.0849" in shown


def test_an_altered_readme_cell_is_found() -> None:
    record = json.loads(json.dumps(find_record("1536")))
    record["readme_seed_tables"][0]["rows"][0]["Pre-TTT BPB"] = "1.08731"
    record["readme_seed_tables"][0]["rows"][1]["Steps"] = "4821"
    found = {(finding.seed, finding.field) for finding in find_disagreements(record)}
    known = {(finding.seed, finding.field) for finding in find_disagreements(find_record("1536"))}
    assert found - known == {(42, "post_quant/sliding bpb: README vs log"), (0, "steps: README vs log")}


@pytest.mark.parametrize(
    ("said", "number", "half_unit"),
    [
        ("15,992,482", 15_992_482, 0.0), ("1.08732", 1.08732, 5e-6), ("-0.01045", -0.01045, 5e-6),
        ("15.8M", 15.8e6, 5e4), ("2843 lines", 2843, 0.0), ("−0.0103", -0.0103, 5e-5), ("251.0s", 251.0, 0.05),
        ("", None, 0.0),
    ],
)  # fmt: skip
def test_printed_numbers_keep_their_precision(said: str, number: float | None, half_unit: float) -> None:
    value, precision = printed_number(said)
    assert value == number
    assert math.isclose(precision, half_unit)


def test_rounding_agrees_and_more_does_not() -> None:
    assert agrees("1.0873", 1.08732)
    assert not agrees("1.0849", 1.08732)


def test_column_meanings_are_read_from_their_words() -> None:
    known = {
        "Pre-TTT BPB": "post_quant/sliding bpb", "Post-TTT BPB": "post_ttt bpb", "TTT gain": "TTT gain",
        "Quantized BPB (no TTT)": "post_quant bpb", "Sliding BPB (s64)": "sliding bpb", "Steps": "steps",
        "val_loss (nats)": "final nats", "Artifact (bytes)": "artifact bytes", "Post-EMA bpb": "post_ema bpb",
        "Eval time": "eval time", "Code size": "code bytes", "Source": None, "Quant no-TTT BPB": "post_quant bpb",
        "Total eval time": "eval time", "Cache gain": None, "Pre-quant BPB": "post_ema bpb", "bytes_code": "code bytes",
        "Train ms": "train time", "step_avg_ms": "ms/step", "baseline_val_bpb": None, "Delta BPB": None,
    }  # fmt: skip
    assert {column: column_meaning(column) for column in known} == known


def test_an_unknown_number_names_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "show", "99999"]) == 2
    error = capsys.readouterr().err
    assert "pr:99999 is not among the published records; known: " in error
    assert "1536" in error


def test_the_list_has_a_line_for_every_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "list", "--format", "markdown"]) == 0
    assert capsys.readouterr().out.count("\n") == len(RECORDS) + 2


def test_another_file_of_the_same_form_can_be_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {**json.loads(json.dumps(find_record("1514"))), "pr": 7}
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"records": [record]}))
    assert main(["published", "show", "7", "--records", str(path)]) == 0
    assert "mean 1.07983" in capsys.readouterr().out
    path.write_text("[]")
    published.load_published.cache_clear()
    assert main(["published", "show", "7", "--records", str(path)]) == 2
    assert "no list 'records'" in capsys.readouterr().err


def test_the_validation_text_follows_from_the_logs() -> None:
    sizes = {run["seed"]: validation_bytes(run) for run in one_run_a_seed(find_record("1536"))}
    assert all(size == pytest.approx(151.078e6, abs=1e3) for size in sizes.values())
    assert validation_bytes(one_run_a_seed(find_record("640"))[0]) is None  # its log prints no token count


def test_the_package_data_is_small_and_names_nobody() -> None:
    path = Path(published.__file__).with_name("published.json")
    text = path.read_text()
    assert len(text) < 300_000
    assert not any(word in text for word in ('"author"', '"github_id"', '"name":'))


def test_a_reader_of_the_output_may_leave_early() -> None:
    done = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "published"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert done.stdout is not None
    done.stdout.close()
    _, said = done.communicate(timeout=60)
    assert (done.returncode, said) == (141, "")
