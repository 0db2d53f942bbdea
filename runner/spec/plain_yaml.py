"""YAML of plain values only: what a spec needs, read as people read it."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_ALIASES = 20
PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")
# what a plain word may look like: YAML 1.1 also reads 042 as 34, 1:30 as 90, 1_000 as 1000 and no as false
PLAIN_FORMS = {
    "int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "float": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    "bool": re.compile(r"true|false|True|False|TRUE|FALSE"),
}
FORM_FIXES = {
    "int": "write a whole number in plain decimal digits, without a leading 0",
    "float": "write a number in plain decimal digits",
    "bool": "write true or false",
}


class SpecLoader(yaml.SafeLoader):
    """YAML of plain values only: refuses a key given twice and more than a few aliases, reads 1e-4 as a number."""

    num_aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node; raises where aliases could blow a small file up to a huge value."""
        if self.check_event(yaml.AliasEvent):
            self.num_aliases += 1
            if self.num_aliases > MAX_ALIASES:
                raise yaml.composer.ComposerError(None, None, f"more than {MAX_ALIASES} aliases", None)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of node; raises where YAML 1.1 reads a plain word as another number than people do."""
        if isinstance(node, yaml.ScalarNode) and node.style is None:
            kind = node.tag.rpartition(":")[2]
            pattern = PLAIN_FORMS.get(kind)
            if pattern is not None and not pattern.fullmatch(node.value):
                read = super().construct_object(node, deep=deep)
                raise yaml.constructor.ConstructorError(
                    None, None, f"{node.value} would be read as {read}; {FORM_FIXES[kind]}, or text in quotes",
                    node.start_mark,
                )  # fmt: skip
        return super().construct_object(node, deep=deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return the mapping of node; raises on a duplicate key, or one that is no plain value."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value in seen:
                shown = f"key {str(key_node.value)[:60]!r}"
                problem = f"{shown} twice" if isinstance(key_node, yaml.ScalarNode) else "a key that is no plain value"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# no dates, binaries or sets: a spec has no use for them, and PyYAML reads them carelessly
SpecLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in PLAIN_TAGS
}
SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
