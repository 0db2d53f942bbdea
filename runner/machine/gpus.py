"""NVIDIA GPUs as the driver's own tool describes them, without touching CUDA; none where there is no tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

SMI = "nvidia-smi"
VISIBLE = "CUDA_VISIBLE_DEVICES"
SMI_TIMEOUT_S = 20
SAMPLE_EVERY_S = 5.0
FACTS = ("index", "name", "driver_version", "memory.used")
SAMPLES = ("clocks.sm", "power.draw", "clocks_throttle_reasons.active")
NEWER_SAMPLES = ("clocks.sm", "power.draw", "clocks_event_reasons.active")  # the same under the name of newer drivers


class Gpu(NamedTuple):
    """One GPU at rest."""

    number: str
    model: str
    driver: str
    used_bytes: int


class Sample(NamedTuple):
    """What the GPUs of a gang were doing at one moment: the slowest clock, all their power, every reason to be slow."""

    clock_mhz: float
    power_w: float
    throttle_bits: int


class GpuWatch:
    """Samples the gang's GPUs while they work, and keeps each sample with the training step it fell on."""

    def __init__(self, ids: Sequence[str], step: Callable[[], int | None], *, every_s: float = SAMPLE_EVERY_S) -> None:
        self.ids, self.step, self.every_s = ids, step, every_s
        self.rows: list[tuple[int, Sample]] = []
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, name="gpu-watch", daemon=True)

    def watch(self) -> None:
        """Take samples until told to end; step() is None outside training."""
        while not self.is_over.wait(self.every_s):
            step = self.step()
            sample = sample_gpus(self.ids) if step is not None else None
            if step is not None and sample is not None:
                self.rows.append((step, sample))

    def arrays(self) -> dict[str, list[float] | list[int]]:
        """Return the samples by column, as they go beside the step rows."""
        return {
            "step": [step for step, _ in self.rows],
            "gpu_clock_mhz": [sample.clock_mhz for _, sample in self.rows],
            "gpu_power_w": [sample.power_w for _, sample in self.rows],
            "gpu_throttle_bits": [sample.throttle_bits for _, sample in self.rows],
        }


def count_gpus() -> int:
    """Return how many GPUs a Ray started here would take: those of this machine that the environment shows."""
    present, visible = len(query((), ("index",))), os.environ.get(VISIBLE)
    return present if visible is None else min(present, sum(bool(name.strip()) for name in visible.split(",")))


def query_gpus(ids: Sequence[str]) -> list[Gpu]:
    """Return the GPUs with these ids (all of them where none are given)."""
    return [
        Gpu(index, model, driver, int(number(used) * (1 << 20))) for index, model, driver, used in query(ids, FACTS)
    ]


def sample_gpus(ids: Sequence[str]) -> Sample | None:
    """Return what these GPUs are doing, None where that cannot be asked."""
    rows = query(ids, SAMPLES) or query(ids, NEWER_SAMPLES)
    if not rows:
        return None
    bits = 0
    for _, _, reasons in rows:
        bits |= int(reasons, 16) if reasons.startswith("0x") else 0
    return Sample(min(number(clock) for clock, _, _ in rows), sum(number(power) for _, power, _ in rows), bits)


def query(ids: Sequence[str], fields: Sequence[str]) -> list[list[str]]:
    """Return one row of the driver's answers for each GPU; no rows without a driver."""
    if shutil.which(SMI) is None:
        return []
    command = [SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    if ids:
        command.append(f"--id={','.join(ids)}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if done.returncode == 0 and len(row) == len(fields)]


def number(cell: str) -> float:
    """Return a number of the driver's, 0 where it says that it does not know."""
    try:
        return float(cell)
    except ValueError:
        return 0.0
