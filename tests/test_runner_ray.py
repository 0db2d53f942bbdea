"""One seed through a real Ray of its own: the smallest proof that gangs work, and that nothing listens to the world."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from runner.gang.ray_start import PRIORITY_VARIABLE
from runner.sweep import run_sweep
from runner.work import Options
from tests.ray_tools import listening, our_processes, wait_until
from tests.stub_work import PRIORITY_TARGET
from tests.sweep_tools import make_spec, no_data, scores_of

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]


def watch_listeners(found: set[str], is_over: threading.Event) -> None:
    """Collect every address that a process below this one listens on, until told to end."""
    while not is_over.wait(0.3):
        found |= listening()


def test_a_seed_runs_on_rays_own_cluster_on_loopback_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRIORITY_VARIABLE, "15")  # as Ray has it where nobody says otherwise
    before, found, is_over = our_processes(), set[str](), threading.Event()
    watcher = threading.Thread(target=watch_listeners, args=(found, is_over))
    watcher.start()
    try:
        assert run_sweep(make_spec(tmp_path, seeds=[1]), Options(target=PRIORITY_TARGET, progress="json")) == 0
    finally:
        is_over.set()
        watcher.join()
    assert set(scores_of(tmp_path)) == {1}
    (priority,) = tmp_path.rglob("priority")
    assert int(priority.read_text()) == os.nice(0)  # Ray's own workers stand back behind everything else on a host
    assert found, "nothing was seen to listen"
    assert found <= {"127.0.0.1", "::1"}
    (run,) = json.loads((tmp_path / "state.json").read_text())["runs"]
    assert (run["state"], run["attempt"], run["node"]) == ("DONE", 1, "127.0.0.1")
    wait_until(lambda: our_processes() <= before, 20, "processes are left")
