"""One readable train_gpt.py out of the model package, and its compressed self-extracting twin.

The file holds every module that training or evaluation needs, in dependency order, each with its comments and
docstrings; what only builds corpora or audits runs is left out because nothing imports it. The same sources and
settings give the same bytes. Nothing of the package is imported here: sources are read as text.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import json
import sys
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from model.config import RunConfig
from model.flatten import Import, Module, flatten, read_module
from model.own_code import PACKED_NAME, Program

PACKAGE = "model"
ENTRY = "model.standalone"
REPLACED = {"model.codesize": "model.own_code"}  # in the file, the code to be counted is the file itself
TRITON, TRITON_GUARD = "triton", ("model.kernels.dispatch", "has_triton")
# what a reader should meet first; among modules whose imports are all there already, the earliest of these comes next
READING_ORDER = (
    "model.field_types", "model.config", "model.layers", "model.data.packing", "model.kernels", "model.lora",
    "model.gpt", "model.distributed", "model.data", "model.ledger", "model.schedule", "model.optim", "model.train",
    "model.quantized", "model.hessians", "model.calibrate", "model.gptq", "model.compression", "model.rans",
    "model.artifact_header", "model.artifact", "model.evaluate", "model.ttt",
)  # fmt: skip


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return the settings that a program carries: all of config but its seed and the places of its data."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "seed"}
    settings["data"] = {name: settings["data"][name] for name in ("val_documents", "val_tokens")}
    return settings


def make_program(config: RunConfig, *, root: Path | None = None) -> Program:
    """Return the program of config from the sources in root (the folder that holds the model package).

    Raises ValueError, naming module and line, for sources that one file cannot hold.
    """
    settings = json.dumps(settings_of(config), indent=1, sort_keys=True)
    return _make_program(settings, (root or Path(__file__).resolve().parents[1]))


@functools.lru_cache(maxsize=8)
def _make_program(settings: str, root: Path) -> Program:
    modules = order_modules(read_package(root))
    flat = flat_names(modules)
    outside = _outside_imports(modules)
    sections = "\n\n".join(_section(module, modules, flat) for module in modules)
    text = "\n".join([
        _guide(modules), "from __future__ import annotations", "",
        *_import_lines(imported for imported in outside.values() if not _is_triton(imported)), "",
        "# The resolved settings of the run: what decides a score, and how it is executed.",
        f'SETTINGS = """{settings}"""', "", "",
        sections, "",
        'if __name__ == "__main__":', "    sys.exit(main(sys.argv[1:], SETTINGS))", "",
    ])  # fmt: skip
    _check(text)
    return Program.of(text)


def read_package(root: Path) -> dict[str, Module]:
    """Return the modules that the entry needs, by name, those of REPLACED exchanged."""
    paths = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted((root / PACKAGE).rglob("*.py"))
        if path.name != "__init__.py"
    }
    names = frozenset(paths)
    found: dict[str, Module] = {}
    waiting = [ENTRY]
    while waiting:
        name = waiting.pop()
        name = REPLACED.get(name, name)
        if name in found:
            continue
        if name not in paths:
            raise ValueError(f"{name} is imported, but {root / PACKAGE} has no such module")
        found[name] = read_module(name, paths[name].read_text(encoding="utf-8"), modules=names)
        waiting += [imported.module for imported in (*found[name].inside, *found[name].deferred)]
    return found


def order_modules(modules: Mapping[str, Module]) -> list[Module]:
    """Return the modules so that each comes after those it imports at its top, otherwise in READING_ORDER."""
    needed = {name: {_target(imported) for imported in module.inside} for name, module in modules.items()}
    for name, module in modules.items():
        if any(map(_is_triton, module.outside)):
            needed[name].add(TRITON_GUARD[0])
    ordered: list[Module] = []
    while needed:
        placed = {module.name for module in ordered}
        ready = [name for name, others in needed.items() if others <= placed]
        if not ready:
            raise ValueError(f"modules import each other in a circle: {', '.join(sorted(needed))}")
        chosen = min(ready, key=_reading_place)
        del needed[chosen]
        ordered.append(modules[chosen])
    return ordered


def _reading_place(name: str) -> tuple[int, str]:
    """Return where READING_ORDER puts a module: at its own name, else at its package, else last."""
    parts = name.split(".")
    prefixes = [".".join(parts[:end]) for end in range(len(parts), 1, -1)]
    return next((READING_ORDER.index(p) for p in prefixes if p in READING_ORDER), len(READING_ORDER)), name


def _target(imported: Import) -> str:
    return REPLACED.get(imported.module, imported.module)


def _is_triton(imported: Import) -> bool:
    return imported.module.split(".")[0] == TRITON


class FlatNames(NamedTuple):
    """What names are called in the single file: by module, then by the name inside it; and equal repetitions."""

    by_module: dict[str, dict[str, str]]
    dropped: dict[str, frozenset[str]]


def flat_names(modules: list[Module]) -> FlatNames:
    """Return a name in the single file for every definition; what two modules define apart gets its module's name.

    An assignment of the same text that names nothing of the package is kept once.
    """
    taken = set(dir(builtins)) | set(_outside_imports(modules)) | {"SETTINGS"}
    homes: dict[str, list[Module]] = {}
    dropped: dict[str, set[str]] = {module.name: set() for module in modules}
    for module in modules:
        for name, statement in module.definitions.items():
            earlier = homes.setdefault(name, [])
            if earlier and earlier[0].definitions[name] == statement and _is_plain(statement, module):
                dropped[module.name].add(name)
            else:
                earlier.append(module)
    by_module: dict[str, dict[str, str]] = {module.name: {} for module in modules}
    for name, owners in homes.items():
        for module in owners:
            is_alone = len(owners) == 1 and name not in taken
            by_module[module.name][name] = name if is_alone else _qualified(name, module.name.rpartition(".")[2])
    for module in modules:
        for name in dropped[module.name]:
            by_module[module.name][name] = by_module[homes[name][0].name][name]
    flat = [name for module in modules for name in set(by_module[module.name]) - dropped[module.name]]
    called = [by_module[module.name][name] for module in modules for name in by_module[module.name]
              if name not in dropped[module.name]]  # fmt: skip
    twice = {name for name in called if called.count(name) > 1 or name in taken}
    if twice:
        raise ValueError(f"names cannot be told apart in one file: {', '.join(sorted(twice))} (of {len(flat)}); rename")
    return FlatNames(by_module, {name: frozenset(names) for name, names in dropped.items()})


def _is_plain(statement: str, module: Module) -> bool:
    """Return whether a dumped statement is an assignment that uses nothing which the package defines."""
    ours = set(module.definitions) | {imported.local for imported in module.inside}
    is_assignment = statement.startswith(("Assign(", "AnnAssign("))
    return is_assignment and not any(f"Name(id='{name}', ctx=Load())" in statement for name in ours)


def _qualified(name: str, stem: str) -> str:
    """Return name with its module's: FORMAT of pipeline becomes FORMAT_PIPELINE, _fused of residual _fused_residual."""
    if name.isupper():
        return f"{name}_{stem.upper()}"
    return f"{name}{stem.title().replace('_', '')}" if name.lstrip("_")[:1].isupper() else f"{name}_{stem}"


