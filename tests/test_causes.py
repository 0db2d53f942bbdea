"""Which rank is to blame: the one that all others wait for, and how that reads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from runner.errors import Failure, Kind
from runner.gang import worker
from runner.gang.rank import Rank
from runner.life.causes import Seen, is_consequence, last_words, most_idle
from runner.life.decisions import Release, Situation, decide_one
from runner.life.job import Beat
from runner.life.states import Failed, Idle, Progress, Run, State, apply_event
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey
from tests.test_runner_worker import make_rank

LIMITS = Limits(stall_s=10.0, start_s=300.0, heartbeat_s=100.0)
KEY = RunKey(seed=1)
NOW = 200.0


def rank_at(moved_at: float, *, waits: bool = False, phase: str = "ttt", step: int = 3) -> Seen:
    """Return a rank that last got further at that time, seen at NOW."""
    return Seen(Beat(phase=phase, step=step, waits=waits, idle_s=NOW - moved_at))


def test_the_rank_that_works_and_is_silent_is_named_though_rank_0_goes_on() -> None:
    found = most_idle({0: rank_at(100.0), 1: rank_at(20.0, step=7)}, NOW)
    assert found == Idle(rank=1, where="ttt step 7", since=20.0)


def test_a_rank_that_waits_for_the_others_is_as_well_as_they_are() -> None:
    found = most_idle({0: rank_at(100.0), 1: rank_at(20.0, waits=True)}, NOW)
    assert found == Idle(rank=0, where="ttt step 3", since=100.0)


def test_the_rank_that_others_wait_for_is_named() -> None:
    found = most_idle({0: rank_at(10.0, waits=True), 1: rank_at(30.0), 2: rank_at(5.0, waits=True)}, NOW)
    assert found == Idle(rank=1, where="ttt step 3", since=30.0)


def test_where_all_wait_the_last_to_come_tells_since_when() -> None:
    found = most_idle({0: rank_at(10.0, waits=True), 1: rank_at(30.0, waits=True)}, NOW)
    assert found is not None
    assert (found.rank, found.since) == (1, 30.0)
    assert most_idle({}, NOW) is None


def test_a_rank_that_does_not_answer_is_named_and_does_not_lengthen_the_silence() -> None:
    mute = Seen(Beat(phase="train", step=7, idle_s=0.5), 11.0)
    found = most_idle({0: rank_at(NOW - 12.0), 1: mute}, NOW)
    assert found == Idle(rank=1, where="train step 7", since=NOW - 12.0)
    assert most_idle({0: rank_at(NOW), 1: mute}, NOW) == Idle(rank=1, where="train step 7", since=NOW - 0.5)


def test_the_last_words_are_those_before_a_crash_was_written_down() -> None:
    crash = (
        "Fatal Python error: Segmentation fault\n\nCurrent thread 0x1:\n  File a\nExtension modules: numpy (total: 1)\n"
    )
    assert last_words("one\ntwo\n\n") == "two"
    assert last_words(f"one\ntwo\n{crash}") == "two"
    assert last_words(f"one\ntwo\n[2026-01-01 E 1 2] *** SIGSEGV received at time=1 ***\n{crash}") == "two"
    assert last_words(crash) == last_words("") == ""


LEAK = (
    "[W1127 09:17:03.293812312 ProcessGroupNCCL.cpp:1496] Warning: WARNING: destroy_process_group() was not called "
    "before program exit, which can leak resources. (function operator())"
)


@pytest.mark.parametrize(
    "farewell",
    [
        LEAK,
        f"[rank0]:{LEAK}",
        f"[rank1]: {LEAK.replace('W1127', 'W730')}",
        "/usr/lib/multiprocessing/resource_tracker.py:254: UserWarning: resource_tracker: There appear to be 1 leaked "
        "semaphore objects to clean up at shutdown\n  warnings.warn('resource_tracker: There appear to be %d '",
    ],
)
def test_an_error_is_the_last_word_though_warnings_follow_it(farewell: str) -> None:
    error = "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    log = (
        f"step:7 train_loss:2.1\n[rank0]: Traceback (most recent call last):\n[rank0]:   File a\n{error}\n{farewell}\n"
    )
    assert last_words(log) == error
    alone = Failure(kind=Kind.RAISED, rank=0, message=f"python train_gpt.py exited with code 1: {last_words(log)!r}")
    assert not is_consequence(alone)
    assert last_words(farewell) == farewell.splitlines()[-1].strip()[:160]  # there is nothing else


def stalled(run: Run, now: float) -> Failure | None:
    """Return the failure for which a run is released at that time."""
    command = decide_one(run, Situation(now=now, gang=Gang(), limits=LIMITS, slots=1))
    return command.failure if isinstance(command, Release) else None


def test_a_gang_is_stalled_when_one_rank_is_though_rank_0_reports() -> None:
    run = Run(key=KEY, state=State.TTT, group=1, has_group=True, attempt=2, facts={"ranks": []})
    idle = Idle(rank=3, where="ttt step 7", since=89.0)
    run = apply_event(run, Progress(key=KEY, group=1, phase="ttt", step=50, idle=idle), 98.0, LIMITS)
    assert stalled(run, 98.5) is None
    failure = stalled(run, 99.5)
    assert failure is not None
    assert (failure.kind, failure.rank, failure.at) == (Kind.STALLED, 3, "ttt step 7")


def test_before_the_first_work_the_limit_is_that_of_the_start() -> None:
    run = Run(key=KEY, state=State.STARTING, group=1, has_group=True, placed_at=1.0, progress_at=1.0, facts={"a": 1})
    run = apply_event(run, Progress(key=KEY, group=1, phase="start", step=0), 5.0, LIMITS)
    assert stalled(run, 200.0) is None
    assert (stalled(run, 302.0) or Failure(kind=Kind.USER, message="")).kind is Kind.START


@pytest.mark.parametrize("sign", ["report", "tick", "meet"])
def test_reports_ticks_and_meetings_are_signs_of_progress(sign: str, tmp_path: Path) -> None:
    rank = make_rank(tmp_path)
    rank.report("train", 5, 10, {})
    rank.moved_at -= 100.0
    assert rank.beat().idle_s >= 100
    rank.wait(True)
    assert rank.beat().idle_s >= 100  # to begin to wait is none
    assert rank.beat().waits
    {"report": lambda: rank.report("train", 5, 10, {}), "tick": rank.tick, "meet": lambda: rank.wait(False)}[sign]()
    assert rank.beat().idle_s < 100
    assert (rank.beat().phase, rank.beat().step) == ("train", 5)


class NosyRank(Rank):
    """A rank that is asked for a beat after each change of what a beat tells, as another thread may ask."""

    def __setattr__(self, name: str, value: object) -> None:
        """Change it, then ask."""
        super().__setattr__(name, value)
        if name in ("waits", "moved_at") and hasattr(self, "heard"):
            self.heard.append(self.beat())


class HastyRank(Rank):
    """A rank whose wait ends while a beat is being made, after the first thing that the beat reads."""

    def __getattribute__(self, name: str) -> Any:
        """Read it, then let the wait end."""
        value = super().__getattribute__(name)
        if name in ("waits", "moved_at") and self.__dict__.pop("is_about_to_go_on", False):
            self.wait(False)
        return value


def test_a_rank_that_stops_waiting_is_at_no_moment_taken_for_stalled(tmp_path: Path) -> None:
    nosy = NosyRank(make_rank(tmp_path).job, 1)
    nosy.wait(True)
    nosy.moved_at -= 100.0
    nosy.heard: list[Beat] = []  # type: ignore[misc]
    nosy.wait(False)
    hasty = HastyRank(nosy.job, 1)
    hasty.wait(True)
    hasty.moved_at -= 100.0
    hasty.__dict__["is_about_to_go_on"] = True
    for beat in (*nosy.heard, hasty.beat()):
        assert beat.waits or beat.idle_s < 50


def test_a_rank_that_calls_exit_fails_with_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "run_pipeline", lambda _rank: sys.exit(3))
    failure = make_rank(tmp_path).run().failure
    assert failure is not None
    assert (failure.error_type, failure.message) == ("SystemExit", "3")
    assert "sys.exit(3)" in failure.traceback


def test_a_failure_is_one_line_with_rank_node_step_advice_and_file() -> None:
    run = Run(key=KEY, state=State.TRAIN, group=1, has_group=True, attempt=2, facts={"ranks": []})
    failure = Failure(
        kind=Kind.DIED, rank=1, node="10.0.0.4", message="process killed by SIGKILL", at="train step 120",
        advice="the node ran out of memory",
    )  # fmt: skip
    failed = apply_event(run, Failed(key=KEY, group=1, failure=failure), 5.0, LIMITS).failure
    assert failed is not None
    assert failed.one_line == (
        "rank 1 on 10.0.0.4: process killed by SIGKILL, at train step 120; the node ran out of memory; "
        "look at seeds/seed=1-repeat=0/logs/attempt=2-rank=1.log"
    )
