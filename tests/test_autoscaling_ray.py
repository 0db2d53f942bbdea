"""Ray's own autoscaler launches and removes made-up nodes of this machine, as a sweep asks for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner.errors import Infeasible
from runner.spec.gang import Gang
from runner.sweep import run_sweep
from runner.work import Options
from tests.ray_tools import TARGET, assert_nothing_is_left, listening, our_processes, sweep, wait_until
from tests.sweep_tools import QUICK, make_spec, no_data, scores_of, state_of, write_faults

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_data")]
__all__ = ["no_data"]

NODE_CPUS, MAX_NODES, IDLE_S = 2, 2, 3.0
HEAD_ID = "f" * 51 + "00000"  # the made-up nodes of the provider count up from here
STORE_BYTES = 80_000_000
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
ENVIRONMENT = {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
SEEDS = [42, 0, 1337]


def autoscaling_config(port: int) -> dict[str, Any]:
    """Return a cluster without any node but its head, which holds no gang.

    The provider is named as one of somebody else's: Ray's packages lack the file that its own name for it reads.
    """
    worker = {"CPU": NODE_CPUS, "object_store_memory": STORE_BYTES}
    nowhere = ("auth", "docker", "file_mounts")
    nothing = [
        "cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands",
        "head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands",
    ]  # fmt: skip
    return {
        "cluster_name": "made-up", "max_workers": MAX_NODES, "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0, "file_mounts_sync_continuously": False, "head_node_type": "ray.head.default",
        "provider": {
            "type": "external", "module": PROVIDER, "disable_node_updaters": True,
            "disable_launch_config_check": True, "launch_multiple": True, "head_node_id": HEAD_ID,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": MAX_NODES},
        },
        **{name: {} for name in nowhere}, **{name: [] for name in nothing},
    }  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a cluster that grows; afterwards no process of it may be left."""
    before = our_processes()
    folder = Path(tempfile.mkdtemp(prefix="ssa-", dir="/tmp"))  # short, for the paths of sockets
    try:
        with growing_cluster(folder) as found:
            yield found
        wait_until(lambda: our_processes() <= before, 20, "processes of the cluster are left")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def growing_cluster(folder: Path) -> Iterator[str]:
    """Start a head with its autoscaler on loopback, and end both and every node that it launched."""
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(autoscaling_config(port)))
    ids = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={
            "num_cpus": 0, "node_ip_address": "127.0.0.1", "gcs_server_port": port, "temp_dir": str(folder),
            "include_dashboard": False, "dashboard_port": None,  # a number that is taken leaks a socket
            "object_store_memory": STORE_BYTES, "autoscaling_config": str(config),
            "env_vars": ids,
        })  # fmt: skip
    try:
        yield str(cluster.address)
    finally:
        monitor = cluster.head_node.all_processes["monitor"][0].process.pid
        os.kill(monitor, signal.SIGSTOP)  # it launches nothing more, and what it launched stays below it
        family = psutil.Process(monitor).children(recursive=True)
        cluster.shutdown()
        for member in family:
            if member.is_running():
                member.kill()
        psutil.wait_procs(family, timeout=10)


@dataclass
class Watch:
    """What `ray status` says and which nodes there are, look by look. Files say when all work and when one has gone."""

    address: str
    all_work: Path
    one_went: Path
    texts: list[str] = field(default_factory=list)
    num_nodes: list[int] = field(default_factory=list)  # besides the head
    addresses: set[str] = field(default_factory=set)  # that processes listen on
    is_over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        """Look until told to end."""
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.autoscaler.v2.utils import ClusterStatusFormatter

        while not self.is_over.wait(0.3):
            status = get_cluster_status(self.address)
            self.texts.append(ClusterStatusFormatter.format(status))
            self.num_nodes.append(len(status.active_nodes) + len(status.idle_nodes) - 1)
            if self.num_nodes[-1] == MAX_NODES:
                self.addresses |= listening()
            if len(status.active_nodes) == MAX_NODES:  # the head holds no gang
                self.all_work.write_text("")
            if self.num_nodes[-1] < max(self.num_nodes):
                self.one_went.write_text("")

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look while the block runs."""
        thread = threading.Thread(target=self.look)
        thread.start()
        try:
            yield
        finally:
            self.is_over.set()
            thread.join()


def test_a_gang_that_no_node_type_can_hold_is_withdrawn_when_the_wait_is_over(address: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    limits = replace(QUICK, wait_s=2.0, max_gangs=2)
    with pytest.raises(Infeasible, match=r"asked for 1 rank\(s\).*3 CPU each.*none came in 2 s.*\{'CPU': 3.0\}"):
        sweep(tmp_path, address, gang=Gang(cpus=NODE_CPUS + 1), limits=limits, seeds=SEEDS)
    assert time.monotonic() - begun < 60
    assert set(state_of(tmp_path).values()) == {"INFEASIBLE"}
    assert_nothing_is_left(address)


def test_nodes_come_as_seeds_ask_for_them_and_one_that_goes_is_nobodys_failure(address: str, tmp_path: Path) -> None:
    all_work, went = tmp_path / "all-nodes-work", tmp_path / "a-node-went"
    out = tmp_path / "grown"
    # the first seed stays until the second is placed as well, the last, alone by then, until the idle node has gone
    stays = [(SEEDS[0], "train", all_work), (SEEDS[2], "evaluate", went)]
    faults = [
        {"seed": seed, "stage": stage, "step": 1, "do": "await", "file": str(file)} for seed, stage, file in stays
    ]
    write_faults(out, *faults)
    watch = Watch(address, all_work, went)
    limits = replace(QUICK, wait_s=120.0, max_gangs=MAX_NODES)
    with watch.looking():
        assert sweep(out, address, gang=Gang(cpus=NODE_CPUS), limits=limits, seeds=SEEDS) == 0
    assert max(watch.num_nodes) == MAX_NODES
    assert went.exists()
    asked = "{'CPU': 2.0} * 1 (STRICT_PACK): 2+ pending placement groups"
    assert any(asked in text for text in watch.texts), watch.texts[0]
    assert {"127.0.0.1"} <= watch.addresses <= {"127.0.0.1", "::1"}
    runs = json.loads((out / "state.json").read_text())["runs"]
    assert {(run["attempt"], run["failures"], run["preemptions"]) for run in runs} == {(1, 0, 0)}
    assert len({run["node_id"] for run in runs}) == MAX_NODES

    alone = make_spec(tmp_path / "alone", gang=Gang(cpus=NODE_CPUS), seeds=SEEDS)
    assert run_sweep(alone, Options(is_local=True, target=TARGET, progress="plain")) == 0
    assert scores_of(out) == scores_of(tmp_path / "alone")
    assert_nothing_is_left(address)
