"""What Prometheus reads of a sweep: all that the driver hands to Ray, and that the dashboard asks for nothing else."""

from __future__ import annotations

import importlib
import json
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner import sweep
from runner.life.states import Run, State
from runner.spec.sweep import RunKey
from runner.work import Options
from tests.ray_tools import wait_until
from tests.stub_work import TARGET
from tests.sweep_tools import make_spec, no_data, write_faults

pytestmark = pytest.mark.usefixtures("no_data")
__all__ = ["no_data"]
DASHBOARD = Path(__file__).parent.parent / "jobs" / "launchers" / "grafana" / "seedsweep.json"
KEY = RunKey(seed=42)
TAGS = (("repeat", "0"), ("seed", "42"), ("sweep", "demo"), ("variant", "base"))


class FakeMetric:
    """Keeps the values by name and tags; counters add up."""

    values: dict[str, dict[tuple[tuple[str, str], ...], float]]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description.endswith(".")
        self.name, self.tag_keys = name, set(tag_keys)
        self.values[name] = {}

    def set(self, value: float, tags: dict[str, str]) -> None:
        """Replace a value."""
        assert set(tags) == self.tag_keys
        self.values[self.name][tuple(sorted(tags.items()))] = value

    def inc(self, value: float, tags: dict[str, str]) -> None:
        """Add to a value; Ray refuses anything but a positive number."""
        assert value > 0
        self.set(self.values[self.name].get(tuple(sorted(tags.items())), 0.0) + value, tags)


@pytest.fixture
def ray_metrics() -> Any:
    """Return the module; Ray must not be imported before tests.ray_tools has said that it is to listen on loopback."""
    return importlib.import_module("runner.gang.ray_metrics")


