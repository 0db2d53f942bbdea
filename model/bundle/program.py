"""The code of a run as it is counted: one readable train_gpt.py out of the model package, and its packed twin.

The readable file holds verbatim every module that training or scoring needs, in the order in which they need each
other, and a short loader. The twin holds the same modules minified, without what no code of theirs names, compressed
and self-extracting: its size is what counts. The same sources, settings and versions of Python and python-minifier
give the same bytes. Sources are read as text; nothing of them is imported here.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from model.config import RunConfig
from model.fields import plain_settings

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, ENTRY, LOADER = "model", "model.standalone", "model.bundle.loader"
READABLE_NAME, PACKED_NAME = "train_gpt.py", "train_gpt_packed.py"
CONVENTION = "self-extracting-minified-train_gpt"  # bytes of the packed twin
QUOTES = "'" * 3
GUIDE = '''"""One seed of a recipe: trained, rounded to integers, scored. Generated: edit the modules, not this file.

Twin made with {tools}
Modules, each after those that it imports:
{modules}

Score an artifact:  python {name} --eval model.ssq --tokenizer T --val 'SHARDS'
Train a seed:       torchrun --standalone --nproc_per_node=8 {name} --train 'SHARDS' --val 'SHARDS' --tokenizer T
"""'''
TAIL = """if __name__ == "__main__":
    import os
    import sys

    sys.meta_path.insert(0, TextImporter(MODULES, __file__))
    from model.standalone import main

    sys.exit(main(sys.argv[1:], SETTINGS, {code_bytes}))
"""
# Latin-1 makes a character of every byte, so that compressed bytes can stand in a string nearly as they are.
LAUNCHER = '# coding: latin-1\nimport brotli\nexec(brotli.decompress("""{payload}""".encode("latin-1")))\n'
# Between three quotes only these need an escape; a line feed and a lone quote stand for themselves.
ESCAPED = re.compile(r'[\\\r\0]|"(?="")|"\Z')
ESCAPES = {"\r": "\\r", "\0": "\\x00"}
IMPORTED = re.compile(r"from (\S+) import ([^\n;]+)")


NUM_PROGRAMS, NUM_MODULES = 8, 512  # that a process keeps
Key = TypeVar("Key")
Value = TypeVar("Value")


class Program(NamedTuple):
    """The code of a run as two files that do the same."""

    readable: str
    packed: bytes

    @property
    def num_bytes(self) -> int:
        """Code bytes as counted: the twin."""
        return len(self.packed)

    @property
    def readable_bytes(self) -> int:
        """Code bytes as committed: the readable file."""
        return len(self.readable.encode())


programs: dict[tuple[str, Path], Program] = {}  # by settings and root; made here, or by another process for this one
minified: dict[tuple[str, str], str] = {}  # by name and source


def code_program(config: RunConfig, *, root: Path = ROOT) -> Program:
    """Return the program of config from the sources in root (the folder that holds the model package).

    Raises ValueError, naming the module, for sources that one file cannot hold.
    """
    settings = json.dumps(settings_of(config), sort_keys=True)
    if (settings, root) not in programs:
        keep(programs, (settings, root), make_program(settings, root), NUM_PROGRAMS)
    return programs[settings, root]


def keep(table: dict[Key, Value], key: Key, value: Value, most: int) -> None:
    """Put a value into a table of at most so many, in place of the one that has been there for the longest."""
    while len(table) >= most:
        del table[next(iter(table))]
    table[key] = value


def make_program(settings: str, root: Path) -> Program:
    """Return the program of settings, as JSON, from the sources in root."""
    modules = read_modules(root)
    loader = (root / f"{LOADER.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines = json.dumps(json.loads(settings), indent=1, sort_keys=True)
    packed = pack_twin(modules, loader, lines)
    guide = GUIDE.format(
        modules="\n".join(f"  {name.replace('.', '/')}.py" for name in modules),
        tools=tool_versions(),
        name=READABLE_NAME,
    )
    return Program(f"{guide}\n\n{render(modules, loader, lines, code_bytes=str(len(packed)))}", packed)


def pack_twin(modules: Mapping[str, str], loader: str, settings: str) -> bytes:
    """Return the packed program of the same modules, loader and settings."""
    return _pack_twin(tuple(modules.items()), loader, settings)


@functools.lru_cache(maxsize=8)  # seconds each, and the seeds of a folder have the same program
def _pack_twin(modules: tuple[tuple[str, str], ...], loader: str, settings: str) -> bytes:
    small = minify_used(dict(modules), loader)
    settings = json.dumps(json.loads(settings), separators=(",", ":"), sort_keys=True)
    text = render(
        small, minify(loader, name=LOADER), settings,
        code_bytes="os.path.getsize(__file__)", quoted=repr,  # a minifier chooses the quotes it likes
    )  # fmt: skip
    return pack(text)


def minify_used(modules: Mapping[str, str], loader: str) -> dict[str, str]:
    """Return the modules minified, without what no code here names: functions, classes, constants and imports.

    Other parts of the package, and annotations, use them. A definition's name counts wherever it stands, in texts too,
    and an import's in its own module or where another imports it from there.
    """
    while True:
        small = {name: minify(text, name=name) for name, text in modules.items()}
        words = _count_words("\n".join([*small.values(), loader, TAIL]))
        passed_on = {
            (match[1], word)
            for text in small.values()
            for match in IMPORTED.finditer(text)
            for word in _count_words(match[2])
        }
        used = {}
        for name, text in modules.items():
            tree, own = _parse(text, name), _count_words(small[name])
            idle = {word for word, count in own.items() if count == 1 and (name, word) not in passed_on}
            unused = {word for word in idle if words[word] == 1}
            used[name] = text if _keep_used(tree, idle, unused) else ast.unparse(tree)
        if used == modules:
            return small
        modules = used


def _count_words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text))


def _keep_used(tree: ast.Module, idle: Collection[str], unused: Collection[str]) -> bool:
    """Drop idle imports and unused definitions from a module's top level; return whether there were none."""
    body, dropped = list[ast.stmt](), 0
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            is_plain = not isinstance(node, ast.ImportFrom) or node.module != "__future__"
            names = [each for each in node.names if not is_plain or (each.asname or each.name) not in idle]
            dropped += len(node.names) - len(names)
            node.names = names
        if not (isinstance(node, ast.Import | ast.ImportFrom) and not node.names) and _defined_name(node) not in unused:
            body.append(node)
    dropped += len(tree.body) - len(body)
    tree.body = body
    return not dropped


