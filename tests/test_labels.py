"""What a gang requires of its nodes, and which model of GPU a sweep keeps to. No Ray cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.sweeps.plan import print_plan
from runner import sweep
from runner.errors import SweepError
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage
from runner.gang import ray_backend, ray_gang
from runner.gang.ray_facts import select_nodes
from runner.gang.ray_gang import RayGang
from runner.life import states
from runner.life.capacity import HERE, Node, count_slots, why_infeasible
from runner.life.decisions import Situation, Submit, decide, place
from runner.life.job import Phase
from runner.life.placing import accelerator_of_sweep, gang_now
from runner.life.states import Run, State
from runner.plan import make_plan
from runner.spec.gang import Gang, Limits, parse_gang
from runner.spec.labels import ACCELERATOR_LABEL, accelerator_type
from runner.spec.sweep import RunKey, SweepSpec
from runner.work import Options
from tests.sweep_tools import make_spec
from tests.test_scheduler import Simulation

KEY = RunKey(seed=1)
ON_H100 = {ACCELERATOR_LABEL: ("H100",)}


def node(name: str, *, gpus: float = 8, **labels: str) -> Node:
    """Return a node with labels; kind is Ray's own of its GPUs."""
    named = {ACCELERATOR_LABEL if label == "kind" else label: value for label, value in labels.items()}
    return Node(node_id=name, name=name, resources={"CPU": 64, "GPU": gpus}, labels={"ray.io/node-id": name, **named})


H, A = node("h", kind="H100", zone="eu"), node("a", kind="A100", zone="us")


def test_accelerator_is_rays_own_label_and_other_labels_are_taken_as_they_are() -> None:
    gang = parse_gang({"gpus": 8, "require": {"accelerator": ["H100", "H200"], "zone": "eu", "corp.com/rack": "7a"}})
    assert gang.require == {ACCELERATOR_LABEL: ("H100", "H200"), "zone": ("eu",), "corp.com/rack": ("7a",)}
    assert gang.describe().endswith(
        "on one node, with accelerator=H100 or H200, zone=eu, corp.com/rack=7a, 1 GPU, 1 CPU each"
    )


