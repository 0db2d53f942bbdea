"""Sweeps on nodes that are really apart: hosts with networks, pids and names of their own, Ray with a token on each.

The driver stands on `desk`, Ray's head on `head`, gangs on the others; an S3 server and a hub stand at the switch. All
hosts share one folder, but for what one of them hides.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from results.store.reader import read_runs
from runner.errors import EXIT_INTERRUPTED
from tests.apart_tools import CPUS, DATA, UNSHARED, Cluster, Driver, ask, interfaces, write_corpus
from tests.fake_hub import REPO
from tests.netlab import SWITCH, Host, python, wait_for_ready, why_not
from tests.netlab_servers import HUB_PORT, S3_PORT
from tests.ray_tools import wait_until
from tests.small_run import TOKENIZER
from tests.smallest import smallest
from tests.sweep_tools import scores_of, state_of, write_faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four hosts with Ray, and servers at the switch; afterwards nothing of them may be left."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    write_corpus(folder / DATA)
    (folder / UNSHARED).mkdir()
    before = interfaces()
    cluster = Cluster(folder)
    try:
        servers = cluster.lab.start(
            python("-m", "tests.netlab_servers", SWITCH, str(folder / DATA)), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        cluster.add("head")
        cluster.add("desk")
        cluster.add("alpha", cpus=CPUS)
        cluster.add("beta", cpus=CPUS, hidden=(folder / DATA, folder / UNSHARED))
        wait_for_ready(servers)
        cluster.wait_for_nodes("desk", "alpha", "beta")
        yield cluster
    finally:
        cluster.close()
    assert interfaces() == before


def write_spec(
    cluster: Cluster,
    name: str,
    *,
    seeds: list[int],
    gang: dict[str, int],
    out: str,
    attempts: int = 1,
    **runtime: float,
) -> str:
    """Write the spec of a sweep through the whole pipeline and return its path."""
    data, path = cluster.folder / DATA, cluster.folder / f"{name}.yaml"
    spec = {
        "name": name, "preset": "tiny", "seeds": seeds, "overrides": smallest(vocab_size=8192, **runtime), "gang": gang,
        "data": {
            "train": f"{data}/fineweb_train_*.bin", "val": f"{data}/fineweb_val_*.bin",
            "tokenizer": f"{data}/{TOKENIZER.name}",
            "fetch": {"repo": REPO, "endpoint": f"http://{SWITCH}:{HUB_PORT}"},
        },
        "out": out, "limits": {"backoff_s": 0.1, "attempts": attempts},
    }  # fmt: skip
    path.write_text(json.dumps(spec))
    return str(path)


def begin_pipeline(cluster: Cluster, name: str, **settings: Any) -> Driver:
    """Begin a sweep through the whole pipeline from `desk`."""
    path = write_spec(cluster, name, **settings)
    return cluster.drive("-m", "seedsweep", "run", path, "--address", cluster.address, "--progress", "plain", log=name)


CUT_SHORT = """
import sys
from runner.spec.read import load_spec
from runner.sweep import run_sweep
from runner.work import Options
options = Options(address={address!r}, target="tests.stub_work:cut_short_pipeline", progress="plain")
sys.exit(run_sweep(load_spec({path!r}), options))
"""
LEFT = """
import json
from results.store.reader import read_runs
from runner.folder.storage import open_storage
storage, folder = open_storage({out!r}), "seeds/seed=1-repeat=0"
rows = read_runs({out!r}).frame[["seed", "state", "post_ttt_bpb", "pre_ttt_bpb", "node_label"]].to_dict("records")
train = json.loads(storage.read(folder + "/stages/train.json"))
print(json.dumps(dict(rows=rows, train=train, logs=storage.names(folder + "/logs"))))
"""
SEEN = """
import os
for folder, _, names in os.walk({folder!r}):
    for name in names:
        print(os.stat(os.path.join(folder, name)).st_dev, os.path.join(folder, name), sep=":")
