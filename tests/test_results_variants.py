"""results.compare.variants, `table` and `compare DIR#V`: differences to the baseline, corrected, and in words."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from jobs.cli import main
from results.compare.power import paired_power, pairs_needed
from results.compare.variants import Ablation, read_table
from results.compare.variants_text import DIFFERENCE_HEADER, as_json, render
from results.stats import holm, paired
from tests.fake_runs import FakeVariant, commit_failed, commit_fake, fake_ablation, fake_sweep

SEEDS = (42, 0, 1337)


def of(name: str, *gains: float, seeds: tuple[int, ...] = SEEDS, reused: tuple[str, ...] = ()) -> FakeVariant:
    return FakeVariant(name, dict(zip(seeds, gains)), reused)


BASE = of("base", 0.0, 0.0, 0.0)
GATE = of("gate", -0.004, -0.005, -0.006)  # mean -0.005, sample std 0.001
WIDE = of("wide", -0.001, 0.001, -0.003)  # mean -0.001, sample std 0.002
WORSE = of("narrow", 0.010, 0.011, 0.012, reused=("train",))


def read(out: Path) -> Ablation:
    table = read_table(out)
    assert isinstance(table, Ablation)
    return table


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1; the third would be 0.06, the last 0.04, which may not be below it
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.6, None]) == [1.0, 1.0, None]
    assert holm([0.03, None, 0.01]) == pytest.approx([0.03, None, 0.02])
    assert holm([]) == []


def test_the_paired_difference_by_hand(tmp_path: Path) -> None:
    effect = read(fake_ablation(tmp_path, [BASE, GATE])).effects[0]
    assert effect.difference is not None
    assert effect.difference.interval is not None
    assert effect.difference.mean == pytest.approx(-0.005, abs=1e-12)
    # t of two degrees of freedom: 97.5 % quantile 4.302653; the error is 0.001 / sqrt(3)
    reach = 4.302653 * 0.001 / math.sqrt(3)
    assert effect.difference.interval.low == pytest.approx(-0.005 - reach, abs=1e-9)
    assert effect.difference.interval.high == pytest.approx(-0.005 + reach, abs=1e-9)
    # P(T < t) of two degrees of freedom is 1/2 + t / (2 sqrt(2 + t^2)), with t = -5 sqrt(3)
    t = -5 * math.sqrt(3)
    assert effect.p_better == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-9)
    assert effect.p_worse == pytest.approx(1 - (effect.p_better or 0.0))


def test_verdicts_are_corrected_for_the_number_of_variants(tmp_path: Path) -> None:
    alone = read(fake_ablation(tmp_path / "one", [BASE, GATE])).effects[0]
    assert (alone.verdict, alone.p_better) == ("better", alone.p_better_holm)
    among = read(fake_ablation(tmp_path / "many", [BASE, GATE, WIDE, WORSE]))
    gate, wide, narrow = among.effects
    assert gate.p_better_holm == pytest.approx(3 * (gate.p_better or 0.0))
    assert (gate.p_better or 1.0) < 0.01 < (gate.p_better_holm or 0.0)
    assert gate.verdict == wide.verdict == "not shown"
    assert narrow.verdict == "worse"
    assert gate.words == "not shown, 4 seeds needed"


def test_a_variant_that_is_no_better_is_not_promised_more_seeds(tmp_path: Path) -> None:
    effects = read(fake_ablation(tmp_path, [BASE, of("same", 0.0, 0.0, 0.0), of("odd", 0.001, -0.001, 0.002)])).effects
    assert [effect.words for effect in effects] == ["not shown, no gain seen"] * 2
    assert effects[0].p_better == effects[0].p_worse == 1.0


def test_only_seeds_that_both_have_are_paired(tmp_path: Path) -> None:
    variants = [
        of("base", 0, 0, 0, 0, seeds=(1, 2, 3, 4)),
        of("some", -0.001, -0.002, -0.5, seeds=(1, 2, 9)),
        of("other", -0.001, -0.002, -0.003, seeds=(7, 8, 9)),
        of("one", -0.001, -0.002, seeds=(4, 9)),
        of("single", -0.001, seeds=(4,)),
        of("stranger", -0.001, seeds=(9,)),
    ]
    effects = {effect.variant: effect for effect in read(fake_ablation(tmp_path, variants)).effects}
    assert (effects["some"].method, effects["some"].seeds) == ("paired", [1, 2])
    assert effects["some"].difference is not None
    assert effects["some"].difference.mean == pytest.approx(-0.0015, abs=1e-12)
    assert effects["other"].method == effects["one"].method == "Welch, other seeds"
    assert effects["other"].verdict == "not shown"
    for name in ("single", "stranger"):
        assert effects[name].words == "no spread, n = 1"
        assert effects[name].p_better_holm is None


def test_the_first_announced_variant_is_the_baseline(tmp_path: Path) -> None:
    out = fake_ablation(tmp_path, [of("plain", 0, 0, 0), of("base", -0.001, -0.002, -0.003)])
    assert (read(out).baseline, list(read(out).tables)) == ("plain", ["plain", "base"])
    (out / "sweep.json").unlink()
    assert (read(out).baseline, read(out).how_chosen) == ("base", "by its name")
    other = fake_ablation(tmp_path / "other", [of("b", 0, 0, 0), of("a", 0, 0, 0)])
    (other / "sweep.json").unlink()
    assert (read(other).baseline, read(other).how_chosen) == ("a", "first by name")
    assert "differences to a (the baseline, first by name)" in render(read(other), "text")


def test_a_damaged_announcement_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_ablation(tmp_path, [BASE, GATE])
    (out / "sweep.json").write_text("{")
    assert run("table", out) == 2
    error = capsys.readouterr().err
    assert "sweep.json is damaged" in error
    assert error.count("\n") == 1


def test_other_validation_text_is_not_compared(tmp_path: Path) -> None:
    out = fake_ablation(tmp_path, [BASE, GATE])
    for seed in SEEDS:
        commit_fake(out, seed, variant="short", shift=-0.1, val_documents_hash="0" * 64)
    effect = read(out).effects[-1]
    assert effect.difference is None
    assert effect.words.startswith("not compared: other validation text")


def test_an_unfinished_baseline_leaves_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_ablation(tmp_path, [of("base"), GATE])
    commit_failed(out, 42, variant="base")
    assert run("table", out) == 1
    shown = capsys.readouterr().out
    assert "no finished seed of base" in shown
    assert "variant=base seed=42 FAILED: rank 3: out of memory" in shown


def test_every_form_has_blocks_and_differences(tmp_path: Path) -> None:
    table = read(fake_ablation(tmp_path, [BASE, GATE, WORSE]))
    text = render(table, "text")
    assert [text.count(f"\n{name}  config_hash") for name in ("base", "gate", "narrow")] == [1, 1, 1]
    assert text.count("\nmean") == 3 + 1  # blocks and foot
    markdown = render(table, "markdown")
    assert f"| {' | '.join(DIFFERENCE_HEADER)} |" in markdown
    content = json.loads(render(table, "json"))
    assert content == as_json(table)
    assert content["baseline"] == "base"
    assert [entry["variant"] for entry in content["differences"]] == ["gate", "narrow"]
    assert [entry["summary"]["post_ttt_bpb"]["n"] for entry in content["variants"]] == [3, 3, 3]
    rows = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(rows) == 9
    gate = next(row for row in rows if row["variant"] == "gate")
    assert float(gate["difference_bpb"]) == content["differences"][0]["difference_bpb"]
    assert rows[0]["difference_bpb"] == ""


def test_many_runs_are_shown_by_their_means(tmp_path: Path) -> None:
    seeds = tuple(range(31))
    table = read(fake_ablation(tmp_path, [of("base", *[0.0] * 31, seeds=seeds), of("x", *[0.001] * 31, seeds=seeds)]))
    text = render(table, "text")
    assert "62 runs: their rows are in --format csv and json" in text
    assert "\n  30  " not in text
    assert len(render(table, "csv").splitlines()) == 63


def test_times_of_reused_stages_are_marked(tmp_path: Path) -> None:
    text = render(read(fake_ablation(tmp_path, [BASE, WORSE])), "text")
    assert text.count("588.1*") == 4  # three runs and their mean
    assert "train of another run" in text
    assert "* another run computed this stage" in text
    assert "*" not in render(read(fake_ablation(tmp_path / "none", [BASE, GATE])), "text")


def test_a_plain_sweep_has_the_table_of_a_plain_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = fake_sweep(tmp_path / "plain")
    named = fake_sweep(tmp_path / "named", variant="base")
    assert run("table", plain) == 0
    shown = capsys.readouterr().out
    assert "differences" not in shown
    assert run("table", named) == 0
    assert capsys.readouterr().out == shown


def test_compare_takes_one_variant_and_agrees_with_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fake_ablation(tmp_path, [BASE, GATE])
    effect = read(out).effects[0]
    assert run("compare", f"{out}#gate", f"{out}#base", "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    assert effect.difference is not None
    assert content["method"] == "paired t over 3 seeds"
    assert content["difference_bpb"]["mean"] == effect.difference.mean
    assert content["p_values"]["p_margin_0"] == pytest.approx(effect.p_better, rel=1e-9)
    assert run("compare", f"{out}#gate", f"{out}#base", "--paired", "none") == 0
    assert "Welch t over seeds" in capsys.readouterr().out
    assert run("compare", f"{out}#gate", fake_sweep(tmp_path / "plain")) == 0
    assert "Welch t over seeds" in capsys.readouterr().out


def test_documents_of_one_variant_are_paired(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_ablation(tmp_path, [BASE, GATE])
    assert run("compare", f"{out}#gate", f"{out}#base", "--paired", "documents") == 0
    assert "A - B = -0.0050" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("", "holds 3 variants (base, gate, wide); name one, such as "),
        ("#gat", "has no variant 'gat'; nearest: gate"),
        ("#zzzz", "has no variant 'zzzz'; there are base, gate, wide"),
        ("#", "has no variant ''; there are base, gate, wide"),
    ],
)
def test_a_side_must_name_a_variant_that_is_there(
    side: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = fake_ablation(tmp_path, [BASE, GATE, WIDE])
    assert run("compare", f"{out}{side}", f"{out}#base") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_with_a_hash_sign_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_sweep(tmp_path / "run#2")
    assert run("compare", out, f"{out}#base") == 0
    assert "A - B = +0.00000" in capsys.readouterr().out


def test_compare_says_how_many_pairs_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = fake_ablation(tmp_path, [BASE, WIDE])
    assert run("compare", f"{out}#wide", f"{out}#base") == 0
    needed = pairs_needed(gain=0.001, std=0.002)
    assert f"{(needed or 0) - 3} more seeds on both sides (to {needed})" in capsys.readouterr().out


def test_the_power_of_pairs_is_that_of_the_noncentral_t() -> None:
    from scipy import stats

    for n, gain in ((3, 2.0), (8, 1.0), (30, 0.5)):
        exact = stats.nct.sf(stats.t.isf(0.01, n - 1), n - 1, gain * math.sqrt(n))
        assert paired_power(gain=gain, std=1.0, n=n) == pytest.approx(exact, abs=1e-4)
    assert pairs_needed(gain=1e-9, std=1.0) is None
    assert pairs_needed(gain=-1.0, std=1.0) is None
    assert paired([1.0, 2.0], [1.0, 2.0]).p_worse() == 1.0
