"""The command that trained a submission, read out of its README and shell scripts: words, variables, seeds.

Only what starts Python or torchrun on a script of the folder counts. Variables that a shell would have filled in are
filled in where the text sets them; the seed's become {seed}.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

FENCE = re.compile(r"^\s*(?:```|~~~)")
SPAN = re.compile(r"`([^`\n]+)`")
ENDS = {"|", "|&", "&&", "||", ";", ";;", "&", "(", ")"}
REDIRECTIONS = {">", ">>", "<", "&>", "&>>", ">&", "<<", "<<<"}
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^{}]*))?\}|(\w+))")
LOOP = re.compile(r"\bfor\s+(\w+)\s+in\s+([^;]+?)\s*(?:;|$)")
LIST = re.compile(r"\b(\w+)=(?:\(([\d\s]+)\)|\"(\d+(?:\s+\d+)+)\"|'(\d+(?:\s+\d+)+)')")
SEED_NAME = re.compile(r"(?:RANDOM_|GLOBAL_|TRAIN_|BASE_)?SEED", re.IGNORECASE)
STARTERS = re.compile(r"(?:torchrun|python[\d.]*)")
WRAPPERS = ("env", "nohup", "time", "exec", "sudo", "stdbuf", "do", "then", "set", "uv", "run")
OTHER_LAUNCHERS = re.compile(r"\b(accelerate\s+launch|deepspeed|mpirun|srun)\b")
OTHER_WORK = re.compile(
    r"data|download|prepare|tokeni[sz]|fineweb|convert|plot|upload|test_|setup|check", re.IGNORECASE
)
LAUNCH_MODULES = ("torch.distributed.run", "torch.distributed.launch")


class Shell(NamedTuple):
    """What the lines so far have set: variables, the exported ones among them, and those that go through numbers."""

    values: dict[str, str]
    exported: set[str]
    lists: dict[str, list[int]]


class RunCommand(NamedTuple):
    """One way to start a script of the folder: words with {seed} in the seed's place, variables set, where it stands.

    seeds: those that the command or the loop around it names.
    """

    words: list[str]
    env: dict[str, str]
    seeds: list[int]
    source: str


def find_commands(texts: Mapping[str, str], files: set[str]) -> list[RunCommand]:
    """Return the commands in these texts (name -> text; *.sh is all shell) that may have trained, the likeliest first.

    files: paths in the folder, of which a command must start one.
    """
    found = []
    for name, text in texts.items():
        shell = Shell({}, set(), {})
        for number, line in shell_lines(text, is_shell=not name.lower().endswith((".md", ".txt"))):
            shell.lists.update(lists_in(line, shell.lists))
            for words in split_line(line):
                command = read_command(words, shell, files, f"{name} line {number}")
                found += [] if command is None or _rank(command)[0] > 0 else [command]
    return sorted(found, key=_rank)


def other_launcher(texts: Mapping[str, str]) -> str | None:
    """Return the words of a launcher that we cannot start, where a text names one in a command."""
    for name, text in texts.items():
        for number, line in shell_lines(text, is_shell=not name.lower().endswith((".md", ".txt"))):
            if match := OTHER_LAUNCHERS.search(line):
                return f"{match.group(1)} ({name} line {number})"
    return None


def count_alike(commands: list[RunCommand]) -> int:
    """Return how many different commands are as likely as the first."""
    return len(
        {(*found.words, *sorted(found.env.items())) for found in commands if _rank(found)[0] == _rank(commands[0])[0]}
    )


def _rank(command: RunCommand) -> tuple[int, int]:
    """Return how unlikely a command is the one that trained."""
    script = script_of(command.words) or ""
    points = 2 * (command.words[0] == "torchrun") + 2 * ("train" in PurePosixPath(script).name) + bool(command.seeds)
    points -= 4 * bool(OTHER_WORK.search(PurePosixPath(script).name))
    points -= 4 * any(re.fullmatch(r"--?eval(?:[_-]only)?", word) for word in command.words)
    return -points, -len(command.env)


def shell_lines(text: str, *, is_shell: bool) -> Iterator[tuple[int, str]]:
    """Yield number and line of what a shell would run: code blocks and code in running text, or all of a script."""
    is_code, joined, first = is_shell, "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not is_shell and FENCE.match(line):
            is_code, joined = not is_code, ""
            continue
        if not is_code and not line.startswith(("    ", "\t")):
            yield from ((number, span) for span in SPAN.findall(line))
            continue
        plain = re.sub(r"^\s*(?:\$|>|%)\s+", "", line).strip()
        first = number if not joined else first
        if plain.endswith("\\"):
            joined += plain[:-1] + " "
            continue
        yield first, joined + plain
        joined = ""


def split_line(line: str) -> Iterator[list[str]]:
    """Yield the commands of a line without comments and redirections; a line that no shell would take yields none."""
    line = re.sub(r"\$\([^()]*\)", "$COMMAND_OUTPUT", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.wordchars += "{}[]@:,$%!^#+="
    lexer.commenters = ""
    try:
        tokens = list(lexer)
    except ValueError:
        return
    words: list[str] = []
    is_target = False
    for token in [*tokens, ";"]:
        if token.startswith("#"):
            break
        if is_target:
            is_target = False
        elif token in REDIRECTIONS:
            words = words[:-1] if words and words[-1] in ("1", "2") else words
            is_target = True
        elif token in ENDS:
            if words:
                yield words
            words = []
        else:
            words.append(token)
    if words:
        yield words


def lists_in(line: str, known: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return the variables that go through whole numbers, and which: arrays and loops, over numbers or over arrays."""
    found = {
        match.group(1): list(map(int, "".join(filter(None, match.groups()[1:])).split()))
        for match in LIST.finditer(line)
    }
    for name, listed in LOOP.findall(line):
        values = listed.split()
        source = VARIABLE.fullmatch(listed.strip("\"'").replace("[@]", "").replace("[*]", ""))
        if source is not None:
            array = source.group(1) or source.group(3)
            numbers = {**known, **found}.get(array)
            found |= {} if numbers is None else {name: numbers}
        elif values and all(re.fullmatch(r"\d{1,10}", value) for value in values):
            found[name] = [int(value) for value in values]
    return found


