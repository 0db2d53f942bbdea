"""seedsweep reproduce: the same seed again gives the same bits; what moved is measured and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jobs.cli import main
from model.audit.reproduction import DIFFERENT, IDENTICAL, WITHIN_NOISE, compare_runs
from results.compare.repeats import Noise, same_seed_noise
from tests.fake_runs import commit_fake
from tests.small_run import copy_sweep, seed_directory, small_sweep

STAGES = ["train", "quantize", "evaluate", "ttt"]


def no_repeats(_metric: str, _difference: float) -> None:
    """Know nothing of noise."""


def test_a_rerun_is_bit_identical_on_one_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "again"
    arguments = ["reproduce", str(small_sweep()), "--seed", "0", "--out", str(out), "--allow-differences"]
    assert main(arguments) == 0
    assert "same libraries and hardware" in capsys.readouterr().out
    content = json.loads((out / "reproduce.json").read_text())
    assert [(stage["stage"], stage["state"]) for stage in content["stages"]] == [(name, IDENTICAL) for name in STAGES]
    assert content["surroundings"] == []
    assert all(stage["difference"] == 0 for stage in content["stages"])


@pytest.mark.parametrize("name", ["config_hash", "data_hash", "code_hash"])
def test_other_hashes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    out = copy_sweep(tmp_path / "out")
    path = seed_directory(out) / "run.json"
    run = json.loads(path.read_text())
    path.write_text(json.dumps({**run, name: "0" * 64}))
    assert main(["reproduce", str(out), "--seed", "42"]) == 2
    shown = capsys.readouterr().err
    assert f"{name} was 000000000000" in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out-reproduce-seed=42").exists()


def test_a_seed_that_never_ran_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", str(small_sweep()), "--seed", "7"]) == 2
    assert "seed=7-repeat=0/run.json is missing" in capsys.readouterr().err
    out = copy_sweep(tmp_path / "out")
    (seed_directory(out) / "stages" / "ttt.json").unlink()
    assert main(["reproduce", str(out), "--seed", "42"]) == 2
    assert "has not finished ttt" in capsys.readouterr().err


def test_another_seed_is_different_in_every_stage() -> None:
    first, second = (seed_directory(small_sweep(), seed) for seed in (42, 0))
    verdicts = compare_runs(first, second, no_repeats)
    assert [verdict.state for verdict in verdicts] == [DIFFERENT] * 4
    assert all("noise is unknown" in verdict.detail for verdict in verdicts)
    assert "tensors differ" in verdicts[0].detail
    assert "codes differ" in verdicts[1].detail


def test_a_small_move_is_judged_by_the_noise_of_repeats(tmp_path: Path) -> None:
    out = copy_sweep(tmp_path / "out")
    workdir = seed_directory(out)
    arrays = dict(np.load(workdir / "ttt.npz"))
    arrays["nats_ttt"][0] += 1e-6
    np.savez(workdir / "ttt.npz", **arrays)
    before = seed_directory(small_sweep())
    by_noise = compare_runs(before, workdir, lambda _metric, difference: abs(difference) < 1e-3)
    assert [verdict.state for verdict in by_noise] == [IDENTICAL, IDENTICAL, IDENTICAL, WITHIN_NOISE]
    assert "1 of" in by_noise[3].detail
    assert compare_runs(before, workdir, lambda _metric, _difference: False)[3].state == DIFFERENT


def test_noise_is_the_pooled_std_of_repeats(tmp_path: Path) -> None:
    for seed, repeat, shift in ((1, 0, 0.0), (1, 1, 0.001), (2, 0, 0.0), (2, 1, 0.003), (3, 0, 0.5)):
        commit_fake(tmp_path, seed, repeat=repeat, post_ttt_bpb=1.0 + seed + shift)
    noise = same_seed_noise(str(tmp_path), "post_ttt_bpb", config_hash="c" * 64)
    assert noise.dof == 2
    assert noise.std == pytest.approx(((0.001**2 + 0.003**2) / 2 / 2) ** 0.5)
    assert noise.allows(0.0096)
    assert not noise.allows(0.0097)  # t(0.975, 2) * std * sqrt(2) = 0.00962
    assert not Noise(0.0, 0).allows(0.0)
    assert same_seed_noise(str(tmp_path), "post_ttt_bpb", config_hash="other").dof == 0
