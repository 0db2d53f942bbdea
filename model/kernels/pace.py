"""Signs of progress that mean something: the host stays close to the device, and long calls tick for a while.

Whoever watches over a rank takes silence for a hang.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TICK_S = 0.5
LONG_CALL_S = 600.0  # no single call of ours has taken a tenth of it
AHEAD = 8  # pieces of work that may wait on the device: enough to keep it busy, seconds at most


def queue_to_host(x: Tensor) -> Tensor:
    """Return a copy of x (on CUDA) on the host, to be read once the device has come past this place in its queue."""
    # pinned, so that the copy is one more entry in that queue and nobody waits
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


class Pace:
    """Counts pieces of work; on a CUDA device the host waits for the one AHEAD pieces back. No bit depends on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.under_way: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Note that one more piece was handed to the device."""
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self.under_way.append(event)
        if len(self.under_way) > AHEAD:
            self.under_way.popleft().synchronize()


@contextmanager
def ticking(tick: Callable[[], None], at_most_s: float = LONG_CALL_S) -> Iterator[None]:
    """Call tick while the block runs, for so long at most: a compiler or a codec cannot say how far it is."""
    is_over = threading.Event()

    def tick_on() -> None:
        for _ in range(int(at_most_s / TICK_S)):
            if is_over.wait(TICK_S):
                return
            tick()

    thread = threading.Thread(target=tick_on, name="tick", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
