"""What others start a sweep with: Slurm's script on made-up nodes, manifests, the image and the SkyPilot task."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from runner.spec.read import load_spec
from tests import kuberay

ROOT = Path(__file__).parent.parent
LAUNCHERS = ROOT / "jobs" / "launchers"
SBATCH = LAUNCHERS / "slurm" / "sweep.sbatch"

SCONTROL = "#!/usr/bin/env bash\nprintf '%s\\n' $FAKE_NODES\n"
# a job step: the command runs here, as if it were on the node
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$FAKE/log"
while [[ $1 == --* ]]; do
    [[ $1 == --nodelist=* ]] && export FAKE_NODE=${1#*=}
    shift
done
exec "$@"
"""
HOSTNAME = """#!/usr/bin/env bash
echo "${FAKE_IP:-10.1.2.3 10.9.9.9}"
"""
RAY = """#!/usr/bin/env bash
echo "$FAKE_NODE token=$RAY_AUTH_TOKEN mode=$RAY_AUTH_MODE ray $*" >>"$FAKE/log"
[[ $FAKE_NODE == "$FAKE_BAD" ]] && exit 1
sleep 300 &
trap 'rm -f "$FAKE/up-$FAKE_NODE"; kill $!; exit 0' TERM
echo "$$" >"$FAKE/up-$FAKE_NODE"
wait
"""
PYTHON = """#!/usr/bin/env bash
cat >/dev/null
ls "$FAKE"/up-* 2>/dev/null | wc -l
"""
SEEDSWEEP = """#!/usr/bin/env bash
sleep "$FAKE_RUN_S" &
trap 'echo "seedsweep got TERM" >>"$FAKE/log"; kill $!; sleep 0.3; exit 3' TERM
echo "seedsweep $*" >>"$FAKE/log"
wait
exit "$FAKE_CODE"
"""
FAKES = {"scontrol": SCONTROL, "srun": SRUN, "hostname": HOSTNAME, "ray": RAY, "python": PYTHON, "seedsweep": SEEDSWEEP}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Slurm has given this job three nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in FAKES.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(tmp_path), "FAKE_NODES": "n1 n2 n3", "FAKE_BAD": "",
        "FAKE_RUN_S": "0", "FAKE_CODE": "0", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_ON_NODE": "64", "SEEDSWEEP_BIN": str(tools), "SEEDSWEEP_WAIT_S": "30",
    }  # fmt: skip


def batch(slurm: dict[str, str], *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script."""
    return subprocess.run(
        ["bash", str(SBATCH), *arguments], env=slurm | changes, capture_output=True, text=True, timeout=120
    )


def log_of(slurm: dict[str, str]) -> list[str]:
    """Return what the fakes were asked for."""
    log = Path(slurm["FAKE"]) / "log"
    return log.read_text().splitlines() if log.exists() else []


def assert_all_ended(slurm: dict[str, str]) -> None:
    """Fail if a node's Ray was left running."""
    assert list(Path(slurm["FAKE"]).glob("up-*")) == []


def test_slurm_starts_ray_on_every_node_head_first_and_ends_it(slurm: dict[str, str]) -> None:
    done = batch(slurm, "spec.yaml", "--out", "/shared/my sweep")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in log_of(slurm) if " ray start " in line and not line.startswith("srun")]
    head, *workers = [shlex.split(line) for line in lines]
    assert head[0] == "n1"
    assert {"--head", "--node-ip-address=10.1.2.3", "--port=24711", "--num-cpus=64", "--block"} <= set(head)
    assert {words[0] for words in workers} == {"n2", "n3"}
    assert all("--address=10.1.2.3:24711" in words and "--head" not in words for words in workers)
    tokens = {words[1] for words in (head, *workers)}
    assert len(tokens) == 1, "one token for all nodes"
    assert len(tokens.pop()) == len("token=") + 64
    assert {words[2] for words in (head, *workers)} == {"mode=token"}
    assert (
        log_of(slurm)[-1] == "seedsweep run spec.yaml --out /shared/my sweep --address 10.1.2.3:24711 --progress plain"
    )
    assert_all_ended(slurm)


