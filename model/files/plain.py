"""JSON mappings and arrays of a run directory, read back: damage is one line that names the file and what to do."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

MISSING = "is missing: the run is not finished, or is of an earlier version"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping. Raises FileNotFoundError or ValueError naming path."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} {MISSING}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to do its stage again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (not a mapping); remove it to do its stage again")
    return content


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Return a JSON mapping, {} where there is no file. Raises ValueError if it is damaged."""
    return read_json(path) if path.exists() else {}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file; nothing in it is unpickled. Raises FileNotFoundError or ValueError."""
    import numpy as np

    if not path.is_file():
        raise FileNotFoundError(f"{path} {MISSING}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to do its stage again") from None


def read_arrays_if_any(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an npz file, {} where there is none. Raises ValueError if it is damaged."""
    return read_arrays(path) if path.exists() else {}
