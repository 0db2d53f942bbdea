"""Somebody else's training program as a spec names it: its folder, its command, and what it finds around it.

The command and the values of `env` may hold {seed}, {run_id}, {world_size}, {workdir} and {out}; a brace that is meant
as one is doubled, and a single one refused. Nothing secret is kept here: a marked value is a name in the driver's
environment.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Literal

from model.fields import check_value, describe, nearest
from runner.spec.keys import check_keys
from runner.spec.places import absolute_path, is_uri
from runner.spec.secrets import has_shape_of_secret, looks_like_secret

PROGRAM_KEYS = ("folder", "command", "env", "seed_env", "inputs", "outputs", "requirements", "log", "launcher")
PLACEHOLDERS = ("seed", "run_id", "world_size", "workdir", "out")
DEFAULT_COMMAND = ("python", "train_gpt.py")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
BRACES = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")
# set for every process of a gang, as torchrun does; a value of the spec's own would only break it
OURS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES",
    "SEEDSWEEP_OUT", "SEEDSWEEP_GANG",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A checked program section. Paths are absolute, or relative to the folder where they are of it."""

    folder: str
    command: tuple[str, ...] = DEFAULT_COMMAND
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)  # variable -> its name in the driver's environment
    seed_env: str = "SEED"  # "" for none
    inputs: Mapping[str, str] = field(
        default_factory=dict
    )  # name of the link in the working folder -> path; or path -> path
    model: tuple[str, ...] = ()  # files of the artifact that the program leaves, globs of the working or the out folder
    code: tuple[str, ...] = ()  # files of the folder that count as code
    requirements: str = ""  # a file of the folder
    log: tuple[str, ...] = ()  # files that the program writes, read before what it prints
    launcher: Literal["none", "torchrun"] = "none"

    def to_json(self) -> dict[str, Any]:
        """Return the section as plain values, from which parse_program makes the same program."""
        marked = {name: {"secret": True, "from_env": source} for name, source in self.secrets.items()}
        is_linked = any(name != path for name, path in self.inputs.items())
        return {
            "folder": self.folder, "command": list(self.command), "env": {**self.env, **marked},
            "seed_env": self.seed_env, "inputs": dict(self.inputs) if is_linked else list(self.inputs.values()),
            "outputs": {"model": list(self.model), "code": list(self.code)}, "requirements": self.requirements,
            "log": list(self.log), "launcher": self.launcher,
        }  # fmt: skip

    def hash_at(self, world_size: int) -> str:
        """Return the hash of all that decides a score besides the folder's and the inputs' contents."""
        plain = {name: value for name, value in self.to_json().items() if name not in ("folder", "inputs", "log")}
        text = json.dumps({**plain, "outputs": None, "world_size": world_size}, sort_keys=True)
        return hashlib.sha256(b"program\0" + text.encode()).hexdigest()


def parse_program(given: object) -> Program:
    """Return the checked program section. Raises ValueError, one line naming the key, for what does not fit."""
    section = check_keys("program", given, PROGRAM_KEYS)
    if not section.get("folder"):
        raise ValueError("program.folder is missing; name the folder that holds the program")
    command = parse_command(section.get("command"))
    launcher = parse_launcher(section.get("launcher"), command)
    env, secrets = parse_env(section.get("env"))
    seed_env = section.get("seed_env", "SEED")
    seed_env = "" if seed_env is None else check_value(seed_env, str, "program.seed_env")
    if seed_env and not VARIABLE.fullmatch(seed_env):
        raise ValueError(f"program.seed_env={seed_env!r} is no name of a variable; write one such as SEED")
    if seed_env in env:
        raise ValueError(f"program.env.{seed_env} is what program.seed_env sets for each run; remove it")
    model, code = parse_outputs(section.get("outputs"))
    return Program(
        folder=absolute_path(check_value(section["folder"], str, "program.folder")), command=command, env=env,
        secrets=secrets, seed_env=seed_env, inputs=parse_inputs(section.get("inputs")), model=model, code=code,
        requirements=check_inside(section.get("requirements") or "", "program.requirements"),
        log=tuple(check_inside(item, "program.log") for item in as_list(section.get("log"), "program.log")),
        launcher=launcher,
    )  # fmt: skip


def parse_launcher(given: object, command: tuple[str, ...]) -> Literal["none", "torchrun"]:
    """Return who starts the processes of a gang; a command that begins with torchrun says so itself."""
    is_torchrun = PurePath(command[0]).name == "torchrun"
    if given is None:
        return "torchrun" if is_torchrun else "none"
    if given == "torchrun":
        return "torchrun"
    if given != "none":
        raise ValueError(f"program.launcher={given!r} must be torchrun, or none for one process a rank")
    if is_torchrun:
        raise ValueError(
            "program.launcher=none starts one process a rank; leave it out with torchrun in program.command"
        )
    return "none"


def parse_command(given: object) -> tuple[str, ...]:
    """Return the command word by word; numbers may stand for themselves."""
    if given is None:
        return DEFAULT_COMMAND
    if not isinstance(given, list | tuple) or not given:
        hint = "; write [python, train_gpt.py]" if isinstance(given, str) else ""
        raise ValueError(f"program.command must be a list of words, not {describe(given)}{hint}")
    words = tuple(as_text(word, f"program.command[{place}]") for place, word in enumerate(given))
    if not words[0]:
        raise ValueError("program.command[0] is empty; it names what is started, such as python")
    for word in words:
        check_placeholders(word, "program.command")
        if has_shape_of_secret(word):
            raise ValueError(
                f"program.command: {word[:6]}... looks like a secret, and commands are recorded; have the program read "
                f"it from its environment, given as env: {{NAME: {{secret: true, from_env: NAME}}}}"
            )
    return words


