"""One gang on Ray: a STRICT_PACK placement group and one actor per rank, polled without ever blocking.

A gang moves from waiting to placed to starting to working to releasing to gone; `poll` says what happened since the
last call. No actor is ever restarted: a restarted one would be blank and nobody told. A failed gang is killed whole
and a fresh one takes its place.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from runner import states
from runner.errors import Failure, Kind, first_line
from runner.rank import Job, Outcome, Rank, redirect_output
from runner.spec import Gang, RunKey

BEAT_EVERY_S = 1.0
COLLECT_S = 1.0  # after a rank's first failure, for what else has failed already
DUMP_S = 3.0  # for stalled ranks to write their stacks down
GONE_S = 15.0  # after a kill, for the processes to vanish
PROBE_S = 0.5  # for a node's daemon to accept a connection
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"
NODE_ID_LABEL = "ray.io/node-id"

# Words in errors of a rank whose peer is gone: a consequence, never the root cause.
PEER_WORDS = ("connection reset", "connection closed", "broken pipe", "socket", "gloo", "nccl", "peer", "tcpstore")


class Phase(StrEnum):
    """How far a gang is."""

    WAITING = "waiting"
    PLACED = "placed"
    GREETING = "greeting"
    OPENING = "opening"
    WORKING = "working"
    FAILING = "failing"
    OVER = "over"
    DUMPING = "dumping"
    RELEASING = "releasing"
    GONE = "gone"


class RankActor(Rank):
    """A rank inside an actor: its output goes to a file of its own, and Ray says which GPUs it holds."""

    def __init__(self, job: Job, rank: int) -> None:
        redirect_output(job.log_path(rank))
        super().__init__(job, rank)

    def hello(self) -> dict[str, Any]:
        """Return who and where this process is, and its GPU ids."""
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return {**super().hello(), "gpus": [str(gpu) for gpu in gpus], "node_id": context.get_node_id()}

    def open_store(self) -> int:
        """Open the gang's rendezvous server and return its port."""
        from runner.worker import open_store

        self.store = open_store(self.job.world_size)
        return int(self.store.port)


