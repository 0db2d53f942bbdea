"""Keeping a node-local run directory and its copy on an object store the same.

A rank works in a local folder. Where the sweep lies behind a URI, every finished file is put there as soon as it is
whole, a stage's record after the stage's outputs; a new attempt begins by fetching what is there.
"""

from __future__ import annotations

from pathlib import Path

from runner.folder.fence import check_epoch
from runner.folder.storage import LocalStorage, ObjectStorage, open_storage, remove_tree

FOLDERS = ("", "checkpoints", "ledger", "stages")  # of a run directory; stages last, as when they were written
COMMITTED = (
    "attempt.json",
    "run.json",
    "steps.npz",
    "gpu.npz",
    "evaluate.npz",
    "ttt.npz",
)  # what the driver needs for the results


class Mirror:
    """A run directory and its copy under a prefix of an object store; epoch is that of the driver it works for."""

    def __init__(self, storage: ObjectStorage, prefix: str, workdir: Path, *, epoch: int = 0) -> None:
        self.storage, self.prefix, self.workdir, self.epoch = storage, prefix, workdir, epoch

    def put(self, path: Path) -> None:
        """Put one finished file; after a checkpoint, forget those that training has dropped.

        Raises Superseded if another driver has taken the sweep over.
        """
        check_epoch(self.storage, self.epoch)
        name = path.relative_to(self.workdir).as_posix()
        self.storage.write(f"{self.prefix}/{name}", path.read_bytes())
        if path.parent.name == "checkpoints" and path.suffix == ".json":
            kept = {item.name for item in path.parent.iterdir()}
            for old in self.storage.names(f"{self.prefix}/checkpoints"):
                if old not in kept:
                    self.storage.remove(f"{self.prefix}/checkpoints/{old}")

    def put_logs(self) -> None:
        """Put the logs as far as they go."""
        for path in sorted((self.workdir / "logs").glob("*")):
            self.put(path)

    def fetch_all(self) -> None:
        """Make the local folder what the store has, logs left out; what another attempt left here does not count."""
        for folder in FOLDERS[1:]:
            remove_tree(self.workdir / folder)
        for path in self.workdir.glob("*"):
            if path.is_file():  # of a sweep that once was at the same place, for all that is known
                path.unlink()
        for folder in FOLDERS:
            for name in self.storage.names(f"{self.prefix}/{folder}".rstrip("/")):
                self.fetch(f"{folder}/{name}".lstrip("/"))

    def fetch_results(self) -> None:
        """Fetch what the driver commits."""
        present = set(self.storage.names(self.prefix))
        remove_tree(self.workdir / "stages")
        for name in COMMITTED:
            if name in present:
                self.fetch(name)
            else:
                (self.workdir / name).unlink(missing_ok=True)
        for name in self.storage.names(f"{self.prefix}/stages"):
            self.fetch(f"stages/{name}")

    def fetch(self, name: str) -> None:
        """Fetch one file."""
        LocalStorage(self.workdir).write(name, self.storage.read(f"{self.prefix}/{name}"))


def open_mirror(out: str, run_name: str, workdir: Path, *, epoch: int = 0) -> Mirror | None:
    """Return the mirror of a run, None where the sweep lies on a filesystem and the run directory is the original."""
    storage = open_storage(out)
    return Mirror(storage, f"seeds/{run_name}", workdir, epoch=epoch) if isinstance(storage, ObjectStorage) else None
