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
