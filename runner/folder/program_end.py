"""What a program left when it ended with 0: its figures, its artifact measured, its own files looked at once more."""

from __future__ import annotations

import lzma
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.files.atomic import file_sha256
from runner.errors import ProgramError
from runner.folder.commit import PROGRAM_STAGE
from runner.folder.program_files import changed_files, is_source, list_names, new_files
from runner.life.job import Job
from runner.spec.program import Program, fill_pattern

if TYPE_CHECKING:
    import numpy as np

AS_FILES = "the script and the modules it imports, as they lie in the folder"
PACKED = "the script and the modules it imports, each packed by lzma"


class End(NamedTuple):
    """The stage record of a finished program, and the columns of its curve."""

    record: dict[str, Any]
    steps: dict[str, np.ndarray]


class Code(NamedTuple):
    """The counted files of a program, in bytes: as they lie, and packed by lzma, each."""

    as_files: int
    packed: int


def read_end(
    job: Job, program: Program, work: Path, out: Path, files: Mapping[str, str], values: Mapping[str, str]
) -> End:
    """Return what a program left; files: the sha256 of its folder's own, values: what placeholders meant.

    Raises ProgramError, one line, if there is no score, or its working folder is gone.
    """
    from results.findings.program import EXPECTED, RESULTS_FILE, read_figures
    from results.published.track import SIZE_LIMIT_BYTES

    if not work.is_dir() or not out.is_dir():
        raise ProgramError(
            f"the program removed its {'working' if not work.is_dir() else 'out'} folder, and with it what it left"
        )
    changed = changed_files(work, files)
    written = {**new_files(work, files), **{f"out/{name}": path for name, path in new_files(out, {}).items()}}
    results = next((written[name] for name in (f"out/{RESULTS_FILE}", RESULTS_FILE) if name in written), None)
    logs, too_long = find_logs(job, program, written, values)
    try:
        figures = read_figures(logs, results, seed=job.key.seed)
    except ValueError as error:
        raise ProgramError("; ".join([f"the program ended with 0, but {error}", *too_long])) from None
    findings, notes, columns = list(figures.findings), [*too_long, *figures.notes], dict(figures.columns)
    artifact = find_artifact(program, written, columns.get("model_bytes"), values, notes)
    code = measure_code(program, work, files, notes)
    columns |= count_bytes(columns, artifact, code, findings)
    columns["size_limit_bytes"] = SIZE_LIMIT_BYTES
    if columns.get("artifact_bytes") is not None:
        columns["within_limit"] = columns["artifact_bytes"] <= SIZE_LIMIT_BYTES
    if changed:
        findings.append(f"the program changed or removed files of its own folder: {list_names(changed)}")
    findings += left_behind(work.parent, job.world_size)
    if columns.get("val_documents_hash") is None:
        notes.append("which validation text it scored is not known: it gave no val_documents_hash")
    missing = [name for name in EXPECTED if columns.get(name) is None]
    notes += [f"not found in what it printed or wrote: {', '.join(missing)}"] * bool(missing)
    notes = list(dict.fromkeys(map(job.redact, notes)))
    findings = list(dict.fromkeys(map(job.redact, findings)))
    provenance = {name: job.redact(words) for name, words in figures.provenance.items()}
    columns["provenance_json"] = {**provenance, "findings": findings, "notes": notes}
    metrics = {**columns, "code_changed": any(map(is_source, changed))}
    if code is not None:
        metrics |= {"code_bytes_as_files": code.as_files, "code_bytes_packed": code.packed}
    names = {path: path.relative_to(job.workdir).as_posix() for path in artifact}
    outputs = {name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path, name in names.items()}
    hashes = {name: job.record.get(name) for name in ("config_hash", "code_hash", "data_hash")}
    return End({"format": 1, "stage": PROGRAM_STAGE, "metrics": metrics, "outputs": outputs, **hashes}, figures.steps)


