"""Imports modules from the texts that one file holds, each under its own name.

This file stands verbatim in a generated train_gpt.py. A module's lines are where tracebacks, inspect and Triton (which
reads the source of a kernel) look for them.
"""

import importlib.abc
import importlib.util
import linecache
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType


class TextImporter(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds and loads modules whose sources are texts; `home` is the file that holds them."""

    def __init__(self, sources: Mapping[str, str], home: str) -> None:
        self.sources, self.home = sources, home

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to load a module that is here, or a package that holds one."""
        if name in self.sources or self.is_package(name):
            return importlib.util.spec_from_loader(name, self)
        return None

    def is_package(self, name: str) -> bool:
        """Return whether modules stand below this name."""
        return any(known.startswith(name + ".") for known in self.sources)

    def get_source(self, name: str) -> str:
        """Return the text of a module; a package that only holds others has none."""
        return self.sources.get(name, "")

    def get_code(self, name: str) -> CodeType:
        """Return the code of a module, its lines counted from its own first one."""
        text, place = self.get_source(name), f"{self.home}/{name.replace('.', '/')}.py"
        linecache.cache[place] = len(text), None, text.splitlines(True), place
        return compile(text, place, "exec", dont_inherit=True)
