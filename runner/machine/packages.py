"""Which packages a run needs, by its configuration, and which of them this machine lacks."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable

from model.config import RunConfig

ALWAYS = ("numpy", "safetensors", "sentencepiece", "brotli", "pyarrow", "psutil")
HEAVY = ("torch", "pandas")  # looked for, not imported: the driver of a gang does without them
BY_ATTENTION = {
    "fa2": ("flash_attn", "flash-attn"),
    "fa3": ("flash_attn_interface", "FlashAttention 3 (from its sources)"),
    "fa4": ("flash_attn.cute", "flash-attn-4"),
    "triton": ("triton", "triton"),
}


def missing_packages(config: RunConfig, *, uses_gpus: bool) -> str:
    """Return one line with what this machine lacks and how to get it, or an empty string."""
    faults = {name: fault for name in ALWAYS if (fault := why_unusable(name))}
    faults |= {name: "not found" for name in HEAVY if not is_found(name)}
    if uses_gpus and not is_found("pynvml"):
        faults["nvidia-ml-py"] = "not found; it counts and watches GPUs"
    if uses_gpus and config.runtime.attention in BY_ATTENTION:
        module, package = BY_ATTENTION[config.runtime.attention]
        if not is_found(module):
            faults[package] = f"not found; runtime.attention={config.runtime.attention!r} asks for it"
    if not faults:
        return ""
    what = "; ".join(f"{name} ({fault})" for name, fault in faults.items())
    return f"this machine lacks what the run needs: {what}; `python -m pip install {' '.join(faults)}` brings it"


class NoPandas:
    """A finder of modules that finds no pandas."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for pandas and leave everything else to the other finders."""
        if name == "pandas":
            raise ModuleNotFoundError(name)


def keep_arrow_small() -> None:
    """Keep pyarrow from importing pandas at its first array, and from a memory pool of its own: 35 MB in a driver.

    Whoever asks it for a frame later still gets one. To be called before this process has threads that import.
    """
    import pyarrow as pa

    pa.set_memory_pool(pa.system_memory_pool())
    finder = NoPandas()
    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, finder)
        try:
            pa.array([])
        finally:
            sys.meta_path.remove(finder)


def missing_trackers(names: Iterable[str]) -> str:
    """Return one line with the trackers' clients that this machine, where the driver runs, lacks; or nothing."""
    missing = [name for name in names if not is_found(name)]
    if not missing:
        return ""
    return (
        f"track.{missing[0]} asks for the package {missing[0]}, which is not installed here; "
        f"`python -m pip install 'seedsweep[{','.join(missing)}]'` brings it, or take it out of the spec"
    )


def why_unusable(name: str) -> str:
    """Return why a small package cannot be imported, in one line, or an empty string."""
    try:
        importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: its shared library cannot be loaded
        return str(error).splitlines()[0] if str(error) else "not found"
    return ""


def is_found(name: str) -> bool:
    """Return whether a module is there, without running it or more than its parents."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