"""
APART, BOTH = (
    f"s3://sweeps/{name}?endpoint_override={SWITCH}:{S3_PORT}&scheme=http&region=us-east-1"
    for name in ("apart", "both")
)
PAIR = {"ranks": 2, "hosts": 2}


@pytest.fixture(scope="module")
def begun(cluster: Cluster) -> dict[str, Driver]:
    """Return the drivers of four sweeps that need no host to fail, at work at once: most of it is waiting for starts.

    stored: two seeds behind a URI, a gang on each of the two nodes, one without data. two and both: a gang over the two
    nodes, in a shared folder and behind a URI. unshared: the same in a folder that one of them does not see.
    """
    stored = begin_pipeline(cluster, "stored", seeds=[1, 2], gang={"ranks": 2}, out=APART)
    wait_until(lambda: stored.text().count(" STARTING ") == 2, 120, "a gang has no place")  # on a node of its own
    path = write_spec(cluster, "both", seeds=[1], gang=PAIR, out=BOTH, attempts=2, checkpoint_every_s=0.001)
    return {
        "stored": stored,
        "two": begin_pipeline(cluster, "two", seeds=[1], gang=PAIR, out=str(cluster.folder / "two")),
        "both": cluster.drive("-c", CUT_SHORT.format(address=cluster.address, path=path), log="both"),
        "unshared": cluster.drive_stub(cluster.folder / UNSHARED / "out", gang=PAIR, seeds=[1]),
    }


def what_is_left(cluster: Cluster, out: str) -> dict[str, Any]:
    """Return the rows of a sweep in the store, and of its first seed the record of training and the names of logs."""
    return dict(json.loads(ask(cluster.hosts["desk"], LEFT.format(out=out))))


@pytest.fixture(scope="module")
def stored(cluster: Cluster, begun: dict[str, Driver]) -> list[dict[str, Any]]:
    """Return the rows of the sweep of two seeds."""
    assert begun["stored"].wait(200) == 0, begun["stored"].text()
    return list(what_is_left(cluster, APART)["rows"])


def test_gangs_on_two_nodes_leave_their_results_in_the_store_and_one_fetches_its_data(
    cluster: Cluster, stored: list[dict[str, Any]]
) -> None:
    assert [(row["seed"], row["state"]) for row in sorted(stored, key=lambda row: row["seed"])] == [
        (1, "DONE"), (2, "DONE"),
    ]  # fmt: skip
    assert {row["node_label"] for row in stored} == {"node-0", "node-1"}
    text = (cluster.folder / "stored.log").read_text()
    assert all(cluster.hosts[name].address in text for name in ("alpha", "beta"))


def test_a_gang_over_two_hosts_scores_the_same_bits(
    cluster: Cluster, begun: dict[str, Driver], stored: list[dict[str, Any]]
) -> None:
    assert begun["two"].wait(200) == 0, begun["two"].text()
    out = cluster.folder / "two"
    (row,) = read_runs(out).frame.to_dict("records")
    assert scores(row) == scores(next(row for row in stored if row["seed"] == 1))
    assert row["node_label"] == "node-0+node-1"
    logs = sorted((out / "seeds" / "seed=1-repeat=0" / "logs").glob("*.log"))
    assert ["interface to 10.77.0." in log.read_text() for log in logs] == [True, True]
    assert all(": eth0" in log.read_text() for log in logs)


def scores(row: dict[str, Any]) -> tuple[float, float]:
    """Return what must not depend on where a gang works, to the bit."""
    return row["pre_ttt_bpb"], row["post_ttt_bpb"]


def test_a_gang_over_two_hosts_that_share_no_folder_goes_on_from_the_store(
    cluster: Cluster, begun: dict[str, Driver], stored: list[dict[str, Any]]
) -> None:
    assert begun["both"].wait(200) == 0, begun["both"].text()
    left = what_is_left(cluster, BOTH)
    (row,) = (row for row in left["rows"] if row["state"] == "DONE")
    assert scores(row) == scores(next(row for row in stored if row["seed"] == 1))
    assert left["train"]["metrics"]["num_resumes"] == 1
    assert {f"attempt={attempt}-rank={rank}.log" for attempt in (1, 2) for rank in (0, 1)} <= set(left["logs"])
    folders = [
        set(ask(cluster.hosts[name], SEEN.format(folder=str(cluster.scratch))).split()) for name in ("alpha", "beta")
    ]
    assert all(folders)
    assert folders[0].isdisjoint(folders[1])  # neither sees a file of the other


def test_out_that_a_node_does_not_see_is_refused_with_the_nodes_address(
    cluster: Cluster, begun: dict[str, Driver]
) -> None:
    assert begun["unshared"].wait(200) != 0
    words = f"node {cluster.hosts['beta'].address} does not see the driver's {cluster.folder / UNSHARED / 'out'}"
    assert words in begun["unshared"].text()


PATIENT = "tests.stub_work:patient_gang_work"


def events(out: Path) -> list[dict[str, Any]]:
    """Return every transition."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def failures(out: Path) -> list[dict[str, Any]]:
    """Return what ended attempts."""
    return [event["failure"] for event in events(out) if event.get("failure")]


