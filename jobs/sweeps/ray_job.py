"""Sending a sweep to a cluster as a Ray job: what travels, what is recorded, and following it to its end.

The working directory goes along without .git, run directories and data, so the commit is recorded here, at
submission. Token authentication stays as the cluster wants it; nothing of it is read or sent from here.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from runner.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, first_line
from runner.folder.program_files import find_files, list_names
from runner.provenance import Git, git_state, run_git
from runner.spec.plain_yaml import SpecLoader
from runner.spec.sweep import SweepSpec

# Left at home: history, environments, caches, data and results, in .gitignore's words; a leading slash means the top
# folder only (model/data is code); "/.*" would match the folder itself. What is left stays far below the limit.
EXCLUDES = (
    "/.?*", "/venv", "/runs", "/wandb", "/mlruns", "/data", "/build", "/dist", "*.egg-info", "__pycache__",
    "*.bin", "*.safetensors", "*.ssq", "*.parquet", "*.npz",
)  # fmt: skip
MAX_UPLOAD_BYTES = 20_000_000
NAMES_AT_ONCE = 500  # files in one question to git
CHECK_IGNORE = (
    "-c",
    "core.quotePath=off",
    "check-ignore",
    "--no-index",
    "--",
)  # as Ray reads .gitignore: tracked or not
FOLLOW_EVERY_S = 2.0
SILENT_S = 60.0  # that a job server may take to come back while its job is followed
EXIT_CODES = {"SUCCEEDED": EXIT_OK, "FAILED": EXIT_FAILED, "STOPPED": EXIT_INTERRUPTED}

Answer = TypeVar("Answer")


class JobServerFailed(ValueError):
    """A job server did not take a job or gives no answer; the message is one line that says what to do."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One job as it will be sent."""

    entrypoint: str
    runtime_env: dict[str, Any]
    metadata: dict[str, str]
    left_links: tuple[str, ...] = ()  # links to folders that stay at home


def make_submission(
    spec: SweepSpec, spec_path: Path, *, working_dir: Path, run_arguments: Sequence[str] = (), git: Git | None = None
) -> Submission:
    """Return the job that runs spec on a cluster. Every word of the command is quoted on its own.

    Raises ValueError if the spec or its program lies outside working_dir, or too much would be uploaded, or not all of
    the program.
    """
    try:
        inside = spec_path.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ValueError(
            f"spec {spec_path} is not inside the working directory {working_dir}, which is what travels"
        ) from None
    if run_git(working_dir, "check-ignore", "--", str(inside)):
        raise ValueError(f"spec {spec_path} is ignored by git, and what git ignores does not travel; move it")
    size, links = pack(working_dir)
    if spec.program is not None:
        check_program(spec_path, Path(spec.program.folder), working_dir, links)
    if size > MAX_UPLOAD_BYTES:
        raise ValueError(
            f"working directory {working_dir} would upload {size / 1e6:.1f} MB, over {MAX_UPLOAD_BYTES / 1e6:.0f} MB; "
            f"run from the repository, and keep data outside it"
        )
    git = git or git_state(working_dir)
    words = ["python", "-m", "jobs.cli", "run", str(inside), "--git-commit", git.commit]
    if git.is_dirty is not None:
        words += ["--git-dirty", "yes" if git.is_dirty else "no"]
    return Submission(
        entrypoint=shlex.join([*words, *run_arguments]),
        runtime_env={"working_dir": str(working_dir), "excludes": [*EXCLUDES, *map(as_pattern, links)]},
        left_links=links,
        metadata={
            "sweep": spec.name,
            "config_hash": spec.config_hash,
            "git_commit": git.commit,
            "git_dirty": str(git.is_dirty),
            "seeds": " ".join(map(str, spec.seeds)),
        },
    )


def check_program(spec_path: Path, folder: Path, working_dir: Path, links: Sequence[str]) -> None:
    """Raise ValueError, one line, unless the folder of a program travels whole and is found where the job runs."""
    try:
        inside = Path(os.path.relpath(folder, working_dir))
        folder.resolve().relative_to(working_dir.resolve())
    except ValueError:
        raise ValueError(
            f"program.folder={folder} is not inside the working directory {working_dir}, which is what travels"
        ) from None
    given = str(yaml.load(spec_path.read_text(encoding="utf-8"), Loader=SpecLoader)["program"]["folder"])
    if given.startswith(("/", "~")):
        raise ValueError(f"program.folder={given} is a place of this machine; write it from the working directory")
    names = [(inside / name).as_posix() for name in find_files(folder)]
    left = [name for name in names if stays_at_home(working_dir / name, working_dir, links)]
    left += ignored_by_git(working_dir, [name for name in names if name not in left])
    if left:
        raise ValueError(
            f"program.folder: {list_names(left)} would not travel (git ignores it, or its name or place says data or "
            f"results); move it, or run from the cluster"
        )


def stays_at_home(path: Path, working_dir: Path, links: Sequence[str]) -> bool:
    """Return whether a file, or a folder around it, is left out of what is packed."""
    places = [path, *(place for place in path.parents if place != working_dir and place.is_relative_to(working_dir))]
    return any(
        is_excluded(place, working_dir) or place.relative_to(working_dir).as_posix() in links for place in places
    )


