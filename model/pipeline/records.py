"""The record that makes a stage finished: what it left, out of what, and where. Read and written here alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from model.report import STAGES

FORMAT = 1  # of run.json and of stage records
HASHES = ("config_hash", "data_hash", "code_hash")


class Output(NamedTuple):
    """A file that a stage left."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRecord:
    """What one finished stage left, out of what, and where; its file, stages/<stage>.json, makes the stage finished.

    identity: what decides the outputs (see identity.py); None where code or surroundings changed on the way, and in
    records of version 0.1, which also lack inputs, surroundings and reused_from. inputs: sha256, by name, of the
    outputs of other stages that it read. reused_from: the run that computed it, None where that was this one.
    """

    stage: str
    seconds: float
    metrics: Mapping[str, Any]
    outputs: Mapping[str, Output]  # by name in the run directory
    config_hash: str
    data_hash: str
    code_hash: str
    surroundings: Mapping[str, Any] = field(default_factory=dict)
    identity: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    reused_from: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain values."""
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in self.__slots__},
            "outputs": {name: output._asdict() for name, output in self.outputs.items()},
        }


def record_path(workdir: Path, stage: str) -> Path:
    """Return where the record of a stage lies."""
    return workdir / "stages" / f"{stage}.json"


def read_record(path: Path) -> StageRecord:
    """Return the stage record at path. Raises FileNotFoundError, or ValueError naming path if it is damaged."""
    return parse_record(path.read_bytes(), shown=str(path))


def parse_record(content: bytes, *, shown: str) -> StageRecord:
    """Return the stage record in content. Raises ValueError naming shown, its place, if it is damaged."""
    try:
        plain = json.loads(content)
        outputs = {name: Output(**facts) for name, facts in plain["outputs"].items()}
        known = {name: plain[name] for name in StageRecord.__slots__ if name in plain}
        record = StageRecord(**{**known, "outputs": outputs})
        check_record(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"stage record {shown} is damaged ({error}); remove it to redo the stage") from error
    return record


def check_record(record: StageRecord) -> None:
    """Raise ValueError unless the parts of a record are of their kinds and its outputs lie in the run directory."""
    for name in ("metrics", "surroundings", "inputs"):
        if not isinstance(getattr(record, name), dict):
            raise ValueError(f"{name} is no table")
    for name in ("stage", *HASHES):
        if not isinstance(getattr(record, name), str):
            raise ValueError(f"{name} is no text")
    for name, output in record.outputs.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not isinstance(output.sha256, str):
            raise ValueError(f"output {name!r} is none of this run's")


def read_records(workdir: Path) -> dict[str, StageRecord]:
    """Return the stage records of a run directory by stage, in order; a stage that is not finished is left out.

    Raises ValueError naming a record that is damaged.
    """
    return {stage: read_record(path) for stage in STAGES if (path := record_path(workdir, stage)).is_file()}