def the_run(out: Path) -> dict[str, Any]:
    """Return the one run of a sweep as state.json shows it, {} before it does."""
    if not (out / "state.json").exists():
        return {}
    (run,) = json.loads((out / "state.json").read_text())["runs"]
    return dict(run)


def test_ranks_of_either_host_that_die_or_hang_are_told_of_by_their_own_node(cluster: Cluster) -> None:
    out = cluster.folder / "faults"
    write_faults(
        out,
        {"attempt": 1, "rank": 1, "stage": "train", "step": 6, "do": "kill"},
        {"attempt": 2, "rank": 1, "stage": "train", "step": 6, "do": "hang"},
    )
    driver = cluster.drive_stub(
        out, gang=PAIR, seeds=[1], target="tests.stub_work:gang_work",
        limits={"stall_s": 5.0, "attempts": 3},
    )  # fmt: skip
    assert driver.wait(120) == 0, driver.text()
    died, hung = failures(out)
    first, second, _ = (event["node"].split(", ") for event in events(out) if event["to"] == "PLACED")
    assert (died["node"], hung["node"]) == (first[1], second[1])
    assert (died["kind"], died["rank"], hung["kind"], hung["rank"]) == ("died", 1, "stalled", 1)
    assert died["message"].startswith("process killed by SIGKILL")
    logs = out / "seeds" / "seed=1-repeat=0" / "logs"
    assert "commit_fault" in (logs / "attempt=2-rank=1.stacks.txt").read_text()
    assert "gang_work" in (logs / "attempt=2-rank=0.stacks.txt").read_text()
    assert scores_of(out).keys() == {1}


def test_a_host_that_comes_back_costs_nothing_and_one_that_does_not_a_preemption(cluster: Cluster) -> None:
    out, beta = cluster.folder / "cut", cluster.hosts["beta"]
    out.mkdir()
    (out / "patience.json").write_text("[25, 0, 1]")
    driver = cluster.drive_stub(out, gang=PAIR, seeds=[1], target=PATIENT, limits={"heartbeat_s": 9.0, "attempts": 1})
    wait_until(lambda: the_run(out).get("step", 0) > 20, 60, "it never trained")
    beta.cut()
    step = settled_step(out)
    beta.mend()
    wait_until(lambda: the_run(out)["step"] > step + 10, 15, "it did not go on")
    assert (the_run(out)["attempt"], the_run(out)["preemptions"]) == (1, 0)
    beta.cut()
    cluster.add("gamma", cpus=CPUS)
    wait_until(lambda: bool(failures(out)), 60, "a host that is cut off was not missed")
    beta.mend()  # too late for the gang, maybe in time for Ray
    wait_until(lambda: not ranks_on(beta), 60, "ranks are left on a host that came back too late")
    assert driver.wait(90) == 0, driver.text()
    run = the_run(out)
    assert (run["state"], run["attempt"], run["preemptions"], run["failures"]) == ("DONE", 2, 1, 0)
    (failure,) = failures(out)
    assert (failure["kind"], failure["node"]) == ("node_lost", beta.address)
    assert sorted(run["node"].split(", ")) == [cluster.hosts[name].address for name in ("alpha", "gamma")]


