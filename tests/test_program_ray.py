"""A made-up program through Ray: its table is what its logs say, its faults are one line each, and none survives."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from jobs.cli import main
from results import load, steps
from tests.ray_tools import ROOT, end, start_cluster, wait_until
from tests.sweep_tools import state_of

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parent / "data" / "program"
PAIR = {"cpus": 1, "ranks": 2}
# what the program of a seed does wrong
ONCE = {1: "kill", 2: "hang"}  # in its first attempt
ALWAYS = {3: "unscored", 4: "exit", 5: "vanish"}
HARMLESS = {6: "daemon", 7: "flood", 8: "stderr"}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """One node of eight CPUs for the whole module."""
    cluster = start_cluster(1)
    yield cluster.address
    cluster.shutdown()


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Assert that no process of a program, nor one that keeps it, outlives its test."""
    yield
    root = tmp_path_factory.getbasetemp()
    wait_until(lambda: not program_processes(root), 20, f"processes are left: {program_processes(root)}")


def program_processes(root: Path) -> list[str]:
    """Return the command of every living process of a program below root, and of those that stand over them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            words = process.cmdline()
            place = process.environ().get("SEEDSWEEP_OUT", words[-1] if "keeper.py" in " ".join(words) else "")
            if place.startswith(str(root)):
                found.append(f"{process.pid} {' '.join(words)}")
        except psutil.Error:
            continue
    return found


def write_spec(folder: Path, *, seeds: list[int], env: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Write a spec of the made-up program and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    limits = {"attempts": 2, "backoff_s": 0.05, "stall_s": 60.0, "stop_grace_s": 2.0, **changes.pop("limits", {})}
    plain = {
        "name": "made-up", "program": {"folder": str(PROGRAM), "env": {"STEPS": 10, **(env or {})}}, "seeds": seeds,
        "gang": {"cpus": 1}, "limits": limits, "out": str(folder / "out"), **changes,
    }  # fmt: skip
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def start(spec: Path, address: str) -> subprocess.Popen[bytes]:
    """Run a sweep in a process of its own."""
    command = [sys.executable, "-m", "jobs.cli", "run", str(spec), "--address", address, "--progress", "plain"]
    return subprocess.Popen(command, cwd=ROOT)


def failures_of(out: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the failures of every seed, in order."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in (out / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event.get("failure"):
            found.setdefault(event["seed"], []).append(event["failure"])
    return found


def mischiefs(cases: dict[int, str]) -> dict[str, str]:
    """Return the variable that tells each seed's program what to do wrong."""
    return {"MISCHIEFS": json.dumps({str(seed): name for seed, name in cases.items()}).join(("{", "}"))}


