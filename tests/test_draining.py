"""A node that is being drained: training leaves a checkpoint and goes on elsewhere, and that costs no attempt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runner.errors import Kind
from runner.gang import ray_backend
from runner.gang.ray_backend import RayBackend, living_nodes
from runner.life import states
from runner.life.decisions import MOVE_S, Command, Release, Situation, Stop, apply_command, decide
from runner.life.states import Run, State, apply_event
from runner.spec.gang import Gang, Limits
from runner.spec.sweep import RunKey

KEY = RunKey(seed=42)
LIMITS = Limits(backoff_s=5.0)
TRAINING = Run(
    key=KEY, state=State.TRAIN, group=1, has_group=True, attempt=1, node_id="n1", node="10.0.0.1", progress_at=100.0
)
DRAINING = apply_event(TRAINING, states.Draining(key=KEY, group=1, node_id="n1"), 100.0, LIMITS)


def next_command(run: Run, now: float = 100.0, **changes: object) -> Command | None:
    """Return what is to be done about one run."""
    found = decide({KEY: run}, at(now, **changes))
    return found[0] if found else None


def at(now: float, **changes: object) -> Situation:
    """Return a situation in which nothing is overdue, under a Ray job's short grace."""
    return replace(Situation(now=now, gang=Gang(), limits=LIMITS, slots=1, grace_s=2.0), **changes)  # type: ignore[arg-type]


def told(run: Run, event: type[states.Event], now: float = 110.0) -> Run:
    """Return run after an event of its gang."""
    return apply_event(run, event(key=KEY, group=run.group), now, LIMITS)


def test_training_stops_for_a_checkpoint_and_the_move_is_a_preemption() -> None:
    assert next_command(TRAINING) is None
    command = next_command(DRAINING)
    assert command == Stop(key=KEY, group=1, is_move=True)
    stopping = apply_command(DRAINING, command, at(100.0))
    assert (stopping.is_stopping, stopping.is_cancelled) == (True, False)
    assert next_command(stopping, 100.0 + MOVE_S - 1) is None
    run = told(stopping, states.Interrupted)
    assert run.state is State.TEARDOWN
    release = next_command(run, 110.0)
    assert isinstance(release, Release)
    run = told(apply_command(run, release, at(110.0)), states.Gone)
    assert (run.state, run.preemptions, run.failures, run.bad_nodes) == (State.RETRY_WAIT, 1, 0, ("n1",))
    placed = states.Placed(key=KEY, group=2, node="10.0.0.2", node_id="n2")
    again = apply_event(replace(run, state=State.QUEUED, group=2, has_group=True), placed, 120.0, LIMITS)
    assert (again.state, again.leaves, again.is_stopping) == (State.PLACED, "", False)


def test_a_checkpoint_that_takes_too_long_is_not_waited_for() -> None:
    stopping = apply_command(DRAINING, Stop(key=KEY, group=1, is_move=True), at(100.0))
    release = next_command(stopping, 100.0 + MOVE_S)
    assert isinstance(release, Release)
    assert release.failure is not None
    assert (release.failure.kind, release.failure.node_id) == (Kind.NODE_LOST, "n1")


@pytest.mark.parametrize("state", [State.STARTING, State.QUANTIZE, State.TTT])
def test_what_has_no_checkpoint_goes_on_to_its_end(state: State) -> None:
    assert next_command(replace(DRAINING, state=state, phase="ttt")) is None
    assert next_command(DRAINING, limits=replace(LIMITS, restart="scratch")) is None


def test_a_run_that_is_cancelled_meanwhile_does_not_come_back() -> None:
    stopping = apply_command(DRAINING, Stop(key=KEY, group=1, is_move=True), at(100.0))
    run = told(stopping, states.Interrupted)
    cancelled = at(111.0, cancelled=frozenset({KEY}))
    (release,) = decide({KEY: run}, cancelled)
    assert told(apply_command(run, release, cancelled), states.Gone).state is State.CANCELLED


def test_the_backend_tells_gangs_of_drains_and_counts_no_room_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeGang:
        key, serial, node_ids = KEY, 3, ("n1", "n2")

    backend = RayBackend(Gang())
    backend.gangs[KEY, 3] = FakeGang()  # type: ignore[assignment]
    monkeypatch.setattr(ray_backend, "draining_nodes", lambda: {"n2", "n9"})
    assert backend.look_for_drains() == [states.Draining(key=KEY, group=3, node_id="n2")]
    assert backend.look_for_drains() == []  # not at every poll
    found = [{"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": {}} for name in ("n1", "n2")]
    monkeypatch.setattr(ray_backend.ray, "nodes", lambda: found)
    assert [node.node_id for node in living_nodes()] == ["n1"]
