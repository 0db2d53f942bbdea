"""Python environments of programs: made once a node from a requirements file, named by what decides them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from model.files.locks import lock_beside
from runner.errors import PreflightError, first_line

MARK = "seedsweep-complete"  # written last into an environment
LOOK_S = 0.5
OFFLINE = (
    "connection", "network", "resolve", "dns", "unreachable", "proxy", "timed out", "max retries", "offline", "tls",
    "ssl",
)  # fmt: skip
VERSIONS = (
    "import json, sys\nfrom importlib import metadata\n"
    "found = {name: None for name in sys.argv[1:]}\n"
    "for name in found:\n"
    "    try:\n        found[name] = metadata.version(name)\n"
    "    except metadata.PackageNotFoundError:\n        found[name] = 'missing'\n"
    "import platform\nprint(json.dumps({'python': platform.python_version(), **found}))\n"
)


def environments_root() -> Path:
    """Return where this node keeps the environments of programs."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "seedsweep" / "environments"


def make_environment(requirements: Path, tick: Callable[[], None], *, root: Path | None = None) -> Path:
    """Return the python of the environment that a requirements file describes, made here if this node has none yet.

    tick is called while it is made, or another process makes it. Raises PreflightError, one line, where packages
    cannot be had: without a network, or because there are none of that name and version.
    """
    place = (root or environments_root()) / environment_name(requirements)
    with lock_beside(place, tick):
        if not (place / MARK).is_file():
            fill_environment(place, requirements, tick)
    return place / "bin" / "python"


def environment_name(requirements: Path) -> str:
    """Return the name of an environment: over the file's contents, Python and the kind of machine."""
    facts = (requirements.read_bytes(), platform.python_version(), sys.platform, platform.machine())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def fill_environment(place: Path, requirements: Path, tick: Callable[[], None]) -> None:
    """Make an environment in place; what an attempt that was broken off left there is taken away first."""
    shutil.rmtree(place, ignore_errors=True)
    uv = shutil.which("uv")
    python = str(place / "bin" / "python")
    if uv is not None:
        make = [uv, "venv", "--quiet", "--python", sys.executable, str(place)]
        install = [uv, "pip", "install", "--quiet", "--python", python, "-r", str(requirements)]
    else:
        make = [sys.executable, "-m", "venv", str(place)]
        install = [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1",
            "--timeout", "15", "-r", str(requirements),
        ]  # fmt: skip
    for command in (make, install):
        code, said = run_ticking(command, tick, cwd=requirements.parent)
        if code:
            shutil.rmtree(place, ignore_errors=True)
            raise PreflightError(f"program.requirements={requirements.name}: {why_not_installed(said)}")
    (place / MARK).write_text("")


def why_not_installed(said: str) -> str:
    """Return one line on an installation that failed: no network, or what the installer said."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    telling = (errors or lines or ["nothing was said"])[-1]
    if any(word in said.lower() for word in OFFLINE):
        return (
            f"packages cannot be had, the index does not answer ({first_line(telling, limit=90)}); give this node a "
            f"network or a mirror, or leave requirements out and install them beside seedsweep"
        )
    return f"packages cannot be installed ({first_line(telling, limit=200)})"


def run_ticking(command: Sequence[str], tick: Callable[[], None], *, cwd: Path) -> tuple[int, str]:
    """Run a command to its end and return its exit code and what it said."""
    with subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        while True:
            try:
                said, _ = process.communicate(timeout=LOOK_S)
                return process.returncode, said
            except subprocess.TimeoutExpired:
                tick()
            except BaseException:
                process.kill()
                raise


def versions_in(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of some packages as another interpreter has them, {} if it does not say."""
    done = subprocess.run(
        [str(python), "-I", "-c", VERSIONS, *packages], capture_output=True, text=True, timeout=60, check=False
    )
    try:
        return {str(name): str(version) for name, version in json.loads(done.stdout).items()}
    except ValueError:
        return {}
