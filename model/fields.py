"""One checker of settings: values against the annotations of their dataclass, whoever made them.

Python, JSON and YAML callers alike end with the same type for the same value, so that equal settings have equal hashes.
Importing this module needs no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def require(is_valid: bool, message: str) -> None:
    """Raise ValueError with message unless is_valid."""
    if not is_valid:
        raise ValueError(message)


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError naming the field unless value is one of choices."""
    require(value in choices, f"{name}={value!r} must be one of {', '.join(map(str, choices))}")


def added(default: T) -> T:
    """Return a field whose default is what the code did before the field was there.

    At its default it enters neither hashes nor records, so that configurations from before keep their names.
    """
    return dataclasses.field(default=default, metadata={"is_added": True})


def plain_settings(config: Any) -> dict[str, Any]:
    """Return a settings dataclass as plain values, sections nested; added fields only where they are not at default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = plain_settings(value)
        elif not field.metadata.get("is_added") or value != field.default:
            found[field.name] = value
    return found


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return 'did you mean ...?' for the closest of choices, or the list of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def fit_fields(config: Any, section: str) -> None:
    """Give every field of a frozen dataclass the type that it is annotated with; for its __post_init__.

    Raises ValueError naming section, field and value where a value does not fit, or is infinite or not a number.
    """
    kind: type = type(config)
    for name, hint in _hints(kind).items():
        value = getattr(config, name)
        fitted = check_value(value, hint, f"{section}.{name}" if section else name)
        if fitted is not value:
            object.__setattr__(config, name, fitted)


@functools.cache
def _hints(kind: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def check_value(value: object, hint: Any, path: str) -> Any:
    """Return value as the annotation hint has it, else raise ValueError naming path.

    Whole numbers fit float, numpy's scalars fit as Python's do, a list fits a tuple; nothing else is converted: neither
    text nor true and false are numbers, and 11.0 is no whole number.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return _check_choice(value, arguments, path)
    if origin in (types.UnionType, typing.Union):
        return _check_union(value, arguments, path)
    if origin is tuple:
        size = None if arguments[-1] is ... else len(arguments)
        if not isinstance(value, list | tuple) or size not in (None, len(value)):
            raise ValueError(f"{path} must be a list{'' if size is None else f' of {size}'}, not {describe(value)}")
        return tuple(check_value(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _check_float(value, path)
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path} must be {type_name(hint)}, not {describe(value)}")
    return str(value) if hint is str else value  # numpy's text is text of another type


def _check_float(value: numbers.Real, path: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{path}={value} must be finite")
    return number + 0.0  # -0.0 equals 0.0 and is written differently


def _check_choice(value: object, choices: tuple[Any, ...], path: str) -> Any:
    if not isinstance(value, bool):
        for choice in choices:
            if choice == value:
                return choice
    raise ValueError(f"{path}={value!r} is not a choice; {nearest(str(value), map(str, choices))}")


def _check_union(value: object, arguments: tuple[Any, ...], path: str) -> Any:
    """Return value checked against an optional type ('X | None')."""
    if value is None and type(None) in arguments:
        return None
    (hint,) = [argument for argument in arguments if argument is not type(None)]
    return check_value(value, hint, path)


def describe(value: object) -> str:
    """Return a value with its type in plain words, for messages: 'text ('x')'."""
    if value is None:
        return "nothing (null)"
    return f"{type_name(type(value))} ({str(value)[:60]!r})"


def type_name(kind: Any) -> str:
    """Return the word for a Python type that a YAML author would use."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list"}
    return words.get(kind, "a mapping" if kind is dict else str(getattr(kind, "__name__", kind)))
