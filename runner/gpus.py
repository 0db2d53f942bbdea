"""NVIDIA GPUs as the driver's own tool describes them, without touching CUDA; none where there is no tool."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

SMI = "nvidia-smi"
SMI_TIMEOUT_S = 20
FACTS = ("index", "name", "driver_version", "memory.used")
SAMPLES = ("clocks.sm", "power.draw", "clocks_throttle_reasons.active")


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


def count_gpus() -> int:
    """Return how many GPUs this machine has."""
    return len(query((), ("index",)))


def query_gpus(ids: Sequence[str]) -> list[Gpu]:
    """Return the GPUs with these ids (all of them where none are given)."""
    return [
        Gpu(index, model, driver, int(number(used) * (1 << 20))) for index, model, driver, used in query(ids, FACTS)
    ]


def sample_gpus(ids: Sequence[str]) -> Sample | None:
    """Return what these GPUs are doing, None where that cannot be asked."""
    rows = query(ids, SAMPLES)
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
