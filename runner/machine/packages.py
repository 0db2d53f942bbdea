"""Which packages a run needs, by its configuration, and which of them this machine lacks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable

from model.config import RunConfig

ALWAYS = ("numpy", "safetensors", "sentencepiece", "brotli", "pyarrow", "pandas", "psutil")
HEAVY = ("torch",)  # looked for, not imported: the driver of a gang does without it
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
