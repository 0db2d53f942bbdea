"""results.compare and `seedsweep compare`: what is comparable, what the p values say, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.cli import main
from tests.fake_runs import STAGE_LEVELS, commit_fake, fake_sweep


def compare(*arguments: str | Path) -> int:
    return main(["compare", *map(str, arguments)])


def test_both_p_values_are_printed_without_a_margin(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("pr:1530", "pr:1493") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "p_margin_0 = 0.001379" in lines
    assert "p_margin_0.005 = 0.002618" in lines
    assert "pr:1530 is shown to be 0.005 nats better than pr:1493 at p < 0.01" in lines


def test_a_margin_replaces_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("pr:1536", "pr:1493", "--margin-nats", "0.005") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("p_margin")] == ["p_margin_0.005 = 0.0314"]
    assert any("is not shown to be 0.005 nats better than pr:1493 at p < 0.01; 2 more seeds" in line for line in lines)


def test_published_against_published_without_margin(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("pr:1514", "pr:1493", "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    assert round(content["p_values"]["p_margin_0"], 4) == 0.0203
    assert content["tested_unit"] == "nats per token"


def test_mixed_tokenizers_compare_in_bits_per_byte_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("pr:1736", "pr:1626") == 0
    shown = capsys.readouterr().out
    assert "mixed or unknown tokenizers: nats per token do not compare, so bits per byte only" in shown
    assert "nats per token, 95% interval" not in shown


def test_other_validation_text_is_refused_and_force_labels_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = fake_sweep(tmp_path / "a"), fake_sweep(tmp_path / "b", val_documents_hash="0" * 64)
    assert compare(a, b) == 2
    assert "other validation text (documents aaaaaaaaaaaa and 000000000000)" in capsys.readouterr().err
    assert compare(a, b, "--force") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("FORCED, not comparable: ") for line in lines)


def test_a_small_corpus_does_not_compare_with_published_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = fake_sweep(tmp_path / "a", val_bytes=1_000_000)
    assert compare(small, "pr:1536") == 2
    assert "1.000 MB and 151.078 MB" in capsys.readouterr().err


def test_the_fineweb_set_compares_with_published_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(fake_sweep(tmp_path / "a", num_documents=0), "pr:1493") == 0
    assert "p_margin_0 = " in capsys.readouterr().out


def test_mixed_configurations_inside_one_side_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = fake_sweep(tmp_path / "a")
    commit_fake(mixed, 7, config_hash="9" * 64)
    other = fake_sweep(tmp_path / "b")
    assert compare(mixed, other) == 2
    assert (
        "config_hash differs inside it: cccccccccccc (seeds 0, 42, 1337); 999999999999 (seeds 7)"
        in capsys.readouterr().err
    )
    assert compare(mixed, other, "--force") == 0


def test_one_seed_says_no_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = fake_sweep(tmp_path / "a", (42,))
    assert compare(one, fake_sweep(tmp_path / "b")) == 0
    shown = capsys.readouterr().out
    assert "no spread, n = 1 (42)" in shown
    assert "p_margin_0 = no spread" in shown
    assert "cannot be tested, n = 1 has no spread" in shown


def test_pairing_over_seeds_sees_what_welch_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seeds = (42, 0, 1337, 7)
    a, b = fake_sweep(tmp_path / "a", seeds, shift=-0.0004), fake_sweep(tmp_path / "b", seeds)
    p_values = []
    for extra in ([], ["--paired", "seeds"]):
        assert compare(a, b, *extra, "--format", "json") == 0
        p_values.append(json.loads(capsys.readouterr().out)["p_values"]["p_margin_0"])
    assert p_values[1] < 0.001 < 0.1 < p_values[0]


def test_pairing_over_documents_uses_the_document_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = fake_sweep(tmp_path / "a", shift=-0.01), fake_sweep(tmp_path / "b")
    assert compare(a, b, "--paired", "documents") == 0
    shown = capsys.readouterr().out
    assert "paired over 40 documents (3 seeds summed)" in shown
    assert "is shown to be better at all" in shown
    assert "does not contain the spread over seeds" in shown


def test_pairing_needs_rows_and_shared_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = fake_sweep(tmp_path / "a", (1, 2)), fake_sweep(tmp_path / "b", (3, 4))
    assert compare(a, b, "--paired", "seeds") == 2
    assert "share none" in capsys.readouterr().err
    assert compare("pr:1530", "pr:1493", "--paired", "documents") == 2
    assert "pr:1530 has none (use --paired seeds)" in capsys.readouterr().err


def test_equivalence_is_asked_for_with_a_band(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = fake_sweep(tmp_path / "a", shift=0.00001), fake_sweep(tmp_path / "b")
    assert compare(a, b, "--equivalence-nats", "0.02") == 0
    assert "(equivalent within +-0.02 nats at p < 0.01)" in capsys.readouterr().out
    assert compare(a, b, "--equivalence-nats", "0.0001") == 0
    assert "not shown to be equivalent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pr:1", "pr:1493"], "pr:1 is not among the published records"),
        (["nowhere", "pr:1493"], "nowhere: no results here"),
        (["pr:1536", "pr:1493", "--margin-nats", "-1"], "margin-nats=-1.0 must be a finite number"),
        (["pr:1536", "pr:1493", "--margin-nats", "nan"], "margin-nats=nan must be a finite number"),
        (["pr:1536", "pr:1493", "--stage", "best"], "stage=best must be one of live, post_ema"),
        (["pr:640", "pr:1493"], "other validation text, or not known to be the same (unknown and 151.078 MB)"),
    ],
)
def test_bad_input_is_one_clear_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_stage_can_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("pr:1536", "pr:1530", "--stage", "pre_ttt") == 0
    assert "pre_ttt bpb mean 1.08791" in capsys.readouterr().out


def test_table_prints_published_records_in_their_own_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_sweep(tmp_path)
    assert main(["table", str(out), "--with", "pr:1536,pr:1530"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(other validation text: not comparable)") == 2
    assert main(["table", str(fake_sweep(tmp_path / "fineweb", num_documents=0)), "--with", "pr:1536"]) == 0
    assert "published, PR 1536 (same validation text)" in capsys.readouterr().out
    unknown = fake_sweep(tmp_path / "unknown", num_documents=0, val_documents_hash=None, **{
        f"{stage}_bytes": None for stage in STAGE_LEVELS
    })  # fmt: skip
    assert main(["table", str(unknown), "--with", "pr:1536"]) == 0
    assert "(validation text not known to be the same: not comparable)" in capsys.readouterr().out
    assert main(["table", str(out), "--with", "pr:5"]) == 2


def test_table_json_gains_one_key_with_published_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_sweep(tmp_path, num_documents=0)
    assert main(["table", str(out), "--with", "pr:1536", "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content)[-1] == "published"
    assert content["published"][0]["pr"] == 1536
    assert content["published"][0]["is_comparable"] is True