def _resolve(target: str, name: str, modules: Mapping[str, Module], flat: FlatNames) -> str:
    """Return what a name that a module defines or passes on is called in the single file."""
    module = modules[REPLACED.get(target, target)]
    if name in module.definitions:
        return flat.by_module[module.name][name]
    for imported in module.inside:
        if imported.local == name and imported.name:
            return _resolve(imported.module, imported.name, modules, flat)
    if any(imported.local == name for imported in module.outside):
        return name
    raise ValueError(f"{module.name} has no {name}")


def _section(module: Module, ordered: list[Module], flat: FlatNames) -> str:
    """Return one module as a section of the file; one that needs Triton stands under a condition."""
    modules = {other.name: other for other in ordered}
    names = dict(flat.by_module[module.name])
    spaces: dict[str, dict[str, str]] = {}
    for imported in (*module.inside, *module.deferred):
        if not imported.name:
            spaces[imported.local] = flat.by_module[_target(imported)]
            continue
        called = _resolve(imported.module, imported.name, modules, flat)
        if names.setdefault(imported.local, called) != called:
            raise ValueError(f"{module.name}: {imported.local} means two things; import one under another name")
    body = flatten(module, names, spaces, flat.dropped[module.name])
    title = f"# {' ' + module.name.replace('.', '/') + '.py ':=^116}"
    gpu_only = [imported for imported in module.outside if _is_triton(imported)]
    if gpu_only:
        guard = flat.by_module[TRITON_GUARD[0]][TRITON_GUARD[1]]
        inner = "\n".join([*_import_lines(gpu_only), "", "", body])
        body = f"if {guard}():\n" + textwrap.indent(inner, "    ")
    return "\n".join([title, module.docstring, "", body]) if module.docstring else "\n".join([title, "", body])


