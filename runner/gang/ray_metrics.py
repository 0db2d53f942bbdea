"""A sweep for Prometheus: the driver's figures through Ray's own metrics, beside those of the cluster.

Ray exports each name with `ray_` in front, a counter with `_total` behind. jobs/launchers/grafana shows them.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from runner.life.states import WORKING, Run, State, newest
from runner.spec.sweep import RunKey

UPDATE_EVERY_S = 2.0  # Ray exports every few seconds; a sweep may have a thousand runs
RUN_TAGS = ("sweep", "variant", "seed", "repeat")


class RayMetrics:
    """A view of a sweep that nobody looks at directly."""

    def __init__(self, sweep: str, *, gpus: int) -> None:
        self.sweep, self.gpus = sweep, gpus
        self.next_at = -float("inf")
        self.spent: dict[RunKey, tuple[float, int]] = {}  # GPU seconds and retries as they were last told
        self.changed: dict[RunKey, Run] = {}
        self.runs = Gauge("seedsweep_runs", "Runs of the sweep in a state.", ("sweep", "state"))
        self.step = Gauge("seedsweep_step", "Newest step of a phase of a run.", (*RUN_TAGS, "phase"))
        self.rate = Gauge("seedsweep_tokens_per_s", "Tokens a second of a run; 0 while it is not at work.", RUN_TAGS)
        self.figures = {
            "loss": Gauge("seedsweep_loss", "Newest loss of a run, nats per token.", RUN_TAGS),
            "bpb": Gauge("seedsweep_bpb", "Newest bits per byte of a run.", RUN_TAGS),
        }
        self.gpu_s = Counter("seedsweep_gpu_seconds", "GPU seconds that gangs of a run have held.", RUN_TAGS)
        self.retries = Counter("seedsweep_retries", "Attempts of a run that failed or lost their node.", RUN_TAGS)

    def update(self, runs: Mapping[RunKey, Run], changed: list[Run], now: float) -> None:
        """Set every figure that may have changed, now and then, and at once when the sweep is over."""
        self.changed |= {run.key: run for run in changed}
        if now < self.next_at and not all(run.is_final for run in runs.values()):
            return
        self.next_at = now + UPDATE_EVERY_S
        states = Count(run.state for run in runs.values())
        for state in State:
            self.runs.set(states[state], {"sweep": self.sweep, "state": str(state)})
        for run in runs.values():
            if run.has_group or run.key in self.changed:
                self.tell(run, now)
        self.changed = {}

    def tell(self, run: Run, now: float) -> None:
        """Set the figures of one run."""
        tags = {
            "sweep": self.sweep, "variant": run.key.variant_name, "seed": str(run.key.seed),
            "repeat": str(run.key.repeat),
        }  # fmt: skip
        is_working = run.state in WORKING
        rate = run.metrics.get("tokens_per_s")
        self.rate.set(float(rate) if is_working and isinstance(rate, int | float) else 0.0, tags)
        if is_working and run.phase:
            self.step.set(run.step, {**tags, "phase": run.phase})
        for word, gauge in self.figures.items():
            if found := newest(run.metrics, word):
                gauge.set(found[1], tags)
        self.count(run, now, tags)

    def count(self, run: Run, now: float, tags: dict[str, str]) -> None:
        """Add what a run has spent since it was last told; what earlier drivers spent they have told."""
        gpu_s, retries = run.gang_s(now) * self.gpus, run.failures + run.preemptions
        told_s, told = self.spent.get(run.key, (gpu_s, retries))  # first told of as QUEUED, before it holds anything
        if gpu_s > told_s:
            self.gpu_s.inc(gpu_s - told_s, tags)
        if retries > told:
            self.retries.inc(retries - told, tags)
        self.spent[run.key] = (gpu_s, retries)

    def close(self) -> None:
        """Ray goes on to export the last figures until the driver ends."""
