"""Files of one run that another run takes over: the same bytes on the disk where that can be, else a copy.

Every file of a run directory is replaced as a whole and never written in place, so that two runs may share one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from pathlib import Path

from model.files.atomic import (
    NOT_THERE,
    aside_folder,
    file_sha256,
    move_file,
    refuse_if_taken_away,
    replace_file,
)

READ_BYTES = 1 << 22  # of a file at a time
NO_LINK = NOT_THERE | {errno.EXDEV, errno.EMLINK, errno.EACCES}  # this pair of places takes no hard link


def share_file(source: Path, path: Path, *, sha256: str) -> None:
    """Let path hold what source holds, whole or not at all: a hard link where the filesystem has them, else a copy.

    What is checked is what comes to stand under path, even where source is replaced meanwhile.
    Raises ValueError if its bytes do not have this sha256, OSError if source cannot be read or path not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own_folder = aside_folder(path)
    aside = (own_folder or path.parent) / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        os.link(source.resolve(strict=True), aside)
        check_sha256(file_sha256(aside), sha256, source)
        move_file(aside, path)
    except OSError as error:
        refuse_if_taken_away(own_folder, path)
        if error.errno not in NO_LINK:
            raise
        copy_file(source, path, sha256=sha256)
    finally:
        with contextlib.suppress(FileNotFoundError):  # a link moved onto itself stays where it was
            aside.unlink()


def copy_file(source: Path, path: Path, *, sha256: str) -> None:
    """Copy source to path, whole or not at all. Raises ValueError if its bytes do not have this sha256."""
    digest = hashlib.sha256()
    with source.open("rb") as bytes_in, replace_file(path) as bytes_out:
        while block := bytes_in.read(READ_BYTES):
            digest.update(block)
            bytes_out.write(block)
        check_sha256(digest.hexdigest(), sha256, source)


def check_sha256(found: str, wanted: str, source: Path | str) -> None:
    """Raise ValueError naming source unless it has the sha256 that was noted of it."""
    if found != wanted:
        raise ValueError(f"{source} does not have the sha256 of its record")
