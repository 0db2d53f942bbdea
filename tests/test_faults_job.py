"""The whole way through `ray job submit`: a job that succeeds, one whose seed fails, one that is stopped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.micro import OVERRIDES, corpus, data_section
from tests.ray_tools import ROOT, wait_until
from tests.sweep_tools import scores_of, state_of

pytestmark = pytest.mark.slow
__all__ = ["corpus"]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A cluster of one node with a job server, on loopback, with token authentication and a token of its own."""
    folder = tmp_path_factory.mktemp("head")
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    gcs, dashboard, agent = free_port(), free_port(), free_port()  # the agent's own default is one for all clusters
    env = {
        **os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    env.pop("RAY_ADDRESS", None)
    temp = f"/tmp/seedsweep-head-{os.getpid()}"  # sockets need a short path
    command = [
        "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--num-cpus=2",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={temp}",
        f"--dashboard-agent-listen-port={agent}", "--object-store-memory=80000000", "--disable-usage-stats",
    ]  # fmt: skip
    with (folder / "ray.log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_until(lambda: is_open(dashboard), 90, f"no job server: {(folder / 'ray.log').read_text()}")
        yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        shutil.rmtree(temp, ignore_errors=True)


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Return whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the code and nothing else, as somebody would submit it."""
    folder = tmp_path_factory.mktemp("tree")
    for package in ("jobs", "model", "results", "runner"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def write_spec(tree: Path, out: Path, corpus: Path, **overrides: Any) -> str:
    """Write a spec of one smallest seed into the working directory and return its path there."""
    sections = {name: {**section, **overrides.get(name, {})} for name, section in OVERRIDES.items()}
    spec = {
        "name": out.name, "preset": "tiny", "seeds": [7], "gang": {"cpus": 1}, "out": str(out), "overrides": sections,
        "data": data_section(corpus), "limits": {"attempts": 1},
    }  # fmt: skip
    path = tree / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path.name


def seedsweep(tree: Path, head: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """Run a seedsweep command in the working directory."""
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words], cwd=tree, env=head, capture_output=True, text=True, timeout=240
    )


def test_a_submitted_sweep_is_followed_to_its_end(
    head: dict[str, str], tree: Path, corpus: Path, tmp_path: Path
) -> None:
    spec = write_spec(tree, tmp_path / "good", corpus)
    address = head["RAY_API_SERVER_ADDRESS"]
    done = seedsweep(tree, head, "submit", spec, "--address", address, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed=7 DONE" in done.stdout
    assert set(scores_of(tmp_path / "good")) == {7}
    record = json.loads((tmp_path / "good" / "sweep.json").read_text())
    assert record["git_commit"] == "unknown"  # the tree is no repository, and says so


def test_a_seed_that_fails_makes_a_plain_ray_job_fail(
    head: dict[str, str], tree: Path, corpus: Path, tmp_path: Path
) -> None:
    spec = write_spec(tree, tmp_path / "bad", corpus, quant={"size_limit_bytes": 1, "on_oversize": "fail"})
    words = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs.cli", "run", spec]
    done = subprocess.run(words, cwd=tree, env=head, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed=7 FAILED" in done.stdout
    assert state_of(tmp_path / "bad") == {7: "FAILED"}


def test_a_stopped_job_leaves_a_cancelled_sweep(head: dict[str, str], tree: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    spec = write_spec(tree, out, corpus, train={"max_steps": 100_000})
    address = head["RAY_API_SERVER_ADDRESS"]
    submitted = seedsweep(tree, head, "submit", spec, "--address", address)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = submitted.stdout.split(":")[0]
    wait_until(lambda: (out / "state.json").exists() and state_of(out).get(7) == "TRAIN", 120, "never trained")
    begun = time.monotonic()
    subprocess.run(["ray", "job", "stop", job], env=head, capture_output=True, timeout=60, check=True)
    status = seedsweep(tree, head, "status", str(out), "--format", "json")
    assert json.loads(status.stdout)["counts"] == {"CANCELLED": 1}, status.stdout
    assert time.monotonic() - begun < 60
    assert list((out / "seeds" / "seed=7-repeat=0" / "checkpoints").rglob("step-*.json"))
