"""A gang over several hosts, without a cluster: what a spec may ask, what nodes hold, who is at fault, who agrees."""

from __future__ import annotations

import errno
import itertools
import json
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayError

from model.controls.self_test import make_corpus, micro_config
from model.distributed import Dist
from model.pipeline import seed
from runner.errors import Failure, Kind, PreflightError
from runner.gang import inquest, ray_facts, ray_gang, worker
from runner.gang.rank import this_host
from runner.gang.ray_ask import Answer, Gpus
from runner.gang.ray_gang import RayGang
from runner.life import states
from runner.life.capacity import HERE, Node, count_slots, why_infeasible
from runner.life.decisions import Situation, overdue, place
from runner.life.job import Phase
from runner.life.states import Run, State
from runner.machine import route
from runner.plan import make_plan, slots_per_node
from runner.spec.gang import Gang, Limits
from runner.spec.read import parse_spec
from runner.spec.sweep import RunKey
from tests.micro_model import ignore
from tests.sweep_tools import make_spec
from tests.test_runner_worker import make_rank

KEY = RunKey(seed=1)


def nodes(*gpus: int) -> list[Node]:
    """Return a node for each number of GPUs."""
    return [Node(node_id=f"n{i}", name=f"10.0.0.{i}", resources={"CPU": 96, "GPU": n}) for i, n in enumerate(gpus)]


@pytest.mark.parametrize(
    ("gang", "words"),
    [
        ({"hosts": 0}, "gang.hosts=0 must be at least 1"),
        ({"gpus": 16}, "gang.gpus=16 must be between 0 and 8 .*more hosts hold more"),
        ({"gpus": 17, "hosts": 2}, "gang.gpus=17 must be between 0 and 16"),
        ({"gpus": 9, "hosts": 2}, "gang.hosts=2 must divide gang.gpus=9"),
        ({"ranks": 3, "hosts": 2}, "gang.hosts=2 must divide gang.ranks=3"),
        ({"hosts": 2}, "gang.hosts=2 must divide gang.ranks=1"),
        ({"hosts": True}, "gang.hosts must be a whole number"),
    ],
)
def test_hosts_that_cannot_share_the_ranks_are_refused(gang: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        make_spec(tmp_path).from_json({**make_spec(tmp_path).to_json(), "gang": gang})


def test_hosts_work_in_a_folder_that_they_share_or_behind_a_uri(tmp_path: Path) -> None:
    plain = {"name": "a", "preset": "tiny", "seeds": [1], "gang": {"ranks": 2, "hosts": 2},
             "data": {"train": "t*.bin", "val": "v*.bin", "tokenizer": "m"}}  # fmt: skip
    for out in ("s3://b/c", f"file://{tmp_path}", str(tmp_path)):
        assert parse_spec({**plain, "out": out}).gang.ranks_per_host == 1
    one, two = (parse_spec({**plain, "out": "x", "gang": {"ranks": 2, "hosts": hosts}}) for hosts in (1, 2))
    assert one.config_hash == two.config_hash


def test_slots_are_as_many_gangs_as_find_different_nodes_for_their_shares() -> None:
    for hosts, counts in itertools.product((1, 2, 3), itertools.product(range(4), repeat=4)):
        gang = Gang(gpus=2 * hosts, cpus=1, hosts=hosts)
        assert count_slots(nodes(*(2 * n for n in counts)), gang) == most_gangs(counts, hosts), (hosts, counts)


def most_gangs(counts: tuple[int, ...], hosts: int) -> int:
    """Return the answer by taking the fullest nodes for each gang in turn."""
    left, found = sorted(counts, reverse=True), 0
    while sum(n > 0 for n in left) >= hosts:
        left = sorted([n - 1 for n in left[:hosts]] + left[hosts:], reverse=True)
        found += 1
    return found


def test_a_gang_over_more_hosts_than_there_are_says_so_and_names_what_helps() -> None:
    gang = Gang(gpus=16, cpus=4, hosts=2)
    words = why_infeasible(nodes(8, 4, 16), gang)
    assert words == ""
    words = why_infeasible(nodes(16, 4), gang)
    assert words.startswith(
        "no 2 nodes can hold one gang: asked for 16 rank(s) on 2 nodes, 8 on each, 1 GPU, 4 CPU each"
    )
    assert words.endswith("10.0.0.1: 96 CPU, 4 GPU")
    assert why_infeasible([replace(nodes(16)[0], node_id=HERE)], gang).endswith("--address names a cluster")


def test_the_plan_shows_the_shares_of_each_node(tmp_path: Path) -> None:
    plan = make_plan(make_spec(tmp_path, gang=Gang(gpus=16, cpus=4, hosts=2)), nodes(8, 16, 0))
    assert plan.slots == 1
    assert [line.rpartition(": ")[2] for line in slots_per_node(plan)] == [
        f"{n} share(s) of a gang over 2 hosts" for n in (1, 2, 0)
    ]


RUN = Run(
    key=KEY, state=State.TRAIN, group=1, has_group=True, attempt=1, node_id="n0", peers=("n1",),
    facts={"ranks": [{"node_id": "n0"}, {"node_id": "n0"}, {"node_id": "n1"}, {"node_id": "n1"}]},
)  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "bad"),
    [
        (Failure(kind=Kind.NODE_LOST, message="gone", node_id="n1"), ("n1",)),
        (Failure(kind=Kind.PREFLIGHT, message="unfit", rank=2), ("n1",)),
        (Failure(kind=Kind.DIED, message="killed", rank=1), ("n0",)),
        (Failure(kind=Kind.START, message="not ready"), ("n0", "n1")),
        (Failure(kind=Kind.RAISED, message="boom", rank=2), ()),
    ],
)
def test_the_node_at_fault_is_the_one_to_avoid(failure: Failure, bad: tuple[str, ...]) -> None:
    run = states.judge_attempt(replace(RUN, failure=failure), 0.0, Limits())
    assert run.bad_nodes == bad
    found = place(run, [run], Situation(now=0.0, gang=Gang(gpus=16, hosts=2), limits=Limits(), slots=1,
                                        nodes=tuple(nodes(8, 8, 8))))  # fmt: skip
    assert found.avoid == (bad if len(bad) < 2 else ())  # three nodes: two have to be left
    assert found.prefer == ""