def parse_env(given: object) -> tuple[dict[str, str], dict[str, str]]:
    """Return the variables that are recorded, and for the secret ones their names in the driver's environment."""
    env: dict[str, str] = {}
    secrets: dict[str, str] = {}
    if given is None:
        return env, secrets
    if not isinstance(given, Mapping):
        raise ValueError(f"program.env must be a mapping of names to values, not {describe(given)}")
    for name, value in given.items():
        path = f"program.env.{name}"
        if not isinstance(name, str) or not VARIABLE.fullmatch(name):
            raise ValueError(f"program.env: {name!r} is no name of a variable")
        if name in OURS:
            raise ValueError(f"{path} is set for each process of a gang; remove it")
        if isinstance(value, Mapping):
            secrets[name] = parse_secret(value, path)
            continue
        env[name] = as_text(value, path)
        check_placeholders(env[name], path)
        if looks_like_secret(name, env[name]):
            raise ValueError(
                f"{path} looks like a secret, and specs are recorded; set it in the driver's environment and write "
                f"{name}: {{secret: true, from_env: {name}}}"
            )
    return env, secrets


def parse_secret(given: Mapping[Any, Any], path: str) -> str:
    """Return the name in the driver's environment of a value that is marked as secret."""
    check_keys(path, given, ("secret", "from_env"))
    source = given.get("from_env")
    if given.get("secret") is not True or not isinstance(source, str) or not VARIABLE.fullmatch(source):
        raise ValueError(f"{path} must be text, or {{secret: true, from_env: NAME}} for a value that is not recorded")
    return source


def parse_inputs(given: object) -> dict[str, str]:
    """Return what must exist on the node: a list of paths, or names of links in the working folder and their paths."""
    if isinstance(given, Mapping):
        named = {check_inside(name, "program.inputs"): path for name, path in given.items()}
    else:
        named = {str(path): path for path in as_list(given, "program.inputs")}
    found = {}
    for name, path in named.items():
        text = check_value(path, str, f"program.inputs.{name}")
        if not text or is_uri(text):
            raise ValueError(f"program.inputs: {text!r} must be a file or a folder on the node")
        if isinstance(given, Mapping) and re.search(r"[*?\[]", text):
            raise ValueError(
                f"program.inputs.{name}={text!r} is a pattern, and a link leads to one place; name the files' folder"
            )
        found[name if isinstance(given, Mapping) else absolute_path(text)] = absolute_path(text)
    return found


def parse_outputs(given: object) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files of the artifact and those that count as code; a list names the artifact's alone."""
    section = given if isinstance(given, Mapping) else {"model": given}
    check_keys("program.outputs", section, ("model", "code"))
    model = tuple(
        check_value(item, str, "program.outputs.model")
        for item in as_list(section.get("model"), "program.outputs.model")
    )
    for item in model:
        check_placeholders(item, "program.outputs.model")
    code = as_list(section.get("code"), "program.outputs.code")
    return model, tuple(check_inside(item, "program.outputs.code") for item in code)


def as_list(given: object, path: str) -> list[Any]:
    """Return one text, a list of texts, or nothing as a list."""
    if given is None or given == "":
        return []
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple):
        raise ValueError(f"{path} must be text or a list of texts, not {describe(given)}")
    return [check_value(item, str, path) for item in given]


def as_text(given: object, path: str) -> str:
    """Return text, or a number or truth value as a person writes it in a shell."""
    if isinstance(given, bool):
        return str(int(given))
    if isinstance(given, int | float | str):
        text = str(given)
        if "\0" in text:
            raise ValueError(f"{path} holds a zero byte")
        return text
    raise ValueError(f"{path} must be text or a number, not {describe(given)}")


def check_inside(given: object, path: str) -> str:
    """Return a relative path without ways out of its folder."""
    text: str = check_value(given, str, path)
    check_placeholders(text, path)
    if os.path.isabs(text) or ".." in PurePath(text).parts:
        raise ValueError(f"{path}={text!r} must be a path inside the program's folder")
    return text


def check_placeholders(text: str, path: str) -> None:
    """Raise ValueError, with the nearest, for a placeholder that there is not, and for a single brace."""
    for found in BRACES.finditer(text):
        if found[1] and found[1] not in PLACEHOLDERS:
            raise ValueError(f"{path}: unknown placeholder {{{found[1]}}}; {nearest(found[1], PLACEHOLDERS)}")
        if len(found[0]) == 1:
            raise ValueError(f"{path}: a single {found[0]} in {text[:60]!r}; double the braces that are meant as such")


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return text with its placeholders filled in and doubled braces made single."""
    return BRACES.sub(lambda found: values[found[1]] if found[1] else found[0][0], text)


def fill_pattern(text: str, values: Mapping[str, str]) -> str:
    """Return a pattern with its placeholders filled in, whose values mean just themselves."""
    return fill(text, {name: glob.escape(value) for name, value in values.items()})
