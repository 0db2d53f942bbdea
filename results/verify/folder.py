"""Verifying a submission folder: every figure in it derived again from its own files, without PyTorch or a GPU.

Each check compares one statement with what other files of the folder say, and names both. What cannot be checked
because its evidence is not in the folder is said to be so, and is no pass. What only the model package knows (how a
configuration is hashed, how a score ledger is chained) is handed in as Formulas.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.export.evidence import EVIDENCE, SUMS, listed_files
from results.export.folder import Author, render_submission
from results.schema import FINISHED
from results.store.guard import file_sha256, first_line
from results.verify.checks import (
    AGREES,
    DIFFERS,
    UNCHECKED,
    Check,
    Formulas,
    _shown,
    compare,
    read_json,
    run_checks,
)

if TYPE_CHECKING:
    pass


def verify_folder(folder: Path, formulas: Formulas) -> list[Check]:
    """Return every check of a submission folder, in the order of the folder's parts.

    Raises FileNotFoundError for a folder that is not there, ValueError for one without evidence.
    """
    from results.verify.seed import check_seed
    from results.verify.sweep import check_sweep

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if not (folder / EVIDENCE).is_dir():
        raise ValueError(f"{folder} has no {EVIDENCE}/ folder; export it with this version of seedsweep")
    checks = [*check_sums(folder), *run_checks("rendered files", lambda: check_rendered(folder))]
    rows = read_finished_rows(folder, checks)
    for row in rows:
        where = f"seed={row['seed']}"
        checks += run_checks(where, lambda row=row: check_seed(folder, row, formulas))  # type: ignore[misc]
    checks += run_checks("sweep", lambda: check_sweep(folder, rows))
    return checks


def check_sums(folder: Path) -> Iterator[Check]:
    """Compare every file with SHA256SUMS."""
    path = folder / SUMS
    if not path.is_file():
        yield Check(SUMS, DIFFERS, "is missing")
        return
    listed: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\S.*)", line)
        if match is None or match[2] in listed:
            yield Check(SUMS, DIFFERS, f"line {line[:80]!r} is no sum, or names a file twice")
            continue
        listed[match[2]] = match[1]
    present = set(listed_files(folder))
    for name in sorted(set(listed) - present):
        yield Check(name, DIFFERS, f"is listed in {SUMS} and missing")
    for name in sorted(present - set(listed)):
        yield Check(name, DIFFERS, f"is not listed in {SUMS}")
    for name in sorted(present & set(listed)):
        yield compare(f"sha256 of {name}", file_sha256(folder / name), listed[name], SUMS)


def check_rendered(folder: Path) -> Iterator[Check]:
    """Render README, submission.json, logs and requirements again from the rows and compare them with the files."""
    said = read_json(folder / EVIDENCE / "export.json")
    author = Author(str(said["author"]), str(said["github_id"]))
    against = said["against"]
    if against is not None and not re.fullmatch(r"pr:\d+", str(against)):
        yield Check("README.md, Delta", UNCHECKED, f"the other side, {against!r}, is not in this folder")
        against = None
    submission = render_submission(str(folder / EVIDENCE), author, against=against)
    for name, text in submission.files.items():
        path = folder / name
        if not path.is_file():
            yield Check(name, DIFFERS, "is missing")
            continue
        stated = path.read_text(encoding="utf-8", errors="replace")
        if name == "submission.json":
            yield from _compare_tables(name, read_json(path), json.loads(text))
        else:
            skipped = "## Delta" if name == "README.md" and against != said["against"] else None
            yield from compare_lines(name, stated, text, skipped)
    logs = {path.name for path in folder.glob("train_seed*.log")}
    for name in sorted(logs - set(submission.files)):
        yield Check(name, DIFFERS, "is the log of a seed that has no finished row")


def _compare_tables(where: str, stated: Any, derived: Any) -> Iterator[Check]:
    """Compare nested JSON objects key by key."""
    if isinstance(stated, dict) and isinstance(derived, dict):
        for key in dict.fromkeys([*derived, *stated]):
            yield from _compare_tables(f"{where} {key}", stated.get(key, "nothing"), derived.get(key, "nothing"))
    else:
        yield compare(where, stated, derived, "the rows")


def compare_lines(where: str, stated: str, derived: str, skipped: str | None) -> Iterator[Check]:
    """Compare two texts line by line, up to a few differences; a section whose heading is skipped is left out."""
    ours, theirs = (_without(text, skipped).splitlines() for text in (stated, derived))
    different = [number for number, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]]
    for number in different[:5]:
        detail = f"states {_shown(ours[number])}, the rows give {_shown(theirs[number])}"
        yield Check(f"{where} line {number + 1}", DIFFERS, detail)
    if len(different) > 5:
        yield Check(where, DIFFERS, f"{len(different) - 5} more lines differ")
    if len(ours) != len(theirs):
        yield Check(where, DIFFERS, f"has {len(ours)} lines, rendered from the rows it has {len(theirs)}")
    elif not different:
        yield Check(where, AGREES, f"all {len(ours)} lines are those rendered from the rows")


def _without(text: str, heading: str | None) -> str:
    if heading is None:
        return text
    return re.sub(rf"(?ms)^{re.escape(heading)}$.*?(?=^## |\Z)", "", text)


def read_finished_rows(folder: Path, checks: list[Check]) -> list[dict[str, Any]]:
    """Return the finished rows of the folder's evidence; files that cannot be read are noted in checks."""
    from results.store.reader import latest_attempts, read_runs

    try:
        rows = latest_attempts(read_runs(str(folder / EVIDENCE)))
    except (ValueError, OSError) as error:
        checks.append(Check(f"{EVIDENCE}/results", DIFFERS, f"cannot be read: {first_line(error)}"))
        return []
    checks += [Check(f"{EVIDENCE}/results", DIFFERS, problem) for problem in rows.problems]
    finished = rows.frame[rows.frame["state"] == FINISHED].sort_values(["seed", "repeat"]).drop_duplicates("seed")
    return [{str(key): value for key, value in row.items()} for row in finished.to_dict("records")]