def test_silence_of_a_node_that_is_gone_is_a_preemption() -> None:
    situation = Situation(now=100.0, gang=Gang(), limits=Limits(heartbeat_s=30.0), slots=1, nodes=tuple(nodes(8, 8)))
    run = replace(RUN, silent_s=31.0, silent_rank=2, progress_at=100.0)
    stalled, lost = overdue(run, situation), overdue(replace(run, lost="n1"), situation)
    assert stalled is not None
    assert lost is not None
    assert (stalled.kind, stalled.rank, stalled.node) == (Kind.STALLED, 2, "10.0.0.1")
    idle = overdue(replace(RUN, idle=states.Idle(rank=1, where="train step 3", since=-1000.0)), situation)
    assert idle is not None
    assert (idle.kind, idle.rank, idle.node) == (Kind.STALLED, 1, "10.0.0.0")
    assert (lost.kind, lost.node, lost.node_id) == (Kind.NODE_LOST, "10.0.0.1", "n1")
    assert overdue(replace(run, silent_s=29.0, lost="n1"), situation) is None  # it may come back


def test_ranks_lie_on_the_hosts_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray_gang, "placement_group", lambda bundles, **more: asked.update(bundles=bundles, **more))
    gang = RayGang(KEY, 1, Gang(gpus=4, cpus=3, hosts=2), avoid=("bad",))
    assert asked["bundles"] == [{"CPU": 6.0, "GPU": 2.0}] * 2
    assert (asked["strategy"], len(asked["bundle_label_selector"])) == ("STRICT_SPREAD", 2)
    monkeypatch.setattr(ray_gang, "placement_group_table", lambda _group: {
        "state": "CREATED", "bundles_to_node_id": {"1": "b", "0": "a"}})  # fmt: skip
    monkeypatch.setattr(ray_gang, "find_node", lambda node_id: {"NodeManagerAddress": f"10.0.0.{node_id}"})
    (event,) = gang.poll()
    assert event == states.Placed(key=KEY, group=1, node="10.0.0.a, 10.0.0.b", node_id="a", peers=("b",))
    assert gang.meeting == ("10.0.0.a", "10.0.0.b")
    gang.gpus = [Gpus(("10", "9"), ""), Gpus(("0", "1"), "")]
    assert [gang.gpus_of(gang.host_of(rank)) for rank in range(4)] == [("9", "10")] * 2 + [("0", "1")] * 2
    job = replace(make_rank(tmp_path).job, world_size=4, hosts=2)
    assert [job.place_of(rank) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert "GLOO_SOCKET_IFNAME" not in ray_facts.rank_environment(gang.shape)
    environment = ray_facts.rank_environment(Gang(cpus=3))
    assert (environment["GLOO_SOCKET_IFNAME"], environment["OMP_NUM_THREADS"]) == (ray_facts.LOOPBACK_INTERFACE, "3")


def test_one_host_asks_for_one_node_and_meets_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(ray_gang, "placement_group", lambda bundles, **more: asked.update(bundles=bundles, **more))
    gang = RayGang(KEY, 1, Gang(ranks=2, cpus=3), prefer="a" * 56)
    assert (asked["bundles"], asked["strategy"]) == ([{"CPU": 6.0}], "STRICT_PACK")
    gang.addresses = ("10.0.0.4",)
    assert gang.meeting == ()


def test_a_rank_that_is_silent_because_its_node_is_gone_is_reported_with_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_gang, "placement_group", lambda *_bundles, **_more: None)
    monkeypatch.setattr(ray_gang, "is_node_lost", lambda node_id: node_id == "b")
    gang = RayGang(KEY, 1, Gang(ranks=2, hosts=2))
    gang.node_ids, gang.phase = ("a", "b"), Phase.WORKING
    gang.lookout.look(is_silent=True)
    assert gang.lookout.asked is not None
    gang.lookout.asked.result(20)
    gang.lookout.look(is_silent=True)
    assert gang.lookout.lost == "b"
    gang.lookout.look(is_silent=False)  # it answers again
    assert gang.lookout.lost == ""


