"""tests/gpu_frontier.py: which jobs there are and in which order, the time limit, and rows joined as they were."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import gpu_frontier
from tests.gpu_frontier import Campaign, Job, Running, collect, make_jobs, read_ablation, spec_of

SPEC = gpu_frontier.ROOT / "jobs" / "specs" / "ablation_frontier.yaml"
MORE = ("roundings of base", "adaptations of base", "adaptations of all")
GUESSES = {"train": 150.0, "screen": 60.0, **dict.fromkeys(MORE, 70.0)}


def campaign(limit_s: float, num_slots: int = 2) -> Campaign:
    """Return a campaign of the shipped spec over two seeds."""
    return Campaign(make_jobs(read_ablation(SPEC)[1], [42, 0]), dict(GUESSES), num_slots, limit_s)


def simulate(given: Campaign, failing: str = "") -> list[tuple[float, str]]:
    """Return when each job begins if every one takes its guess."""
    now, order, running = 0.0, [], []
    while True:
        for job, _ in [item for item in running if item[1] <= now]:
            given.ended[job.name] = 1 if job.name == failing else 0
        running = [item for item in running if item[1] > now]
        while len(running) < given.num_slots and (job := given.next_job(now)) is not None:
            order.append((now, job.name))
            running.append((job, now + given.expected_s(job)))
        if not running:
            return order
        now = min(end for _, end in running)


def test_pairs_come_first_then_what_shares_them_then_each_part_over_all_seeds() -> None:
    plain, variants = read_ablation(SPEC)
    jobs = make_jobs(variants, [42, 0])
    assert [job.name for job in jobs[:4]] == ["final-base-42", "final-base-0", "final-all-42", "final-all-0"]
    more = jobs[4 : 4 + 2 * len(MORE)]
    assert [job.kind for job in more] == [kind for kind in MORE for _ in range(2)]
    assert {job.needs for job in more} == {job.name for job in jobs[:4]}
    trained = {name for job in more for name in job.variants}
    single = [name for name in variants if name not in trained]
    assert [job.name for job in jobs[4 + len(more) :]] == [
        f"screening-{name}-{seed}" for name in ["base", *single] for seed in (42, 0)
    ]
    assert {name for job in jobs for name in job.variants} == set(plain["variants"])
    assert len({job.name for job in jobs}) == len(jobs)


def test_without_the_final_sweep_the_bases_screening_is_rounded_and_adapted_otherwise() -> None:
    jobs = make_jobs(read_ablation(SPEC)[1], [42, 0], ["screening"])
    assert [job.name for job in jobs[:6]] == [
        "screening-base-42", "screening-base-0", "screening-base-42-roundings", "screening-base-0-roundings",
        "screening-base-42-adaptations", "screening-base-0-adaptations",
    ]  # fmt: skip
    assert {job.needs for job in jobs[2:6]} == {"screening-base-42", "screening-base-0"}
    assert {"fit", "quant"} <= set(jobs[2].variants)
    assert "ttt" in jobs[4].variants
    assert {job.kind for job in jobs[6:]} == {"screen"}


def test_one_whole_recipe_may_be_trained_alone() -> None:
    jobs = make_jobs(read_ablation(SPEC)[1], [42, 0], ["final"], ["all"])
    assert [job.name for job in jobs[:2]] == ["final-all-42", "final-all-0"]
    assert {job.group for job in jobs} == {"all"}


def test_no_job_begins_that_would_not_end_in_time_and_none_before_what_it_needs() -> None:
    begun = {name: now for now, name in simulate(campaign(400.0))}
    assert max(begun.values()) + 60.0 <= 400.0
    assert begun["final-base-42"] == begun["final-base-0"] == 0.0
    assert begun["final-all-0"] == 150.0
    assert begun["final-base-42-roundings"] == 300.0
    assert not any(name.startswith("screening") for name in begun)
    assert [name for _, name in simulate(campaign(100.0))][:1] == ["screening-base-42"]  # what still fits
    many = {name: now for now, name in simulate(campaign(1e6, num_slots=6))}
    assert many["screening-base-42"] == 0.0  # a place that nothing more valuable can use


def test_what_needs_a_failed_job_is_left_out() -> None:
    begun = [name for _, name in simulate(campaign(1e6), failing="final-all-42")]
    assert "final-all-42-adaptations" not in begun
    assert "final-all-0-adaptations" in begun


def test_the_longest_of_a_kind_is_what_the_next_one_is_given() -> None:
    given = campaign(1e6)
    ended = SimpleNamespace(poll=lambda: 0, returncode=0)
    job = Job("final", 42, "base", ("base",), "train")
    given.running = [Running(job, 0, ended, 5.0)]  # type: ignore[arg-type]
    assert given.free_slots() == [1]
    assert [running.job for running in given.take_ended(185.0)] == [job]
    assert given.expected_s(job) == 180.0
    assert (given.ended, given.free_slots()) == ({job.name: 0}, [0, 1])


@pytest.mark.parametrize(("job_name", "steps"), [("final-all-42-adaptations", None), ("screening-polar-42", 160)])
def test_a_jobs_spec_is_the_sweeps_for_one_seed(tmp_path: Path, job_name: str, steps: int | None) -> None:
    plain, variants = read_ablation(SPEC)
    for name in ("made_train_0.bin", "made_val_0.bin", "made.model"):
        (tmp_path / name).touch()
    args = gpu_frontier.parse_arguments([str(tmp_path), "out", "--gpus", "4", "--work", str(tmp_path)])
    (job,) = [job for job in make_jobs(variants, [42]) if job.name == job_name]
    spec = gpu_frontier.parse_spec(spec_of(job, plain, args))
    assert (spec.seeds, spec.gang.gpus, spec.config.data.val_documents) == ((42,), 1, 96 if steps else 192)
    for variant in spec.variants:
        whole = variants[variant.name].config
        assert variant.config.train.max_steps == (steps or whole.train.max_steps)
        assert (variant.config.model, variant.config.quant, variant.config.ttt) == (whole.model, whole.quant, whole.ttt)
    assert plain["overrides"]["train"].keys() == {"ema_horizon_frac", "muon_momentum_warmup_frac"}  # not changed


def test_rows_of_all_jobs_are_joined_and_what_is_not_committed_stays_out(tmp_path: Path) -> None:
    def leave(folder: str, name: str, tables: list[str]) -> None:
        for table in tables:
            path = tmp_path / folder / "results" / table / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{table} of {name}")
        (tmp_path / folder / "results" / "SHA256SUMS").write_text(f"abc  runs/{name}.parquet\n")
        (tmp_path / folder / "events.jsonl").write_text("")
        (tmp_path / folder / "sweep.json").write_text(json.dumps({"variants": {name: f"hash of {name}"}}))

    leave("final-all-42", "all", list(gpu_frontier.TABLES))
    leave("final-base-42", "base", list(gpu_frontier.TABLES))
    leave("final-base-0", "base0", ["documents", "steps"])  # still at work
    leave("screening-base-42", "other", list(gpu_frontier.TABLES))
    target = tmp_path / "rows" / "final"
    collect("final", tmp_path, ["base", "all"], target)
    found = {str(path.relative_to(target / "results")) for path in target.rglob("*.parquet")}
    assert found == {f"{table}/{name}.parquet" for table in gpu_frontier.TABLES for name in ("all", "base")}
    assert list(json.loads((target / "sweep.json").read_text())["variants"]) == ["base", "all"]
    assert (target / "results" / "SHA256SUMS").read_text().count("\n") == 3


def test_jobs_that_run_at_the_limit_are_ended_and_their_rows_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import subprocess

    def begin(job: Job, *_: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

    monkeypatch.setattr(gpu_frontier, "begin", begin)
    args = argparse.Namespace(limit_s=1.0, out=tmp_path / "out", work=tmp_path)
    given = campaign(1.0)
    given.guesses = dict.fromkeys(GUESSES, 0.5)
    gpu_frontier.drive(given, read_ablation(SPEC)[0], args)
    assert given.running
    assert all(running.process.returncode != 0 for running in given.running)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rows.tar.xz"]