@pytest.fixture
def values(ray_metrics: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Return what the metrics hold."""
    monkeypatch.setattr(FakeMetric, "values", {}, raising=False)
    monkeypatch.setattr(ray_metrics, "Gauge", FakeMetric)
    monkeypatch.setattr(ray_metrics, "Counter", FakeMetric)
    return FakeMetric.values


def test_every_figure_of_a_run_is_told_and_gpu_seconds_and_retries_add_up(ray_metrics: Any, values: Any) -> None:
    metrics = ray_metrics.RayMetrics("demo", gpus=8)
    queued = Run(key=KEY, state=State.QUEUED, preemptions=3, held_s=50.0)  # an earlier driver's
    metrics.update({KEY: queued}, [queued], 0.0)
    run = replace(
        queued, state=State.TRAIN, has_group=True, attempt=4, placed_at=10.0, phase="train", step=7,
        metrics={"loss": 3.5, "tokens_per_s": 1e6},
    )  # fmt: skip
    metrics.update({KEY: run}, [run], 20.0)
    assert values["seedsweep_loss"] == {TAGS: 3.5}
    assert values["seedsweep_tokens_per_s"] == {TAGS: 1e6}
    assert values["seedsweep_step"] == {tuple(sorted((*TAGS, ("phase", "train")))): 7}
    assert values["seedsweep_gpu_seconds"] == {TAGS: 80.0}
    assert values["seedsweep_retries"] == {}
    assert values["seedsweep_runs"][("state", "TRAIN"), ("sweep", "demo")] == 1
    waiting = replace(run, state=State.RETRY_WAIT, has_group=False, held_s=70.0, failures=1)
    metrics.update({KEY: waiting}, [waiting], 30.0)
    assert values["seedsweep_gpu_seconds"] == {TAGS: 160.0}
    assert values["seedsweep_retries"] == {TAGS: 1}
    assert values["seedsweep_tokens_per_s"] == {TAGS: 0.0}
    assert values["seedsweep_runs"][("state", "TRAIN"), ("sweep", "demo")] == 0
    scored = replace(run, phase="ttt", state=State.TTT, held_s=70.0, metrics={"running_bpb": 1.1})
    metrics.update({KEY: scored}, [scored], 40.0)
    assert values["seedsweep_bpb"] == {TAGS: 1.1}


def test_a_thousand_runs_are_told_of_now_and_then_and_nothing_is_lost_between(ray_metrics: Any, values: Any) -> None:
    metrics = ray_metrics.RayMetrics("demo", gpus=0)
    queued = Run(key=KEY, state=State.QUEUED)
    other = Run(key=RunKey(seed=1), state=State.QUEUED)
    metrics.update({KEY: queued, other.key: other}, [queued, other], 0.0)
    failed = replace(queued, state=State.RETRY_WAIT, failures=1)
    metrics.update({KEY: failed, other.key: other}, [failed], 0.5)
    assert values["seedsweep_retries"] == {}
    metrics.update({KEY: failed, other.key: other}, [], 2.5)
    assert values["seedsweep_retries"] == {TAGS: 1}
    over = {run.key: replace(run, state=State.DONE) for run in (failed, other)}
    metrics.update(over, list(over.values()), 2.6)
    assert values["seedsweep_runs"][("state", "DONE"), ("sweep", "demo")] == 2, "the end is told at once"


def exported(ray_metrics: Any, values: Any) -> set[str]:
    """Return the names under which Ray exports the metrics."""
    metrics = ray_metrics.RayMetrics("demo", gpus=8)
    counters = {metrics.gpu_s.name, metrics.retries.name}
    return {f"ray_{name}_total" if name in counters else f"ray_{name}" for name in values}


def test_the_dashboard_shows_every_metric_and_asks_for_no_other(ray_metrics: Any, values: Any) -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for query in queries for name in re.findall(r"ray_seedsweep_\w+", query)}
    assert asked == exported(ray_metrics, values)
    assert all('sweep=~"$sweep"' in query for query in queries)
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])
    assert {item["name"] for item in board["templating"]["list"]} == {"datasource", "sweep"}
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in board["panels"])


class Scraper:
    """A view that reads the node's metrics as Prometheus would, once the sweep is over and before the driver ends."""

    def __init__(self) -> None:
        self.text = ""

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Wait for the figures of a sweep that is done."""
        import ray

        if all(run.is_final for run in runs.values()):
            port = int(ray.nodes()[0]["MetricsExportPort"])  # type: ignore[no-untyped-call]
            done = re.compile(r'^ray_seedsweep_runs\{[^}]*state="DONE"[^}]*\} 1\.0$', re.MULTILINE)  # exported last
            wait_until(lambda: done.search(self.scrape(port)) is not None, 60, "no metrics at the node's port")

    def scrape(self, port: int) -> str:
        """Return what the node exports now."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            self.text = answer.read().decode()
        return self.text

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.slow
def test_prometheus_finds_a_sweep_at_the_nodes_own_port(
    tmp_path: Path, ray_metrics: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper = Scraper()
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")
    monkeypatch.setattr(
        sweep, "open_metrics", lambda spec, _options: [ray_metrics.RayMetrics(spec.name, gpus=3), scraper]
    )
    write_faults(tmp_path, {"seed": 1, "attempt": 1, "stage": "train", "step": 2, "do": "raise"})
    assert sweep.run_sweep(make_spec(tmp_path, seeds=[1]), Options(target=TARGET, progress="json")) == 0
    values = {
        (name, dict(re.findall(r'(\w+)="([^"]*)"', tags)).get("state", "")): float(value)
        for name, tags, value in re.findall(r"^(ray_seedsweep_\w+)\{(.*)\} (\S+)$", scraper.text, re.MULTILINE)
    }
    assert values["ray_seedsweep_runs", "DONE"] == 1
    assert values["ray_seedsweep_retries_total", ""] == 1
    assert values["ray_seedsweep_gpu_seconds_total", ""] > 0
    assert values["ray_seedsweep_loss", ""] > 0
    assert 'sweep="test"' in scraper.text
