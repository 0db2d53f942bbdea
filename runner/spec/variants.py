"""The variants of an ablation: one configuration for each name, from `variants:` and from the product of `grid:`.

A variant may change whatever decides a score, and nothing else: seeds, data and the way of running are the sweep's, or
differences would not be paired.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from model.config import HASHED_SECTIONS, RunConfig
from model.fields import describe, nearest
from results.store.names import VARIANT_PATTERN
from runner.spec.keys import check_keys, update_fields
from runner.spec.sweep import Variant

MAX_VARIANTS = 200
SWEEP_WIDE = {  # what somebody may want to vary, and where it belongs
    "seed": "seeds are listed at the top of the spec, and every variant runs all of them",
    "data": "scores on other data cannot be compared; make it another sweep",
    "runtime": "how a sweep is run is the same for all its variants; put it under overrides",
}
TOKENIZERS = ("model", "vocab_size")


def parse_variants(given: Mapping[str, Any], base: RunConfig) -> tuple[Variant, ...]:
    """Return the variants that a spec names, those of `variants` before those of `grid`; () where it has neither.

    base: the configuration that they change. Raises ValueError, one line, for anything that does not fit.
    """
    variants: list[Variant] = []
    if "variants" in given:
        variants += parse_named(given["variants"], base)
    if "grid" in given:
        variants += expand_grid(given["grid"], base)
    if len(variants) > MAX_VARIANTS:
        raise ValueError(f"{len(variants)} variants are over the limit of {MAX_VARIANTS}; make it several sweeps")
    refuse_equal(variants)
    return tuple(variants)


def parse_named(given: object, base: RunConfig) -> list[Variant]:
    """Return the variants of a mapping from name to overrides."""
    if not isinstance(given, Mapping):
        raise ValueError(f"variants must be a mapping of names to overrides, not {describe(given)}")
    if not given:
        raise ValueError("variants is empty; name at least one, such as base: {}")
    return [
        Variant(name=check_variant_name(name), config=override(base, overrides, f"variants.{name}"))
        for name, overrides in given.items()
    ]


def check_variant_name(value: object) -> str:
    """Return the name of a variant that is safe as a file name; raises ValueError otherwise."""
    if not isinstance(value, str) or not VARIANT_PATTERN.fullmatch(value):
        raise ValueError(
            f"variants: name {value!r} must be text of 1-80 letters, digits, '.', '_', '+', '=', ',' or '-', "
            f"not starting with '.' or '-'"
        )
    return value


def override(base: RunConfig, overrides: object, path: str) -> RunConfig:
    """Return base changed by nested overrides. Raises ValueError naming path for what may not vary, or does not fit."""
    given = check_keys(path, {} if overrides is None else overrides, (*HASHED_SECTIONS, *SWEEP_WIDE))
    for name in given:
        if name in SWEEP_WIDE:
            raise ValueError(f"{path}: {name} may not vary between variants; {SWEEP_WIDE[name]}")
    try:
        config = update_fields(base, given, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    section, name = TOKENIZERS
    if getattr(getattr(config, section), name) != getattr(getattr(base, section), name):
        raise ValueError(f"{path}: {section}.{name} may not vary between variants; it is the tokenizer's")
    return config


def expand_grid(given: object, base: RunConfig) -> list[Variant]:
    """Return one variant for each combination of a grid's values, the last setting changing fastest."""
    if not isinstance(given, Mapping):
        raise ValueError(f"grid must be a mapping of settings to lists of values, not {describe(given)}")
    if not given:
        raise ValueError("grid is empty; name a setting and its values, such as ttt.lr: [0.001, 0.0001]")
    for setting, values in given.items():
        check_setting(setting, base)
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"grid.{setting} must be a list of one or more values, not {describe(values)}")
    count = math.prod(len(values) for values in given.values())
    if count > MAX_VARIANTS:
        raise ValueError(f"grid has {count} combinations, over the limit of {MAX_VARIANTS}; shorten its lists")
    labels = label_settings(list(given))
    axes = [[(setting, value) for value in values] for setting, values in given.items()]
    variants = [grid_point(base, point, labels) for point in itertools.product(*axes)]
    refuse_repeats(variants)
    return variants


def check_setting(setting: object, base: RunConfig) -> None:
    """Raise ValueError, naming the nearest, unless setting is the dotted name of one that may vary."""
    known = [
        f"{section}.{item.name}" for section in HASHED_SECTIONS for item in dataclasses.fields(getattr(base, section))
    ]
    first = str(setting).partition(".")[0]
    if first in SWEEP_WIDE:
        raise ValueError(f"grid: {setting} may not vary between variants; {SWEEP_WIDE[first]}")
    if setting not in known:
        raise ValueError(f"grid: unknown setting {setting!r}; {nearest_setting(str(setting), known)}")


def nearest_setting(name: str, known: Iterable[str]) -> str:
    """Return the dotted setting that somebody meant, by its last part where that is all they gave."""
    same = [setting for setting in known if setting.rpartition(".")[2] == name.rpartition(".")[2]]
    if same:
        return f"did you mean {' or '.join(map(repr, same))}?"
    words = nearest(name, known)
    return words if words.startswith("did") else "write section.setting, such as ttt.lr"


def label_settings(settings: Sequence[str]) -> dict[str, str]:
    """Return what each setting of a grid is called in names: its last part, the whole where two end alike."""
    count = Counter(setting.rpartition(".")[2] for setting in settings)
    return {
        setting: setting if count[setting.rpartition(".")[2]] > 1 else setting.rpartition(".")[2]
        for setting in settings
    }


def grid_point(base: RunConfig, point: Sequence[tuple[str, object]], labels: Mapping[str, str]) -> Variant:
    """Return the variant of one combination of values, named by them."""
    overrides: dict[str, dict[str, object]] = {}
    for setting, value in point:
        section, _, field_name = setting.partition(".")
        overrides.setdefault(section, {})[field_name] = value
    shown = ", ".join(f"{setting}={value}" for setting, value in point)
    config = override(base, overrides, f"grid ({shown})")
    words = []
    for setting, _ in point:  # named by the values as they were fitted: 1 and 1.0 are one number
        section, _, field_name = setting.partition(".")
        words.append(f"{labels[setting]}={value_word(getattr(getattr(config, section), field_name))}")
    name = "+".join(words)
    if not VARIANT_PATTERN.fullmatch(name):
        raise ValueError(f"grid ({shown}): {name!r} cannot be a file name of at most 80 letters; name it in variants")
    return Variant(name=name, config=config)


def value_word(value: object) -> str:
    """Return a setting's value as a word of a file name."""
    if isinstance(value, tuple):
        return ",".join(map(value_word, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0")


def refuse_repeats(variants: Sequence[Variant]) -> None:
    """Raise ValueError if a grid makes the same combination twice."""
    for name, count in Counter(variant.name for variant in variants).items():
        if count > 1:
            raise ValueError(f"grid makes {name} {count} times; list each value once")


def refuse_equal(variants: Sequence[Variant]) -> None:
    """Raise ValueError naming two variants of the same configuration, or of names that a disk may take for one."""
    seen: dict[RunConfig, str] = {}
    names: dict[str, str] = {}
    for variant in variants:
        folded = variant.name.casefold()
        if folded in names:
            raise ValueError(f"variants {names[folded]!r} and {variant.name!r} have the same name; rename one")
        if variant.config in seen:
            raise ValueError(
                f"variants {seen[variant.config]!r} and {variant.name!r} have equal configurations; remove one"
            )
        names[folded], seen[variant.config] = variant.name, variant.name
