"""MLflow, TensorBoard and Weights & Biases, each through its own client, which is imported only when it is used.

A run of a sweep is a run of the tracker: named by variant, seed and repeat, tagged with the hashes of configuration,
data and code and with the commit. The same sweep given again goes on in the same runs. Metrics are PHASE/NAME over the
phase's steps; a finished run gets the scores of its stage records beside them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from model.report import STAGES
from results.schema import column_names
from runner.folder.commit import PROGRAM_STAGE
from runner.folder.storage import open_storage
from runner.life.states import Run, State
from runner.spec.sweep import RunKey, SweepSpec
from runner.view.tracking import Feed, Point, Tracker, Tracking

RUN_TAG = "seedsweep_run"  # names a run of a sweep across drivers
HASHES = ("data_hash", "code_hash", "git_commit", "git_dirty")
MLFLOW_STATUS = {State.DONE: "FINISHED", State.CANCELLED: "KILLED"}  # the rest is FAILED
MAX_BATCH = 1000  # metrics in one request to MLflow


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What trackers are told of runs besides their figures.

    record: what every run of the sweep records, as it grows.
    """

    spec: SweepSpec
    record: Mapping[str, Any]

    def run_id(self, key: RunKey) -> str:
        """Return a name that a run keeps when its sweep goes on."""
        parts = (self.spec.out, key.name, self.spec.variant_hashes[key.variant_name])
        return sha256("\n".join(parts).encode()).hexdigest()[:16]

    def tags(self, key: RunKey) -> dict[str, str]:
        """Return what identifies a run, as text."""
        hashes = {name: str(self.record[name]) for name in HASHES if self.record.get(name) is not None}
        return {
            RUN_TAG: self.run_id(key), "sweep": self.spec.name, "variant": key.variant_name, "seed": str(key.seed),
            "repeat": str(key.repeat), "config_hash": self.spec.variant_hashes[key.variant_name], **hashes,
        }  # fmt: skip

    def endings(self, run: Run) -> dict[str, str]:
        """Return the tags of a run that is over; data may have been hashed only on its node."""
        error = {"error": run.failure.one_line} if run.failure is not None and run.state is State.FAILED else {}
        return {**self.tags(run.key), "state": str(run.state), "attempts": str(run.attempt), **error}

    def scores(self, key: RunKey) -> dict[str, float]:
        """Return the figures of a run's stage records that are columns of the results."""
        storage, columns = open_storage(self.spec.out), set(column_names("runs"))
        found: dict[str, float] = {}
        names = storage.names(f"seeds/{key.name}/stages")
        for stage in (*STAGES, PROGRAM_STAGE):
            if f"{stage}.json" in names:
                metrics = json.loads(storage.read(f"seeds/{key.name}/stages/{stage}.json")).get("metrics", {})
                found |= {name: float(value) for name, value in metrics.items()
                          if name in columns and isinstance(value, int | float)}  # fmt: skip
        return found


class MlflowTracker:
    """Runs of one experiment, which has the sweep's name."""

    def __init__(self, place: str, labels: Labels) -> None:
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the sweep's own lines are read there
        from mlflow.tracking import MlflowClient

        self.client, self.labels = MlflowClient(tracking_uri=place), labels
        found = self.client.get_experiment_by_name(labels.spec.name)
        self.experiment = found.experiment_id if found else self.client.create_experiment(labels.spec.name)
        self.runs: dict[RunKey, str] = {}

    def run_of(self, key: RunKey) -> str:
        """Return the id of a run, that of an earlier driver where there is one."""
        if key not in self.runs:
            tags = self.labels.tags(key)
            found = self.client.search_runs([self.experiment], f"tags.{RUN_TAG} = '{tags[RUN_TAG]}'", max_results=1)
            if found:
                self.runs[key] = found[0].info.run_id
                self.client.update_run(self.runs[key], status="RUNNING")
            else:
                self.runs[key] = self.client.create_run(self.experiment, tags=tags, run_name=key.words).info.run_id
        return self.runs[key]

    def write(self, points: list[Point]) -> None:
        """Write points, as few requests as there are runs among them."""
        from mlflow.entities import Metric

        for key, group in groupby(sorted(points, key=lambda point: point.key), key=lambda point: point.key):
            metrics = [
                Metric(f"{point.phase}/{name}", value, int(1000 * point.at), point.step)
                for point in group
                for name, value in point.metrics.items()
            ]
            for begin in range(0, len(metrics), MAX_BATCH):
                self.client.log_batch(self.run_of(key), metrics=metrics[begin : begin + MAX_BATCH])

    def end(self, run: Run) -> None:
        """Write scores and end of a run."""
        from mlflow.entities import Metric, RunTag

        now, scores = int(1000 * time.time()), self.labels.scores(run.key)
        metrics = [Metric(name, value, now, 0) for name, value in scores.items()]
        tags = [RunTag(name, value) for name, value in self.labels.endings(run).items()]
        self.client.log_batch(self.run_of(run.key), metrics=metrics, tags=tags)
        self.client.set_terminated(self.run_of(run.key), status=MLFLOW_STATUS.get(run.state, "FAILED"))

    def close(self) -> None:
        """Nothing is kept back."""


