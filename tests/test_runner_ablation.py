"""Ablations in one process with stub work: stages are shared, faults stay with their run, directories can grow."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from jobs.sweeps.plan import print_plan
from runner import sweep as sweep_module
from runner.errors import Refused
from runner.folder.directory import CancelRequest, SweepDirectory
from runner.folder.storage import LocalStorage
from runner.life.capacity import Node
from runner.plan import Left, make_plan
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey, SweepSpec
from runner.sweep import announced_spec, run_sweep
from runner.work import Options
from tests import stub_work
from tests.stub_work import STAGES, TARGET
from tests.sweep_tools import make_spec, no_data, write_faults

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
VARIANTS: dict[str, Any] = {
    "base": {},
    "wide": {"train": {"matrix_lr": 0.5}},
    "coarse": {"quant": {"matrix_bits": 4}},
    "fast": {"ttt": {"lr": 0.5}},
}
LOCAL = Options(is_local=True, target=TARGET, progress="plain")


@pytest.fixture(autouse=True)
def quick_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stub's steps take next to no time."""
    monkeypatch.setattr(stub_work, "STEP_S", 0.002)


def ablation(out: Path, *, seeds: tuple[int, ...] = (1,), **more: Any) -> SweepSpec:
    """Return four variants, one of which changes training, one the artifact and one the adaptation."""
    return make_spec(out, **{"seeds": list(seeds), "variants": VARIANTS, **more})


