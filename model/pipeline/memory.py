"""The most memory that a rank has held since it was last asked to begin counting."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
RESET_PEAK = "5"  # what the kernel wants to hear: forget the largest resident size
ON_GPU, RESIDENT, RESIDENT_EVER = "allocated on the GPU", "resident", "resident, since the process began"


def reset_peak_memory(device: torch.device) -> str:
    """Begin counting anew, and return what peak_memory_bytes counts from now on: one of the three phrases above.

    A system that does not let a process forget its largest resident size (no /proc, or one that may not be written)
    goes on from the largest so far.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return ON_GPU
    try:
        CLEAR_REFS.write_text(RESET_PEAK)
    except OSError:
        return RESIDENT_EVER
    return RESIDENT


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was held: allocated by PyTorch on a GPU, else resident in this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
