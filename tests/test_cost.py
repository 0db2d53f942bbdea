"""What a sweep spends: GPU-hours of every attempt in status and table, an estimate in plan, money with a price."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.cli import main
from jobs.sweeps.plan import print_plan
from results.table_text import as_json, render
from runner.errors import Failure, Kind
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.folder.takeover import take_over_run
from runner.life import states
from runner.life.capacity import Node
from runner.life.states import Run, State, apply_event
from runner.plan import make_plan
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey, SweepSpec
from runner.view.status import look
from tests.fake_runs import commit_fake, seed_table
from tests.sweep_tools import make_spec

KEY = RunKey(seed=42)
LIMITS = Limits(attempts=3, backoff_s=5.0)
HOUR_S = 3600.0
DIED = Failure(kind=Kind.DIED, message="process died", rank=0)


def hold(run: Run, *, start: float, end: float, failure: Failure | None = DIED) -> Run:
    """Return run after a gang had a place from start to end."""
    group = run.group + 1
    run = replace(run, state=State.QUEUED, group=group, has_group=True)
    run = apply_event(run, states.Placed(key=KEY, group=group, node="a", node_id="a"), start, LIMITS)
    run = replace(run, state=State.TRAIN)
    done = states.Finished(key=KEY, group=group)
    run = apply_event(
        run, done if failure is None else states.Failed(key=KEY, group=group, failure=failure), end, LIMITS
    )
    return apply_event(run, states.Gone(key=KEY, group=group), end, LIMITS)


def test_every_attempt_counts_from_its_place_to_its_end_and_waiting_does_not() -> None:
    run = hold(Run(key=KEY), start=100.0, end=400.0)
    assert run.gang_s(10_000.0) == 300.0
    run = hold(run, start=1000.0, end=1700.0, failure=None)
    assert (run.state, run.gang_s(10_000.0)) == (State.COMMITTING, 1000.0)


def test_a_gang_at_work_counts_until_now_and_one_that_waits_for_room_not_at_all() -> None:
    run = hold(Run(key=KEY), start=100.0, end=400.0)
    waiting = replace(run, state=State.QUEUED, has_group=True)
    assert waiting.gang_s(9000.0) == 300.0
    assert apply_event(waiting, states.Gone(key=KEY, group=waiting.group), 9000.0, LIMITS).gang_s(9999.0) == 300.0
    assert replace(run, state=State.TRAIN, has_group=True, placed_at=1000.0).gang_s(1060.0) == 360.0


def test_what_earlier_drivers_spent_is_kept() -> None:
    run = replace(Run(key=KEY), attempt=2, held_s=500.0)
    for finished, is_wanted in ((None, True), (2, True), (None, False)):
        assert take_over_run(KEY, run, finished, is_wanted=is_wanted).held_s == 500.0


def leave_sweep(out: Path, price: float | None) -> SweepSpec:
    """Leave the files of a sweep on two GPUs whose driver gave it up: one run done, one still at work."""
    spec = replace(make_spec(out, seeds=[1, 2], gang=Gang(gpus=2, cpus=1)), price_per_gpu_hour=price)
    directory = SweepDirectory(LocalStorage(out))
    directory.write_json("sweep.json", {"sweep": spec.name, "config_hash": spec.config_hash, "spec": spec.to_json()})
    one, two = spec.keys
    directory.write_state(spec.name, [
        Run(key=one, state=State.DONE, held_s=HOUR_S),
        Run(key=two, state=State.FAILED, held_s=HOUR_S / 2, failure=DIED),
    ], 0.0)  # fmt: skip
    return spec


def test_status_shows_gpu_hours_and_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_sweep(tmp_path, 2.5)
    assert look(str(tmp_path)).gpu_hours == (2.0, 1.0)
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split()[-3:] == ["GPU-hours", "cost", "note"]
    assert "1 DONE, 1 FAILED; GPU-hours in all 3.000; cost in all 7.50" in printed
    assert main(["status", str(tmp_path), "--format", "json"]) == 0
    picture = json.loads(capsys.readouterr().out)
    assert picture["price_per_gpu_hour"] == 2.5
    assert [(run["gpu_hours"], run["cost"]) for run in picture["runs"]] == [(2.0, 5.0), (1.0, 2.5)]


def test_without_a_price_there_is_no_money_and_without_gpus_neither(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_sweep(tmp_path, None)
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "GPU-hours in all 3.000" in printed
    assert "cost" not in printed
    spec = make_spec(tmp_path / "cpu", seeds=[1])
    directory = SweepDirectory(LocalStorage(tmp_path / "cpu"))
    directory.write_json("sweep.json", {"spec": spec.to_json()})
    directory.write_state(spec.name, [Run(key=spec.keys[0], state=State.DONE, held_s=HOUR_S)], 0.0)
    assert main(["status", str(tmp_path / "cpu")]) == 0
    assert "GPU-hours" not in capsys.readouterr().out


def test_status_of_a_directory_of_an_earlier_version_works(tmp_path: Path) -> None:
    leave_sweep(tmp_path, None)
    state = json.loads((tmp_path / "state.json").read_text())
    for run in state["runs"]:
        del run["held_s"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert look(str(tmp_path)).gpu_hours == (0.0, 0.0)


# fake runs hold eight GPUs for 25 minutes from ten o'clock
def test_the_table_sums_all_attempts_of_a_run(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, state="FAILED", error="rank 3: out of memory")
    commit_fake(tmp_path, 42, attempt=2, started_at="2026-04-11T10:40:00+00:00", ended_at="2026-04-11T11:10:00+00:00")
    commit_fake(tmp_path, 7)
    table = seed_table(tmp_path)
    hours = {row["seed"]: row["gpu_hours"] for row in table.seeds}
    assert hours == {7: pytest.approx(8 * 25 / 60), 42: pytest.approx(8 * (25 + 30) / 60)}
    assert not [note for note in table.notes if "GPU-hours" in note]
    text = render(table, "text")
    assert "GPU-hours" in text.splitlines()[1]
    assert "10.667 in all" in text
    assert "cost" not in text


def test_an_attempt_never_begins_before_the_one_before_it_ended(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, state="FAILED", error="rank 3: out of memory")
    commit_fake(tmp_path, 42, attempt=2, ended_at="2026-04-11T10:55:00+00:00")  # says that it began at ten as well
    assert seed_table(tmp_path).seeds[0]["gpu_hours"] == pytest.approx(8 * 55 / 60)


def test_attempts_that_left_no_row_are_said(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, attempt=3)
    assert seed_table(tmp_path).notes == [
        "GPU-hours lack 2 attempt(s) that left no row, as when their driver is killed"
    ]


def test_the_table_shows_money_where_the_sweep_has_a_price(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42)
    (tmp_path / "sweep.json").write_text(json.dumps({"spec": {"price_per_gpu_hour": 3.0}}))
    table = seed_table(tmp_path)
    assert table.seeds[0]["cost"] == pytest.approx(10.0)
    assert "3.333 in all, cost 10.00 at the spec's price_per_gpu_hour" in render(table, "text")
    assert as_json(table)["spent"]["cost"] == pytest.approx(10.0)
    assert render(table, "csv").splitlines()[0].endswith("gpu_hours,cost")


def test_a_table_of_cpu_runs_has_no_gpu_hours(tmp_path: Path) -> None:
    commit_fake(tmp_path, 42, num_gpus=0)
    assert "GPU-hours" not in render(seed_table(tmp_path), "text")


def test_a_plan_estimates_money(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(
        make_spec(tmp_path, gang=Gang(gpus=1, cpus=1), preset="published", overrides={}), price_per_gpu_hour=2.0
    )
    print_plan(make_plan(spec, [Node(node_id="a", name="a", resources={"CPU": 2, "GPU": 1})]))
    assert "1.00 GPU-hours (cost 2.00) (train.budget_s=600" in capsys.readouterr().out


@pytest.mark.parametrize("price", ["2 EUR", -1, True, float("inf"), float("nan"), [2]])
def test_a_price_that_is_none_is_refused(tmp_path: Path, price: object) -> None:
    with pytest.raises(ValueError, match="price_per_gpu_hour must be a number of 0 or more, without a currency"):
        make_spec(tmp_path, price_per_gpu_hour=price)


def test_the_price_is_recorded_with_the_spec_and_changes_no_hash(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, price_per_gpu_hour=2)
    assert SweepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.config_hash == make_spec(tmp_path).config_hash
    plain = spec.to_json()
    del plain["price_per_gpu_hour"], plain["track"]
    assert SweepSpec.from_json(plain).price_per_gpu_hour is None
