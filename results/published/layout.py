"""What lies in a submission folder and where: its logs, submission.json and README, at any of the usual depths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

LOG_SUFFIXES = (".log", ".txt", ".out", ".jsonl", ".stdout", ".stderr", ".err")
NOT_LOGS = re.compile(
    r"(?:requirements|constraints|licen[sc]e|readme|notice|notes?|todo|changelog|cmakelists|citation|environment|packages|"
    r"pip[_-]?freeze|apt|robots|sha256sums|commands?)[\w.-]*", re.IGNORECASE,
)  # fmt: skip
NOT_SEARCHED = ("__pycache__", "node_modules", "venv", "site-packages", "wandb", "data", "datasets", "tokenizers")
MAX_DEPTH = 5  # folders below the submission
MAX_LOG_BYTES = 300_000_000


RESULT_FILES = re.compile(r"[\w.-]*(?:result|metric|eval|log|seed|summary|score|final)[\w.-]*\.json", re.IGNORECASE)
# logs that their names set apart from the runs of a submission
ASIDE = re.compile(
    r"(?:^|[_\-./])(?:ablations?|abl|old|failed|smoke|debug|sanity|dry_?run|archive|previous|aborted|crash(?:ed)?|baselines?|"
    r"scratch|discarded|superseded)(?=[_\-./]|$)", re.IGNORECASE,
)  # fmt: skip


class Layout(NamedTuple):
    """The folder that holds the submission, its logs, its submission.json (None: not there), and remarks.

    results: JSON files that may hold scores, for folders whose logs hold none.
    """

    root: Path
    logs: list[Path]
    submission: Path | None
    notes: list[str]
    results: list[Path]


def lay_out(folder: Path) -> Layout:
    """Return where the parts of one submission are.

    Raises FileNotFoundError for a folder that is not there, ValueError for one that holds several submissions.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    notes: list[str] = []
    files = _files_below(folder, notes)
    submissions = [path for path in files if re.fullmatch(r"submission[\w.-]*\.json", path.name, re.IGNORECASE)]
    logs = [path for path in files if _may_be_log(path, folder, notes)]
    results = [path for path in files if RESULT_FILES.fullmatch(path.name) and path not in submissions]
    own = [path for path in submissions if path.parent == folder]
    nested = sorted({path.parent for path in submissions if path.parent != folder})
    with_logs = [parent for parent in nested if any(parent in path.parents for path in logs)]
    if own:
        logs = _without_nested(folder, logs, with_logs, notes)
        return Layout(folder, logs, _first_submission(own, notes), notes, results)
    if not nested:
        with_logs = _readme_folders(folder, files, logs)
    if len(with_logs) > 1:
        names = ", ".join(parent.relative_to(folder).as_posix() for parent in with_logs)
        raise ValueError(f"{folder}: holds {len(with_logs)} submissions ({names}); import them one at a time")
    if with_logs and nested:
        root = with_logs[0]
        outside = [path for path in logs if root not in path.parents]
        if not outside:
            notes.append(f"{root.relative_to(folder).as_posix()}: the folder with submission.json; it is the one read")
            return Layout(
                root, logs, _first_submission([p for p in submissions if p.parent == root], notes), notes, results
            )
    found = submissions if len(nested) == 1 else []
    if len(nested) > 1:
        notes.append(f"{len(nested)} submission.json lie in folders without logs: none of them is used")
    elif not found:
        notes.append("submission.json not found")
    return Layout(folder, logs, _first_submission(found, notes) if found else None, notes, results)


def _files_below(folder: Path, notes: list[str]) -> list[Path]:
    """Return every file, those nearest to the top first; links to folders are not followed."""

    def report(error: OSError) -> None:
        notes.append(f"{error.filename}: cannot be read ({error.strerror}); left out")

    found = []
    for place, names, files in os.walk(folder, onerror=report):
        depth = len(Path(place).relative_to(folder).parts)
        kept = [name for name in sorted(names) if not name.startswith(".") and name not in NOT_SEARCHED]
        names[:] = kept if depth < MAX_DEPTH else []
        found += [Path(place) / name for name in files if not name.startswith(".")]
    found = [path for path in found if path.is_file()]
    return sorted(found, key=lambda path: (len(path.parts), path.as_posix()))


def _readme_folders(folder: Path, files: list[Path], logs: list[Path]) -> list[Path]:
    """Return the folders with a README and logs of their own, where the top has neither."""
    readmes = {path.parent for path in files if path.name.lower() == "readme.md"}
    if folder in readmes or any(path.parent == folder for path in logs):
        return []
    tops = [place for place in sorted(readmes) if not any(other in place.parents for other in readmes)]
    return [place for place in tops if any(place in path.parents for path in logs)]


def _may_be_log(path: Path, folder: Path, notes: list[str]) -> bool:
    if path.suffix.lower() not in LOG_SUFFIXES or NOT_LOGS.fullmatch(path.name):
        return False
    try:
        size = path.stat().st_size
    except OSError:
        size = 0  # reading it says what is wrong
    if size > MAX_LOG_BYTES:
        notes.append(f"{path.relative_to(folder).as_posix()}: {size / 1e6:.0f} MB is too long for a log; left out")
    return size <= MAX_LOG_BYTES


def _without_nested(folder: Path, logs: list[Path], nested: list[Path], notes: list[str]) -> list[Path]:
    """Return the logs that belong to the folder's own submission."""
    for parent in nested:
        name = parent.relative_to(folder).as_posix()
        notes.append(f"{name}: has a submission.json of its own; its logs are left out (import it by itself)")
    return [path for path in logs if not any(parent in path.parents for parent in nested)]


def _first_submission(paths: list[Path], notes: list[str]) -> Path:
    exact = [path for path in paths if path.name.lower() == "submission.json"]
    chosen = (exact or paths)[0]
    if len(paths) > 1:
        notes.append(f"several files named submission*.json: {chosen.name} is used")
    return chosen