def _outside_imports(modules: list[Module]) -> dict[str, Import]:
    """Return the imports of other packages by local name. Raises ValueError where one name means two things."""
    found: dict[str, Import] = {}
    for imported in (Import("sys", "", "sys"), *(entry for module in modules for entry in module.outside)):
        if found.setdefault(imported.local, imported) != imported and imported.name + found[imported.local].name:
            raise ValueError(
                f"{imported.local} is imported as {imported.line()!r} and {found[imported.local].line()!r}"
            )
        if not imported.name and "." in imported.module and imported.local == imported.module.split(".")[0]:
            found[imported.module] = imported  # import a.b binds a, and b inside it
    return found


def _import_lines(imports: Iterable[Import]) -> list[str]:
    """Return import statements, the standard library's first, names of one module in one statement."""
    chosen = sorted(set(imports))
    plain = [entry.line() for entry in chosen if not entry.name]
    named: dict[str, list[str]] = {}
    for entry in chosen:
        if entry.name:
            alias = entry.name + (f" as {entry.local}" if entry.local != entry.name else "")
            named.setdefault(entry.module, []).append(alias)
    lines = [*plain, *(f"from {module} import {', '.join(names)}" for module, names in named.items())]
    return sorted(lines, key=lambda line: (line.split()[1].split(".")[0] not in sys.stdlib_module_names, line))


def _guide(modules: list[Module]) -> str:
    """Return the file's docstring: how to run it and how to read it."""
    contents = []
    for module in modules:
        text = ast.get_docstring(module.tree) or ""
        contents.append(f"  {module.name.replace('.', '/') + '.py':<34} {' '.join(text.split())[:78]}".rstrip())
    guide = (
        f"""
train_gpt.py: one recipe in one file, from tokens to scores. Generated; the sources are the modules named below.

Train, round, evaluate and adapt (8 GPUs, or any number that divides the micro-batches of a step; CPU works too):
  torchrun --standalone --nproc_per_node=8 train_gpt.py --train 'DATA/*_train_*.bin' --val 'DATA/*_val_*.bin' \\
      --tokenizer DATA/TOKENIZER.model --seed 42 --out OUT
Score an artifact, before and after test-time training (needs torch, numpy, sentencepiece and brotli only):
  python train_gpt.py --eval model.ssq --tokenizer DATA/TOKENIZER.model --val 'DATA/*_val_*.bin'
On a CPU, with the PyTorch build and the number of threads of the run (both are in the artifact, threads are set from
it), the scores are those of the run to the last bit.

{PACKED_NAME} is this file, compressed; `python {PACKED_NAME} --source` prints it.

How to read it: SETTINGS first, then `class GPT` (the one forward pass), `class Trainer`, `quantize_weights`,
`score_rows` (plain evaluation), `class Adapter` (test-time training), and `main` at the end. A name that two modules
define ends in its module's name here. The sections, in this order (search for the path):

""".strip()
        + "\n\n"
        + "\n".join(contents)
    )
    return f'"""{guide}\n"""\n'


def _check(text: str) -> None:
    """Raise ValueError if the file binds a name to two things or holds a reference to the package."""
    tree = ast.parse(text)
    seen: dict[str, str] = {}  # a name -> the module it is imported from, or nothing
    statements = [inner for node in tree.body for inner in (node.body if isinstance(node, ast.If) else [node])]
    for node in statements:
        source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
        for name in _bound(node):
            if name in seen and not source == seen[name] != "":
                raise ValueError(f"line {node.lineno} of the generated file binds {name} a second time")
            seen[name] = source
    for inner in ast.walk(tree):
        if isinstance(inner, ast.ImportFrom) and (inner.module or "").split(".")[0] == PACKAGE:
            raise ValueError(f"line {inner.lineno} of the generated file still imports {inner.module}")


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