def find_logs(
    job: Job, program: Program, written: Mapping[str, Path], values: Mapping[str, str]
) -> tuple[dict[str, Path], list[str]]:
    """Return what counts as a log: the files that the spec names, what each rank printed, other logs that it wrote.

    Second, a line for each that is too long to be read.
    """
    from results.published.layout import LOG_SUFFIXES, MAX_LOG_BYTES, NOT_LOGS

    patterns = [fill_pattern(pattern, values) for pattern in program.log]
    named = {name: path for pattern in patterns for name, path in written.items() if is_named(name, path, pattern)}
    ranks = {f"output of rank {rank}": job.log_path(rank) for rank in range(job.world_size)}
    printed = {name: path for name, path in ranks.items() if path.is_file()}
    others = {
        name: path
        for name, path in written.items()
        if path.suffix.lower() in LOG_SUFFIXES and not NOT_LOGS.fullmatch(path.name)
    }
    found = {**named, **printed, **others}
    sizes = {name: path.stat().st_size for name, path in found.items()}
    too_long = [
        f"{name}: {size / 1e6:.0f} MB is too long for a log; left out (write the figures into results.json)"
        for name, size in sizes.items()
        if size > MAX_LOG_BYTES
    ]
    return {name: path for name, path in found.items() if sizes[name] <= MAX_LOG_BYTES}, too_long


def find_artifact(
    program: Program, written: Mapping[str, Path], claimed: int | None, values: Mapping[str, str], notes: list[str]
) -> list[Path]:
    """Return the files of the artifact: those that the spec names, else a new file of the size that was claimed."""
    if program.model:
        found: dict[Path, None] = {}
        for pattern in (fill_pattern(item, values) for item in program.model):
            paths = [path for name, path in written.items() if is_named(name, path, pattern)]
            found |= dict.fromkeys(paths)
            if not paths:
                notes.append(f"program.outputs: no new file is {pattern}")
        return list(found)
    same = [path for path in written.values() if claimed is not None and path.stat().st_size == claimed]
    if claimed is not None and not same:
        notes.append(f"no new file has the {claimed} bytes of the model: taken from the log; name it under outputs")
    return same[:1]


def is_named(name: str, path: Path, pattern: str) -> bool:
    """Return whether a pattern means a new file, by its name in the working folder or by its whole path."""
    return path.match(pattern) or Path(name).match(pattern)


def measure_code(program: Program, work: Path, files: Mapping[str, str], notes: list[str]) -> Code | None:
    """Return the size of the code: of the files that the spec names, else of the script and what it imports."""
    from results.findings.code_files import read_code

    names: Sequence[str] = program.code
    if not names:
        code = read_code(work)
        script = next((word for word in program.command if word in files and word.endswith(".py")), None)
        names = [script] if script else []
        if code and script in (None, code["entry"]):
            names = [code["entry"], *code["helpers"]]
    missing = [name for name in names if not (work / name).is_file()]
    if missing or not names:
        notes.append(f"code not measured: {list_names(missing) or 'no script'} is not in the folder")
        return None
    contents = [(work / name).read_bytes() for name in names]
    return Code(sum(map(len, contents)), sum(len(lzma.compress(content)) for content in contents))


def count_bytes(
    columns: Mapping[str, Any], artifact: Sequence[Path], code: Code | None, findings: list[str]
) -> dict[str, Any]:
    """Return model, code and artifact bytes: the model as measured, the code as the program counts it."""
    found: dict[str, Any] = {}
    model = sum(path.stat().st_size for path in artifact) if artifact else columns.get("model_bytes")
    said = columns.get("model_bytes")
    if said is not None and model != said:
        findings.append(f"model_bytes: the program says {said}, its artifact has {model}")
    if model is not None:
        found["model_bytes"] = model
    counted = columns.get("code_bytes")
    if code is not None:
        found["code_bytes_readable"] = code.as_files
        known = {code.as_files: AS_FILES, code.packed: PACKED}
        other = f"as the program counted it (as files {code.as_files} bytes, packed by lzma {code.packed})"
        found["code_bytes_convention"] = AS_FILES if counted is None else known.get(counted, other)
        counted = code.as_files if counted is None else counted
    elif counted is not None:
        found["code_bytes_convention"] = "as the program counted it"
    if counted is not None:
        found["code_bytes"] = counted
    if model is not None and counted is not None:
        found["artifact_bytes"] = model + counted
        said = columns.get("artifact_bytes")
        if said is not None and said != model + counted:
            findings.append(f"artifact_bytes: the program says {said}, model and code are {model} + {counted}")
    return found


def left_behind(place: Path, world_size: int) -> list[str]:
    """Return a line for each rank whose process had left others behind when it ended."""
    lines = []
    for rank in range(world_size):
        path = place / f"left-{rank}"
        if path.is_file():
            lines.append(f"rank {rank} ended and left {path.read_text()} process(es) behind, which were ended")
    return lines
