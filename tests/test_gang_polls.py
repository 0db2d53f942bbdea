"""What a gang makes of its ranks' beats and deaths, with made-up references in place of a cluster."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayError

from runner.errors import Failure, Kind
from runner.gang import ray_ask
from runner.gang import ray_gang as gang_module
from runner.gang.rank import this_host
from runner.gang.ray_gang import RayGang
from runner.life import causes, states
from runner.life.job import Beat, Job, Outcome, Phase
from runner.spec.gang import Gang
from runner.spec.sweep import RunKey
from tests.ray_tools import wait_until
from tests.test_runner_worker import make_rank


class Ref:
    """A reference whose value arrives when a test says so."""

    def __init__(self, value: object = None, *, is_ready: bool = False) -> None:
        self.value, self.is_ready = value, is_ready

    def arrive(self, value: object) -> None:
        """Let the value be there."""
        self.value, self.is_ready = value, True


class FakeActor:
    """A rank that answers with what a test put into it, or not at all."""

    def __init__(self) -> None:
        self.now = Beat()
        self.answers = True
        self.is_killed = False
        self.beat = self

    def remote(self) -> Ref:
        """Ask for a beat."""
        return Ref(self.now, is_ready=self.answers)


class FakeRay:
    """As much of Ray as a gang at work uses; tasks are done at once, in this process."""

    def wait(self, refs: list[Ref], *, timeout: float, num_returns: int = 1) -> tuple[list[Ref], list[Ref]]:
        """Return the references that are ready, and the rest."""
        return [ref for ref in refs if ref.is_ready], [ref for ref in refs if not ref.is_ready]

    def get(self, ref: Ref | list[Ref], timeout: float | None = None) -> Any:
        """Return a value, or those of several references, or raise it."""
        if isinstance(ref, list):
            return [self.get(one) for one in ref]
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def remote(self, function: Callable[..., object]) -> Any:
        """Return something whose options(...).remote(...) calls function."""

        class Task:
            def options(self, **_options: object) -> Task:
                return self

            def remote(self, *arguments: object) -> Ref:
                return Ref(function(*arguments), is_ready=True)

        return Task()

    def kill(self, actor: FakeActor, *, no_restart: bool) -> None:
        """Note it."""
        actor.is_killed = True


@pytest.fixture(params=["here", "elsewhere"])
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RayGang:
    """Return a gang of two that has just begun to work, on the driver's host or on another."""
    monkeypatch.setattr(gang_module, "ray", FakeRay())
    monkeypatch.setattr(ray_ask, "ray", FakeRay())
    monkeypatch.setattr(ray_ask, "as_remote", FakeRay().remote)  # which keeps what it made for the tests on real Ray
    monkeypatch.setattr(ray_ask, "NodeAffinitySchedulingStrategy", lambda *_arguments, **_options: None)
    for name in ("placement_group", "remove_placement_group"):
        monkeypatch.setattr(gang_module, name, lambda *_arguments, **_options: None)
    monkeypatch.setattr(gang_module, "is_node_lost", lambda _node: False)
    monkeypatch.setattr(causes, "COLLECT_S", 0.0)
    gang = RayGang(RunKey(seed=1), 1, Gang(ranks=2))
    gang.job = replace(make_rank(tmp_path).job, world_size=2)
    gang.node_ids, gang.addresses, gang.phase = ("n",), ("10.0.0.4",), Phase.WORKING
    gang.actors, gang.pending = [FakeActor(), FakeActor()], {Ref(): 0, Ref(): 1}
    gang.seen = {0: Beat(), 1: Beat()}
    host = this_host() if request.param == "here" else "elsewhere"
    gang.facts = [{"host": host, "rank": rank, "node_id": "n"} for rank in (0, 1)]
    return gang


def test_a_group_that_waits_for_long_is_looked_at_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    looks, now = [], [1000.0]
    table = {"state": "PENDING", "bundles_to_node_id": {0: "n"}}
    monkeypatch.setattr(gang_module, "placement_group", lambda *_arguments, **_options: None)
    monkeypatch.setattr(gang_module, "placement_group_table", lambda _group: looks.append(now[0]) or table)
    monkeypatch.setattr(gang_module, "find_node", lambda _node: {"NodeManagerAddress": "10.0.0.4"})
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: now[0])
    gang = RayGang(RunKey(seed=1), 1, Gang())
    for _ in range(1200):  # a minute in which it is asked as often as the loop does
        assert gang.poll() == []
        now[0] += 0.05
    assert len([at for at in looks if at < 1001.0]) >= 15  # most groups have their place at once
    assert len([at for at in looks if at >= 1030.0]) <= 31
    table["state"] = "CREATED"
    now[0] += 1.0
    (event,) = gang.poll()
    assert isinstance(event, states.Placed)
    assert (event.node, event.node_id) == ("10.0.0.4", "n")