@pytest.mark.parametrize(("out", "asked"), [("s3://b/x", [0, 1]), ("/shared/x", [1])])
def test_every_host_is_asked_for_its_logs_where_no_other_sees_them(
    out: str, asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []

    def ask_nodes(_question: object, _job: object, ranks: list[dict[str, Any]]) -> Answer:
        found.extend(ranks)
        return Answer(lambda: False, list)

    monkeypatch.setattr(ray_gang, "placement_group", lambda *_bundles, **_more: None)
    monkeypatch.setattr(ray_gang, "is_node_lost", lambda _node_id: False)
    monkeypatch.setattr(ray_gang, "ask_nodes", ask_nodes)
    gang = RayGang(KEY, 1, Gang(ranks=2, hosts=2))
    gang.job = replace(make_rank(tmp_path).job, world_size=2, hosts=2, out=out)
    gang.actors, gang.node_ids, gang.dead = [None, None], ("a", "b"), {1: RayError("killed")}
    gang.ended_at = time.monotonic()
    assert gang.poll_failing() == []
    assert [facts["rank"] for facts in found] == asked
    assert [facts["rank"] for facts in found if facts["is_dead"]] == [1]


def test_the_living_are_not_waited_for_to_end_and_their_logs_are_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    puts: list[object] = []
    monkeypatch.setattr(inquest, "put_logs", puts.append)
    job = make_rank(tmp_path).job
    assert inquest.learn_ends(job, [{"rank": 0, "is_dead": False}]) == {}
    assert puts == [job]


class Peers(Dist):
    """A first rank whose only peer is the first rank of another host, which has said its word."""

    word = "{}"

    def gather_text(self, text: str) -> list[str]:
        """Return both words."""
        return [text, "{}", self.word, "{}"]


class Later(Dist):
    """A rank behind rank 0, which has said its words one after the other; problems says that of a further rank."""

    words: tuple[str, ...] = ()
    problem = "fine"

    def gather_text(self, text: str) -> list[str]:
        """Return rank 0's next word, this rank's, and that of a further one."""
        word, *self.words = self.words
        return [word, text, self.problem]


def test_the_first_rank_of_each_further_host_fetches_what_rank_0_names(tmp_path: Path) -> None:
    fetched: list[tuple[str, str]] = []
    gone: set[str] = set()
    full = ""
    config = micro_config(make_corpus(tmp_path / "corpus"))

    def fetch(name: str, sha256: str) -> None:
        if name == full:
            raise OSError(errno.ENOSPC, "No space left on device", name)
        if name in gone:
            raise FileNotFoundError(2, "no such object", name)
        fetched.append((name, sha256))

    def bring(rank: int, local_rank: int, problem: str = "fine", **orders: Any) -> None:
        dist = Later(rank=rank, world_size=4, local_rank=local_rank)
        dist.words, dist.problem = (json.dumps({"model.ssq": "a" * 64, "b.npz": "b" * 64}), "fine"), problem
        orders = {"fetch": fetch, **orders}
        seed.Run(config, dist, tmp_path, ignore, orders=seed.Orders(**orders)).bring({"x": "not rank 0's"})

    bring(2, 0)
    assert fetched == [("model.ssq", "a" * 64), ("b.npz", "b" * 64)]
    bring(1, 1), bring(3, 1), bring(0, 0), bring(2, 0, fetch=None)
    assert len(fetched) == 2  # rank 0 has them, others find them, and in one directory for all nothing is to do
    gone.add("b.npz")
    with pytest.raises(RuntimeError, match=r"rank 2 cannot have what rank 0 has written: .*no such object: 'b\.npz'"):
        bring(2, 0)
    for rank, local_rank in ((0, 0), (1, 1)):  # nobody waits for the one that has failed
        with pytest.raises(RuntimeError, match="a peer cannot go on: rank 2 cannot"):
            bring(rank, local_rank, problem="rank 2 cannot")
    full = "model.ssq"
    with pytest.raises(OSError, match="No space left on device"):  # for which the next attempt waits
        bring(2, 0)


@pytest.mark.parametrize(("what", "value"), [("data", "e" * 64), ("CPU", "AVX2"), ("CPU", None)])
def test_hosts_that_differ_are_unfit(
    what: str, value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "data_hash", lambda *_arguments, **_more: "d" * 64)
    rank, dist, facts = make_rank(tmp_path), Peers(), {"hardware": {}}
    same = {"node": "10.0.0.2", "data": "d" * 64, "CPU": torch.backends.cpu.get_cpu_capability()}
    dist.word = json.dumps(same)
    worker.check_hosts_agree(rank, dist, facts)
    dist.word = json.dumps({**same, what: value})
    with pytest.raises(PreflightError, match=rf"node 10.0.0.2 has other {what} than node {socket.gethostname()}"):
        worker.check_hosts_agree(rank, dist, facts)


def test_the_interface_is_that_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    assert route.interface_to("127.0.0.1") == loopback
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(PreflightError, match=r"no route to 203\.0\.113\.1 "):
        route.interface_to("203.0.113.1")


def refuse(*_arguments: object) -> None:
    """Raise what a machine without a route raises."""
    raise OSError(101, "Network is unreachable")


def test_a_named_interface_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "interface_to", lambda _address: "eth7")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    worker.use_interface_to("10.0.0.2")
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("ib0", "=eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")


def test_containers_of_one_host_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"host": this_host(), "pid": os.getpid()}
    assert ray_facts.is_running(here)
    monkeypatch.setattr("runner.gang.rank.namespaces", lambda: "pid:[1]")
    assert not ray_facts.is_running(here)
