"""model/kernels/pace.py, and who hears of progress: long calls tick for a while, waits are told, every rank reports."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from model.corpus.writer import hold_folder
from model.distributed import Dist
from model.kernels import pace
from model.kernels.pace import Pace, ticking
from model.pipeline.seed import run_seed
from model.train.trainer import Trainer
from tests.micro_model import ignore, micro_loader, micro_train, random_model
from tests.ray_tools import wait_until
from tests.test_pipeline import Corpus, Killed, corpus

__all__ = ["corpus"]


def test_a_long_call_ticks_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "TICK_S", 0.01)
    ticks: list[float] = []
    with ticking(lambda: ticks.append(time.monotonic())):
        wait_until(lambda: len(ticks) >= 3, 20, "no ticks")
    count = len(ticks)
    time.sleep(0.1)
    assert len(ticks) == count


def test_a_call_that_never_ends_stops_ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "TICK_S", 0.01)
    ticks: list[float] = []
    with ticking(lambda: ticks.append(0.0), 0.05):
        wait_until(lambda: len(ticks) == 5, 20, "no ticks")
        time.sleep(0.2)
    assert len(ticks) == 5


def test_an_error_inside_a_long_call_comes_through() -> None:
    with pytest.raises(ValueError, match="broken"), ticking(lambda: None):
        raise ValueError("broken")
    assert not [thread for thread in threading.enumerate() if thread.name == "tick"]


def test_on_a_cpu_the_host_is_the_device() -> None:
    pace = Pace(torch.device("cpu"))
    for _ in range(20):
        pace.step()
    assert not pace.under_way


def test_a_meeting_says_when_it_begins_and_ends() -> None:
    heard: list[bool] = []
    dist = Dist.single()
    dist.on_wait = heard.append
    dist.broadcast_floats([1.0])  # as in every step of training
    assert heard == [True, False]


def test_every_micro_batch_of_training_ticks(tmp_path: Path) -> None:
    heard: list[bool] = []
    dist, config = Dist.single(), micro_train(max_steps=3)
    dist.on_wait = heard.append
    Trainer(random_model(), micro_loader(tmp_path, config=config), config, dist, ignore).run()
    assert heard.count(True) == 3 + 1  # what the ranks agree on before each step, and before the end
    assert heard.count(False) == heard.count(True) + 3 * config.micro_batches_per_step


def test_who_waits_for_a_folder_says_so(tmp_path: Path) -> None:
    heard: list[float] = []
    with hold_folder(tmp_path):

        def wait() -> None:
            with hold_folder(tmp_path, on_wait=lambda: heard.append(time.monotonic())):
                heard.append(0.0)

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: len(heard) >= 1, 20, "nothing was said")
        assert heard[-1] > 0
    thread.join(20)
    assert heard[-1] == 0.0


def test_every_rank_reports_its_own_progress(corpus: Corpus, tmp_path: Path) -> None:
    heard: list[str] = []

    def report(phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
        heard.append(phase)
        if heard.count("train") == 3:  # the stage, and two steps of it
            raise Killed

    with pytest.raises(Killed):
        run_seed(corpus.config, Dist(rank=1), tmp_path, report)
    assert heard[0] == "prepare"
