"""Turn plain YAML values into frozen dataclasses, refusing what does not fit with the nearest valid name.

One checker for every section of a spec: keys against field names, values against the fields' annotations.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def nearest(name: str, choices: typing.Iterable[str]) -> str:
    """Return '; did you mean ...?' for the closest of choices, or the list of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def check_keys(path: str, given: object, known: typing.Iterable[str]) -> Mapping[str, Any]:
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


def updated(base: T, given: object, path: str, *, skip: tuple[str, ...] = ()) -> T:
    """Return the dataclass base with the fields named in given replaced, nested sections included.

    Raises ValueError for unknown names, wrong types, and values the dataclass itself refuses.
    """
    assert dataclasses.is_dataclass(base)
    assert not isinstance(base, type)
    names = [item.name for item in dataclasses.fields(base) if item.name not in skip]
    values = check_keys(path, given, names)
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in values.items():
        here, current = f"{path}.{name}" if path else name, getattr(base, name)
        if dataclasses.is_dataclass(current):
            changes[name] = updated(current, value, here)
        else:
            changes[name] = checked(value, hints[name], here)
    return typing.cast(T, dataclasses.replace(base, **changes))


def checked(value: object, hint: Any, path: str) -> Any:
    """Return value if it fits the annotation hint (an int fits float), else raise ValueError naming path."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ValueError(f"{path}={value!r} is not a choice; {nearest(str(value), map(str, arguments))}")
        return value
    if origin in (types.UnionType, typing.Union):
        return check_union(value, arguments, path)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path} must be a list, not {describe(value)}")
        return tuple(checked(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} must be {type_name(hint)}, not {describe(value)}")
    if isinstance(value, float) and value != value:
        raise ValueError(f"{path} must be a number, not {value}")
    return value


def check_union(value: object, arguments: tuple[Any, ...], path: str) -> Any:
    """Return value checked against an optional type ('X | None')."""
    if value is None and type(None) in arguments:
        return None
    (hint,) = [argument for argument in arguments if argument is not type(None)]
    return checked(value, hint, path)


def describe(value: object) -> str:
    """Return a value with its YAML type, for messages: 'the string 'x''."""
    if value is None:
        return "nothing (null)"
    return f"{type_name(type(value))} ({str(value)[:60]!r})"


def type_name(kind: Any) -> str:
    """Return the word for a Python type that a YAML author would use."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return words.get(kind, "a mapping" if kind is dict else str(getattr(kind, "__name__", kind)))