def _defined_name(node: ast.stmt) -> str:
    """Return the name that a statement defines and does nothing else, or nothing."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def tool_versions() -> str:
    """Return the versions on which the bytes of a twin depend."""
    tools = (f"{name} {metadata.version(name)}" for name in ("python-minifier", "brotli"))
    return ", ".join([f"Python {sys.version_info[0]}.{sys.version_info[1]}", *tools])


def is_twin(readable: str, packed: bytes) -> bool | None:
    """Return whether packed is the twin of a readable program; None where these versions of the tools cannot tell.

    Nothing of either is run. Raises ValueError for a text that is no such program.
    """
    match = re.search(r"^Twin made with (.+)$", readable, re.MULTILINE)
    if match is None or match[1] != tool_versions():
        return None
    settings, modules, last_line = None, {}, 0
    for node in _parse(readable, READABLE_NAME).body:
        value = node.value.value if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) else None
        if not isinstance(node, ast.Assign) or not isinstance(value, str):
            continue
        target = node.targets[0]
        if isinstance(target, ast.Name) and target.id == "SETTINGS":
            settings = value
        elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
            modules[str(target.slice.value)], last_line = value, node.end_lineno or 0
    if settings is None or not modules:
        raise ValueError("the readable program holds no settings or no modules")
    loader = (
        "\n".join(readable.split("\n")[last_line:]).partition('\n\nif __name__ == "__main__":')[0].strip("\n") + "\n"
    )
    return pack_twin(modules, loader, settings) == packed


def _parse(source: str, name: str) -> ast.Module:
    """Return the tree of a source. Raises ValueError naming the module and line for what is no Python."""
    try:
        return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{name} is no Python at line {error.lineno}: {error.msg}") from error


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a program carries: all of config but its seed and the places of its data."""
    settings = {name: value for name, value in plain_settings(config).items() if name != "seed"}
    settings["data"] = {name: settings["data"][name] for name in ("val_documents", "val_tokens")}
    return settings


def read_modules(root: Path) -> dict[str, str]:
    """Return name -> source of every module that the entry needs, each after those that it imports.

    Raises ValueError for a module that is not there, a circle, a package with code, or three single quotes in a source.
    """
    sources: dict[str, str] = {}
    graph: dict[str, list[str]] = {}
    waiting = [ENTRY]
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        sources[name] = _read_module(root, name)
        graph[name] = sorted(set(_imported_modules(root, name, sources[name])))
        waiting += graph[name]
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"modules import each other in a circle: {' -> '.join(error.args[1])}") from None
    return {name: sources[name] for name in order}


