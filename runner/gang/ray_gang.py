"""One gang on Ray: a placement group of whole hosts and one actor per rank, polled without ever blocking.

The group holds what the gang uses. The actors stand beside it: a process that waited for a gang cannot be moved into a
group. A gang moves from waiting to placed to starting to working to releasing to gone; `poll` says what happened since
the last call. No actor is ever restarted: a restarted one would be blank and nobody told. A failed gang is killed whole
and a fresh one takes its place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from runner.errors import Failure, Kind
from runner.gang.inquest import End, learn_ends, write_stacks
from runner.gang.rank import Rank
from runner.gang.ray_ask import Answer, Gpus, Lookout, ask_gpus, ask_nodes
from runner.gang.ray_facts import find_node, is_node_lost, is_running, ray_words, select_nodes
from runner.gang.ray_rank import WaitingRanks
from runner.life import states
from runner.life.causes import MUTE_S, Seen, choose_patience, last_words, most_idle, root_cause
from runner.life.job import Beat, Job, Outcome, Phase
from runner.spec.gang import Gang
from runner.spec.labels import ACCELERATOR_LABEL
from runner.spec.sweep import RunKey

BEAT_EVERY_S = 1.0
START_BEAT_EVERY_S = 0.2  # until it trains
ASLEEP_S = 5.0  # between two looks: this process was stopped, and answers from meanwhile are still on their way
WAKE_S = 2.0  # for those to come in
INQUEST_S = 8.0  # for the node to tell how ranks ended, or where they stand
GONE_S = 15.0  # after a kill, for the processes to vanish
LOOK_EVERY_S = 1.0  # for the place of a group that has waited for long


class RayGang:
    """The placement group and the actors of one attempt."""

    def __init__(
        self, key: RunKey, serial: int, shape: Gang, *, prefer: str = "", avoid: Sequence[str] = (),
        require: Mapping[str, Sequence[str]] | None = None,
    ) -> None:  # fmt: skip
        self.key, self.serial, self.shape = key, serial, shape
        selector = [select_nodes(require or {}, avoid)] * shape.hosts if require or avoid else None
        self.group = placement_group(
            [shape.share] * shape.hosts, strategy="STRICT_PACK" if shape.hosts == 1 else "STRICT_SPREAD",
            name=f"{key.name}-group={serial}", _soft_target_node_id=prefer or None, bundle_label_selector=selector,
        )  # fmt: skip
        self.next_look = 0.0  # for its place
        self.node_ids: tuple[str, ...] = ()  # of its hosts, in the order of their ranks
        self.addresses: tuple[str, ...] = ()
        self.job: Job | None = None
        self.actors: list[Any] = []
        self.pending: dict[Any, int] = {}  # run references still open -> rank
        self.waiting = WaitingRanks(shape)
        self.is_ahead: list[bool] = []  # of each rank, whether its process was made before the gang had its place
        self.cold_words = ""  # why one that was could not be used
        self.hellos: list[Any] = []
        self.facts: list[dict[str, Any]] = []
        self.gpu_refs: list[Any] = []
        self.gpus: list[Gpus] = []  # those of the gang on each of its hosts
        self.port_ref: Any = None
        self.outcomes: dict[int, Outcome] = {}
        self.beats: dict[int, tuple[Any, float]] = {}  # rank -> (open reference, when it was sent)
        self.next_beat = 0.0
        self.looked_at = math.inf  # for beats
        self.lookout = Lookout(self.lost_node)
        self.next_told = 0.0
        self.seen: dict[int, Beat] = {}  # the newest of each rank
        self.ended_at = -math.inf  # when a rank last ended
        self.late: set[int] = set()  # ranks whose next answer may be from before the ranks met
        self.inquest: Answer | None = None  # what the gang's nodes are asked once it hangs or lost a rank
        self.dead: dict[int, RayError] = {}
        self.turn(Phase.WAITING)

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
        """See whether the group has its place; one that has waited for long is looked at less often."""
        now = time.monotonic()
        if now < self.next_look:
            return []
        self.next_look = now + min(LOOK_EVERY_S, self.waited_s() / 20)
        table = placement_group_table(self.group)
        if table["state"] != "CREATED":
            return []
        bundles = {int(index): str(node_id) for index, node_id in table["bundles_to_node_id"].items()}
        self.node_ids = tuple(bundles[index] for index in sorted(bundles))
        nodes = [find_node(node_id) for node_id in self.node_ids]
        self.addresses = tuple(node.get("NodeManagerAddress", "") for node in nodes)
        self.turn(Phase.PLACED)
        return [
            states.Placed(
                key=self.key, group=self.serial, node=", ".join(self.addresses), node_id=self.node_ids[0],
                peers=self.node_ids[1:], accelerator=(nodes[0].get("Labels") or {}).get(ACCELERATOR_LABEL, ""),
            )
        ]  # fmt: skip

    def start(self, job: Job, waiting: WaitingRanks) -> None:
        """Give one actor per rank its job, one that waits on the rank's host where there is one."""
        self.job, self.waiting = job, waiting
        taken = [waiting.take(self.node_ids[self.host_of(rank)], job) for rank in range(job.world_size)]
        self.actors, self.is_ahead = [actor for actor, _ in taken], [is_ahead for _, is_ahead in taken]
        self.hellos = [self.begin(rank) for rank in range(job.world_size)]
        if self.shape.gpus:
            self.gpu_refs = [ask_gpus(self.group, host, self.shape) for host in range(self.shape.hosts)]
        self.turn(Phase.GREETING)

    def begin(self, rank: int) -> Any:
        """Give the actor of a rank its job; return the reference to what it says then."""
        return self.actors[rank].begin.remote(self.job, rank, self.addresses[self.host_of(rank)])

    def poll_hellos(self) -> list[states.Event]:
        """See whether every rank's process answers, and which GPUs they have."""
        asked = [*self.hellos, *self.gpu_refs]
        ready, waiting = ray.wait(asked, num_returns=len(asked), timeout=0)
        for ref in ready:
            rank = asked.index(ref) if ref in self.hellos else 0
            try:
                ray.get(ref)
            except RayError as error:
                if ref not in self.hellos or not self.is_ahead[rank]:
                    return self.lose(rank, error)
                self.start_afresh(rank, error)
                waiting = [ref]
        if waiting:
            return []
        self.facts, self.gpus = ray.get(self.hellos), ray.get(self.gpu_refs)
        meets_here = self.job is None or self.job.program is None  # a program's ranks meet by themselves
        if len(self.actors) > 1 and meets_here:
            self.port_ref = self.actors[0].open_store.remote(*self.meeting)
        self.turn(Phase.OPENING)
        return self.poll_store()

    @property
    def meeting(self) -> tuple[str, ...]:
        """The addresses by which the hosts of the gang meet; none where there is one, whose loopback is enough."""
        return self.addresses if len(self.addresses) > 1 else ()

    def start_afresh(self, rank: int, error: RayError) -> None:
        """Put a fresh process in the place of one that waited and then could not begin."""
        assert self.job is not None
        actor, node_id = self.actors[rank], self.node_ids[self.host_of(rank)]
        self.actors[rank], words = self.waiting.replace(actor, node_id, self.job, error)
        self.is_ahead[rank], self.cold_words = False, self.cold_words or words
        self.hellos[rank] = self.begin(rank)

    @property
    def is_at_work(self) -> bool:
        """Whether its ranks do the work of a stage; until then they need this machine for themselves."""
        return self.phase is Phase.WORKING and self.seen[0].phase in states.PHASES

    def gpus_of(self, host: int) -> tuple[str, ...]:
        """Return the ids of all GPUs that the gang has on one of its hosts, in their order."""
        found = self.gpus[host].ids if self.gpus else ()
        return tuple(sorted(found, key=lambda gpu: (len(gpu), gpu)))

    def host_of(self, rank: int) -> int:
        """Return on which of the gang's hosts a rank is."""
        return rank // self.shape.ranks_per_host

    def poll_store(self) -> list[states.Event]:
        """See whether the rendezvous is open; then let every rank work."""
        port = None
        if self.port_ref is not None:
            if not ray.wait([self.port_ref], timeout=0)[0]:
                return []
            try:
                port = ray.get(self.port_ref)
            except RayError as error:
                return self.lose(0, error)
        refs = [
            actor.run.remote(port=port, visible_gpus=self.gpus_of(self.host_of(rank)), addresses=self.meeting)
            for rank, actor in enumerate(self.actors)
        ]
        self.pending = {ref: rank for rank, ref in enumerate(refs)}
        self.seen = {rank: Beat() for rank in range(len(refs))}
        self.turn(Phase.WORKING)
        facts = {
            "ranks": self.facts, "device": self.gpus[0].model if self.gpus else states.CPU,
            "num_ahead": sum(self.is_ahead), "cold": self.cold_words,
        }  # fmt: skip
        return [states.Started(key=self.key, group=self.serial, facts=facts)]

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
            self.ended_at = time.monotonic()
            try:
                self.outcomes[rank] = ray.get(ref)
            except RayError as error:
                self.lose(rank, error)

    def poll_failing(self) -> list[states.Event]:
        """Wait a moment for the other ranks' errors and for what is known of dead ones, then name the root cause."""
        self.collect()
        patience = choose_patience(self.outcomes.values())
        if self.pending and self.waited_s() < patience:
            return []
        lost = self.lost_node()
        is_apart = self.job is not None and self.job.is_apart  # the log of a rank that waits for the failed one, too
        if (self.dead or is_apart) and not lost and self.waited_s() < patience + INQUEST_S:
            if self.inquest is None:
                asked = range(len(self.actors)) if is_apart else sorted(self.dead)
                facts = [{**self.facts_of(rank), "is_dead": rank in self.dead} for rank in asked]
                self.inquest = ask_nodes(learn_ends, self.job, facts)
            if not self.inquest.is_there():
                return []
        self.describe_deaths()
        failed = {rank: outcome for rank, outcome in self.outcomes.items() if outcome.failure is not None}
        failure = root_cause(failed, is_node_lost=bool(lost))
        if lost:
            failure = replace(failure, node=self.addresses[self.node_ids.index(lost)], node_id=lost)
        return self.fail(failure)

    def facts_of(self, rank: int) -> dict[str, Any]:
        """Return how a rank described itself, or where it must have been if it never did."""
        return (
            self.facts[rank] if self.facts else {"rank": rank, "host": "", "node_id": self.node_ids[self.host_of(rank)]}
        )

    def lost_node(self) -> str:
        """Return the id of the first of the gang's nodes that has gone away, "" where all answer."""
        return next((node_id for node_id in self.node_ids if is_node_lost(node_id)), "")

    def describe_deaths(self) -> None:
        """Put what the nodes said of dead ranks into their failures; without an answer they have Ray's words."""
        ends: dict[int, End] = {}
        for found in self.inquest.get() if self.inquest is not None else ():
            ends |= found
        for rank, error in self.dead.items():
            end = ends.get(rank, End())
            at = end.at or self.outcomes[rank].at
            self.outcomes[rank] = Outcome(kind="failed", at=at, failure=self.death(error, rank, end))
        self.inquest = None

    def fail(self, failure: Failure) -> list[states.Event]:
        """Return the event of a failed gang; it does nothing more until it is released."""
        self.turn(Phase.OVER)
        return [states.Failed(key=self.key, group=self.serial, failure=failure)]

    def lose(self, rank: int, error: RayError) -> list[states.Event]:
        """Note that a rank's process ended without an outcome."""
        self.dead[rank] = error
        self.outcomes[rank] = Outcome(kind="failed", at=time.time(), failure=self.death(error, rank, End()))
        self.turn(Phase.FAILING)
        return []

    def death(self, error: RayError, rank: int, end: End) -> Failure:
        """Return the failure of a rank whose process ended without an outcome."""
        tail = end.log_tail or (Rank(self.job, rank).log_tail() if self.job is not None else "")
        words = end.words or ray_words(error)
        last = last_words(tail)
        message = f"process {words}" + f", last in its log: {last!r}" * bool(last)
        host = self.host_of(rank)
        return Failure(
            kind=Kind.NODE_LOST if is_node_lost(self.node_ids[host]) else Kind.DIED, rank=rank,
            node=self.addresses[host], message=message, at=self.seen[rank].where if rank in self.seen else "",
            advice=end.advice, log_tail=tail,
        )  # fmt: skip

    def poll_beats(self) -> list[states.Event]:
        """Fetch the newest progress of the gang, and see who has not answered for how long."""
        if time.monotonic() - self.looked_at > ASLEEP_S and self.beats:
            ray.wait([ref for ref, _ in self.beats.values()], num_returns=len(self.beats), timeout=WAKE_S)
        now, is_new = time.monotonic(), False
        self.looked_at = now
        for rank, (ref, _) in list(self.beats.items()):
            if ray.wait([ref], timeout=0)[0]:
                del self.beats[rank]
                try:
                    beat = ray.get(ref)
                except RayError:
                    continue  # its outcome will say the same, with more words
                if rank == 0 and beat.serial != self.seen[rank].serial:
                    is_new = True
                    if self.seen[rank].is_starting and not beat.is_starting:
                        self.forget_the_start(now)
                is_late = rank in self.late
                self.late.discard(rank)
                self.seen[rank] = beat.excused if is_late else beat
        silent = max(((now - sent, rank) for rank, (_, sent) in self.beats.items()), default=(0.0, None))
        if now >= self.next_beat:
            self.next_beat = now + (BEAT_EVERY_S if self.is_at_work else START_BEAT_EVERY_S)
            self.lookout.look(is_silent=silent[0] > MUTE_S)
            for rank in set(self.pending.values()) - set(self.beats):
                self.beats[rank] = (self.actors[rank].beat.remote(), now)
        if not is_new and now < self.next_told:
            return []
        self.next_told = now + BEAT_EVERY_S
        beat = self.seen[0]  # rank 0 speaks for the gang
        owed = {rank: now - sent for rank, (_, sent) in self.beats.items()}
        seen = {rank: Seen(self.seen[rank], owed.get(rank, 0.0)) for rank in self.pending.values()}
        is_program = self.job is not None and self.job.program is not None
        return [
            states.Progress(
                key=self.key, group=self.serial, phase=beat.phase, step=beat.step, total=beat.total,
                metrics=beat.metrics, is_news=is_new, silent_s=silent[0], silent_rank=silent[1], lost=self.lookout.lost,
                idle=most_idle(seen, now, met_at=self.ended_at, are_told_apart=not is_program),
            )
        ]  # fmt: skip

    def forget_the_start(self, now: float) -> None:
        """Excuse what ranks said, and still owe, from before they met: imports may have kept them from getting further.

        That they have met is known from rank 0, which has gone on.
        """
        self.beats = {rank: (ref, now) for rank, (ref, _) in self.beats.items()}
        self.late = set(self.beats)
        self.seen = {rank: beat.excused for rank, beat in self.seen.items()}

    def last_beats(self) -> list[states.Event]:
        """Return rank 0's last progress, which may be newer than its last heartbeat."""
        try:
            beat = ray.get(self.actors[0].beat.remote(), timeout=2)
        except (RayError, GetTimeoutError):
            return []
        return [
            states.Progress(
                key=self.key, group=self.serial, phase=beat.phase, step=beat.step, total=beat.total,
                metrics=beat.metrics,
            )
        ]  # fmt: skip

    def stop(self) -> None:
        """Ask every rank to end early."""
        for actor in self.actors:
            actor.stop.remote()

    def release(self, *, with_stacks: bool) -> None:
        """Kill every rank and remove the group; with_stacks: let the node write down where they stand first."""
        if with_stacks and self.pending:
            self.inquest = ask_nodes(write_stacks, self.job, self.facts)
            self.turn(Phase.DUMPING)
        else:
            self.kill()

    def poll_dumps(self) -> list[states.Event]:
        """Kill once the stacks of every rank are written, or could not be within INQUEST_S."""
        if self.inquest is None or self.inquest.is_there() or self.waited_s() > INQUEST_S:
            self.kill()
        return []

    def kill(self) -> None:
        """Kill now."""
        self.inquest = None
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