@pytest.mark.parametrize("code", ["1", "2", "3"])
def test_slurm_ends_with_the_code_of_the_sweep(slurm: dict[str, str], code: str) -> None:
    assert batch(slurm, "spec.yaml", FAKE_CODE=code, FAKE_NODES="n1").returncode == int(code)
    assert_all_ended(slurm)


def test_slurm_passes_the_end_of_the_time_on_and_waits_for_the_checkpoint(slurm: dict[str, str]) -> None:
    process = subprocess.Popen(
        ["bash", str(SBATCH), "spec.yaml"], env=slurm | {"FAKE_RUN_S": "200"}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not any(line.startswith("seedsweep run") for line in log_of(slurm)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 3
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert log_of(slurm)[-1] == "seedsweep got TERM"
    assert_all_ended(slurm)


def test_slurm_says_which_nodes_did_not_come(slurm: dict[str, str]) -> None:
    done = batch(slurm, "spec.yaml", FAKE_BAD="n3", SEEDSWEEP_WAIT_S="3")
    assert done.returncode == 1
    assert "2 of 3 node(s) joined Ray within 3 s" in done.stderr
    assert not any(line.startswith("seedsweep") for line in log_of(slurm))
    assert_all_ended(slurm)


def test_slurm_refuses_what_cannot_work_in_one_line(slurm: dict[str, str]) -> None:
    assert batch(slurm).stderr == "usage: sbatch sweep.sbatch SPEC [options of seedsweep run]\n"
    loopback = batch(slurm, "spec.yaml", FAKE_IP="127.0.1.1")
    assert (loopback.returncode, "set SEEDSWEEP_HEAD_IP" in loopback.stderr) == (2, True)
    assert batch(slurm, "spec.yaml", FAKE_IP="127.0.1.1", SEEDSWEEP_HEAD_IP="10.0.0.9").returncode == 0
    outside = {name: value for name, value in slurm.items() if not name.startswith("SLURM")}
    assert "give it to sbatch" in batch(outside, "spec.yaml").stderr


def tool(name: str) -> str:
    """Return the path of a linter; skip where it is not installed."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    scripts = [SBATCH, ROOT / ".ci" / "run"]
    for part in ("setup", "run"):
        scripts.append(tmp_path / f"{part}.sh")
        variables = "".join(f"{name}={shlex.quote(value)}\n" for name, value in task["envs"].items())
        scripts[-1].write_text(f"#!/bin/bash\n# shellcheck disable=SC2034\n{variables}{task[part]}")
    done = subprocess.run([tool("shellcheck"), *map(str, scripts)], capture_output=True, text=True, timeout=60)
    assert done.stdout == ""


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run(
        [tool("hadolint"), "--no-color", str(LAUNCHERS / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == ""


def test_the_image_is_not_roots_watches_itself_and_copies_what_is_there() -> None:
    lines = (LAUNCHERS / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line[:1].isupper()]
    assert [line[1] for line in words if line[0] == "USER"] == ["1001:1001"]
    assert any(line[0] == "HEALTHCHECK" for line in words)
    assert next(line[1] for line in words if line[0] == "FROM").startswith("nvidia/cuda:")
    copied = [name for line in words if line[0] == "COPY" for name in line[1:-1] if not name.startswith("--")]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"model", "runner", "results", "jobs", "pyproject.toml", "constraints.txt"} <= set(copied)


def schema() -> Any:
    """Return the fields that our manifests may use."""
    found = json.loads((kuberay.FOLDER / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def manifest(name: str) -> Any:
    """Return a manifest."""
    return yaml.safe_load((kuberay.FOLDER / name).read_text())


@pytest.mark.parametrize("path", kuberay.MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_fits_its_schema_and_its_gangs_fit_its_nodes(path: Path) -> None:
    job = manifest(path.name)
    jsonschema.validate(job, schema())
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "jobs.cli", "run"]
    sweep = load_spec(ROOT / words[4], out=words[6])
    limits = [
        group["template"]["spec"]["containers"][0]["resources"]["limits"]
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    ]
    (node,) = (limit for limit in limits if "nvidia.com/gpu" in limit)
    assert int(node["nvidia.com/gpu"]) >= sweep.gang.gpus
    assert int(node["cpu"]) >= sweep.gang.share["CPU"]


@pytest.mark.parametrize(
    ("name", "part", "wrong"),
    [
        ("rayjob.yaml", (), {"workerGroupSpec": []}),
        ("autoscaling.yaml", ("autoscalerOptions",), {"upscalingMode": "Fast"}),
        ("autoscaling.yaml", ("autoscalerOptions",), {"idleTimeoutSecond": 3}),
        ("fault-tolerance.yaml", ("gcsFaultToleranceOptions",), {"redisAdress": "x"}),
        ("fault-tolerance.yaml", ("gcsFaultToleranceOptions", "redisPassword"), {"vale": "x"}),
        ("rayjob.yaml", ("authOptions",), {"mode": "tokens"}),
    ],
)
def test_a_misspelled_field_is_refused(name: str, part: tuple[str, ...], wrong: dict[str, Any]) -> None:
    job = manifest(name)
    place = job["spec"]["rayClusterSpec"]
    for step in part:
        place = place[step]
    place |= wrong
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, schema())


def test_nodes_that_come_and_go_are_waited_for() -> None:
    job = manifest("autoscaling.yaml")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is True
    sweep = load_spec(ROOT / shlex.split(job["spec"]["entrypoint"])[4])
    assert (sweep.limits.wait_s, sweep.limits.restart) == (1800.0, "checkpoint")
    assert sweep.limits.max_gangs is not None
    assert 1 < sweep.limits.max_gangs <= cluster["workerGroupSpecs"][0]["maxReplicas"]
    assert sweep.config.runtime.checkpoint_every_s


def test_the_driver_does_not_run_on_the_head_that_may_be_replaced() -> None:
    job = manifest("fault-tolerance.yaml")
    wanted = json.loads(job["spec"]["entrypointResources"])
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    has = [json.loads(json.loads(group["rayStartParams"].get("resources", '"{}"'))) for group in groups]
    assert [found for found in has if found == wanted], has
    assert "resources" not in job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]


def definition(version: str = "v1") -> dict[str, Any]:
    """Return a small definition in the form of the operator's."""
    spec = {
        "type": "object",
        "properties": {
            "entrypoint": {"type": "string"},
            "port": {"x-kubernetes-int-or-string": True},
            "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
            "free": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    whole = {"type": "object", "properties": {"apiVersion": {}, "kind": {}, "metadata": {}, "spec": spec}}
    served = {"name": version, "served": True, "schema": {"openAPIV3Schema": whole}}
    return {"spec": {"group": "ray.io", "names": {"kind": "RayJob"}, "versions": [served]}}


def test_a_field_that_the_operators_definition_does_not_know_is_found() -> None:
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "x"}}
    good = {"entrypoint": "x", "port": "80", "metadata": {"a": "b"}, "free": {"anything": 1}}
    assert kuberay.find_faults(definition(), {**job, "spec": good}) == []
    assert "entrypont" in kuberay.find_faults(definition(), {**job, "spec": {"entrypont": "x"}})[0]
    assert kuberay.find_faults(definition("v2"), {**job, "spec": good}) == ["version v1 is not served; there are v2"]


def test_the_skypilot_task_runs_a_spec_that_is_there_on_the_gpus_it_asks_for() -> None:
    task = yaml.safe_load((LAUNCHERS / "skypilot.yaml").read_text())
    sweep = load_spec(ROOT / task["envs"]["SPEC"], out=task["envs"]["OUT"])
    assert int(task["resources"]["accelerators"].partition(":")[2]) >= sweep.gang.gpus
    assert "ray stop" not in task["run"], "it would end SkyPilot's own Ray as well"
    assert "RAY_AUTH_TOKEN" in task["secrets"]
