"""NVIDIA GPUs as their driver describes them through NVML, without touching CUDA; none where there is no driver."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

VISIBLE = "CUDA_VISIBLE_DEVICES"
SAMPLE_EVERY_S = 5.0
MILLIWATTS = 1000.0


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
    nvml, visible = open_driver(), os.environ.get(VISIBLE)
    present = ask(nvml.nvmlDeviceGetCount) if nvml else 0
    return present if visible is None else min(present, sum(bool(name.strip()) for name in visible.split(",")))


def query_gpus(ids: Sequence[str]) -> list[Gpu]:
    """Return the GPUs with these UUIDs or numbers (all of them where none are given), [] if one is not there."""
    nvml = open_driver()
    if nvml is None:
        return []
    version = str(ask(nvml.nvmlSystemGetDriverVersion))
    return [
        Gpu(
            number=str(ask(nvml.nvmlDeviceGetIndex, handle)),
            model=str(ask(nvml.nvmlDeviceGetName, handle)),
            driver=version,
            used_bytes=getattr(ask(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2), "used", 0),
        )
        for handle in find_handles(nvml, ids)
    ]


def sample_gpus(ids: Sequence[str]) -> Sample | None:
    """Return what these GPUs are doing, None where that cannot be asked."""
    nvml = open_driver()
    handles = find_handles(nvml, ids) if nvml else []
    if not handles:
        return None
    return Sample(
        clock_mhz=float(min(ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM) for handle in handles)),
        power_w=sum(ask(nvml.nvmlDeviceGetPowerUsage, handle) for handle in handles) / MILLIWATTS,
        throttle_bits=functools.reduce(
            int.__or__, (ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) for handle in handles)
        ),
    )


@functools.cache
def open_driver() -> Any:
    """Return NVML, open until this process ends; None where driver or package (see packages) is not there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def find_handles(nvml: Any, ids: Sequence[str]) -> list[Any]:
    """Return the driver's handles of the GPUs with these UUIDs or numbers, [] if it does not know one of them."""
    try:
        if not ids:
            return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [
            nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdecimal() else nvml.nvmlDeviceGetHandleByUUID(name)
            for name in ids
        ]
    except nvml.NVMLError:
        return []


def ask(question: Callable[..., Any], *arguments: object) -> Any:
    """Return an answer of the driver's, 0 where it says that it does not know."""
    nvml = open_driver()
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return 0
