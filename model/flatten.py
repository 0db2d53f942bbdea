"""One module of a package as a section of a single file: imports of its own package resolved, names kept unique.

Works on the text, guided by the syntax tree, so that comments, docstrings and layout stay as their author left them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

FUTURE, GUARD = "__future__", "TYPE_CHECKING"
DROPPED_NAMES = ("__all__",)


class Import(NamedTuple):
    """`from module import name as local`, or with an empty name `import module as local`."""

    module: str
    name: str
    local: str

    def line(self) -> str:
        """Return the statement."""
        if self.name:
            return f"from {self.module} import {self.name}" + (f" as {self.local}" if self.local != self.name else "")
        return f"import {self.module}" + (f" as {self.local}" if self.local != self.module.split(".")[0] else "")


@dataclass(slots=True)
class Module:
    """A parsed module of the package: what it says, defines and imports at its top level."""

    name: str
    source: str
    tree: ast.Module
    definitions: dict[str, str] = field(default_factory=dict)  # name -> its statement, to tell equal ones
    outside: list[Import] = field(default_factory=list)  # of other packages
    inside: list[Import] = field(default_factory=list)  # of this package
    deferred: list[Import] = field(default_factory=list)  # of this package, inside functions
    docstring: str = field(init=False)  # as it stands in the source, quotes included; empty where there is none

    def __post_init__(self) -> None:
        first = self.tree.body[0] if self.tree.body else None
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        self.docstring = (ast.get_source_segment(self.source, first) or "") if first is not None and is_text else ""


def read_module(name: str, source: str, *, modules: frozenset[str]) -> Module:
    """Return a parsed module; modules are the dotted names of all modules of the package.

    Raises ValueError for what a single file cannot hold: star imports, relative imports, names bound twice.
    """
    module = Module(name, source, ast.parse(source))
    for statement in module.tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for found in _imports(statement, module, modules):
                (module.inside if found.module in modules else module.outside).append(found)
        elif isinstance(statement, ast.If | ast.Try) and not _is_type_guard(statement):
            raise ValueError(
                f"{name}:{statement.lineno}: a single file cannot hold top-level {type(statement).__name__}"
            )
        for bound in _bound_by(statement):
            if bound in module.definitions:
                raise ValueError(f"{name}:{statement.lineno}: {bound} is bound twice")
            if bound not in DROPPED_NAMES:
                module.definitions[bound] = ast.dump(statement)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node not in module.tree.body:
            module.deferred += [found for found in _imports(node, module, modules) if found.module in modules]
    return module


def _is_type_guard(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == GUARD


def _imports(node: ast.Import | ast.ImportFrom, module: Module, modules: frozenset[str]) -> Iterator[Import]:
    """Yield what an import statement binds; `from package import module` counts as an import of that module."""
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, "", alias.asname or alias.name.split(".")[0]) for alias in node.names)
        return
    if node.level or not node.module or any(alias.name == "*" for alias in node.names):
        raise ValueError(f"{module.name}:{node.lineno}: relative and star imports cannot be resolved")
    if node.module == FUTURE:
        return
    for alias in node.names:
        local = alias.asname or alias.name
        if f"{node.module}.{alias.name}" in modules:
            yield Import(f"{node.module}.{alias.name}", "", local)
        else:
            yield Import(node.module, alias.name, local)


def _bound_by(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement other than an import binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]


class Edit(NamedTuple):
    """Replace the text from (line, column) to (end line, end column) by another; lines from 1, columns in bytes."""

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def flatten(
    module: Module, names: Mapping[str, str], spaces: Mapping[str, Mapping[str, str]], drop: frozenset[str]
) -> str:
    """Return the module's text without docstring, imports of the package and type-checking blocks.

    names: what each name of the module's top level is called in the single file. spaces: for a local name that stands
    for a whole module, that module's names. drop: definitions that an equal one before makes superfluous.
    """
    renamer = _Renamer(module, names, spaces)
    renamer.visit(module.tree)
    edits = renamer.edits
    for position, statement in enumerate(module.tree.body):
        is_docstring = position == 0 and bool(module.docstring)
        is_import = isinstance(statement, ast.Import | ast.ImportFrom)
        bound = _bound_by(statement)
        is_dropped = bool(bound) and all(name in drop or name in DROPPED_NAMES for name in bound)
        if is_docstring or is_import or _is_type_guard(statement) or is_dropped:
            edits = [edit for edit in edits if not _covers(statement, edit)]
            edits.append(_removal(statement, module.source))
    return re.sub(r"\n{4,}", "\n\n\n", _apply(module.source, edits)).strip("\n") + "\n"


def _covers(statement: ast.stmt, edit: Edit) -> bool:
    return statement.lineno <= edit.start[0] <= (statement.end_lineno or 0)


def _removal(statement: ast.stmt, source: str) -> Edit:
    """Return the edit that takes a statement out, with the comment behind it and its decorators."""
    last = statement.end_lineno or statement.lineno
    return Edit((statement.lineno, 0), (last, len(source.splitlines()[last - 1].encode())), "")


def _rename_in_braces(text: str, name: str, flat: str) -> str:
    """Return an f-string's text with a name renamed inside its innermost braces."""
    word = re.compile(rf"(?<![.\w'\"]){re.escape(name)}\b(?!\s*=[^=])")

    def rename(part: re.Match[str]) -> str:
        return word.sub(flat, part[0])

    return re.sub(r"\{[^{}]*\}", rename, text)


