"""The transition function: what each event makes of a run, and what it must never make of one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.errors import Failure, Kind
from runner.life import states
from runner.life.decisions import Release, Situation, apply_command, decide
from runner.life.states import Run, State, apply_event
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey

KEY = RunKey(seed=42)
LIMITS = Limits(attempts=3, preemptions=2, backoff_s=5.0, backoff_max_s=12.0)
TRAINING = Run(key=KEY, state=State.TRAIN, group=1, has_group=True, attempt=1, node_id="n1", node="10.0.0.1")


def failed(run: Run, failure: Failure, now: float = 100.0) -> Run:
    """Return run after a failure, its kill, and its group's removal."""
    run = apply_event(run, states.Failed(key=KEY, group=run.group, failure=failure), now, LIMITS)
    assert run.state is State.TEARDOWN
    situation = Situation(now=now, gang=Gang(), limits=LIMITS, slots=1)
    (command,) = decide({KEY: run}, situation)
    assert isinstance(command, Release)
    return apply_event(apply_command(run, command, situation), states.Gone(key=KEY, group=run.group), now, LIMITS)


def error(message: str = "boom", kind: Kind = Kind.RAISED) -> Failure:
    """Return a failure with an exception."""
    return Failure(kind=kind, message=message, error_type="RuntimeError", rank=0)


def test_a_failure_waits_twice_as_long_each_time_up_to_the_limit() -> None:
    run, waits = TRAINING, []
    for message in ("a", "b"):
        run = failed(replace(run, state=State.TRAIN, has_group=True, previous=run.failure), error(message))
        assert run.state is State.RETRY_WAIT
        waits.append(run.not_before - 100.0)
    assert waits == [5.0, 10.0]


def test_a_third_failure_is_final() -> None:
    assert failed(replace(TRAINING, failures=2), error()).state is State.FAILED


def test_the_same_exception_twice_in_a_row_is_final() -> None:
    assert failed(replace(TRAINING, previous=error("same")), error("same")).state is State.FAILED
    assert failed(replace(TRAINING, previous=error("other")), error("same")).state is State.RETRY_WAIT


def test_a_users_mistake_is_not_retried() -> None:
    assert failed(TRAINING, error("val_tokens=0", Kind.USER)).state is State.FAILED


def test_a_lost_node_costs_a_preemption_and_no_attempt() -> None:
    lost = Failure(kind=Kind.NODE_LOST, message="the node went away")
    run = failed(replace(TRAINING, failures=2), lost)
    assert (run.state, run.failures, run.preemptions, run.bad_nodes) == (State.RETRY_WAIT, 2, 1, ("n1",))
    assert failed(replace(TRAINING, preemptions=2), lost).state is State.FAILED


def test_words_of_an_older_group_change_nothing() -> None:
    late = states.Finished(key=KEY, group=0)
    assert apply_event(TRAINING, late, 5.0, LIMITS) is TRAINING


def test_a_run_that_is_over_stays_over() -> None:
    done = replace(TRAINING, state=State.DONE)
    for event in (states.Failed(key=KEY, group=1, failure=error()), states.Gone(key=KEY, group=1)):
        assert apply_event(done, event, 5.0, LIMITS) is done


def test_done_comes_from_committed_only() -> None:
    finished = apply_event(TRAINING, states.Finished(key=KEY, group=1), 5.0, LIMITS)
    assert finished.state is State.COMMITTING
    gone = apply_event(finished, states.Gone(key=KEY, group=1), 6.0, LIMITS)
    assert gone.state is State.COMMITTING
    assert apply_event(TRAINING, states.Committed(key=KEY, group=1), 5.0, LIMITS) is TRAINING
    assert apply_event(gone, states.Committed(key=KEY, group=1), 7.0, LIMITS).state is State.DONE


def test_results_that_cannot_be_written_are_retried() -> None:
    gone = replace(TRAINING, state=State.COMMITTING, has_group=False)
    run = apply_event(gone, states.Failed(key=KEY, group=1, failure=error("disk full", Kind.COMMIT)), 5.0, LIMITS)
    assert run.state is State.RETRY_WAIT


@pytest.mark.parametrize(
    ("phase", "state"), [("train", "TRAIN"), ("quantize", "QUANTIZE"), ("evaluate", "EVALUATE"), ("ttt", "TTT")]
)
def test_reported_phases_move_the_state(phase: str, state: str) -> None:
    starting = replace(TRAINING, state=State.STARTING)
    run = apply_event(starting, states.Progress(key=KEY, group=1, phase=phase, step=3, total=9), 5.0, LIMITS)
    assert (str(run.state), run.step, run.total) == (state, 3, 9)


def test_an_unknown_phase_counts_as_progress_and_leaves_the_state() -> None:
    run = apply_event(TRAINING, states.Progress(key=KEY, group=1, phase="prepare"), 5.0, LIMITS)
    assert (run.state, run.progress_at) == (State.TRAIN, 5.0)


def test_a_group_that_waits_for_room_is_left_alone_however_long_that_takes() -> None:
    waiting = Run(key=KEY, state=State.QUEUED, group=1, has_group=True)
    situation = Situation(now=1e6, gang=Gang(), limits=LIMITS, slots=1)
    assert decide({KEY: waiting}, situation) == []