def events_of(out: Path) -> list[dict[str, Any]]:
    """Return events.jsonl."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def begun(out: Path) -> Counter[str]:
    """Return how many attempts computed each stage, from what their ranks logged."""
    logs = [path.read_text() for path in out.glob("seeds/*/logs/*-rank=0.log")]
    return Counter(stage for text in logs for stage in STAGES if f" {stage} step=1 " in text)


def scores(out: Path) -> dict[tuple[str, int], float]:
    """Return (variant, seed) -> score of every finished run; one that came twice fails."""
    from results.store.reader import read_runs

    frame = read_runs(out).frame
    done = frame[frame["state"] == "DONE"]
    assert not done.duplicated(["variant", "seed"]).any()
    return dict(zip(zip(done["variant"], done["seed"].astype(int)), done["post_ttt_bpb"]))


def states(out: Path) -> dict[str, str]:
    """Return run -> state as state.json has it."""
    runs = json.loads((out / "state.json").read_text())["runs"]
    return {f"{run['variant']}-{run['seed']}": run["state"] for run in runs}


def test_variants_share_what_they_have_in_common_and_score_as_if_alone(tmp_path: Path) -> None:
    out = tmp_path / "together"
    assert run_sweep(ablation(out, seeds=(1, 2)), LOCAL) == 0
    assert begun(out)["train"] == 4  # of eight runs: base and wide, for each seed
    assert begun(out)["quantize"] == 6
    assert begun(out)["ttt"] == 8
    found = scores(out)
    for name in VARIANTS:
        alone = tmp_path / name
        assert run_sweep(ablation(alone, seeds=(2,), variants={name: VARIANTS[name]}), LOCAL) == 0
        assert scores(alone) == {(name, 2): found[name, 2]}
    record = json.loads((out / "seeds" / "variant=fast-seed=1-repeat=0" / "stages" / "train.json").read_text())
    assert record["reused_from"] == "variant=base-seed=1-repeat=0"
    donors = [event["donors"] for event in events_of(out) if event["variant"] == "fast" and event.get("donors")]
    assert donors[0] == dict.fromkeys(("train", "quantize", "evaluate"), "variant=base-seed=1-repeat=0")


def test_waiting_is_shown_and_holds_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(ablation(tmp_path), LOCAL) == 0
    printed = capsys.readouterr().out
    assert "variant=coarse seed=1 QUEUED (waits for train of variant=base-seed=1)" in printed
    ways = [event["to"] for event in events_of(tmp_path) if event["variant"] == "coarse"]
    assert ways[:3] == ["QUEUED", "PLACED", "STARTING"]
    assert "TRAIN" not in ways


@pytest.mark.parametrize(("stage", "trainings"), [("train", 3), ("quantize", 2)])
def test_when_a_donor_fails_the_next_run_computes_what_it_has_not_left(
    tmp_path: Path, stage: str, trainings: int
) -> None:
    write_faults(tmp_path, {"variant": "base", "stage": stage, "step": 1, "do": "refuse"})
    assert run_sweep(ablation(tmp_path), LOCAL) == 1
    assert states(tmp_path) == {"base-1": "FAILED", "wide-1": "DONE", "coarse-1": "DONE", "fast-1": "DONE"}
    assert begun(tmp_path)["train"] == trainings
    assert begun(tmp_path)["quantize"] == (3 if stage == "train" else 4)
    write_faults(tmp_path)
    options = replace(LOCAL, only=frozenset({RunKey(variant="base", seed=1)}))
    assert run_sweep(announced_spec(str(tmp_path)), options) == 0
    assert len(scores(tmp_path)) == 4
    assert begun(tmp_path)["train"] == trainings  # base takes it from whoever has it, or has it itself


def test_outputs_that_were_deleted_are_made_again(tmp_path: Path) -> None:
    import shutil

    assert run_sweep(ablation(tmp_path, variants={"base": {}}), LOCAL) == 0
    shutil.rmtree(tmp_path / "seeds")
    assert run_sweep(ablation(tmp_path), LOCAL) == 0
    assert begun(tmp_path)["train"] == 2  # wide's own, and one for coarse and fast
    assert len(scores(tmp_path)) == 4


def test_variants_and_seeds_can_be_added_and_a_name_keeps_its_meaning(tmp_path: Path) -> None:
    assert run_sweep(ablation(tmp_path, variants={"base": {}, "fast": VARIANTS["fast"]}), LOCAL) == 0
    assert run_sweep(ablation(tmp_path, seeds=(1, 2), variants={"base": {}, "coarse": VARIANTS["coarse"]}), LOCAL) == 0
    assert set(scores(tmp_path)) == {("base", 1), ("fast", 1), ("coarse", 1), ("base", 2), ("coarse", 2)}
    assert begun(tmp_path)["train"] == 2
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert list(record["variants"]) == ["base", "coarse", "fast"]
    assert record["config_hash"] == record["variants"]["base"]
    for name in ("coarse", "fast"):  # of the newest announcement, and of an earlier one
        with pytest.raises(Refused, match=f"another configuration of variant {name}"):
            run_sweep(ablation(tmp_path, variants={"base": {}, name: {"ttt": {"lr": 0.25}}}), LOCAL)
    with pytest.raises(Refused, match=r"quant\.matrix_bits 4, now 6"):
        run_sweep(ablation(tmp_path, variants={"base": {}, "coarse": {"ttt": {"lr": 0.25}}}), LOCAL)


def test_a_directory_of_plain_seeds_takes_variants_and_keeps_its_runs(tmp_path: Path) -> None:
    assert run_sweep(make_spec(tmp_path, seeds=[1]), LOCAL) == 0
    assert (tmp_path / "results" / "runs" / "seed=1-repeat=0-attempt=1.parquet").exists()
    assert run_sweep(ablation(tmp_path), LOCAL) == 0
    assert set(scores(tmp_path)) == {(name, 1) for name in VARIANTS}
    with pytest.raises(Refused, match="another configuration of variant base"):
        run_sweep(ablation(tmp_path, variants={"base": {"ttt": {"lr": 0.25}}}), LOCAL)


def test_a_state_of_before_variants_is_read(tmp_path: Path) -> None:
    assert run_sweep(make_spec(tmp_path, seeds=[1]), LOCAL) == 0
    state = json.loads((tmp_path / "state.json").read_text())
    for run in state["runs"]:
        del run["variant"], run["waits_for"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert main(["status", str(tmp_path)]) == 0
    assert run_sweep(make_spec(tmp_path, seeds=[1, 2]), LOCAL) == 0


def test_one_variant_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepDirectory, "clear_cancel_requests", lambda _self: None)
    SweepDirectory(LocalStorage(tmp_path)).ask_cancel(variant="base")
    assert run_sweep(ablation(tmp_path, seeds=(1, 2)), LOCAL) == 3
    assert {run: state for run, state in states(tmp_path).items() if state != "DONE"} == {
        "base-1": "CANCELLED", "base-2": "CANCELLED",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seed", "variant", "name"),
    [(None, "", "all"), (3, "", "seed=3"), (None, "x", "variant=x"), (3, "v-seed=1", "seed=3-variant=v-seed=1"),
     (None, "seed=1", "variant=seed=1")],
)  # fmt: skip
def test_a_cancel_request_is_its_file_name(seed: int | None, variant: str, name: str) -> None:
    request = CancelRequest(seed, variant)
    assert request.file_name == name
    assert CancelRequest.from_file_name(name) == request
    assert CancelRequest.from_file_name("notes.txt") is None


def test_commands_take_a_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_sweep(ablation(tmp_path), LOCAL) == 0
    capsys.readouterr()
    out = str(tmp_path)
    assert main(["status", out]) == 0
    assert "variant" in capsys.readouterr().out
    assert main(["status", out, "--format", "json"]) == 0
    assert {run["variant"] for run in json.loads(capsys.readouterr().out)["runs"]} == set(VARIANTS)
    assert main(["logs", out, "--seed", "1"]) == 2
    assert "say which with --variant (base, wide, coarse, fast)" in capsys.readouterr().err
    assert main(["logs", out, "--seed", "1", "--variant", "fast"]) == 0
    printed = capsys.readouterr().out
    assert "ttt step=1" in printed
    assert "train step=1" not in printed
    for command in (["logs", out, "--seed", "1"], ["cancel", out]):
        assert main([*command, "--variant", "fats"]) == 2
        assert "did you mean 'fast'" in capsys.readouterr().err
    assert main(["cancel", out, "--variant", "fast"]) == 0


def test_other_code_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_sweep(ablation(tmp_path, variants={"base": {}}), LOCAL) == 0
    monkeypatch.setattr(sweep_module, "code_hash", lambda: "f" * 64)
    assert run_sweep(ablation(tmp_path), replace(LOCAL, allow_code_change=True)) == 0
    assert begun(tmp_path)["train"] == 3  # base by the code of before; wide, and one for coarse and fast by this one


def test_a_plan_counts_stages_and_what_sharing_saves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ablation(tmp_path, seeds=(1, 2), gang=Gang(gpus=1, cpus=1), preset="published")
    plan = make_plan(spec, [Node(node_id="a", name="a", resources={"CPU": 2, "GPU": 2})])
    assert {stage.stage: (stage.num_computed, stage.num_wanted) for stage in plan.stages} == {
        "train": (4, 8), "quantize": (6, 8), "evaluate": (6, 8), "ttt": (8, 8),
    }  # fmt: skip
    assert plan.stages[0].shared_by == (("base", "coarse", "fast"),)
    assert plan.hours(is_shared=False) == pytest.approx(8 * 1200 / 3600)
    assert plan.hours(is_shared=True) == pytest.approx((4 * 588 + 6 * 12 + 8 * 600) / 3600)
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "stage train: 4 to compute for 8 run(s); shared by base, coarse, fast" in printed
    assert "2.01 GPU-hours; without sharing 1h20m, 2.67 GPU-hours (train.budget_s=600" in printed


def test_a_plan_takes_times_from_stages_that_were_computed_here(tmp_path: Path) -> None:
    assert run_sweep(ablation(tmp_path), LOCAL) == 0
    plan = make_plan(ablation(tmp_path, seeds=(1, 2)), [Node(node_id="a", name="a", resources={"CPU": 2})])
    assert plan.seed_source == "mean of 12 stages computed here"
    assert {stage.stage: (stage.num_computed, stage.seconds) for stage in plan.stages} == {
        "train": (2, 1.0), "quantize": (3, 1.0), "evaluate": (3, 1.0), "ttt": (4, 1.0),
    }  # fmt: skip
    assert [plan.runs[key] for key in plan.spec.keys[:4]] == [Left.DONE] * 4