def _apply(source: str, edits: list[Edit]) -> str:
    """Return source with the edits made, none of which may overlap."""
    lines = [line.encode() for line in source.splitlines()]
    for edit in sorted(edits, reverse=True):
        (first, left), (last, right) = edit.start, edit.end
        lines[first - 1 : last] = [lines[first - 1][:left] + edit.text.encode() + lines[last - 1][right:]]
    return b"\n".join(lines).decode() + "\n"


class _Renamer(ast.NodeVisitor):
    """Collects the edits that give each use of a top-level name its name in the single file, minding local names."""

    def __init__(self, module: Module, names: Mapping[str, str], spaces: Mapping[str, Mapping[str, str]]) -> None:
        self.module, self.names, self.spaces = module, names, spaces
        self.resolved = {found.local for found in (*module.inside, *module.deferred)}
        self.scopes: list[tuple[set[str], bool]] = []  # (names bound, whether it is a class body)
        self.edits: list[Edit] = []

    def _is_local(self, name: str) -> bool:
        inner = self.scopes[-1:]  # a class body is seen from itself only, not from its methods
        outer = [scope for scope in self.scopes[:-1] if not scope[1]]
        return any(name in bound for bound, _ in (*outer, *inner))

    def _flat(self, name: str) -> str:
        return name if self._is_local(name) else self.names.get(name, name)

    def _replace(self, node: ast.expr, text: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        self.edits.append(Edit((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), text))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.spaces and not self._is_local(node.id):
            raise ValueError(f"{self.module.name}:{node.lineno}: module {node.id} is used as a value; import its names")
        if self._flat(node.id) != node.id:
            self._replace(node, self._flat(node.id))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        if isinstance(owner, ast.Name) and owner.id in self.spaces and not self._is_local(owner.id):
            self._replace(node, self.spaces[owner.id][node.attr])
        else:
            self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Rename inside an f-string by pattern: before Python 3.12 the tree does not know the places in it."""
        used = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
        if used & set(self.spaces):
            raise ValueError(f"{self.module.name}:{node.lineno}: a module is used in an f-string; import its names")
        renamed = [name for name in sorted(used) if self._flat(name) != name]
        if renamed:
            text = ast.get_source_segment(self.module.source, node)
            assert text is not None
            for name in renamed:
                text = _rename_in_braces(text, name, self._flat(name))
            self._replace(node, text)

    def visit_Import(self, node: ast.Import) -> None:
        """Leave other packages' imports inside functions as they are."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Take an import of the package out of a function: its names are there already."""
        ours = {found.module if found.name else found.module.rpartition(".")[0] for found in self.module.deferred}
        if self.scopes and node.module in ours:
            for alias in node.names:
                assert (alias.asname or alias.name) not in self.module.definitions, alias.name
            self._replace(node, "pass")  # type: ignore[arg-type]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._rename_definition(node, "def")
        arguments = node.args
        for outer in (*node.decorator_list, *arguments.defaults, *arguments.kw_defaults, node.returns):
            if outer is not None:
                self.visit(outer)
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in every:
            if argument is not None and argument.annotation is not None:
                self.visit(argument.annotation)
        bound = {argument.arg for argument in every if argument is not None} | self._bound_in(node.body)
        self._visit_scope(node.body, bound, is_class=False)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._rename_definition(node, "class")
        for outer in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(outer)
        self._visit_scope(node.body, self._bound_in(node.body), is_class=True)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg)
        self._visit_scope([node.body], {argument.arg for argument in every if argument is not None}, is_class=False)

    def visit_comprehension_of(self, node: ast.AST) -> None:
        """Visit a comprehension: its targets are names of its own."""
        bound = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.scopes.append((bound, False))
        self.generic_visit(node)
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_of

    def _visit_scope(self, body: list[ast.stmt] | list[ast.expr], bound: set[str], *, is_class: bool) -> None:
        self.scopes.append((bound, is_class))
        for child in body:
            self.visit(child)
        self.scopes.pop()

    def _bound_in(self, body: list[ast.stmt]) -> set[str]:
        """Return the names that statements bind in their own scope, those of resolved imports left out."""
        bound: set[str] = set()
        shared: set[str] = set()
        waiting: list[ast.AST] = list(body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                bound.add(node.name)
                continue
            if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
                continue
            if isinstance(node, ast.Global):
                shared |= set(node.names)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                locals_ = {alias.asname or alias.name.split(".")[0] for alias in node.names}
                bound |= locals_ - self.resolved
            waiting += ast.iter_child_nodes(node)
        for name in shared:
            if self.names.get(name, name) != name:
                raise ValueError(f"{self.module.name}: global {name} is also defined elsewhere; rename one of them")
        return bound - shared

    def _rename_definition(self, node: ast.FunctionDef | ast.ClassDef, keyword: str) -> None:
        flat = self._flat(node.name) if not self.scopes else node.name
        if flat != node.name:
            line = self.module.source.splitlines()[node.lineno - 1].encode()
            start = line.index(f"{keyword} {node.name}".encode()) + len(keyword) + 1
            self.edits.append(Edit((node.lineno, start), (node.lineno, start + len(node.name.encode())), flat))