@pytest.mark.parametrize(
    ("require", "words"),
    [
        ("H100", r"gang.require must be a mapping of labels to values, not text \('H100'\)"),
        ({"accelerator": 100}, r"accelerator must be text or a list of texts, not a whole number"),
        ({"accelerator": True}, "gang.require.accelerator must be text or a list of texts, not true or false"),
        ({"accelerator": []}, "gang.require.accelerator is an empty list; name a value"),
        ({"accelerator": "!H100"}, "gang.require.accelerator='!H100' is no value of a label"),
        ({"accelerator": "in(H100)"}, "is no value of a label"),
        ({"accelerator": ["H100", None]}, "gang.require.accelerator must be text .* not nothing"),
        ({"my zone": "eu"}, "gang.require: 'my zone' is no label of a node"),
        ({1: "eu"}, "gang.require: 1 is no label of a node"),
        ({"accelerator": "H100", ACCELERATOR_LABEL: "A100"}, "names accelerator and ray.io.*, which are one"),
    ],
)  # fmt: skip
def test_a_requirement_that_no_node_could_meet_is_refused_in_one_line(require: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_gang({"gpus": 8, "require": require})


def test_only_nodes_that_match_count() -> None:
    gang = Gang(gpus=8, require=ON_H100)
    assert count_slots([H, A], gang) == 1
    assert count_slots([A], gang) == 0
    assert count_slots([H, A], Gang(gpus=16, hosts=2, require=ON_H100)) == 0
    words = why_infeasible([node("h", gpus=4, kind="H100"), A], gang)
    assert words.endswith("nodes have h: 64 CPU, 4 GPU (1 without the labels of gang.require left out)")


@pytest.mark.parametrize(
    ("require", "words"),
    [
        (
            {"zune": ("eu",)},
            "no node has the label zune that gang.require names: the nodes have accelerator=A100, H100; zone=eu, us; "
            "name one of these, or start nodes with `ray start --labels zune=eu`",
        ),
        (
            {ACCELERATOR_LABEL: ("H200", "B200")},
            "no node has accelerator=H200 or B200 as gang.require has it: the nodes have accelerator=A100, H100; ask "
            "for one of these, or set wait_s if such a node is to come",
        ),
        (
            {**ON_H100, "zone": ("us",)},
            "no node has all of gang.require (accelerator=H100, zone=us): h has accelerator=H100, zone=eu; a has "
            "accelerator=A100, zone=us; leave one out",
        ),
    ],
)  # fmt: skip
def test_a_label_that_no_node_has_is_said_with_those_that_there_are(
    require: Mapping[str, tuple[str, ...]], words: str
) -> None:
    assert why_infeasible([H, A], Gang(gpus=8, require=require)) == words


def test_a_label_that_no_node_has_is_waited_for_as_long_as_a_node_is(tmp_path: Path) -> None:
    gang = Gang(gpus=8, require=ON_H100)
    at_once = Simulation(tmp_path / "a", gang=gang)
    assert set(at_once.run().values()) == {"INFEASIBLE"}
    assert at_once.clock.now < 30
    assert "the nodes have no labels" in at_once.events()[-1]["why"]
    patient = Simulation(tmp_path / "b", gang=gang, limits=Limits(wait_s=600.0, stall_s=10_000.0))
    patient.until(lambda: patient.clock.now > 300)
    patient.cluster.all_nodes = [H]
    patient.cluster.free = {"h": 1}
    patient.cluster.place_waiting()
    assert set(patient.run().values()) == {"DONE"}


def test_the_plan_says_which_nodes_match(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = make_spec(tmp_path, gang=Gang(gpus=4, require=ON_H100))
    print_plan(make_plan(spec, [H, A]))
    lines = capsys.readouterr().out.splitlines()
    assert (
        "gang: 4 rank(s) on one node, with accelerator=H100, 1 GPU, 1 CPU each; restart: checkpoint; 3 attempts"
        in lines
    )
    assert "node h: 64 CPU, 8 GPU: 2 gang(s) (accelerator=H100)" in lines
    assert "node a: 64 CPU, 8 GPU: not for this gang (accelerator=A100)" in lines
    assert "slots: 2 gang(s) at once" in lines
    assert not [line for line in lines if line.startswith("priority")]
    spec = replace(spec, priority=-2, preemptible=True, gang=Gang(gpus=8, same_gpu=True))
    SweepDirectory(LocalStorage(tmp_path)).write_state("test", [Run(key=KEY, accelerator="A100")], 0.0)
    print_plan(make_plan(spec, [H, A]))
    lines = capsys.readouterr().out.splitlines()
    assert "priority: -2 among the sweeps of the cluster; its gangs make way for a higher one" in lines
    assert "node h: 64 CPU, 8 GPU: not for this gang (accelerator=H100)" in lines


def test_what_is_required_and_what_is_avoided_are_asked_for_together() -> None:
    assert select_nodes(ON_H100, ()) == {ACCELERATOR_LABEL: "in(H100)"}
    assert select_nodes(ON_H100, ("x", "y")) == {ACCELERATOR_LABEL: "in(H100)", "ray.io/node-id": "!in(x,y)"}
    assert select_nodes({"ray.io/node-id": ("x", "y")}, ("x",)) == {"ray.io/node-id": "in(y)"}
    bad = Run(key=KEY, state=State.QUEUED, bad_nodes=("h",))
    situation = situation_on([H, A, node("h2", kind="H100")], Gang(gpus=8, require=ON_H100))
    command = place(bad, [bad], situation)
    assert (command.avoid, command.require) == (("h",), ON_H100)
    only = place(bad, [bad], situation_on([H, A], Gang(gpus=8, require=ON_H100)))
    assert only.avoid == ()  # the other node is none that it could go to


def test_a_group_is_asked_for_with_a_selector_for_each_of_its_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(ray_gang, "placement_group", lambda _bundles, **options: asked.append(options))
    gang = Gang(gpus=16, hosts=2, require=ON_H100)
    ray_backend.RayBackend(gang).submit(Submit(key=KEY, group=1, avoid=("x",), require=gang.require))
    selector = {ACCELERATOR_LABEL: "in(H100)", "ray.io/node-id": "!in(x)"}
    assert asked[0]["bundle_label_selector"] == [selector, selector]
    RayGang(KEY, 1, Gang())
    assert asked[1]["bundle_label_selector"] is None


def test_a_placed_gang_knows_what_ray_calls_the_gpus_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gang, "placement_group", lambda *_arguments, **_options: None)
    table = {"state": "CREATED", "bundles_to_node_id": {0: "h"}}
    monkeypatch.setattr(ray_gang, "placement_group_table", lambda _group: table)
    facts = {"NodeManagerAddress": "10.0.0.4", "Labels": dict(H.labels)}
    monkeypatch.setattr(ray_gang, "find_node", lambda _node_id: facts)
    gang = RayGang(KEY, 1, Gang(gpus=1))
    (placed,) = gang.poll()
    assert gang.phase is Phase.PLACED
    assert isinstance(placed, states.Placed)
    assert (placed.node, placed.accelerator) == ("10.0.0.4", "H100")


def test_rays_names_of_gpus_are_told_from_the_names_of_their_driver() -> None:
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    for model in (
        "NVIDIA H100 80GB HBM3", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "Tesla V100-SXM2-16GB", "NVIDIA L40S",
        "NVIDIA A10G", "NVIDIA GH200 480GB", "NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA TITAN V",
        "NVIDIA GeForce RTX 5090", "Quadro RTX 6000",
    ):  # fmt: skip
        assert accelerator_type(model) == NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(model), model
    assert accelerator_type("") == ""


def test_local_takes_this_machines_gpu_for_what_is_required_and_no_other_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Node(node_id=HERE, name="here", resources={"CPU": 8, "GPU": 1}, labels={ACCELERATOR_LABEL: "H100"})
    monkeypatch.setattr(sweep, "this_machine", lambda: here)
    sweep.check_local_labels(make_spec(tmp_path, gang=Gang(gpus=1, require=ON_H100)))
    for require, words in (
        ({ACCELERATOR_LABEL: ("A100",)}, "--local runs on this machine: no node has accelerator=A100 as gang.require"),
        ({"zone": ("eu",)}, "--local runs on this machine: no node has the label zone that gang.require names"),
    ):
        spec = make_spec(tmp_path, gang=Gang(gpus=1, require=require))
        with pytest.raises(SweepError, match=words):
            sweep.run_sweep(spec, Options(is_local=True))
    assert not (tmp_path / "sweep.json").exists()


def situation_on(nodes: list[Node], gang: Gang) -> Situation:
    """Return a situation on these nodes."""
    return Situation(now=0.0, gang=gang, limits=Limits(), slots=count_slots(nodes, gang), nodes=tuple(nodes))


MIXED = [
    node("a1", kind="A100"),
    node("h1", kind="H100"),
    node("h2", kind="H100"),
    node("a2", kind="A100"),
    node("h3", kind="H100"),
]


def wishes(runs: list[Run], nodes: list[Node], gang: Gang) -> list[str]:
    """Return the nodes where the gangs of runs that wait would best be."""
    commands = decide({run.key: run for run in runs}, situation_on(nodes, gang))
    return [command.prefer for command in commands if isinstance(command, Submit)]


def queued(*seeds: int) -> list[Run]:
    """Return runs that wait for a place."""
    return [Run(key=RunKey(seed=seed), state=State.QUEUED) for seed in seeds]


def placed_on(seed: int, where: Node, *, at: float = 5.0) -> Run:
    """Return a run that trains on a node."""
    return Run(
        key=RunKey(seed=seed), state=State.TRAIN, has_group=True, group=1, attempt=1, node_id=where.node_id,
        accelerator=where.accelerator, placed_at=at, since=at, progress_at=at, phase="train",
    )  # fmt: skip


def test_seeds_would_rather_be_on_the_model_on_which_the_most_find_room_or_the_first_one_is() -> None:
    gang = Gang(gpus=8)
    assert wishes(queued(1, 2, 3), MIXED, gang) == ["h1", "h2", "h3"]
    assert wishes([placed_on(9, MIXED[0]), *queued(1)], MIXED, gang) == ["a2"]
    assert wishes([placed_on(8, MIXED[1], at=9.0), placed_on(9, MIXED[0]), *queued(1)], MIXED, gang) == ["a2"]
    assert wishes(queued(1), [MIXED[1], MIXED[2]], gang) == [""]  # they are alike: Ray knows best
    assert wishes(queued(1), MIXED, Gang(cpus=4)) == [""]
    done = Run(key=RunKey(seed=9), state=State.DONE, attempt=1, accelerator="A100")  # by an earlier driver
    assert wishes([done, *queued(1, 2)], MIXED, gang) == ["a1", "a2"]
    (again,) = queued(1)
    begun = Run(key=again.key, state=State.QUEUED, attempt=1, accelerator="H100")
    assert wishes([done, begun], MIXED, gang) == ["h1"]  # its checkpoint is of that model


def test_with_same_gpu_no_other_model_counts_or_is_asked_for() -> None:
    gang = Gang(gpus=8, same_gpu=True)
    assert gang_now(gang, queued(1), MIXED).require == ON_H100
    on_a = gang_now(gang, [placed_on(9, MIXED[0])], MIXED)
    assert count_slots(MIXED, on_a) == 2
    commands = decide({run.key: run for run in queued(1)}, situation_on(MIXED, on_a))
    assert [command.require for command in commands if isinstance(command, Submit)] == [{ACCELERATOR_LABEL: ("A100",)}]
    assert gang_now(Gang(gpus=8), [placed_on(9, MIXED[0])], MIXED) == Gang(gpus=8)
    lost = why_infeasible([MIXED[1]], on_a)
    assert lost.startswith(
        "no node has accelerator=A100 as gang.same_gpu needs: the nodes have accelerator=H100; leave it out"
    )
    bare = [Node(node_id="n", name="n", resources={"CPU": 64, "GPU": 8})]
    assert "gang.same_gpu=true needs nodes with Ray's label" in why_infeasible(bare, gang_now(gang, (), bare))
    assert accelerator_of_sweep((), bare, gang) == ""


def test_a_spec_keeps_what_its_gang_requires(tmp_path: Path) -> None:
    plain = make_spec(tmp_path, gang=Gang(gpus=1)).to_json()
    assert not {"require", "same_gpu"} & set(plain["gang"])  # earlier versions read it
    spec = SweepSpec.from_json({**plain, "gang": {**plain["gang"], "require": {"accelerator": "H100"}}})
    assert SweepSpec.from_json(spec.to_json()) == spec
    assert spec.gang.require == ON_H100
    assert spec.config_hash == make_spec(tmp_path, gang=Gang(gpus=1)).config_hash