class RayGang:
    """The placement group and the actors of one attempt."""

    def __init__(self, key: RunKey, serial: int, shape: Gang, *, prefer: str = "", avoid: Sequence[str] = ()) -> None:
        self.key, self.serial, self.shape = key, serial, shape
        selector = [{NODE_ID_LABEL: f"!in({','.join(avoid)})"}] * shape.world_size if avoid else None
        self.group = placement_group(
            [shape.bundle] * shape.world_size, strategy="STRICT_PACK", name=f"{key.name}-group={serial}",
            _soft_target_node_id=prefer or None, bundle_label_selector=selector,
        )  # fmt: skip
        self.phase = Phase.WAITING
        self.node = self.node_id = ""
        self.job: Job | None = None
        self.actors: list[Any] = []
        self.pending: dict[Any, int] = {}  # run references still open -> rank
        self.hellos: list[Any] = []
        self.facts: list[dict[str, Any]] = []
        self.port_ref: Any = None
        self.outcomes: dict[int, Outcome] = {}
        self.beats: dict[int, tuple[Any, float]] = {}  # rank -> (open reference, when it was sent)
        self.next_beat = 0.0
        self.serials: dict[int, int] = {}
        self.dumps: list[Any] = []
        self.since = time.monotonic()

    def poll(self) -> list[states.Event]:
        """Return what happened since the last call."""
        steps = {
            Phase.WAITING: self.poll_group,
            Phase.GREETING: self.poll_hellos,
            Phase.OPENING: self.poll_store,
            Phase.WORKING: self.poll_work,
            Phase.FAILING: self.poll_failing,
            Phase.DUMPING: self.poll_dumps,
            Phase.RELEASING: self.poll_release,
        }
        step = steps.get(self.phase)
        return step() if step is not None else []

    def turn(self, phase: Phase) -> None:
        """Enter a phase, from now on."""
        self.phase, self.since = phase, time.monotonic()

    def waited_s(self) -> float:
        """Return how long the gang has been in its phase."""
        return time.monotonic() - self.since

    def poll_group(self) -> list[states.Event]:
        """See whether the group has its place."""
        table = placement_group_table(self.group)
        if table["state"] != "CREATED":
            return []
        self.node_id = str(next(iter(table["bundles_to_node_id"].values())))
        self.node = find_node(self.node_id).get("NodeManagerAddress", "")
        self.turn(Phase.PLACED)
        return [states.Placed(key=self.key, group=self.serial, node=self.node, node_id=self.node_id)]

    def start(self, job: Job) -> None:
        """Start one actor per rank in the group's bundles."""
        self.job = job
        actor = ray.remote(RankActor)
        env = rank_environment(job)
        for rank in range(job.world_size):
            strategy = PlacementGroupSchedulingStrategy(
                placement_group=self.group, placement_group_bundle_index=rank, placement_group_capture_child_tasks=False
            )
            handle = actor.options(
                num_cpus=self.shape.bundle["CPU"], num_gpus=self.shape.bundle.get("GPU", 0), max_concurrency=4,
                max_restarts=0, scheduling_strategy=strategy, runtime_env={"env_vars": env},
            ).remote(job, rank)  # fmt: skip
            self.actors.append(handle)
        self.hellos = [handle.hello.remote() for handle in self.actors]
        self.turn(Phase.GREETING)

    def poll_hellos(self) -> list[states.Event]:
        """See whether every rank's process answers."""
        ready, waiting = ray.wait(self.hellos, num_returns=len(self.hellos), timeout=0)
        for ref in ready:
            try:
                ray.get(ref)
            except RayError as error:
                return self.fail(self.death(error, self.hellos.index(ref)))
        if waiting:
            return []
        self.facts = ray.get(self.hellos)
        if len(self.actors) > 1:
            self.port_ref = self.actors[0].open_store.remote()
        self.turn(Phase.OPENING)
        return self.poll_store()

    def poll_store(self) -> list[states.Event]:
        """See whether the rendezvous is open; then let every rank work."""
        port = None
        if self.port_ref is not None:
            if not ray.wait([self.port_ref], timeout=0)[0]:
                return []
            try:
                port = ray.get(self.port_ref)
            except RayError as error:
                return self.fail(self.death(error, 0))
        gpus = tuple(sorted({gpu for facts in self.facts for gpu in facts["gpus"]}, key=lambda gpu: (len(gpu), gpu)))
        refs = [actor.run.remote(port=port, visible_gpus=gpus) for actor in self.actors]
        self.pending = {ref: rank for rank, ref in enumerate(refs)}
        self.turn(Phase.WORKING)
        return [states.Started(key=self.key, group=self.serial, facts={"ranks": self.facts, "gpus": gpus})]

    def poll_work(self) -> list[states.Event]:
        """Collect outcomes and heartbeats of a working gang."""
        self.collect()
        if any(outcome.kind == "failed" for outcome in self.outcomes.values()):
            self.turn(Phase.FAILING)
            return []
        if not self.pending:
            self.turn(Phase.OVER)
            is_interrupted = any(outcome.kind == "interrupted" for outcome in self.outcomes.values())
            kind = states.Interrupted if is_interrupted else states.Finished
            return [*self.last_beats(), kind(key=self.key, group=self.serial)]
        return self.poll_beats()

    def collect(self) -> None:
        """Take in the outcomes of ranks that ended, a dead process included."""
        ready, _ = ray.wait(list(self.pending), num_returns=len(self.pending), timeout=0) if self.pending else ([], [])
        for ref in ready:
            rank = self.pending.pop(ref)
            try:
                self.outcomes[rank] = ray.get(ref)
            except RayError as error:
                self.outcomes[rank] = Outcome(kind="failed", at=time.time(), failure=self.death(error, rank))

    def poll_failing(self) -> list[states.Event]:
        """Wait a moment for the other ranks' errors, then name the root cause."""
        self.collect()
        if self.pending and self.waited_s() < COLLECT_S:
            return []
        failed = {rank: outcome for rank, outcome in self.outcomes.items() if outcome.failure is not None}
        return self.fail(root_cause(failed, is_node_lost=is_node_lost(self.node_id)))

    def fail(self, failure: Failure) -> list[states.Event]:
        """Return the event of a failed gang; it does nothing more until it is released."""
        self.turn(Phase.OVER)
        return [states.Failed(key=self.key, group=self.serial, failure=failure)]

    def death(self, error: RayError, rank: int) -> Failure:
        """Return the failure of a rank whose process ended without an outcome."""
        message = first_line(str(getattr(error, "cause", "") or error)) or type(error).__name__
        return Failure(
            kind=Kind.NODE_LOST if is_node_lost(self.node_id) else Kind.DIED, rank=rank, node=self.node,
            message=f"process died ({message})", log_tail=self.tail(rank),
        )  # fmt: skip

    def tail(self, rank: int) -> str:
        """Return the end of a rank's log, where this host can read it."""
        return Rank(self.job, rank).log_tail() if self.job is not None else ""

    def poll_beats(self) -> list[states.Event]:
        """Fetch the newest progress of the gang, and see who has not answered for how long."""
        now, news = time.monotonic(), []
        for rank, (ref, _) in list(self.beats.items()):
            if ray.wait([ref], timeout=0)[0]:
                del self.beats[rank]
                try:
                    beat = ray.get(ref)
                except RayError:
                    continue  # its outcome will say the same, with more words
                if beat.serial != self.serials.get(rank, 0):
                    self.serials[rank] = beat.serial
                    news.append((rank, beat))
        silent = max(((now - sent, rank) for rank, (_, sent) in self.beats.items()), default=(0.0, None))
        if now >= self.next_beat:
            self.next_beat = now + BEAT_EVERY_S
            for rank in set(self.pending.values()) - set(self.beats):
                self.beats[rank] = (self.actors[rank].beat.remote(), now)
        if not news and silent[0] < BEAT_EVERY_S:
            return []
        beat = min(news)[1] if news else None  # rank 0's word where it spoke
        report = {"phase": beat.phase, "step": beat.step, "total": beat.total, "metrics": beat.metrics} if beat else {}
        return [
            states.Progress(
                key=self.key, group=self.serial, is_news=beat is not None, silent_s=silent[0], silent_rank=silent[1],
                **report,
            )
        ]  # fmt: skip

    def last_beats(self) -> list[states.Event]:
        """Return rank 0's last progress, which may be newer than its last heartbeat."""
        try:
            beat = ray.get(self.actors[0].beat.remote(), timeout=2)
        except (RayError, GetTimeoutError):
            return []
        return [
            states.Progress(
                key=self.key,
                group=self.serial,
                phase=beat.phase,
                step=beat.step,
                total=beat.total,
                metrics=beat.metrics,
            )
        ]

    def stop(self) -> None:
        """Ask every rank to end early."""
        for actor in self.actors:
            actor.stop.remote()

    def release(self, *, with_stacks: bool) -> None:
        """Kill every rank and remove the group; with_stacks: let them write down where they stand first."""
        if with_stacks and self.pending:
            self.dumps = [actor.dump_stacks.remote() for actor in self.actors]
            self.turn(Phase.DUMPING)
        else:
            self.kill()

    def poll_dumps(self) -> list[states.Event]:
        """Kill once every rank wrote its stacks, or could not within DUMP_S."""
        _, waiting = ray.wait(self.dumps, num_returns=len(self.dumps), timeout=0)
        if not waiting or self.waited_s() > DUMP_S:
            self.kill()
        return []

    def kill(self) -> None:
        """Kill now."""
        for actor in self.actors:
            ray.kill(actor, no_restart=True)
        remove_placement_group(self.group)
        self.turn(Phase.RELEASING)

    def poll_release(self) -> list[states.Event]:
        """See whether the processes are gone."""
        if self.waited_s() < GONE_S and any(is_running(facts) for facts in self.facts):
            return []
        self.turn(Phase.GONE)
        self.actors, self.pending = [], {}
        return [states.Gone(key=self.key, group=self.serial)]


