"""How a submission folder's program is run, as far as the folder says: command, seeds, data, files it leaves.

Every fact carries the place it was read at; what is not said anywhere is left empty, and nothing is guessed silently.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from results.findings.importer import read_submission
from results.findings.run_command import (
    SEED_NAME,
    RunCommand,
    count_alike,
    find_commands,
    other_launcher,
    own_path,
    script_of,
)
from results.published.layout import NOT_SEARCHED, lay_out
from results.published.records import Record
from results.published.submission_json import read_submission_json
from results.published.submitted import listed_seeds
from results.published.text_files import read_text

MAX_DEPTH = 3
MAX_SOURCE_BYTES = 5_000_000
COMMAND_KEYS = ("run_command", "command", "cmd", "train_command", "reproduce", "reproduce_command", "launch_command")
# what a source reads from its environment, with the text it falls back on
FALLBACK = re.compile(r"""environ(?:\.get)?\(\s*["'](\w+)["']\s*,\s*(?:str\(\s*)?f?["']([^"']*)["']""")
READ = re.compile(r"""environ(?:\.get)?[\[(]\s*["'](\w+)["']""")
DATA_NAME = re.compile(r"(?:^|_)(?:PATHS?|DIRS?|FILES?|GLOB|ROOT|SHARDS?|FOLDER|TOKENIZER|DATA)$", re.IGNORECASE)
WRITTEN = re.compile(r"OUT|LOG|SAVE|CKPT|CHECKPOINT|CACHE|TMP|TEMP|ARTIFACT|PYTHONPATH|LD_|WANDB|RESULT", re.IGNORECASE)
ARTIFACT = re.compile(
    r"""["']([\w./-]*?\w[\w.-]*\.(?:ptz|ssq|int\d+\w*|(?:int\d+|quant\w*|mixed)[\w.-]*\.(?:bin|pt|npz|br|xz|zst|gz)|"""
    r"""(?:ptz|bin|pt)\.(?:br|xz|zst|gz)))["']"""
)
LOG_FILE = re.compile(r"""f["'](\w[\w./-]*)\{(?:[\w.]*\.)?run_id\}([\w.-]*\.(?:txt|log))["']""")
IMPORT = re.compile(r"^\s*(?:from\s+([A-Za-z_][\w.]*)\s+import|import\s+([A-Za-z_][\w., ]*))", re.MULTILINE)
RANKS = re.compile(r"--?nproc[-_]per[-_]node(?:=(.+))?")
NODES = re.compile(r"--?nnodes(?:=(.+))?")
CARDS = re.compile(r"(\d)\s*[x×*]\s*(?:NVIDIA\s*)?[HABL]\d", re.IGNORECASE)


class Fact(NamedTuple):
    """Something that a folder says, and where: "README.md line 31"."""

    value: str
    source: str


class FoundProgram(NamedTuple):
    """What a folder says about running its program; None and empty: it does not say.

    ranks: processes of the launcher, as written. paths: data by the variable or option that names it. reads: variables
    that the script looks at. code: the script and what it imports of the folder. cards: GPUs of the machine it was
    measured on.
    """

    folder: Path
    command: RunCommand | None
    commands: int
    other_launcher: str | None
    script: str | None
    ranks: str | None
    nodes: str | None
    cards: int | None
    seeds: list[int]
    seeds_source: str | None
    paths: dict[str, Fact]
    reads: set[str]
    requirements: str | None
    artifacts: list[str]
    log: str | None
    code: list[str]
    notes: list[str]


def read_program(folder: Path) -> FoundProgram:
    """Return what a submission folder says about running its program.

    Raises FileNotFoundError for a folder that is not there, ValueError for one that holds several submissions.
    """
    layout = lay_out(folder)
    root, notes = layout.root, [note for note in layout.notes if "submission.json not found" not in note]
    files = _files_of(root)
    texts = _texts(root, files, notes)
    submission = read_submission_json(layout.submission, notes)
    commands = find_commands({**texts, **_commands_of(submission)}, files)
    command = commands[0] if commands else None
    script = _script(command, files)
    source = "" if script is None else _source(root / script)
    seeds, seeds_source = _seeds(folder, submission, commands)
    return FoundProgram(
        folder=root,
        command=command,
        commands=count_alike(commands),
        other_launcher=None if command else other_launcher(texts),
        script=script,
        ranks=_option(command, RANKS),
        nodes=_option(command, NODES),
        cards=_cards(submission),
        seeds=seeds,
        seeds_source=seeds_source,
        paths=_paths(command, source, script, files),
        reads=set(READ.findall(source)),
        requirements=next((name for name in sorted(files) if name.lower() == "requirements.txt"), None),
        artifacts=list(dict.fromkeys(ARTIFACT.findall(source))),
        log=next(("".join((head, "{run_id}", tail)) for head, tail in LOG_FILE.findall(source)), None),
        code=[] if script is None else _code_of(root, script, files),
        notes=notes,
    )


def _files_of(root: Path) -> set[str]:
    """Return the paths of the files that a command may name, relative to the folder."""
    found = set()
    for place, names, files in os.walk(root):
        inside = Path(place).relative_to(root)
        kept = [name for name in names if not name.startswith(".") and name not in NOT_SEARCHED]
        names[:] = kept if len(inside.parts) < MAX_DEPTH else []
        found |= {(inside / name).as_posix() for name in files if not name.startswith(".")}
    return {name for name in found if (root / name).is_file()}


def _texts(root: Path, files: set[str], notes: list[str]) -> dict[str, str]:
    """Return what may hold the run command: the README first, then other Markdown and shell scripts of the top."""
    names = [name for name in files if "/" not in name and name.lower().endswith((".md", ".sh", ".bash"))]
    texts = {}
    for name in sorted(names, key=lambda name: (name.lower() != "readme.md", name)):
        try:
            texts[name] = read_text(root / name).text
        except ValueError as error:
            notes.append(f"{name}: left out ({str(error).removeprefix(f'{root / name}: ')})")
    return texts


def _commands_of(submission: dict[str, Any] | None) -> dict[str, str]:
    """Return the commands that submission.json gives, each as a text of shell."""
    given = {key: (submission or {}).get(key) for key in COMMAND_KEYS}
    return {f"submission.json {key}": value for key, value in given.items() if isinstance(value, str)}


def _script(command: RunCommand | None, files: set[str]) -> str | None:
    """Return the script that is run: the command's, else train_gpt.py, else the only Python file of the top."""
    if command is not None:
        named = script_of(command.words)
        return None if named is None else own_path(named, files)
    top = [name for name in files if "/" not in name and name.endswith(".py")]
    return "train_gpt.py" if "train_gpt.py" in top else top[0] if len(top) == 1 else None


def _source(path: Path) -> str:
    """Return a script's text; nothing for one that cannot be read as text."""
    if path.stat().st_size > MAX_SOURCE_BYTES:
        return ""
    try:
        return read_text(path).text
    except ValueError:
        return ""


def _code_of(root: Path, script: str, files: set[str]) -> list[str]:
    """Return the script and what it imports of the folder, directly or by way of others."""
    found = [script]
    for name in found:  # grows while it is gone through
        beside = "" if "/" not in name else name.rpartition("/")[0] + "/"
        for listed in IMPORT.findall(_source(root / name)):
            for module in (entry.split()[0] for entry in "".join(listed).split(",") if entry.split()):
                path = module.replace(".", "/")
                places = (f"{start}{path}{end}" for start in (beside, "") for end in (".py", "/__init__.py"))
                own = next((place for place in places if place in files), None)
                found += [own] if own is not None and own not in found else []
    return found


def _seeds(folder: Path, submission: dict[str, Any] | None, commands: list[RunCommand]) -> tuple[list[int], str | None]:
    """Return the seeds that the logs show, else those that submission.json lists, else those of the commands."""
    try:
        record: Record = read_submission(folder).record
    except ValueError:
        record = {"runs": []}
    logged = [run["seed"] for run in record["runs"] if run["seed"] is not None]
    listed = listed_seeds(submission)
    named = [seed for command in commands[:1] for seed in command.seeds]
    same = [command for command in commands if commands and command.words == commands[0].words]
    named = named if len(named) > 1 else [seed for command in same for seed in command.seeds]
    for seeds, source in ((logged, "logs"), (listed, "submission.json"), (named, "the run command")):
        if seeds:
            return sorted({*seeds, *(listed if source == "logs" else [])}), source
    return [], None


def _option(command: RunCommand | None, pattern: re.Pattern[str]) -> str | None:
    """Return the value of an option of the launcher, None where the command has none."""
    words = [] if command is None else command.words
    for word, after in zip(words, [*words[1:], ""]):
        match = pattern.fullmatch(word)
        if match:
            return match.group(1) or after
    return None


def _cards(submission: dict[str, Any] | None) -> int | None:
    """Return the number of GPUs that submission.json names, such as 8xH100."""
    match = CARDS.search(str((submission or {}).get("hardware", "")))
    return int(match.group(1)) if match else None


def _paths(command: RunCommand | None, source: str, script: str | None, files: set[str]) -> dict[str, Fact]:
    """Return the data that the command names, by variable or option, and what the script falls back on elsewhere."""
    found: dict[str, Fact] = {}
    if command is not None:
        for name, value in command.env.items():
            if _is_data(name, value, files):
                found[name] = Fact(value, command.source)
        for before, word in zip(command.words, command.words[1:]):
            option, mark, value = word.partition("=")
            option, value = (option, value) if mark and option.startswith("-") else (before, word)
            if (
                option.startswith("--")
                and _is_path(value)
                and own_path(value, files) is None
                and not _is_output(option)
            ):
                found[option] = Fact(value, command.source)
    for name, value in FALLBACK.findall(source):
        if name not in found and name not in (command.env if command else {}) and _is_data(name, value, files):
            found[name] = Fact(value, f"{script}, its own default")
    return found


def _is_data(name: str, value: str, files: set[str]) -> bool:
    """Return whether a variable names data that the program reads."""
    is_named = DATA_NAME.search(name) is not None or re.search(r"\.(?:bin|model|jsonl?|parquet|npy|txt)$", value)
    return bool(is_named) and _is_path(value) and not _is_output(name) and own_path(value, files) is None


def _is_output(name: str) -> bool:
    return WRITTEN.search(name) is not None or SEED_NAME.fullmatch(name) is not None


def _is_path(value: str) -> bool:
    """Return whether a value looks like a path: it has a slash, and is neither an address nor a sum."""
    return "/" in value and "://" not in value and " " not in value and len(value) > 1