def ignored_by_git(working_dir: Path, names: Sequence[str]) -> list[str]:
    """Return those of the files of a working directory that git ignores."""
    found: set[str] = set()
    for begin in range(0, len(names), NAMES_AT_ONCE):
        said = run_git(working_dir, *CHECK_IGNORE, *names[begin : begin + NAMES_AT_ONCE])
        found |= set((said or "").splitlines())
    return [name for name in names if name in found]


class Luggage(NamedTuple):
    """What of a working directory travels."""

    num_bytes: int
    links: tuple[str, ...]  # links to folders, which stay at home: Ray would pack whatever they lead to


def pack(working_dir: Path) -> Luggage:
    """Return the size of what would travel, by the patterns that Ray is given; a link to a file counts as the file.

    What .gitignore names is counted though Ray leaves it at home too: never less than what travels.
    """
    total, links, waiting = 0, [], [working_dir]
    while waiting:
        for path in waiting.pop().iterdir():
            if is_excluded(path, working_dir):
                continue
            if path.is_dir() and path.is_symlink():
                links.append(path.relative_to(working_dir).as_posix())
            elif path.is_dir():
                waiting.append(path)
            elif path.is_file():
                total += path.stat().st_size
    return Luggage(total, tuple(sorted(links)))


def as_pattern(name: str) -> str:
    """Return the pattern, in .gitignore's words, of exactly this path."""
    return "/" + re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)


def is_excluded(path: Path, working_dir: Path) -> bool:
    """Return whether one of EXCLUDES keeps path at home."""
    return any(
        path.parent == working_dir and fnmatch(path.name, pattern[1:])
        if pattern.startswith("/")
        else path.match(pattern)
        for pattern in EXCLUDES
    )


def connect(address: str, *, is_verbose: bool = False) -> Any:
    """Return a client of the cluster's job server, which says what it packs only where is_verbose.

    Raises ValueError if none answers at address.
    """
    from ray.job_submission import JobSubmissionClient

    if not is_verbose:
        logging.getLogger("ray").setLevel(logging.CRITICAL)

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        said = first_line(str(error)) or type(error).__name__
        raise ValueError(f"--address {address}: no job server answers there ({said})") from None


def submit(client: Any, submission: Submission) -> str:
    """Send the job and return its id. Raises JobServerFailed if the cluster does not take it."""
    try:
        job_id: str = client.submit_job(
            entrypoint=submission.entrypoint, runtime_env=submission.runtime_env, metadata=submission.metadata
        )
    except (OSError, RuntimeError) as error:
        raise JobServerFailed(
            f"--address {client.get_address()}: the cluster did not take the job "
            f"({first_line(str(error))}){remedy(error)}"
        ) from None
    return job_id


def remedy(error: Exception) -> str:
    """Return what to do about a job server's refusal, where the cause is known."""
    if "No available agent" not in str(error):
        return ""
    return (
        "; the head node's job agent does not run, dashboard_agent.log there says why: often its port 52365 belongs to "
        "another cluster of that machine, then give `ray start` another --dashboard-agent-listen-port"
    )


def follow(client: Any, job_id: str, write: Callable[[str], object] = sys.stdout.write) -> int:
    """Print what the job prints until it ends, and return the exit code that its end means.

    SUCCEEDED is 0 and STOPPED 3. Ray reports any other exit as FAILED; its message has the sweep's own code.
    Raises JobServerFailed if the job server gives no answer for SILENT_S.
    """
    for text in new_text(client, job_id):
        write(text)
        sys.stdout.flush()
    info = ask_patiently(lambda: client.get_job_info(job_id), client, job_id)
    status = str(info.status.value)
    if status == "FAILED" and info.driver_exit_code in (EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED):
        return int(info.driver_exit_code)
    return EXIT_CODES.get(status, EXIT_FAILED)


def new_text(client: Any, job_id: str) -> Iterator[str]:
    """Yield the job's output as it grows, the last of it after the job has ended."""
    shown = 0
    while True:
        is_over = ask_patiently(lambda: client.get_job_status(job_id), client, job_id).is_terminal()
        text = ask_patiently(lambda: client.get_job_logs(job_id), client, job_id)
        if len(text) > shown:
            yield text[shown:]
            shown = len(text)
        if is_over:
            return
        time.sleep(FOLLOW_EVERY_S)


def ask_patiently(question: Callable[[], Answer], client: Any, job_id: str) -> Answer:
    """Return the job server's answer; ask again while it gives none, since the job goes on without us.

    Raises JobServerFailed after SILENT_S.
    """
    until = time.monotonic() + SILENT_S
    while True:
        try:
            return question()
        except (OSError, RuntimeError) as error:
            if time.monotonic() >= until:
                address = client.get_address()
                raise JobServerFailed(
                    f"--address {address}: the job server has not answered for {SILENT_S:.0f} s "
                    f"({first_line(str(error))}); the job may go on: "
                    f"`ray job logs {job_id} --follow --address {address}`"
                ) from None
        time.sleep(FOLLOW_EVERY_S)
