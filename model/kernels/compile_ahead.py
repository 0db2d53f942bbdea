"""Inside compiling_ahead() Triton kernels are not launched but compiled, several processes at once.

Triton compiles a kernel where it is first launched, one after the other. A rehearsal, the same calls on small tensors
inside compiling_ahead(), names them all beforehand. Threads would wait for each other: half of a compilation is Python.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from model.kernels.launch import listeners

logger = logging.getLogger(__name__)

HANG_S = 180.0  # after this helpers are ended, and what they have not compiled is compiled here
LOADERS = 8  # threads; more of them wait for Python's lock
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
MARK = "all"  # a file in Triton's cache, under a hash of the calls: all their kernels are there
Key = tuple[Any, ...]


class Call(NamedTuple):
    """A launch that a rehearsal has heard of."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def key(self) -> Key:
        """What the compiler sees of the call, or more than that; the same in every process."""
        return self.kernel.cache_key, *map(_kind, self.args), *self.options.items()

    def compile(self) -> Any:
        """Return the compiled kernel, from Triton's cache on disk if it is there."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.options)

    def load(self) -> None:
        """Compile, make the launcher and load the code, so that a launch finds everything."""
        self.compile()[self.grid]


_inherited: list[Call] = []  # what forked processes are to compile


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return value == 1, value % 16 == 0, value.bit_length() > 31
    base = getattr(value, "base", None)  # a tensor descriptor's
    return type(value) if base is None else (base.dtype, *value.block_shape)


@contextmanager
def compiling_ahead(device: torch.device, num_processes: int) -> Iterator[None]:
    """Launch nothing inside the block; it ends when everything that would have been launched can be.

    What kernels would have written stays undefined inside the block. Raises what a compilation raises.
    """
    clock = [time.monotonic()]
    calls: dict[Key, Call] = {}

    def note(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        call = Call(kernel, grid, args, options)
        calls.setdefault(call.key, call)

    listeners.append(note)
    try:
        yield
    finally:
        listeners.remove(note)
    if not calls:
        return
    clock.append(time.monotonic())
    _compile_apart(calls, num_processes)
    clock.append(time.monotonic())
    with ThreadPoolExecutor(min(LOADERS, num_processes), "load", torch.cuda.set_device, (device,)) as pool:
        for done in [pool.submit(call.load) for call in calls.values()]:
            done.result()
    clock.append(time.monotonic())
    logger.info("compiled=%d rehearsal_s=%.2f compile_s=%.2f load_s=%.2f", len(calls), *np.diff(clock))


class _TargetOnly:
    """What compiling needs of Triton's driver, for a forked process: it must not touch CUDA."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        """Return what the code is for."""
        return self.target

    def get_current_device(self) -> int:
        """Return a number by which Triton keeps kernels apart."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Return a stream that nothing is launched on."""
        return 0


def _compile_share(first: int, count: int, target: Any, parent: int) -> None:
    """Compile every count-th inherited call; end with the parent, for a process left over would hold its GPU."""
    from triton.runtime import driver

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # the parent's thread that forked waits for the helpers, so both end together
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be asked
        os.kill(os.getpid(), signal.SIGKILL)
    driver.set_active(_TargetOnly(target))
    for call in _inherited[first::count]:
        try:
            call.compile()
        except Exception as error:
            name = getattr(call.kernel, "__name__", "a kernel")
            sys.exit(f"compiling {name} ahead: {type(error).__name__}: {error}".splitlines()[0][:300])


def _compile_apart(calls: dict[Key, Call], num_processes: int) -> None:
    """Fill Triton's cache on disk from forked processes. What fails there is done, and fails, in this one again."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return
    from triton import __version__
    from triton.runtime import driver
    from triton.runtime.cache import get_cache_manager

    target = driver.active.get_current_target()
    names = repr((__version__, target, sorted(map(repr, calls))))
    digest = hashlib.sha256(names.encode()).hexdigest()
    try:
        cache = get_cache_manager(digest)
        with _alone(digest):
            if cache.get_file(MARK) is None and _run_helpers(list(calls.values()), num_processes, target):
                cache.put(b"", MARK)
    except OSError as error:
        logger.warning("kernels are compiled one after the other: Triton's cache cannot be used: %s", error)


def _alone(digest: str) -> FileLock:
    """Return the lock that lets one process of this machine and user through: the others find its work done."""
    return FileLock(Path(tempfile.gettempdir()) / f"seedsweep-{os.getuid()}-compile-{digest[:16]}.lock")


def _run_helpers(calls: list[Call], num_processes: int, target: Any) -> bool:
    """Return whether forked processes compiled all calls."""
    count = min(num_processes, len(calls))
    context, deadline = multiprocessing.get_context("fork"), time.monotonic() + HANG_S
    _inherited[:] = calls
    helpers = [
        context.Process(target=_compile_share, args=(first, count, target, os.getpid()), daemon=True)
        for first in range(count)
    ]
    try:
        for helper in helpers:
            helper.start()
        for helper in helpers:
            helper.join(max(0.0, deadline - time.monotonic()))
        codes = [helper.exitcode for helper in helpers]
    finally:
        _inherited.clear()
        for helper in helpers:
            if helper.is_alive():
                helper.kill()
                helper.join()
    if None in codes:
        logger.warning("compiling ahead took over %.0f s: %d of %d processes ended", HANG_S, codes.count(None), count)
    elif any(codes):
        logger.warning("compiling ahead failed in a process of its own (exit codes %s): it goes on here", codes)
    return not any(code != 0 for code in codes)