class TensorBoardTracker:
    """One folder of event files a run: DIR/SWEEP/RUN."""

    def __init__(self, place: str, labels: Labels) -> None:
        self.folder, self.labels = Path(place) / labels.spec.name, labels
        self.writers: dict[RunKey, Any] = {}

    def add(self, key: RunKey, values: list[dict[str, Any]], step: int, at: float) -> None:
        """Write summary values at one step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if key not in self.writers:
            self.writers[key] = EventFileWriter(str(self.folder / key.name))
            self.add(key, [text_value("tags", self.labels.tags(key))], 0, at)
        summary = Summary(value=[Summary.Value(**value) for value in values])
        self.writers[key].add_event(Event(wall_time=at, step=step, summary=summary))

    def write(self, points: list[Point]) -> None:
        """Write points."""
        for point in points:
            values = [{"tag": f"{point.phase}/{name}", "simple_value": value} for name, value in point.metrics.items()]
            self.add(point.key, values, point.step, point.at)
        for key in {point.key for point in points}:
            self.writers[key].flush()

    def end(self, run: Run) -> None:
        """Write scores and end of a run, and close its file."""
        scores = self.labels.scores(run.key)
        values = [{"tag": f"scores/{name}", "simple_value": value} for name, value in scores.items()]
        self.add(run.key, [*values, text_value("end", self.labels.endings(run))], 0, time.time())
        self.writers.pop(run.key).close()

    def close(self) -> None:
        """Close the files of runs that are not over."""
        for writer in self.writers.values():
            writer.close()


def text_value(tag: str, words: Mapping[str, str]) -> dict[str, Any]:
    """Return a summary value that TensorBoard shows as a table of words."""
    from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in words.items())])
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return {"tag": tag, "metadata": metadata, "tensor": TensorProto(dtype=DT_STRING, string_val=[table.encode()])}


class WandbTracker:
    """Runs of one project, grouped by the sweep; offline where WANDB_MODE says so."""

    def __init__(self, place: str, labels: Labels) -> None:
        self.project, self.labels = place, labels
        self.runs: dict[RunKey, Any] = {}

    def run_of(self, key: RunKey) -> Any:
        """Return an open run, the one of an earlier driver where there is one."""
        if key not in self.runs:
            import wandb

            entity, _, project = self.project.rpartition("/")
            settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
            run = wandb.init(
                project=project, entity=entity or None, group=self.labels.spec.name, name=key.words,
                id=self.labels.run_id(key), resume="allow", reinit="create_new", config=self.labels.tags(key),
                settings=settings,
            )  # fmt: skip
            self.runs[key] = run
        return self.runs[key]

    def write(self, points: list[Point]) -> None:
        """Write points; each phase has its own axis of steps, because its steps begin again."""
        for point in points:
            run, axis = self.run_of(point.key), f"{point.phase}/step"
            run.define_metric(f"{point.phase}/*", step_metric=axis)
            run.log({axis: point.step, **{f"{point.phase}/{name}": value for name, value in point.metrics.items()}})

    def end(self, run: Run) -> None:
        """Write scores and end of a run."""
        open_run = self.run_of(run.key)
        open_run.config.update(self.labels.endings(run), allow_val_change=True)
        for name, value in self.labels.scores(run.key).items():
            open_run.summary[name] = value
        self.runs.pop(run.key).finish(exit_code=0 if run.state is State.DONE else 1)

    def close(self) -> None:
        """Finish the runs that are not over, to be gone on with later."""
        for run in self.runs.values():
            run.finish(exit_code=1)


CLIENTS: dict[str, Callable[[str, Labels], Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def open_tracking(spec: SweepSpec, record: Mapping[str, Any]) -> Tracking:
    """Return a view that tells every tracker of the spec; record is what the sweep's runs record, as it grows."""
    labels = Labels(spec=spec, record=record)
    return Tracking([Feed(name, lambda n=name, p=place: CLIENTS[n](p, labels)) for name, place in spec.track.items()])  # type: ignore[misc]
