"""A whole sweep on Ray where the surroundings are against it: other people's names, shells, homes and kills."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from runner.gang.ray_start import family_of
from tests.ray_tools import ROOT, wait_until
from tests.sweep_tools import state_of, write_faults

pytestmark = pytest.mark.slow


def start(out: Path, *, python: str = sys.executable, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
    """Start a driver with stub work of one seed on a Ray of its own."""
    code = (
        "import seedsweep; seedsweep.hold_packages(); import sys; from tests.drive_sweep import main; sys.exit(main())"
    )
    arguments = json.dumps({"out": str(out), "gang": {"gpus": 0, "cpus": 1}, "seeds": [42]})
    paths = f"{ROOT}{os.pathsep}{environment.pop('PYTHONPATH', '')}"
    return subprocess.Popen(
        [python, "-P", "-c", code, arguments], cwd=cwd, env={**os.environ, **environment, "PYTHONPATH": paths}
    )


def test_ranks_work_beside_a_folder_with_our_names_in_it(tmp_path: Path) -> None:
    for name in ("model.py", "runner.py", "results.py"):
        (tmp_path / name).write_text("raise RuntimeError('the user\\'s own')\n")
    assert start(tmp_path / "out", cwd=tmp_path).wait(240) == 0


def test_ranks_work_from_an_environment_whose_path_a_shell_would_split(tmp_path: Path) -> None:
    prefix = tmp_path / "my env (1) & it's"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    (packages,) = prefix.glob("lib/python*/site-packages")
    (packages / "base.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")) + "\n")
    assert start(tmp_path / "out", python=str(prefix / "bin" / "python")).wait(240) == 0


@pytest.mark.parametrize("stage", ["starting", "working"])
def test_a_killed_driver_leaves_neither_processes_nor_a_session(stage: str, tmp_path: Path) -> None:
    out, base = tmp_path / "out", Path("/tmp") / f"s{os.getpid()}"  # sockets need a short path
    base.mkdir()
    write_faults(out, {"stage": "train", "step": 2, "do": "wait", "seconds": 600})
    driver = start(out, RAY_TMPDIR=str(base))
    try:
        wait_until(lambda: "gcs_server" in words_of(family_of(driver.pid)), 200, "Ray was not started")
        if stage == "working":
            wait_until(lambda: "TRAIN" in state_of(out).values(), 200, "nothing trained")
            assert "RankActor" in words_of(family_of(driver.pid))
        family = family_of(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
        assert psutil.wait_procs(family, timeout=90)[1] == []
        wait_until(lambda: not list(base.iterdir()), 90, "a session is left")
    finally:
        driver.kill()
        driver.wait(30)
        shutil.rmtree(base)


def words_of(processes: list[psutil.Process]) -> str:
    """Return the names and command lines of processes."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found += [process.name(), *process.cmdline()]
    return " ".join(found)
