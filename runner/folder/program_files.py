"""The folder of a program: named by its contents, kept once in the sweep's folder, unpacked for each attempt.

Histories, caches and environments stay at home. A link to a file counts as the file; one to a folder is refused, since
whatever it leads to would have to travel.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import stat
import tarfile
from collections.abc import Mapping
from pathlib import Path

from model.files.atomic import file_sha256
from runner.folder.storage import Storage

MAX_BYTES = 512 << 20
LEFT_AT_HOME = ("__pycache__", "venv", "node_modules", "wandb")  # and whatever begins with a dot
SOURCE_SUFFIXES = frozenset({".py", ".sh", ".cpp", ".cc", ".cu", ".cuh", ".h", ".hpp", ".c", ".rs", ".so"})
SHOWN_FILES = 4


def find_files(folder: Path) -> dict[str, Path]:
    """Return the files of a program's folder by relative path, sorted.

    Raises ValueError, one line naming program.folder, if it is no folder, holds nothing, a link to a folder, something
    that is no file, or more than MAX_BYTES.
    """
    if not folder.is_dir():
        raise ValueError(f"program.folder={folder} is not a folder; name the one that holds the program")
    found: dict[str, Path] = {}
    total = 0
    for place, names, files in os.walk(folder):
        for name in [*names]:
            path = Path(place) / name
            if name.startswith(".") or name in LEFT_AT_HOME:
                names.remove(name)
            elif path.is_symlink():
                raise ValueError(f"program.folder: {path} is a link to a folder; name what it leads to under inputs")
        for name in files:
            path = Path(place) / name
            if name.startswith(".") or path.suffix == ".pyc":
                continue
            if not path.is_file():
                kind = "leads nowhere" if path.is_symlink() else "is no file"
                raise ValueError(f"program.folder: {path} {kind}; remove it")
            total += path.stat().st_size
            found[path.relative_to(folder).as_posix()] = path
    if total > MAX_BYTES:
        raise ValueError(
            f"program.folder={folder} holds {total / 1e6:.0f} MB, over {MAX_BYTES / 1e6:.0f} MB; keep data outside it, "
            f"and name it under inputs"
        )
    if not found:
        raise ValueError(f"program.folder={folder} holds no files")
    return dict(sorted(found.items()))


def hash_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the sha256 of each file."""
    return {name: file_sha256(path) for name, path in files.items()}


def folder_hash(hashes: Mapping[str, str]) -> str:
    """Return the sha256 (hex) that names a folder: over the relative path and contents of each file."""
    digest = hashlib.sha256(b"program folder\0")
    for name, sha256 in sorted(hashes.items()):
        encoded = name.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "big") + encoded + bytes.fromhex(sha256))
    return digest.hexdigest()


def archive_path(name: str) -> str:
    """Return where the sweep's folder keeps the program folder of this hash."""
    return f"program/{name}.tar"


def find_folder(storage: Storage, folder: str, name: str) -> str:
    """Return a program's folder, or once it has moved the path of the copy under this hash in the sweep's own folder.

    Raises ValueError, one line, if there is neither.
    """
    if Path(folder).is_dir():
        return folder
    kept = archive_path(name)
    if kept.rpartition("/")[2] not in storage.names("program"):
        raise ValueError(
            f"program.folder={folder} is not there any more, and {storage.shown} has no copy of it; give "
            f"`seedsweep run SPEC` again with its new place"
        )
    return f"{storage.shown}/{kept}"


def kept_folder(storage: Storage, folder: str) -> bytes | None:
    """Return the packed folder that a path into the sweep's own folder means, None for a path elsewhere."""
    name = folder.removeprefix(f"{storage.shown}/")
    is_kept = re.fullmatch(r"program/[0-9a-f]{64}\.tar", name) and name.rpartition("/")[2] in storage.names("program")
    return storage.read(name) if is_kept else None


def keep_folder(storage: Storage, files: Mapping[str, Path], name: str) -> None:
    """Put a program's folder into the sweep's, under its hash, unless it is there. Raises ValueError if it changed."""
    path = archive_path(name)
    if path.rpartition("/")[2] in storage.names("program"):
        return
    content = pack(files)
    if folder_hash(read_hashes(content)) != name:
        raise ValueError("program.folder changed while it was read; run the same command again")
    storage.write(path, content)


def pack(files: Mapping[str, Path]) -> bytes:
    """Return a tar of the files: contents, and whether they may be executed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in files.items():
            content = path.read_bytes()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o555 if os.access(path, os.X_OK) else 0o444
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def read_hashes(content: bytes) -> dict[str, str]:
    """Return the sha256 of each file in a packed folder."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {
            member.name: hashlib.sha256(file.read()).hexdigest()
            for member in archive
            if (file := archive.extractfile(member)) is not None
        }


def unpack(content: bytes, place: Path) -> dict[str, str]:
    """Write a packed folder's files, read-only, into a new folder and return their sha256."""
    clear_folder(place)
    place.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(place, filter="tar")
        for member in archive:
            os.chmod(place / member.name, member.mode & 0o555)
    return read_hashes(content)


def clear_folder(place: Path) -> None:
    """Remove what an attempt left, also where its program took away the right to."""
    if not place.exists():
        return
    for folder, _, _ in os.walk(place):
        with contextlib.suppress(OSError):
            os.chmod(folder, stat.S_IRWXU)
    shutil.rmtree(place)


def changed_files(place: Path, hashes: Mapping[str, str]) -> list[str]:
    """Return the files of a program that are no longer what they were, or are gone."""
    changed = []
    for name, sha256 in hashes.items():
        path = place / name
        try:
            is_same = path.is_file() and not path.is_symlink() and file_sha256(path) == sha256
        except OSError:
            is_same = False
        if not is_same:
            changed.append(name)
    return changed


def new_files(place: Path, hashes: Mapping[str, str]) -> dict[str, Path]:
    """Return by relative path the files that a program wrote into its folder: new ones, and changed ones of its own.

    Links are not followed: they lead to inputs.
    """
    found: dict[str, Path] = {}
    for folder, names, files in os.walk(place):
        names[:] = sorted(name for name in names if name not in LEFT_AT_HOME and not (Path(folder) / name).is_symlink())
        for name in sorted(files):
            path = Path(folder) / name
            relative = path.relative_to(place).as_posix()
            if path.is_symlink() or not path.is_file():
                continue
            if relative not in hashes or file_sha256(path) != hashes[relative]:
                found[relative] = path
    return found


def is_source(name: str) -> bool:
    """Return whether a file of a program is code."""
    return Path(name).suffix in SOURCE_SUFFIXES


def list_names(names: list[str]) -> str:
    """Return a few names, and how many more there are."""
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more