def poll(gang: RayGang) -> states.Progress:
    """Ask for beats, take them in, and return what the gang says."""
    found: list[states.Event] = []
    for _ in range(2):
        gang.next_beat = gang.next_told = 0.0
        found = gang.poll()
    (event,) = found
    assert isinstance(event, states.Progress)
    return event


def test_rank_0_speaks_and_the_silent_rank_is_named(pair: RayGang) -> None:
    pair.actors[0].now = Beat(serial=9, phase="ttt", step=90, total=100)
    pair.actors[1].now = Beat(serial=5, phase="ttt", step=50, total=100, idle_s=33.0)
    event = poll(pair)
    assert (event.phase, event.step) == ("ttt", 90)
    assert event.idle is not None
    assert (event.idle.rank, event.idle.where) == (1, "ttt step 50")
    assert time.monotonic() - event.idle.since == pytest.approx(33.0, abs=2.0)


def test_only_what_rank_0_reports_is_news(pair: RayGang) -> None:
    pair.actors[1].now = Beat(serial=5, phase="train", step=50)
    event = poll(pair)
    assert not event.is_news
    assert event.phase == ""


def test_a_rank_that_waits_for_rank_0_is_not_silent(pair: RayGang) -> None:
    pair.actors[1].now = Beat(serial=5, phase="ttt", step=50, idle_s=500.0, waits=True)
    event = poll(pair)
    assert event.idle is not None
    assert event.idle.rank == 0
    assert time.monotonic() - event.idle.since < 10


def test_a_driver_that_slept_takes_nobody_for_stalled(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    poll(pair)
    awake = time.monotonic
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: awake() + 5000.0)
    event = poll(pair)
    assert event.idle is not None
    assert awake() + 5000.0 - event.idle.since < 10
    assert event.silent_s < 10


def test_a_driver_that_slept_lets_answers_come_in_first(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.actors[1].answers = False
    poll(pair)
    (late, _), awake, wait = pair.beats[1], time.monotonic, FakeRay.wait

    def wait_long(ray: FakeRay, refs: list[Ref], *, timeout: float, num_returns: int = 1) -> Any:
        if timeout and late in refs:
            late.arrive(Beat(serial=3, phase="train", step=3))
        return wait(ray, refs, timeout=timeout, num_returns=num_returns)

    monkeypatch.setattr(FakeRay, "wait", wait_long)
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: awake() + 5000.0)
    pair.next_beat = awake() + 9000.0
    (event,) = pair.poll()
    assert isinstance(event, states.Progress)
    assert event.silent_s < 10


def test_a_rank_that_does_not_answer_is_the_heartbeats_affair(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.actors[1].answers = False
    poll(pair)
    awake = time.monotonic
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: awake() + 50.0)
    event = poll(pair)
    assert event.idle is not None
    assert (event.idle.rank, event.silent_rank) == (1, 1)
    assert event.silent_s >= 50
    assert awake() + 50.0 - event.idle.since < 10


def test_what_a_rank_owed_while_it_was_starting_is_forgotten(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.actors[0].now, pair.actors[1].answers = Beat(serial=1, phase="start"), False
    poll(pair)
    awake = time.monotonic
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: awake() + 50.0)
    assert poll(pair).silent_s >= 50
    pair.actors[0].now = Beat(serial=2, phase="check")
    assert poll(pair).silent_s < 10


def test_what_a_rank_said_before_the_ranks_met_is_out_of_date(pair: RayGang) -> None:
    first, second = pair.actors
    first.now = Beat(serial=1, phase="start")
    second.now = Beat(serial=1, phase="start", idle_s=30.0)  # its imports took so long
    poll(pair)
    first.now = Beat(serial=2, phase="train", step=1)  # so both have met; the second one's next answer is on its way
    second.answers = False
    event = poll(pair)
    assert event.idle is not None
    assert time.monotonic() - event.idle.since < 5
    (ref, _), second.answers = pair.beats[1], True
    ref.arrive(Beat(serial=1, phase="start", idle_s=31.0))  # given just before they met
    pair.next_beat = time.monotonic() + 60
    pair.next_told = 0.0
    (event,) = pair.poll()  # type: ignore[assignment]
    assert event.idle is not None
    assert time.monotonic() - event.idle.since < 5


def test_a_rank_that_waited_for_one_that_ended_is_not_to_blame(pair: RayGang) -> None:
    first, second = pair.actors
    first.now = Beat(serial=9, phase="ttt", step=9)
    second.now = Beat(serial=5, phase="train", step=5, idle_s=20.0, waits=True)
    poll(pair)
    second.answers = False
    next(ref for ref, rank in pair.pending.items() if rank == 0).arrive(Outcome(kind="finished", at=time.time()))
    event = poll(pair)
    assert event.idle is not None
    assert time.monotonic() - event.idle.since < 5


