"""A first spec for somebody else's program, from what its folder says: for a person to check, line by line.

Every line says where its value was read. CHECK marks what was guessed or is not here; NOT FOUND marks what nobody said.
Values that look like secrets stay out of it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from results.findings.run_command import SEED_NAME
from results.findings.submitted_program import Fact, FoundProgram
from runner.spec.gang import MAX_RANKS
from runner.spec.program import OURS as SET_BY_GANG
from runner.spec.secrets import has_shape_of_secret, looks_like_secret

CHECK, NOT_FOUND = "CHECK", "NOT FOUND"
PLAIN = re.compile(r"(?:-{1,2}|\.?/)?[A-Za-z_][\w./=-]*")
WORDS_WITH_A_MEANING = re.compile(r"true|false|null|yes|no|on|off|y|n", re.IGNORECASE)
OURS = re.compile(r"\{(?:seed|run_id|world_size|workdir|out)\}")
RUN_ID = re.compile(r"-{0,2}run[_-]?(?:id|name)", re.IGNORECASE)
BLANK = re.compile(r"\$|<|^/?path/to\b|(?:^|/)[A-Z][A-Z_]{2,}(?=[/.]|$)")  # a path that stands for the reader's own
PARENTS = 5  # a record lies three folders deep in its repository, whose data paths start at the top


class Remark(NamedTuple):
    """What a person has to look at: CHECK or NOT FOUND, the key of the spec, and why."""

    kind: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.key}: {self.text}"


class Draft(NamedTuple):
    """The text of a spec, the remarks that stand in it, and whether the spec can be loaded as it is."""

    text: str
    remarks: list[Remark]
    is_complete: bool


class _Pen:
    """Writes lines with their sources and remarks, and keeps the remarks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.remarks: list[Remark] = []

    def write(self, line: str, source: str | None = None, *remarks: Remark) -> None:
        """Add a line; source and remarks become its comment."""
        self.remarks += remarks
        comment = "; ".join([*([source] if source else []), *(f"{remark.kind}: {remark.text}" for remark in remarks)])
        self.lines.append(f"{line}  # {comment}" if comment else line)

    def note(self, indent: str, remark: Remark) -> None:
        """Add a remark on a line of its own."""
        self.remarks.append(remark)
        self.lines.append(f"{indent}# {remark.kind}: {remark.text}")


def draft_spec(found: FoundProgram, *, folder: str) -> Draft:
    """Return the spec of a found program; folder: its path as the spec shall name it."""
    pen = _Pen()
    name = _name_of(found.folder)
    pen.write("# Written by seedsweep program init. Read every line: CHECK was guessed or is not on this machine,")
    pen.write("# NOT FOUND is said nowhere in the folder. Then: seedsweep plan THIS_FILE")
    pen.write(f"name: {quote(name)}")
    pen.write("program:")
    pen.write(f"  folder: {quote(folder)}")
    _write_command(pen, found)
    _write_env(pen, found)
    _write_seed_env(pen, found)
    _write_inputs(pen, found)
    _write_files(pen, found)
    if found.seeds:
        pen.write(f"seeds: [{', '.join(map(str, found.seeds))}]", found.seeds_source)
    else:
        pen.write("seeds: []", None, Remark(NOT_FOUND, "seeds", "no log, submission.json or command names a seed"))
    _write_gang(pen, found)
    pen.write(f"out: {quote(_out(folder, name))}")
    for note in found.notes:
        pen.note("", Remark(CHECK, "folder", note))
    return Draft("\n".join(pen.lines) + "\n", pen.remarks, bool(found.seeds) and found.script is not None)


def quote(value: str) -> str:
    """Return text as YAML that reads back as the same text, in quotes where plain words would not."""
    if PLAIN.fullmatch(value) and not WORDS_WITH_A_MEANING.fullmatch(value):
        return value
    return yaml.safe_dump(value, default_style='"', width=10**9, allow_unicode=True).strip()


