"""Mappings of names to values, as YAML gives them: checked for unknown names, and laid over settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from model.fields import check_value, describe, nearest

T = TypeVar("T")


def check_keys(path: str, given: object, known: Iterable[str]) -> Mapping[str, Any]:
    """Return given as a mapping whose keys are all known.

    Raises ValueError that names path, the unknown key and the nearest valid name.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} must be a mapping of names to values, not {describe(given)}")
    names = list(known)
    for key in given:
        if key not in names:
            raise ValueError(f"{path}: unknown key {key!r}; {nearest(str(key), names)}")
    return given


def update_fields(base: T, given: object, path: str) -> T:
    """Return the dataclass base with the fields named in given replaced, nested sections included.

    Raises ValueError for unknown names, wrong types, and values the dataclass itself refuses.
    """
    assert dataclasses.is_dataclass(base)
    assert not isinstance(base, type)
    names = [item.name for item in dataclasses.fields(base)]
    values = check_keys(path, given, names)
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        here, current = f"{path}.{name}" if path else name, getattr(base, name)
        if dataclasses.is_dataclass(current):
            changes[name] = update_fields(current, value, here)
        else:
            changes[name] = check_value(value, hints[name], here)
    return typing.cast(T, dataclasses.replace(base, **changes))
