"""Sweeps on nodes that are really apart: hosts with networks, pids and names of their own, Ray with a token on each.

The driver stands on `desk`, Ray's head on `head`, gangs on the others; an S3 server and a hub stand at the switch. All
hosts share one folder, but for what one of them hides.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from model.corpus.shard_file import write_shard
from runner.errors import EXIT_INTERRUPTED
from tests.fake_hub import REPO
from tests.netlab import SWITCH, Host, Lab, python, wait_for_ready, why_not
from tests.netlab_servers import HUB_PORT, S3_PORT
from tests.ray_tools import wait_until
from tests.small_run import TOKENIZER
from tests.smallest import smallest
from tests.sweep_tools import scores_of, state_of, write_faults

pytestmark = pytest.mark.slow
CPUS = 2  # of each node that works: room for one gang
GCS_PORT = 6379
# Ray gives a node up after about 15 s without an answer
ENVIRONMENT = {
    "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000", "RAY_health_check_failure_threshold": "5",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5eed" * 16, "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
DATA, UNSHARED = "data", "unshared"


class Cluster:
    """A lab with Ray on its hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # a short path: sockets lie there
        self.address = ""
        self.hosts: dict[str, Host] = {}
        self.scratch = folder / "scratch"  # where a node works whose sweep is behind a URI
        self.scratch.mkdir()
        self.lab = Lab({**ENVIRONMENT, "HF_HOME": str(folder / "hub"), "TMPDIR": str(self.scratch)})

    def add(self, name: str, *, cpus: int = 0, hidden: tuple[Path, ...] = ()) -> None:
        """Add a host and start Ray on it; the first one becomes the head."""
        host = self.hosts[name] = Host(
            self.lab, name, len(self.hosts) + 1, hidden=(*hidden, self.sessions, self.scratch)
        )
        role = ["--address", self.address] if self.address else ["--head", "--port", str(GCS_PORT),
                "--include-dashboard", "false", "--temp-dir", str(self.sessions)]  # fmt: skip
        with (self.folder / f"{name}.log").open("wb") as log:
            host.start(
                python("-m", "ray.scripts.scripts", "start", *role, "--node-ip-address", host.address, "--block",
                       "--num-cpus", str(cpus), "--object-store-memory", "80000000"),
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        if not self.address:
            self.address = f"{host.address}:{GCS_PORT}"
            knock = python("-c", f"import socket; socket.create_connection(('{host.address}', {GCS_PORT}), 1)")
            wait_until(lambda: not host.start(knock, stderr=subprocess.DEVNULL).wait(), 60, "the head did not start")

    def close(self) -> None:
        """End everything; the folder of sessions is empty outside of the hosts."""
        self.lab.close()
        self.sessions.rmdir()

    def wait_for_nodes(self, *names: str) -> None:
        """Wait until Ray knows these hosts."""
        wanted = [self.hosts[name].address for name in names]
        code = f"""
import ray, time
while not ray.is_initialized():
    try: ray.init("{self.address}", log_to_driver=False, logging_level="CRITICAL")
    except ConnectionError: time.sleep(0.5)
while not set({wanted}) <= {{node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}}: time.sleep(0.2)
"""
        ask(self.hosts["head"], code)

    def drive(self, *arguments: str, on: str = "desk", log: str = "driver") -> Driver:
        """Start a driver on a host."""
        return Driver(self.hosts[on], arguments, self.folder / f"{log}.log")

    def drive_stub(self, out: Path, *, on: str = "desk", **given: Any) -> Driver:
        """Start the driver of stub work on a host."""
        given |= {"out": str(out), "address": self.address, "on_loopback": False}
        return self.drive("-m", "tests.drive_sweep", json.dumps(given), on=on, log=out.name)


class Driver:
    """A driver on a host, and what it says."""

    def __init__(self, host: Host, arguments: tuple[str, ...], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = host.start(python(*arguments), stdout=file, stderr=subprocess.STDOUT)

    def wait(self, within_s: float) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver did not end within {within_s} s:\n{self.text()}") from None

    def text(self) -> str:
        """Return what it has said so far."""
        return self.log.read_text()


def ask(host: Host, code: str) -> str:
    """Run Python code on a host and return what it prints."""
    done = host.start(python("-c", code), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = done.communicate(timeout=120)
    assert done.returncode == 0, error.decode()
    return out.decode()


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


def interfaces() -> set[str]:
    """Return the network interfaces of this machine."""
    return set(psutil.net_if_addrs())


def write_corpus(folder: Path) -> None:
    """Write made-up shards and their tokenizer, as the hub has them."""
    folder.mkdir()
    generator = np.random.Generator(np.random.PCG64(1))
    for name, num_documents in (("val_000000", 6), ("train_000000", 60)):
        documents = [np.append([1], 300 + generator.zipf(1.3, size=120) % 7000) for _ in range(num_documents)]
        write_shard(folder / f"fineweb_{name}.bin", np.concatenate(documents))
    (folder / TOKENIZER.name).write_bytes(TOKENIZER.read_bytes())


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


def run_pipeline(cluster: Cluster, name: str, **settings: Any) -> None:
    """Run a sweep through the whole pipeline from `desk`."""
    path = write_spec(cluster, name, **settings)
    driver = cluster.drive("-m", "seedsweep", "run", path, "--address", cluster.address, "--progress", "plain",
                           log=name)  # fmt: skip
    assert driver.wait(120) == 0, driver.text()


CUT_SHORT = """
import sys
from runner.spec.read import load_spec
from runner.sweep import run_sweep
from runner.work import Options
options = Options(address={address!r}, target="tests.stub_work:cut_short_pipeline", progress="plain")
sys.exit(run_sweep(load_spec({path!r}), options))
"""
READ = """
from results.store.reader import read_runs
frame = read_runs({out!r}).frame
print(frame[["seed", "state", "post_ttt_bpb", "pre_ttt_bpb", "node_label"]].to_json(orient="records"))
"""
LEFT = """
import json
from runner.folder.storage import open_storage
storage = open_storage({out!r})
folder = "seeds/seed=1-repeat=0"
record = json.loads(storage.read(folder + "/stages/train.json"))
print(json.dumps(dict(record=record, logs=storage.names(folder + "/logs"))))
"""


@pytest.fixture(scope="module")
def stored(cluster: Cluster) -> list[dict[str, Any]]:
    """Return the rows of a sweep of two seeds behind a URI: a gang on each of the two nodes, one without data."""
    out = f"s3://sweeps/apart?endpoint_override={SWITCH}:{S3_PORT}&scheme=http&region=us-east-1"
    run_pipeline(cluster, "stored", seeds=[1, 2], gang={"ranks": 2}, out=out)
    rows: list[dict[str, Any]] = json.loads(ask(cluster.hosts["desk"], READ.format(out=out)))
    return rows


def test_gangs_on_two_nodes_leave_their_results_in_the_store_and_one_fetches_its_data(
    cluster: Cluster, stored: list[dict[str, Any]]
) -> None:
    assert [(row["seed"], row["state"]) for row in sorted(stored, key=lambda row: row["seed"])] == [
        (1, "DONE"), (2, "DONE"),
    ]  # fmt: skip
    assert {row["node_label"] for row in stored} == {"node-0", "node-1"}
    text = (cluster.folder / "stored.log").read_text()
    assert all(cluster.hosts[name].address in text for name in ("alpha", "beta"))


def test_a_gang_over_two_hosts_scores_the_same_bits(cluster: Cluster, stored: list[dict[str, Any]]) -> None:
    out = cluster.folder / "two"
    run_pipeline(cluster, "two", seeds=[1], gang={"ranks": 2, "hosts": 2}, out=str(out))
    (row,) = json.loads(ask(cluster.hosts["desk"], READ.format(out=str(out))))
    (other,) = (row for row in stored if row["seed"] == 1)
    for name in ("post_ttt_bpb", "pre_ttt_bpb"):
        assert row[name] == other[name]
    assert row["node_label"] == "node-0+node-1"
    logs = sorted((out / "seeds" / "seed=1-repeat=0" / "logs").glob("*.log"))
    assert ["interface to 10.77.0." in log.read_text() for log in logs] == [True, True]
    assert all(": eth0" in log.read_text() for log in logs)


def test_a_gang_over_two_hosts_that_share_no_folder_goes_on_from_the_store(
    cluster: Cluster, stored: list[dict[str, Any]]
) -> None:
    out = f"s3://sweeps/two?endpoint_override={SWITCH}:{S3_PORT}&scheme=http&region=us-east-1"
    path = write_spec(cluster, "both", seeds=[1], gang={"ranks": 2, "hosts": 2}, out=out, attempts=2,
                      checkpoint_every_s=0.001)  # fmt: skip
    driver = cluster.drive("-c", CUT_SHORT.format(address=cluster.address, path=path), log="both")
    assert driver.wait(120) == 0, driver.text()
    attempts = json.loads(ask(cluster.hosts["desk"], READ.format(out=out)))
    (row,) = (row for row in attempts if row["state"] == "DONE")
    (other,) = (row for row in stored if row["seed"] == 1)
    for name in ("post_ttt_bpb", "pre_ttt_bpb"):
        assert row[name] == other[name]
    left = json.loads(ask(cluster.hosts["desk"], LEFT.format(out=out)))
    assert left["record"]["metrics"]["num_resumes"] == 1
    assert {f"attempt={attempt}-rank={rank}.log" for attempt in (1, 2) for rank in (0, 1)} <= set(left["logs"])


def test_out_that_a_node_does_not_see_is_refused_with_the_nodes_address(cluster: Cluster) -> None:
    out = cluster.folder / UNSHARED / "out"
    driver = cluster.drive_stub(out, gang={"ranks": 2, "hosts": 2}, seeds=[1])
    assert driver.wait(60) != 0
    assert f"node {cluster.hosts['beta'].address} does not see the driver's {out}" in driver.text()


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
        out, gang={"ranks": 2, "hosts": 2}, seeds=[1], target="tests.stub_work:gang_work",
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
    driver = cluster.drive_stub(
        out, gang={"ranks": 2, "hosts": 2}, seeds=[1], target=PATIENT, limits={"heartbeat_s": 9.0, "attempts": 1}
    )
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
    """Return the step at which a cut gang stands still for four seconds."""
    time.sleep(1.5)
    step = int(the_run(out)["step"])
    time.sleep(4.0)
    assert the_run(out)["step"] == step
    return step


def ranks_on(host: Host) -> list[psutil.Process]:
    """Return the ranks that live on a host."""
    return [process for process in host.processes() if "RankActor" in " ".join(process.cmdline())]


def test_a_driver_that_is_cut_off_ends_with_its_ranks_and_another_goes_on(cluster: Cluster) -> None:
    out, desk = cluster.folder / "lonely", cluster.hosts["desk"]
    write_faults(out, {"attempt": 1, "stage": "train", "step": 9, "do": "wait", "seconds": 600})
    driver = cluster.drive_stub(out, gang={"ranks": 2}, seeds=[1], target="tests.stub_work:gang_work",
                                limits={"stall_s": 600.0}, knocks=2)  # fmt: skip
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
    write_faults(out, {"attempt": 1, "stage": "train", "do": "wait", "seconds": 1.0})  # at every step
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