@pytest.fixture(scope="module")
def pairs(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep of gangs of two: of two seeds one rank is killed, or hangs, in the first attempt."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "once").mkdir()
    env = {**mischiefs(ONCE), "ONCE": str(folder / "once")}
    spec = write_spec(folder, seeds=[*ONCE, 42], env=env, gang=PAIR, limits={"stall_s": 40.0})
    assert main(["run", str(spec), "--address", address, "--progress", "plain"]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def singles(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a sweep in which each seed's program does something else wrong."""
    folder = tmp_path_factory.mktemp("singles")
    cases = {**ALWAYS, **HARMLESS}
    assert main(["run", str(write_spec(folder, seeds=list(cases), env=mischiefs(cases))), "--address", address]) == 1
    return folder / "out"


def test_two_ranks_over_three_seeds_give_a_table_of_what_their_logs_say(pairs: Path) -> None:
    out = pairs
    frame = load(out).query("state == 'DONE'").set_index("seed")
    assert set(frame["source"]) == {"program"}
    assert set(frame.index) == {1, 2, 42}
    for seed, row in frame.iterrows():
        log = (out / "seeds" / f"seed={seed}-repeat=0" / "logs" / f"attempt={row['attempt']}-rank=0.log").read_text()
        assert row["post_ttt_bpb"] == float(re.findall(r"quantized_ttt_lora .*val_bpb:(\S+)", log)[0])
        assert row["pre_ttt_bpb"] == float(re.findall(r"quantized val_loss.*val_bpb:(\S+)", log)[0])
        assert row["live_bpb"] == float(re.findall(r"10/10 val_loss.*val_bpb:(\S+)", log)[0])
        (model,) = (out / "seeds" / f"seed={seed}-repeat=0").rglob("final_model.int6.ptz")
        assert row["model_bytes"] == model.stat().st_size
        assert row["artifact_bytes"] == row["model_bytes"] + row["code_bytes"]
        assert (row["steps"], row["world_size"], row["num_cpus"]) == (10, 2, 2)
        curve = steps(out).query("seed == @seed and attempt == @row.attempt")
        assert curve["loss"].tolist() == [float(loss) for loss in re.findall(r"train_loss:(\S+)", log)]
    assert frame["post_ttt_bpb"].nunique() == 3


@pytest.mark.parametrize(("seed", "kind"), [(1, "died"), (2, "stalled")])
def test_a_gang_that_lost_a_process_or_hangs_starts_again_from_scratch(pairs: Path, seed: int, kind: str) -> None:
    (failure,) = failures_of(pairs)[seed]
    assert failure["kind"] == kind
    assert state_of(pairs)[seed] == "DONE"
    logs = pairs / "seeds" / f"seed={seed}-repeat=0" / "logs"
    if kind == "died":
        assert failure["rank"] == 1
        assert failure["message"].startswith("python train_gpt.py killed by SIGKILL")
    else:
        assert "in misbehave" in (logs / "attempt=1-rank=1.stacks.txt").read_text()
        assert "all_reduce" in (logs / "attempt=1-rank=0.stacks.txt").read_text()
    (row,) = load(pairs).query("seed == @seed and state == 'DONE'").to_dict("records")
    assert (row["attempt"], row["steps"], row["code_changed"]) == (2, 10, False)


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (3, "the program ended with 0, but no score: no line of output of rank 0"),
        (4, "python train_gpt.py exited with code 3, last in its log: 'about to give up'"),
        (5, "the program removed its working folder, and with it what it left"),
    ],
)
def test_a_program_that_never_scores_fails_twice_in_one_line(singles: Path, seed: int, words: str) -> None:
    failures = failures_of(singles)[seed]
    assert state_of(singles)[seed] == "FAILED"
    assert len(failures) == 2
    assert all(failure["message"].startswith(words) for failure in failures)
    assert all("\n" not in failure["message"] for failure in failures)


@pytest.mark.parametrize("seed", HARMLESS)
def test_what_does_no_harm_is_done_at_the_first_attempt(singles: Path, seed: int) -> None:
    assert seed not in failures_of(singles)
    row = load(singles).set_index("seed").loc[seed]
    assert (row["state"], row["attempt"]) == ("DONE", 1)
    findings = json.loads(row["provenance_json"])["findings"]
    left = ["rank 0 ended and left 1 process(es) behind, which were ended"]
    assert findings == (left if HARMLESS[seed] == "daemon" else [])


def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on_and_ends_when_told(
    address: str, tmp_path: Path
) -> None:
    spec, out = write_spec(tmp_path, seeds=[42], env={"STEPS": 30000, "MISCHIEF": "deaf"}), tmp_path / "out"
    driver = start(spec, address)
    wait_until(lambda: bool(program_processes(tmp_path)) and is_at(out, "TRAIN"), 60, "never started")
    end(driver)
    wait_until(lambda: not program_processes(tmp_path), 15, f"left: {program_processes(tmp_path)}")
    driver = start(spec, address)
    wait_until(lambda: bool(program_processes(tmp_path)) and is_at(out, "TRAIN"), 60, "never went on")
    assert main(["cancel", str(out)]) == 0
    assert driver.wait(timeout=60) == 3
    assert state_of(out) == {42: "CANCELLED"}


def is_at(out: Path, state: str) -> bool:
    """Return whether some seed is in a state."""
    return (out / "state.json").exists() and state in state_of(out).values()
