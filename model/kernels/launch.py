"""Launching Triton kernels, or telling whoever listens that they would be launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Heard instead of a launch: kernel, grid, arguments, options. A backward pass launches from a thread of its own, so
# that every thread must see the listener.
listeners: list[Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]] = []


def launch(kernel: Any, grid: tuple[int, ...], /, *args: Any, **options: Any) -> None:
    """Run kernel[grid](*args, **options), or only tell the newest listener of it. Constants come by name."""
    if listeners:
        listeners[-1](kernel, grid, args, options)
    else:
        kernel[grid](*args, **options)


def gate_sizes(gate: Any, width: int) -> dict[str, int]:
    """Return a packed gate's sizes for a kernel: columns that it has numbers for, those of width, a power of two.

    gate (P,): a bias and P - 1 weights, or None.
    """
    num_columns = 0 if gate is None else gate.numel() - 1
    return {
        "FACTOR": num_columns, "WIDTH": min(num_columns, width), "NEAR": 1 << max(num_columns - 1, 0).bit_length(),
    }  # fmt: skip
