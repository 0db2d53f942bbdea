"""Paths and URIs as a spec names them."""

from __future__ import annotations

import os
import re

URI_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*://")


def is_uri(path: str) -> bool:
    """Return whether path is a URI (s3://, gs://, file://) and not a local path."""
    return bool(URI_PATTERN.match(path))


def absolute_path(path: str) -> str:
    """Return a local path made absolute from the current directory; a URI, or nothing, as it is."""
    return path if not path or is_uri(path) else os.path.abspath(os.path.expanduser(path))


def is_object_store(place: str) -> bool:
    """Return whether place is a URI of something else than a folder."""
    return is_uri(place) and not place.startswith("file://")