def _name_of(folder: Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+|\.{2,}", "-", folder.resolve().name).strip("-._")[:64]
    return name or "program"


def _out(folder: str, name: str) -> str:
    """Return the run directory: beside the folder of the program where it would lie in it."""
    out, inside = Path("runs", name), Path(folder).resolve()
    if not out.resolve().is_relative_to(inside):
        return out.as_posix()
    return Path(os.path.relpath(inside.parent / out)).as_posix()


def _escape(text: str) -> str:
    """Return text with every brace doubled that is not one of our placeholders."""
    parts = re.split(f"({OURS.pattern})", text)
    return "".join(part if OURS.fullmatch(part) else part.replace("{", "{{").replace("}", "}}") for part in parts)


def _write_command(pen: _Pen, found: FoundProgram) -> None:
    """Write command and launcher."""
    remarks = []
    if found.command is None:
        said = found.other_launcher
        why = f"it is started by {said}; write it as torchrun" if said else "no run command in README.md or a *.sh file"
        remarks.append(Remark(NOT_FOUND, "program.command", why))
        words, source = ([] if found.script is None else ["python", found.script]), None
    else:
        words, source = list(_safe_words(found, remarks)), found.command.source
        if found.commands > 1:
            remarks.append(Remark(CHECK, "program.command", f"the folder has {found.commands} different commands"))
    pen.write(f"  command: [{', '.join(quote(_escape(word)) for word in words)}]", source, *remarks)
    if words[:1] == ["torchrun"]:
        pen.write("  launcher: torchrun")


def _safe_words(found: FoundProgram, remarks: list[Remark]) -> Iterator[str]:
    """Yield the command's words: ranks and run id as placeholders, without secrets."""
    assert found.command is not None, "a command was found"
    before = ""
    for word in found.command.words:
        option, mark, value = word.partition("=")
        is_joined = bool(mark) and option.startswith("-")
        name, given = (option, value) if is_joined else (before, word)
        kept = word
        if re.fullmatch(r"--?nproc[-_]per[-_]node", name):
            kept = "{world_size}"
        elif name.startswith("-") and RUN_ID.fullmatch(name) and given:
            kept = "{run_id}"
        elif has_shape_of_secret(given) or (
            name.startswith("-") and looks_like_secret(name.lstrip("-").replace("-", "_"), given)
        ):
            kept = "LEFT_OUT"
            remarks.append(Remark(CHECK, "program.command", f"a value like a secret is left out{_behind(name)}"))
        elif "$" in word:
            remarks.append(Remark(CHECK, "program.command", f"{word}: nothing here sets the variable"))
        elif "*" in word:
            words = f"{word}: no shell fills in the *; name the files if the program does not find them itself"
            remarks.append(Remark(CHECK, "program.command", words))
        yield f"{option}={kept}" if is_joined and kept != word else kept
        before = word


def _behind(name: str) -> str:
    return f" behind {name}" if name.startswith("-") else ""


def _write_env(pen: _Pen, found: FoundProgram) -> None:
    """Write the variables that the command sets, without the seed's, the gang's own and secrets."""
    given = dict(found.command.env) if found.command else {}
    if "RUN_ID" in found.reads and "RUN_ID" not in given and found.log:
        given["RUN_ID"] = ""
    kept = {name: value for name, value in given.items() if not SEED_NAME.fullmatch(name)}
    pen.write("  env:" if kept else "  env: {}")
    is_empty = True
    for name, value in kept.items():
        if name in SET_BY_GANG:
            pen.lines.append(f"    # {name} is left out: it is set for every process of a gang")
        elif looks_like_secret(name, value):
            words = f"{name} is left out, it looks like a secret; write {name}: {{secret: true, from_env: {name}}}"
            pen.note("    ", Remark(CHECK, f"program.env.{name}", words))
        else:
            is_empty = False
            _write_variable(pen, name, value)
    if kept and is_empty:
        pen.write("    {}")


def _write_variable(pen: _Pen, name: str, value: str) -> None:
    remarks = []
    if RUN_ID.fullmatch(name):
        pen.write(f"    {name}: {quote('{run_id}')}")
        return
    if "$" in value:
        remarks.append(Remark(CHECK, f"program.env.{name}", "nothing here sets the variable in it"))
    elif os.path.isabs(value) and re.search(r"OUT|LOG|SAVE|CKPT|CHECKPOINT|CACHE|RESULT", name):
        words = "runs at the same time would share this place; {out} is a folder of the run's own"
        remarks.append(Remark(CHECK, f"program.env.{name}", words))
    pen.write(f"    {name}: {quote(_escape(value))}", None, *remarks)


def _write_seed_env(pen: _Pen, found: FoundProgram) -> None:
    """Write which variable carries the seed."""
    command = found.command
    given = next((name for name in (command.env if command else {}) if SEED_NAME.fullmatch(name)), None)
    if given:
        pen.write(f"  seed_env: {given}")
    elif command and any("{seed}" in word for word in command.words):
        pen.write("  seed_env: null", "the command itself takes the seed")
    elif read := next((name for name in sorted(found.reads) if SEED_NAME.fullmatch(name)), None):
        pen.write(f"  seed_env: {read}", f"{found.script} reads it")
    else:
        words = "neither the command nor the script names a seed; SEED is set, and perhaps nobody reads it"
        pen.write("  seed_env: SEED", None, Remark(NOT_FOUND, "program.seed_env", words))


def _write_inputs(pen: _Pen, found: FoundProgram) -> None:
    """Write the data: as links into the working folder where the program names it by a relative path."""
    links: dict[str, tuple[str, Fact, Remark | None]] = {}
    is_linked = False
    for name, fact in found.paths.items():
        path = os.path.expanduser(_without_glob(fact.value))
        place = _place(path, found.folder)
        remark = None
        if place is None:
            why = "stands for a path of yours" if BLANK.search(path) else f"{path} is not on this machine"
            remark = Remark(CHECK, "program.inputs", f"{name}: {why}; write where it is")
        if os.path.isabs(path):
            link = path
        else:
            is_linked = True
            link = os.path.normpath(path)
            link = os.path.basename(link) if link.startswith("..") else link
        links.setdefault(link, (place or path, fact, remark))
    if not links:
        words = "neither the command nor the script names data"
        pen.write("  inputs: []", None, Remark(NOT_FOUND, "program.inputs", words))
        return
    pen.write("  inputs:")
    for link, (place, fact, remark) in links.items():
        if any(link != other and link.startswith(f"{other}/") for other in links):
            continue  # lies in another one
        shown = f"{quote(link.lstrip('/').replace('/', '-') if os.path.isabs(link) else link)}: {quote(place)}"
        pen.write(f"    {shown}" if is_linked else f"    - {quote(place)}", fact.source, *([remark] if remark else []))


def _without_glob(path: str) -> str:
    """Return a path up to its first part with a wildcard."""
    head = re.split(r"[*?\[]", path)[0]
    return path if head == path else os.path.dirname(head) or "."


def _place(path: str, folder: Path) -> str | None:
    """Return where data is on this machine: as named from here, from the folder, or from a folder above it."""
    if BLANK.search(path):
        return None
    if os.path.isabs(path):
        return path if os.path.exists(path) else None
    above = folder.resolve()
    bases = [Path.cwd(), above, *list(above.parents)[:PARENTS]]
    found = next((base / path for base in bases if (base / path).exists()), None)
    return None if found is None else os.path.normpath(found)


def _write_files(pen: _Pen, found: FoundProgram) -> None:
    """Write packages, artifact, code and log."""
    if found.requirements:
        remark = Remark(CHECK, "program.requirements", "it does not name torch, and only what it names is installed")
        pen.write(f"  requirements: {quote(found.requirements)}", None, *[remark] * _lacks_torch(found))
    else:
        words = "no requirements.txt: it runs with the packages installed here"
        pen.write("  requirements: null", None, Remark(NOT_FOUND, "program.requirements", words))
    model = ", ".join(quote(_escape(name)) for name in found.artifacts)
    code = ", ".join(map(quote, found.code))
    remarks = []
    if not found.artifacts:
        words = "which files are the artifact is not said; without them its size is what the log says"
        remarks.append(Remark(NOT_FOUND, "program.outputs.model", words))
    elif len(found.artifacts) > 1:
        remarks.append(Remark(CHECK, "program.outputs.model", "only the artifact counts; remove the other files"))
    pen.write(f"  outputs: {{model: [{model}], code: [{code}]}}", None, *remarks)
    has_run_id = found.command is not None and any(RUN_ID.fullmatch(name) for name in found.command.env)
    if found.log and (has_run_id or "RUN_ID" in found.reads):
        pen.write(f"  log: [{quote(found.log)}]")


def _lacks_torch(found: FoundProgram) -> bool:
    """Return whether a program needs torch, by its imports or its launcher, and its requirements do not name it."""
    is_torchrun = found.command is not None and found.command.words[:1] == ["torchrun"]
    texts = [(found.folder / name).read_text(encoding="utf-8", errors="replace") for name in found.code]
    if not is_torchrun and not any(re.search(r"^\s*(?:import|from)\s+torch\b", text, re.MULTILINE) for text in texts):
        return False
    text = (found.folder / str(found.requirements)).read_text(encoding="utf-8", errors="replace")
    return re.search(r"(?:^\s*|/)torch(?=[\s=<>!~@;,\[]|-\d|$)", text, re.MULTILINE | re.IGNORECASE) is None


def _write_gang(pen: _Pen, found: FoundProgram) -> None:
    """Write the GPUs of the gang."""
    remarks = []
    if found.ranks is not None and found.ranks.isdigit() and 1 <= int(found.ranks) <= MAX_RANKS:
        gpus, source = int(found.ranks), "--nproc_per_node"
    else:
        gpus, source = min(found.cards or 1, MAX_RANKS), "submission.json" if found.cards else ""
        given = "has no --nproc_per_node" if found.ranks is None else f"has --nproc_per_node={found.ranks}"
        remarks.append(Remark(CHECK, "gang.gpus", f"the command {given}"))
    if found.nodes not in (None, "1", "1:1"):
        remarks.append(Remark(CHECK, "gang", f"the command is for --nnodes={found.nodes}; a gang is on one node"))
    pen.write(f"gang: {{gpus: {gpus}}}", source or None, *remarks)
