"""Keeping a node-local run directory and its copy on an object store the same.

A rank works in a local folder. Where the sweep lies behind a URI, every finished file is put there as soon as it is
whole, a stage's record after the stage's outputs; a new attempt begins by fetching what is there. Of a gang's further
hosts each fetches what its ranks are about to read, when they are, by the sha256 that rank 0 names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from model.files.atomic import file_sha256
from model.files.linked import check_sha256
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
        self.keep(name, self.read(name))

    def fetch_same(self, name: str, sha256: str) -> None:
        """Have the file of this name and sha256 here: it may be, left by an earlier attempt, else it is fetched.

        Raises OSError if the store does not give it, ValueError if what it gives has another sha256.
        """
        path = self.workdir / name
        if path.is_file() and file_sha256(path) == sha256:
            return
        content = self.read(name)
        check_sha256(hashlib.sha256(content).hexdigest(), sha256, f"{self.storage.shown}: {self.prefix}/{name}")
        self.keep(name, content)

    def read(self, name: str) -> bytes:
        """Return a file's bytes as the store has them."""
        return self.storage.read(f"{self.prefix}/{name}")

    def keep(self, name: str, content: bytes) -> None:
        """Write a file of the local folder."""
        LocalStorage(self.workdir).write(name, content)


def open_mirror(out: str, run_name: str, workdir: Path, *, epoch: int = 0) -> Mirror | None:
    """Return the mirror of a run, None where the sweep lies on a filesystem and the run directory is the original."""
    storage = open_storage(out)
    return Mirror(storage, f"seeds/{run_name}", workdir, epoch=epoch) if isinstance(storage, ObjectStorage) else None