def _read_module(root: Path, name: str) -> str:
    """Return a module's source, checked to fit into one file."""
    path = root / f"{name.replace('.', '/')}.py"
    if not path.is_file():
        raise ValueError(f"{name} is imported, but {path} is not there")
    package = path.parent / "__init__.py"
    if package.is_file() and package.read_text(encoding="utf-8").strip():
        raise ValueError(f"{package} has code: a package in one file has none of its own; move it to a module")
    text = path.read_text(encoding="utf-8")
    if QUOTES in text:
        raise ValueError(f"{path} holds {QUOTES}, which ends a text in the generated file; write double quotes")
    return text


def _imported_modules(root: Path, name: str, source: str) -> Iterator[str]:
    """Yield the modules of the package that a source imports when it runs, inside functions too."""
    for node in _running_imports(_parse(source, name)):
        for found in [node.module or ""] if isinstance(node, ast.ImportFrom) else [item.name for item in node.names]:
            if found.split(".")[0] != PACKAGE:
                continue
            if isinstance(node, ast.ImportFrom) and (root / found.replace(".", "/")).is_dir():
                yield from (f"{found}.{item.name}" for item in node.names)
            else:
                yield found


def _running_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield every import but those for type checkers. Raises ValueError for a relative one."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(f"a relative import in line {node.lineno}: write the whole name")
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        yield from _running_imports(node)


def quote_raw(text: str) -> str:
    """Return text as a literal in which it can be read as it is."""
    return f"r{QUOTES}{text}{QUOTES}"


def render(
    modules: Mapping[str, str], loader: str, settings: str, *, code_bytes: str, quoted: Callable[[str], str] = quote_raw
) -> str:
    """Return a program's text: settings, modules between quotes, and the loader that imports them."""
    texts = "\n\n".join(f'MODULES["{name}"] = {quoted(text)}' for name, text in modules.items())
    return "\n\n".join([
        f"SETTINGS = {quoted(settings)}", "MODULES = {}", texts, loader, TAIL.format(code_bytes=code_bytes),
    ])  # fmt: skip


def minify(source: str, *, name: str) -> str:
    """Return minify_module of a source, once a process."""
    if (name, source) not in minified:
        keep(minified, (name, source), minify_module(source, name=name), NUM_MODULES)
    return minified[name, source]


def minify_module(source: str, *, name: str) -> str:
    """Return a module without docstrings, comments and most annotations, its local names shortened.

    Names that other modules may use stay: they cost little once compressed. Triton reads the source of a kernel with
    its annotations, so these stay where kernels are. There a constant under a second, shorter name would be a constant
    no more. What is given by its place only stays so: its shortened name may be that of a constant given by name.
    """
    import python_minifier

    has_kernels = "triton" in source
    constants = {
        node.arg for node in ast.walk(_parse(source, name))
        if isinstance(node, ast.arg) and node.annotation and ast.unparse(node.annotation).endswith("constexpr")
    }  # fmt: skip
    text = python_minifier.minify(
        source,
        filename=name,
        remove_annotations=python_minifier.RemoveAnnotationsOptions(
            remove_variable_annotations=not has_kernels,
            remove_return_annotations=True,
            remove_argument_annotations=not has_kernels,
            remove_class_attribute_annotations=False,  # fields of dataclasses and tuples
        ),
        remove_literal_statements=True,
        hoist_literals=False,
        preserve_locals=sorted(constants),
        rename_globals=False,
        remove_asserts=True,
        convert_posargs_to_args=False,
    )
    is_annotated = any(getattr(node, "annotation", None) is not None for node in ast.walk(_parse(text, name)))
    return text if is_annotated else text.replace("from __future__ import annotations\n", "", 1)


def pack(text: str) -> bytes:
    """Return a self-extracting file that does what text does."""
    import brotli

    compressed = brotli.compress(text.encode(), mode=brotli.MODE_TEXT, quality=11, lgwin=24)
    return LAUNCHER.format(payload=escape(compressed)).encode("latin-1")


def escape(data: bytes) -> str:
    """Return what stands for data between three double quotes of a Latin-1 source."""
    return ESCAPED.sub(lambda found: ESCAPES.get(found[0], f"\\{found[0]}"), data.decode("latin-1"))
