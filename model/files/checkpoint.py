"""Checkpoints inside a stage: one tensor file and one record with its checksum, the two newest kept.

The record is written after the tensors, so a checkpoint without one never existed. Loading verifies the checksum and
falls back to the checkpoint before, saying so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model.files.atomic import file_sha256, remove_file, replace_file
from model.files.tensors import load_tensors, save_tensors

logger = logging.getLogger(__name__)
NUM_KEPT = 2


def write_json(path: Path, value: object) -> None:
    """Write JSON, complete or not at all."""
    with replace_file(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


@dataclass(slots=True)
class CheckpointStore:
    """The checkpoints of one training run in one folder; on_write hears of each file that was finished."""

    folder: Path
    on_write: Callable[[Path], None] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write a checkpoint and drop all but the two newest, and what a killed attempt left half-written."""
        tensor_path, record_path = self._paths(step)
        for left in self.folder.glob(".step-*.tmp"):
            left.unlink(missing_ok=True)
        sha256 = save_tensors(tensor_path, tensors)
        write_json(record_path, {"format": 1, "step": step, "sha256": sha256, "meta": meta})
        for path in (tensor_path, record_path):
            if self.on_write is not None:
                self.on_write(path)
        for old in self.steps()[:-NUM_KEPT]:
            for path in reversed(self._paths(old)):
                remove_file(path)

    def steps(self) -> list[int]:
        """Return the steps that have a record, oldest first."""
        found = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.json"))
        return sorted(int(step) for step in found if step.isdigit())

    def hash_files(self, step: int) -> dict[Path, str]:
        """Return the sha256 of both files of a checkpoint."""
        tensor_path, record_path = self._paths(step)
        return {tensor_path: str(json.loads(record_path.read_text())["sha256"]), record_path: file_sha256(record_path)}

    def load_newest(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return (tensors, meta with "step") of the newest undamaged checkpoint, or None where there is none."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except (ValueError, OSError, KeyError) as error:
                logger.warning("checkpoint of step %d ignored, trying the one before: %s", step, error)
        return None

    def clear(self) -> None:
        """Remove every checkpoint, and what a killed attempt left half-written."""
        for pattern in ("step-*.json", "step-*.safetensors", ".step-*.tmp"):
            for path in self.folder.glob(pattern):
                remove_file(path)

    def load(self, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, meta with "step") of one checkpoint. Raises ValueError, OSError or KeyError if damaged."""
        tensor_path, record_path = self._paths(step)
        record = json.loads(record_path.read_text())
        if not isinstance(record, dict) or not isinstance(record.get("meta"), dict):
            raise ValueError(f"checkpoint record {record_path} is damaged")
        if file_sha256(tensor_path) != record["sha256"]:
            raise ValueError(f"checkpoint {tensor_path} does not have the sha256 of its record")
        return load_tensors(tensor_path), {**record["meta"], "step": step}

    def _paths(self, step: int) -> tuple[Path, Path]:
        stem = self.folder / f"step-{step:07d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".json")
