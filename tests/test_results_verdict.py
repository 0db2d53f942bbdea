"""`seedsweep compare --reproduces`: what is shown, what is not, and in which words; its error rates by simulation."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as scipy_stats

from jobs.cli import main
from results.compare.power import equivalence_power, paired_equivalence_power
from results.compare.sides import Pace, Side
from results.compare.verdict import ALPHA, Verdict, judge
from results.compare.verdict_text import describe_pace, sentence
from results.stats import paired, welch
from results.validation_text import Text, relate
from tests.fake_runs import fake_sweep
from tests.made_folders import made_log, write_folder
from tests.simulate_statistics import print_verdicts, rates_of_verdict

TEXT = Text("a" * 64, 1000.0)
CLAIM = {42: 1.0772, 0: 1.0769, 1337: 1.0783}


def side(
    bpb: dict[int, float], name: str = "rerun", *, text: Text = TEXT, pace: Pace | None = None, **changes: Any
) -> Side:
    """Return a side with these scores."""
    paces = {} if pace is None else dict.fromkeys(bpb, pace)
    made = Side(name, "post_ttt", bpb, {}, None, None, text, [], [], paces)
    return made._replace(**changes)


def judge_scores(rerun: dict[int, float], claimed: dict[int, float] | None = None, **options: Any) -> Verdict:
    """Return the verdict on scores alone."""
    return judge(side(rerun), side(CLAIM if claimed is None else claimed, "claim"), **options)


def moved(*gaps: float) -> dict[int, float]:
    """Return the claimed scores, each moved by its gap."""
    return {seed: score + gap for (seed, score), gap in zip(CLAIM.items(), gaps)}


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_the_two_tests_are_those_of_scipy() -> None:
    rerun, claimed, margin = [1.0775, 1.0771, 1.0786, 1.0779], [1.0772, 1.0769, 1.0783], 0.001
    for ours, theirs in (
        (welch(rerun, claimed), lambda x, y, side: scipy_stats.ttest_ind(x, y, equal_var=False, alternative=side)),
        (paired(rerun[:3], claimed), lambda x, y, side: scipy_stats.ttest_rel(x[:3], y, alternative=side)),
    ):
        p = [
            theirs(np.add(rerun, shift), claimed, side).pvalue
            for shift, side in ((-margin, "less"), (margin, "greater"), (-margin, "greater"), (margin, "less"))
        ]
        assert ours.p_equivalent(margin) == pytest.approx(max(p[0], p[1]), rel=1e-9)
        # above the mean the far tail is that of a difference as far below -margin
        assert ours.p_beyond(margin) == pytest.approx(p[2] + p[1], rel=1e-9)
        two_sided = theirs(rerun, claimed, "two-sided").pvalue
        assert ours.p_beyond(0.0) == pytest.approx(two_sided, rel=1e-9)


@pytest.mark.parametrize("alike", [None, 0.0, 0.9, -0.5])
@pytest.mark.parametrize("spread", [0.2, 1.0])
def test_neither_claim_is_made_too_often(spread: float, alike: float | None) -> None:
    same, other = rates_of_verdict(3, 3, spread, spread, gap=1.0, alike=alike)
    assert same < 1.1 * ALPHA
    assert other < 1.1 * ALPHA


def test_unequal_spreads_and_seed_counts_keep_the_error_rates() -> None:
    for n_a, n_b, std_a, std_b in ((8, 3, 0.3, 0.3), (3, 3, 0.1, 0.4), (8, 3, 0.4, 0.1)):
        same, other = rates_of_verdict(n_a, n_b, std_a, std_b, gap=1.0)
        assert max(same, other) < 0.075, (n_a, n_b, std_a, std_b)  # Welch at three seeds is a little too sure
    assert rates_of_verdict(5, 3, 0.5, 0.5, gap=0.0)[1] < 0.01  # an honest claim is hardly ever refused


@pytest.mark.parametrize(("n_a", "n_b", "std", "gap"), [(3, 3, 0.25, 0.0), (6, 3, 0.3, 0.3), (12, 12, 0.8, 0.0)])
def test_planned_power_is_what_simulation_finds(n_a: int, n_b: int, std: float, gap: float) -> None:
    planned = equivalence_power(gap=gap, std_a=std, std_b=std, n_a=n_a, n_b=n_b, margin=1.0, alpha=ALPHA)
    assert rates_of_verdict(n_a, n_b, std, std, gap=gap)[0] == pytest.approx(planned, abs=0.015)


def test_planned_power_of_pairs_is_what_simulation_finds() -> None:
    planned = paired_equivalence_power(gap=0.2, std=0.5 * 2**0.5, n=8, margin=1.0, alpha=ALPHA)
    assert rates_of_verdict(8, 8, 0.5, 0.5, gap=0.2, alike=0.0)[0] == pytest.approx(planned, abs=0.01)
    with pytest.raises(ValueError, match="n=1 pairs have no spread"):
        paired_equivalence_power(gap=0, std=1, n=1, margin=1, alpha=ALPHA)


def test_the_simulation_prints_verdicts_of_both_tests(capsys: pytest.CaptureFixture[str]) -> None:
    print_verdicts()
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("Welch") for line in lines] == 3 * [1, 0, 0]
    assert all("at nominal 0.05" in line for line in lines)


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_the_same_scores_are_reproduced_by_two_seeds() -> None:
    two = dict(list(CLAIM.items())[:2])
    result = judge_scores(two, two)
    assert (result.words, result.p_equivalent) == ("reproduced", 0.0)


def test_scores_near_the_claimed_ones_are_reproduced() -> None:
    result = judge_scores(moved(0.0001, -0.0001, 0.00005))
    assert result.words == "reproduced"
    assert sentence(result).startswith("reproduced: the mean of rerun - claim is +0.00002 bpb, shown to lie within")


def test_a_difference_beyond_the_margin_is_not_reproduced() -> None:
    for sign, word in ((1, "worse"), (-1, "better")):
        result = judge_scores(moved(sign * 0.0102, sign * 0.0100, sign * 0.0099))
        assert result.words == "not reproduced"
        assert f"bpb ({word}), shown to lie beyond +-0.0005 (p = " in sentence(result)


def test_what_is_not_shown_equal_is_not_therefore_refused() -> None:
    result = judge_scores(moved(0.0009, -0.0012, 0.0007))
    assert result.words == "not decided"
    assert sentence(result).startswith("not decided with 3 seeds on both sides: the 90% interval of the difference, [")
    assert "seeds on both sides would decide with power 0.8 if the two are truly equal" in sentence(result)
    assert "(only 3 are claimed)" in sentence(result)


def test_the_edge_of_the_margin_is_neither() -> None:
    exact = judge_scores({1: 1.5, 2: 1.5}, {1: 1.0, 2: 1.0}, margin=0.5)
    assert exact.words == "not decided"
    assert "without a measured spread" in sentence(exact)


def test_so_many_seeds_as_are_asked_for_do_decide() -> None:
    rng = np.random.default_rng(8)
    claimed = dict(enumerate(rng.normal(1.0, 0.0007, 3).tolist()))
    plan = judge_scores(dict(enumerate(rng.normal(1.0, 0.0007, 3).tolist(), 100)), claimed).plan
    assert plan is not None
    assert plan.both is not None
    assert plan.rerun is None  # three claimed seeds alone leave more room than the margin
    done = [
        judge_scores(
            dict(enumerate(rng.normal(1.0, 0.0007, 60).tolist(), 100)),
            dict(enumerate(rng.normal(1.0, 0.0007, 60).tolist())),
        ).words
        for _ in range(20)
    ]
    assert done.count("reproduced") >= 17


def test_more_reruns_are_asked_for_where_they_would_do() -> None:
    claimed = {seed: 1.0 + 0.0001 * (seed % 3) for seed in range(10)}
    result = judge_scores({77: 1.0002, 78: 1.0001}, claimed, margin=0.00015)
    assert result.words == "not decided"
    assert result.plan is not None
    assert result.plan.rerun is not None
    assert result.plan.rerun > 2
    assert f"{result.plan.rerun} seeds rerun beside the 10 claimed would decide" in sentence(result)


def test_seeds_are_paired_only_where_one_side_has_all_of_the_other() -> None:
    assert judge_scores(moved(0, 0, 0)).is_paired
    wider = judge_scores({**moved(0, 0, 0), 7: 1.2})
    assert wider.is_paired
    assert wider.notes == ["rerun: seeds 7 have no partner and are not in the test"]
    assert not judge_scores({42: 1.0772, 0: 1.0769, 7: 1.2}).is_paired
    assert not judge_scores({42: 1.0772}).is_paired
    assert not judge_scores(moved(0, 0, 0), pairing="none").is_paired
    with pytest.raises(ValueError, match="rerun and claim share none"):
        judge_scores({7: 1.0, 8: 1.1}, pairing="seeds")


def test_one_seed_decides_nothing_but_its_place_is_told() -> None:
    result = judge_scores({42: 1.2})
    assert result.words == "not decided"
    said = sentence(result)
    assert said.startswith(
        "not decided with 1 seed rerun and 3 claimed: one seed has no spread; the rerun one lies +0.12253"
    )
    assert "outside the +-0.00366 within which 95% of seeds spread like them fall" in said
    assert "the claimed one lies" in sentence(judge_scores(CLAIM, {5: 1.0773}))
    both = sentence(judge_scores({42: 1.0772}, {42: 1.0772}))
    assert "one pair has no spread (the difference is +0.00000 bpb); without a measured spread" in both


@pytest.mark.parametrize(
    ("rerun", "claimed", "words"),
    [
        (
            Pace(4000, 600, 1),
            Pace(4500, 600, 1),
            "11.1% fewer steps (4,000 against 4,500 a seed) in 600.0 s of training",
        ),
        (
            Pace(4000, 600, 1),
            Pace(4500, 600, 1),
            "(its machine is slower): fewer steps by themselves make a score worse",
        ),
        (Pace(4000, 600, 1), Pace(4500, 600, 1), "which does not explain a difference of -0.01000 bpb"),
        (Pace(5000, 600, 1), Pace(4500, 600, 1), "so the difference may be the machine's or the clock's"),
        (
            Pace(4000, 533, 1),
            Pace(4500, 600, 1),
            "a step takes as long on both machines, so it trained for another time",
        ),
        (Pace(4000, None, 1), Pace(4500, 600, 1), "in a training time that is not known on both sides"),
    ],
)
def test_steps_that_differ_are_explained(rerun: Pace, claimed: Pace, words: str) -> None:
    result = judge(side(moved(-0.01, -0.01, -0.01), pace=rerun), side(CLAIM, "claim", pace=claimed))
    assert words in str(describe_pace(result))


def test_steps_that_hardly_differ_or_are_unknown_go_unmentioned() -> None:
    for rerun, claimed in ((Pace(4450, 600, 1), Pace(4500, 600, 1)), (Pace(None, 1, 1), Pace(4500, 1, 1))):
        assert describe_pace(judge(side(CLAIM, pace=rerun), side(CLAIM, "claim", pace=claimed))) is None


def test_logs_compared_with_themselves_are_noticed() -> None:
    note = "every seed has the very score and seconds of the claim: these are its own logs, not a rerun"
    pace = Pace(4000, 599.9, 12.3)
    assert judge(side(CLAIM, pace=pace), side(CLAIM, "claim", pace=pace)).notes == [note]
    for other in (Pace(4000, 599.8, 12.3), Pace(4000, None, 12.3), None):
        assert judge(side(CLAIM, pace=other), side(CLAIM, "claim", pace=pace)).notes == []
    assert judge(side(moved(0, 0, 1e-9), pace=pace), side(CLAIM, "claim", pace=pace)).notes == []


# ---- validation text ------------------------------------------------------------------------------------------------


def test_text_is_the_same_other_or_not_known() -> None:
    assert relate(TEXT, TEXT) == "same"
    assert relate(TEXT, Text("b" * 64, 1000.0)) == "other"
    assert relate(TEXT, Text(None, 1000.0)) == "not known"
    assert relate(TEXT, Text(None, 2000.0)) == "other"
    assert relate(TEXT, Text(None, None)) == "not known"


def test_other_text_is_refused_and_unknown_text_is_said() -> None:
    with pytest.raises(ValueError, match=r"not compared: other validation text \(documents aaaaaaaaaaaa and bbbb"):
        judge(side(CLAIM, text=Text("b" * 64, 1000.0)), side(CLAIM, "claim"))
    result = judge(side(CLAIM, text=Text(None, None)), side(CLAIM, "claim"))
    assert result.text == "not known"
    assert sentence(result).endswith("on validation text that is not known to be the same")


# ---- the command ----------------------------------------------------------------------------------------------------


def compare(*arguments: str | Path) -> int:
    return main(["compare", *map(str, arguments), "--reproduces"])


def test_the_exit_code_is_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claimed = fake_sweep(tmp_path / "claimed")
    codes = {}
    for name, options in {
        "reproduced": {"shift": 0.00003}, "not reproduced": {"shift": 0.01}, "not decided": {"seeds": (1, 2)},
    }.items():  # fmt: skip
        codes[name] = compare(fake_sweep(tmp_path / name.replace(" ", "-"), **options), claimed)
        assert capsys.readouterr().out.splitlines()[-1].startswith(name)
    assert codes == {"reproduced": 0, "not reproduced": 1, "not decided": 1}


def test_a_run_directory_against_the_folder_of_logs_it_claims(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {42: 1.0775, 0: 1.0772}
    folders = [
        write_folder(
            tmp_path / name,
            {f"train_seed{seed}.log": made_log(seed=seed, ttt=bpb, steps=steps) for seed, bpb in scores.items()},
        )
        for name, steps in (("rerun", 4000), ("claimed", 4400))
    ]
    assert main(["import-logs", str(folders[0]), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    for rerun in (folders[0], tmp_path / "out"):
        assert compare(rerun, folders[1], "--format", "json") == 0
        content = json.loads(capsys.readouterr().out)
        assert content["verdict"] == "reproduced"
        assert content["validation_text"] == "same"
        assert [(row["seed"], row["claimed_steps"], row["rerun_steps"]) for row in content["seeds"]] == [
            (0, 4400, 4000),
            (42, 4400, 4000),
        ]
        assert content["seeds"][0]["rerun_train_s"] == content["seeds"][0]["claimed_train_s"] == 598.0
        assert content["seeds"][0]["rerun_score_s"] == 250.0
        assert "9.1% fewer steps" in content["steps"]


def test_the_rerun_is_read_at_the_pass_that_the_claim_was_scored_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed = write_folder(tmp_path / "claimed", {f"train_seed{seed}.log": made_log(seed=seed) for seed in (1, 2)})
    rerun = write_folder(
        tmp_path / "rerun", {f"train_seed{seed}.log": made_log(seed=seed, ttt=1.05) for seed in (1, 2)}
    )
    assert compare(rerun, claimed, "--format", "json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rerun"]["stage"] == content["claimed"]["stage"] == "sliding"


def test_every_form_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rerun, claimed = fake_sweep(tmp_path / "a", shift=0.00003), fake_sweep(tmp_path / "b")
    shown = {}
    for form in ("text", "markdown", "json", "csv"):
        assert compare(rerun, claimed, "--format", form) == 0
        shown[form] = capsys.readouterr().out
    said = json.loads(shown["json"])["sentence"]
    assert shown["text"].splitlines()[-1] == said
    assert shown["markdown"].splitlines()[-1] == f"**{said}**"
    assert "| 1337 | 1.07" in shown["markdown"]
    rows = list(csv.DictReader(io.StringIO(shown["csv"])))
    assert [row["seed"] for row in rows] == ["0", "42", "1337"]
    assert {row["verdict"] for row in rows} == {"reproduced"}
    assert float(rows[0]["difference_bpb"]) == pytest.approx(0.00003)


def test_a_forced_verdict_is_labelled_on_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rerun, claimed = fake_sweep(tmp_path / "a"), fake_sweep(tmp_path / "b", val_documents_hash="0" * 64)
    assert compare(rerun, claimed) == 2
    assert "other validation text (documents 000000000000 and aaaaaaaaaaaa)" in capsys.readouterr().err
    assert compare(rerun, claimed, "--force") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("FORCED, not comparable: ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reproduces", "--margin", "0"], "margin=0 must be a positive number of bits per byte"),
        (["--reproduces", "--margin", "nan"], "margin=nan must be a positive number"),
        (["--reproduces", "--margin-nats", "0.005"], "--margin-nats is not for --reproduces, whose margin is --margin"),
        (["--reproduces", "--equivalence-nats", "0.1"], "--equivalence-nats is not for --reproduces"),
        (["--reproduces", "--paired", "documents"], "--paired documents is about these artifacts only"),
        (["--margin", "0.005"], "--margin 0.005 goes with --reproduces; the margin of a gain is --margin-nats"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "pr:1536", "pr:1493", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
