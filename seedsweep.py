"""The `seedsweep` command, under a name that nothing else has; `python -m seedsweep` is the same.

Our packages have everyday names, and many a folder of experiments holds a model.py or a results/ too. Whatever stands
in the current folder or on PYTHONPATH, those four names mean the packages beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = str(Path(__file__).resolve().parent)
PACKAGES = ("jobs", "model", "results", "runner")


class OwnPackages:
    """Finds our packages beside this file, before the import path is asked."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where one of our packages is; nothing is said about any other module."""
        return PathFinder.find_spec(name, [ROOT]) if name in PACKAGES else None


def hold_packages() -> None:
    """Let our names mean our packages for the rest of this process."""
    if OwnPackages not in sys.meta_path:
        sys.meta_path.insert(0, OwnPackages)


def main() -> int:
    """Run one command and return its exit code."""
    hold_packages()
    from jobs.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