def die(gang: RayGang, error: RayError, note: dict[str, Any] | None) -> states.Failed:
    """Let rank 1 die at training step 7, with what its watch noted, and return what the gang says of it."""
    assert gang.job is not None
    path = gang.job.log_path(1)
    path.parent.mkdir(parents=True)
    path.write_text("train step=7\nFatal Python error: Aborted\n")
    if note is not None:
        gang.job.end_path(1).write_text(json.dumps(note))
    gang.seen[1] = Beat(phase="train", step=7)
    next(ref for ref, rank in gang.pending.items() if rank == 1).arrive(error)
    events: list[states.Event] = []
    while not events:
        events = gang.poll()
    (event,) = events
    assert isinstance(event, states.Failed)
    return event


@pytest.mark.parametrize(
    ("status", "words", "advice"),
    [
        (int(signal.SIGKILL), "process killed by SIGKILL, last in its log: 'train step=7'", "dmesg"),
        (int(signal.SIGSEGV) | 0x80, "process killed by SIGSEGV", "compiled code crashed"),
        (int(signal.SIGABRT), "process killed by SIGABRT", "compiled code crashed"),
        (3 << 8, "process exited with code 3", "see the end of the log"),
    ],
)
def test_a_dead_rank_is_reported_as_its_watch_saw_it(pair: RayGang, status: int, words: str, advice: str) -> None:
    failure = die(pair, RayActorError(), {"status": status, "num_oom_kills": 0, "at": 5.0}).failure
    assert failure.message.startswith(words)
    assert (failure.kind, failure.rank, failure.node, failure.at) == (Kind.DIED, 1, "10.0.0.4", "train step 7")
    assert advice in failure.advice
    assert "train step=7" in failure.log_tail


def test_without_a_watch_the_report_has_what_ray_knows(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.gang.inquest.NOTE_S", 0.0)
    error = RayError(
        "The actor died.\nWorker exit detail: Worker exits unexpectedly. Worker exits with an exit code 4."
    )
    message = die(pair, error, None).failure.message
    assert message.startswith("process ended (Worker exits unexpectedly. Worker exits with an exit code 4)")


PEER_GONE = "gloo/transport/tcp/pair.cc:537 Read error: Connection reset by peer"


def fail(gang: RayGang, rank: int, message: str, *, kind: Kind = Kind.RAISED) -> None:
    """Let a rank of a gang at work end with a failure."""
    failure = Failure(kind=kind, rank=rank, message=message)
    ref = next(ref for ref, one in gang.pending.items() if one == rank)
    ref.arrive(Outcome(kind="failed", at=time.time(), failure=failure))


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what lets seconds pass for a gang."""
    passed, awake = [0.0], time.monotonic
    monkeypatch.setattr("runner.gang.ray_gang.time.monotonic", lambda: awake() + sum(passed))
    return passed.append


def test_a_rank_that_blames_a_peer_is_not_named_before_the_peer_is_heard(
    pair: RayGang, pass_time: Callable[[float], None]
) -> None:
    fail(pair, 0, PEER_GONE)
    for _ in range(3):
        assert pair.poll() == []
        pass_time(causes.BLAME_S / 4)
    fail(pair, 1, "python train_gpt.py killed by SIGKILL", kind=Kind.DIED)
    (event,) = pair.poll()
    assert isinstance(event, states.Failed)
    assert (event.failure.kind, event.failure.rank) == (Kind.DIED, 1)
    assert PEER_GONE in event.failure.others[0]


def test_a_peer_that_never_ends_is_not_waited_for_longer_than_that(
    pair: RayGang, pass_time: Callable[[float], None]
) -> None:
    fail(pair, 0, PEER_GONE)
    assert pair.poll() == []
    assert pair.poll() == []
    pass_time(causes.BLAME_S)
    (event,) = pair.poll()
    assert isinstance(event, states.Failed)
    assert (event.failure.rank, event.failure.message) == (0, PEER_GONE)


def test_a_rank_that_fails_by_itself_is_named_though_others_hang(
    pair: RayGang, pass_time: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causes, "COLLECT_S", 1.0)
    fail(pair, 1, "loss is nan at step 7")
    assert pair.poll() == []
    assert pair.poll() == []
    pass_time(1.0)
    (event,) = pair.poll()
    assert isinstance(event, states.Failed)
    assert (event.failure.rank, event.failure.message) == (1, "loss is nan at step 7")


def test_a_stalled_gang_is_killed_when_its_stacks_are_written(pair: RayGang, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Job, Any]] = []
    monkeypatch.setattr(gang_module, "write_stacks", lambda job, facts: asked.append((job, facts)))
    pair.release(with_stacks=True)
    assert pair.phase is Phase.DUMPING
    assert not any(actor.is_killed for actor in pair.actors)
    wait_until(lambda: pair.inquest is not None and pair.inquest.is_there(), 20, "no stacks")
    pair.poll()
    assert asked == [(pair.job, pair.facts)]
    assert all(actor.is_killed for actor in pair.actors)
