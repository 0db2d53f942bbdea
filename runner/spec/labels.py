"""What a gang may require of its nodes' labels, and the label by which Ray names a node's GPUs."""

from __future__ import annotations

import re
from collections.abc import Mapping

from model.fields import describe

ACCELERATOR = "accelerator"  # in a spec and in messages, for Ray's own label
ACCELERATOR_LABEL = "ray.io/accelerator-type"  # which Ray gives to every node with GPUs
NODE_ID_LABEL = "ray.io/node-id"
NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"  # as Kubernetes and Ray have names and values of labels
LABEL = re.compile(rf"([A-Za-z0-9][A-Za-z0-9.-]{{0,251}}[A-Za-z0-9]/)?{NAME}")
VALUE = re.compile(NAME)


def parse_require(given: object) -> dict[str, tuple[str, ...]]:
    """Return label -> values, one of which a node must have; `accelerator` becomes Ray's own label.

    Raises ValueError, naming the label, for what is no label, no value, or there twice.
    """
    if not isinstance(given, Mapping):
        raise ValueError(f"gang.require must be a mapping of labels to values, not {describe(given)}")
    found: dict[str, tuple[str, ...]] = {}
    for name, values in given.items():
        if not isinstance(name, str) or not LABEL.fullmatch(name):
            raise ValueError(f"gang.require: {name!r} is no label of a node; write accelerator, or a label of Ray's")
        label = ACCELERATOR_LABEL if name == ACCELERATOR else name
        if label in found:
            raise ValueError(f"gang.require names {ACCELERATOR} and {ACCELERATOR_LABEL}, which are one; keep one")
        listed = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not listed:
            raise ValueError(f"gang.require.{name} is an empty list; name a value, or leave it out")
        for value in listed:
            if not isinstance(value, str):
                raise ValueError(
                    f"gang.require.{name} must be text or a list of texts, not {describe(value)}; quote it"
                )
            if not VALUE.fullmatch(value):
                raise ValueError(f"gang.require.{name}={value!r} is no value of a label; write it as the nodes have it")
        found[label] = tuple(dict.fromkeys(listed))
    return found


def shown(label: str) -> str:
    """Return a label as a spec names it."""
    return ACCELERATOR if label == ACCELERATOR_LABEL else label


def words(labels: Mapping[str, tuple[str, ...]]) -> str:
    """Return required labels in words: 'accelerator=H100 or A100, zone=eu'."""
    return ", ".join(f"{shown(label)}={' or '.join(values)}" for label, values in labels.items())


def accelerator_type(model: str) -> str:
    """Return the value of Ray's label for a GPU whose driver calls it model; "" for none.

    The words in capitals after the maker's, up to the first with a digit, which ends where small letters or a dash
    begin; the whole name without the maker where there is no such word. As Ray 2.60 does it.
    """
    taken: list[str] = []
    for word in model.split()[1:]:
        head = re.split(r"[^A-Z0-9]", word)[0]
        if any(character.isdigit() for character in head):
            return "-".join([*taken, head])
        if head != word:
            break
        taken.append(word)
    return "-".join(model.removeprefix("NVIDIA ").split())