def rank_environment(job: Job) -> dict[str, str]:
    """Return the environment of a rank: its threads, all GPUs of the gang visible later, traffic on loopback only."""
    threads = str(job.threads)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE,
        "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE,
    }


def root_cause(failed: Mapping[int, Outcome], *, is_node_lost: bool) -> Failure:
    """Return the failure that came first, with those that only followed from it as further lines."""

    def order(rank: int) -> tuple[bool, float]:
        outcome = failed[rank]
        assert outcome.failure is not None, rank
        return is_consequence(outcome.failure), outcome.at

    ranks = sorted(failed, key=order)
    causes = [failure for rank in ranks if (failure := failed[rank].failure) is not None]
    first = causes[0]
    if is_node_lost:
        return Failure(kind=Kind.NODE_LOST, node=first.node, message="the node went away", log_tail=first.log_tail)
    plain = {name: getattr(first, name) for name in Failure.__dataclass_fields__}
    return Failure(**{**plain, "others": tuple(failure.one_line for failure in causes[1:])})


def is_consequence(failure: Failure) -> bool:
    """Return whether the error says that a peer went away, and nothing about this rank."""
    if failure.kind is Kind.DIED:
        return False
    text = f"{failure.error_type} {failure.message}".lower()
    return any(word in text for word in PEER_WORDS)


def is_node_lost(node_id: str) -> bool:
    """Return whether a node's daemon no longer answers; Ray itself takes up to 14 s to notice."""
    node = find_node(node_id)
    if not node.get("Alive", False):
        return bool(node_id)
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_S):
            return False
    except OSError:
        return True


def find_node(node_id: str) -> dict[str, Any]:
    """Return what Ray knows of a node, {} if it knows none."""
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((node for node in nodes if node["NodeID"] == node_id), {})


def is_running(facts: Mapping[str, Any]) -> bool:
    """Return whether a rank's process is still there, as far as this host can see."""
    if facts["host"] != socket.gethostname():
        return False
    try:
        return psutil.Process(facts["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
