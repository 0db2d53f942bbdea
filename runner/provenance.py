"""Where figures come from: source, packages, machine, and the fingerprints that name config, data and code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from model.config import DataConfig
from model.data.cpus import usable_cpus

PACKAGES = (
    "torch",
    "ray",
    "numpy",
    "pyarrow",
    "pandas",
    "scipy",
    "safetensors",
    "sentencepiece",
    "brotli",
    "seedsweep",
)
SOURCE_ROOT = Path(__file__).resolve().parent.parent
OWN_FILE = "runner/provenance.py"
GIT_TIMEOUT_S = 20
# what may decide a figure, or whether two runs are alike, and comes from whoever starts the driver
SETTING_PREFIXES = (
    "CUDA_", "CUBLAS", "CUDNN_", "NCCL_", "NVIDIA_", "GLOO_", "TORCH", "PYTORCH_", "TRITON_", "OMP_", "MKL_", "KMP_",
    "GOMP_", "OPENBLAS_", "ATEN_", "DNNL_", "ONEDNN_", "PYTHONHASHSEED", "LD_PRELOAD",
)  # fmt: skip


class Git(NamedTuple):
    """The state of the working tree."""

    commit: str  # "unknown" outside a repository
    is_dirty: bool | None  # None where unknown


def git_state(root: Path = SOURCE_ROOT) -> Git:
    """Return commit and dirty flag of the sources, ("unknown", None) where git cannot tell."""
    commit = run_git(root, "rev-parse", "HEAD")
    is_ours = run_git(root, "ls-files", "--error-unmatch", "--", OWN_FILE)  # not of a repository around an installation
    if not commit or not is_ours:
        return Git("unknown", None)
    changes = run_git(root, "status", "--porcelain", "--untracked-files=no")
    return Git(commit, None if changes is None else bool(changes))


def run_git(root: Path, *arguments: str) -> str | None:
    """Return git's output, or None if it failed or is not there.

    GIT_DIR and its kin, as hooks have them, would make git speak of another repository than the one around root.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter, without importing them."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def different_versions(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Return 'torch 2.13.0 here, 2.12.0 there; ...' for packages whose versions differ, or nothing."""
    differing = [
        f"{name} {version} at the driver, {theirs.get(name, 'missing')} here"
        for name, version in sorted(ours.items())
        if theirs.get(name, "missing") != version
    ]
    return "; ".join(differing)


def machine() -> dict[str, Any]:
    """Return the host this process runs on: CPU, memory, system. GPUs are the worker's to say."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu_model": cpu_model(),
        "num_cpus": os.cpu_count() or 1,
        "usable_cpus": usable_cpus(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of this process that may decide a result, sorted by name."""
    given = os.environ if environment is None else environment
    return {name: value for name, value in sorted(given.items()) if name.startswith(SETTING_PREFIXES)}


def cpu_model() -> str:
    """Return the CPU's name as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def code_hash() -> str:
    """Return the sha256 over the sorted sources of the four packages."""
    from model.bundle.code_hash import code_hash as hash_sources

    return str(hash_sources())


def data_hash(data: DataConfig, *, vocab_size: int) -> str:
    """Return the sha256 over the contents of shards and tokenizer.

    Raises ValueError or FileNotFoundError, naming the field, where files are missing or damaged, or the tokenizer
    cannot count the bytes of the validation text.
    """
    from model.data.manifest import hash_data
    from model.data.text_check import check_text

    hashes = hash_data(data, vocab_size=vocab_size)
    check_text(data, hashes, vocab_size=vocab_size)
    return hashes.data_hash


def data_files(data: DataConfig, *, vocab_size: int) -> dict[str, Any]:
    """Return what the data hash is taken over, by file, {} where this machine lacks data or cannot read it.

    It only lets a later refusal name what differs; the hash itself decides.
    """
    from model.data.manifest import hash_data
    from model.pipeline.differences import DATA_LIMITS

    try:
        hashed = hash_data(data, vocab_size=vocab_size)
    except (ValueError, OSError):
        return {}
    files = {"train": dict(hashed.train), "val": dict(hashed.val), "tokenizer": hashed.tokenizer}
    return {**files, **{name: getattr(data, name) for name in DATA_LIMITS}}


def data_problems(data: DataConfig) -> list[str]:
    """Return one line for each thing of data that this machine lacks; sizes and headers only, in milliseconds."""
    from model.data.manifest import check_data

    return check_data(data)
