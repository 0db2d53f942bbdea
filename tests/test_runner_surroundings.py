"""A whole sweep on Ray where the surroundings are against it: other people's names, shells, homes and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def start(out: Path, *, python: str = sys.executable, cwd: Path = ROOT, **environment: str) -> subprocess.Popen[bytes]:
    """Start a driver with stub work on a Ray of its own."""
    code = (
        "import seedsweep; seedsweep.hold_packages(); import sys; from tests.drive_sweep import main; sys.exit(main())"
    )
    arguments = json.dumps({"out": str(out), "gang": {"gpus": 0, "cpus": 1}})
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


def test_a_killed_driver_leaves_neither_processes_nor_a_session(tmp_path: Path) -> None:
    base = Path("/tmp") / f"s{os.getpid()}"
    base.mkdir()
    driver = start(tmp_path / "out", RAY_TMPDIR=str(base))
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "out" / "state.json").exists():
            assert time.monotonic() < deadline, "the sweep did not start"
            time.sleep(0.1)
        family = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        driver.wait(30)
        _, left = psutil.wait_procs(family, timeout=60)
        assert left == []
        deadline = time.monotonic() + 30
        while list(base.iterdir()):
            assert time.monotonic() < deadline, "a session is left"
            time.sleep(0.1)
    finally:
        driver.kill()
        base.rmdir()