def settled_step(out: Path) -> int:
    """Return the step at which a cut gang stands still for three seconds."""
    time.sleep(1.5)
    step = int(the_run(out)["step"])
    time.sleep(3.0)
    assert the_run(out)["step"] == step
    return step


def ranks_on(host: Host) -> list[psutil.Process]:
    """Return the ranks that live on a host."""
    return [process for process in host.processes() if "RankActor" in " ".join(process.cmdline())]


def test_a_driver_that_is_cut_off_ends_with_its_ranks_and_another_goes_on(cluster: Cluster) -> None:
    out, desk = cluster.folder / "lonely", cluster.hosts["desk"]
    write_faults(out, {"attempt": 1, "stage": "train", "step": 9, "do": "wait", "seconds": 600})
    driver = cluster.drive_stub(out, gang={"ranks": 2}, seeds=[1], target="tests.stub_work:gang_work",
                                limits={"stall_s": 600.0}, knocks=2, knock_s=2.5)  # fmt: skip
    wait_until(lambda: the_run(out).get("step", 0) >= 8, 60, "it never trained")
    desk.cut()
    others = [host for name, host in cluster.hosts.items() if name != "desk"]
    wait_until(lambda: not any(ranks_on(host) for host in others), 60, "ranks outlive their driver")
    assert driver.wait(60) == EXIT_INTERRUPTED, driver.text()
    assert f"Ray's head at {cluster.address} does not answer any more" in driver.text()
    desk.mend()
    again = cluster.drive_stub(
        out, on="head", gang={"ranks": 2}, seeds=[1], target="tests.stub_work:gang_work", lease_ttl_s=5.0
    )  # it took fewer knocks than usual: the lease is not a minute old
    assert again.wait(90) == 0, again.text()
    record = json.loads((out / "seeds" / "seed=1-repeat=0" / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] == [8]
    assert state_of(out) == {1: "DONE"}


def test_a_node_that_is_drained_is_left_with_a_checkpoint(cluster: Cluster) -> None:
    out = cluster.folder / "drained"
    slow = {"attempt": 1, "stage": "train", "do": "wait", "seconds": 3.0}
    write_faults(out, *({**slow, "step": step} for step in range(6, 12)))
    driver = cluster.drive_stub(out, on="head", gang={"ranks": 2}, seeds=[1], target="tests.stub_work:gang_work",
                                limits={"attempts": 1})  # fmt: skip
    wait_until(lambda: the_run(out).get("step", 0) >= 5, 60, "it never trained")
    node = the_run(out)["node_id"]
    why = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 120"
    drain = ["drain-node", "--address", cluster.address, "--node-id", node, *why.split()]
    assert cluster.hosts["head"].start(python("-m", "ray.scripts.scripts", *drain)).wait(60) == 0
    assert driver.wait(60) == 0, driver.text()
    run = the_run(out)
    assert (run["state"], run["attempt"], run["preemptions"], run["failures"]) == ("DONE", 2, 1, 0)
    assert run["node_id"] != node
    record = json.loads((out / "seeds" / "seed=1-repeat=0" / "stages" / "train.json").read_text())
    assert record["metrics"]["resumed_at_steps"] in ([4], [8])