def read_command(words: list[str], shell: Shell, files: set[str], source: str) -> RunCommand | None:
    """Return the start of a script of the folder; None for other commands. What they set goes into shell."""
    env: dict[str, str] = {}
    rest = list(words)
    is_exported = rest[0] == "export"
    while rest and (rest[0] in ("export", *WRAPPERS) or ASSIGNMENT.fullmatch(rest[0]) or rest[0].startswith("-")):
        match = ASSIGNMENT.fullmatch(rest.pop(0))
        if match:
            env[match.group(1)] = match.group(2)
    if is_exported or not rest:
        shell.values.update(env)
        shell.exported.update([*env, *rest] if is_exported else [])
        return None
    starter = PurePosixPath(rest[0]).name
    if not STARTERS.fullmatch(starter):
        return None
    rest = _as_torchrun([starter, *rest[1:]])
    script = script_of(rest)
    own = None if script is None else own_path(script, files)
    if script is None or own is None:
        return None
    values = {**shell.values, **env}
    filler = _Filler(values, shell.lists)
    variables = {
        name: filler.fill(value, name) for name, value in values.items() if name in env or name in shell.exported
    }
    filled = filler.fill_words(rest)
    return RunCommand([own if word == script else word for word in filled], variables, filler.seeds, source)


class _Filler:
    """Puts the values of variables into words, {seed} for the seed, and collects the seeds that it meets."""

    def __init__(self, values: Mapping[str, str], lists: Mapping[str, list[int]]) -> None:
        self.values = values
        self.lists = lists
        self.seeds: list[int] = []

    def fill(self, text: str, name: str = "") -> str:
        """Return text as a shell makes it of a variable's value."""
        if SEED_NAME.fullmatch(name) and re.fullmatch(r"\d{1,10}", text):
            self.seeds.append(int(text))
            return "{seed}"
        filled = VARIABLE.sub(self._value, os.path.expanduser(text))
        return "{seed}" if SEED_NAME.fullmatch(name) and VARIABLE.fullmatch(filled) else filled  # SEED=$1

    def _value(self, match: re.Match[str]) -> str:
        name, default = match.group(1) or match.group(3), match.group(2)
        if name in self.lists:
            self.seeds += [seed for seed in self.lists[name] if seed not in self.seeds]
            return "{seed}"
        if name in self.values and f"${name}" not in self.values[name] and f"${{{name}" not in self.values[name]:
            return self.fill(self.values[name], name)
        if SEED_NAME.fullmatch(name):
            self.seeds += [int(default)] if default and default.isdigit() else []
            return "{seed}"
        return match.group() if default is None else default

    def fill_words(self, words: list[str]) -> list[str]:
        """Return a command's words; the number behind --seed is the seed."""
        filled: list[str] = []
        for before, word in zip(["", *words], words):
            option, mark, value = word.partition("=")
            if _is_seed_option(before) and word.isdigit():
                filled.append(self.fill(word, "SEED"))
            elif mark and _is_seed_option(option):
                filled.append(f"{option}={self.fill(value, 'SEED')}")
            else:
                filled.append(self.fill(word))
        return filled


def _is_seed_option(word: str) -> bool:
    return word.startswith("-") and bool(SEED_NAME.fullmatch(word.lstrip("-").replace("-", "_")))


def _as_torchrun(words: list[str]) -> list[str]:
    """Return `python -m torch.distributed.run ...` as the torchrun that it is; other commands as they are."""
    if words[0] != "torchrun" and len(words) > 2 and words[1] == "-m" and words[2] in LAUNCH_MODULES:
        return ["torchrun", *words[3:]]
    return ["python" if STARTERS.fullmatch(words[0]) and words[0] != "torchrun" else "torchrun", *words[1:]]


def script_of(words: list[str]) -> str | None:
    """Return the script that a command starts: its first word that ends in .py."""
    return next((word for word in words[1:] if word.endswith(".py") and not word.startswith("-")), None)


def own_path(path: str, files: set[str]) -> str | None:
    """Return which file of the folder a path from anywhere means: the longest end of it that is one; None: none."""
    parts = PurePosixPath(path).parts
    ends = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((end for end in ends if end in files), None)
