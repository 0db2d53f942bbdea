"""A sweep as plain values that were checked: which runs there are, on what gang, into which folder."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from model.config import RunConfig, config_hash
from model.fields import check_value, describe, plain_settings
from results.schema import BASE
from results.store.names import run_name
from runner.spec.gang import Gang, Limits, parse_gang
from runner.spec.keys import check_keys, update_fields
from runner.spec.program import Program, parse_program

MAX_SEED = 2**32 - 1  # numpy's generators take no more
SHOWN_VARIANTS = 12  # in one line
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class RunKey:
    """One run of a sweep: a variant, a seed and which repeat of it; variant is "" where the sweep names none."""

    variant: str = ""
    seed: int
    repeat: int = 0

    @property
    def name(self) -> str:
        """The run's folder and the stem of its result files."""
        return run_name(self.variant, self.seed, self.repeat)

    @property
    def variant_name(self) -> str:
        """The variant as the results name it."""
        return self.variant or BASE

    @property
    def words(self) -> str:
        """The run in a sentence: its name, without a repeat where there is only the first."""
        return self.name.removesuffix("-repeat=0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One configuration of a sweep; its seed is 0."""

    name: str
    config: RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A checked sweep. config is the baseline's and has seed 0; each run replaces it. With a program it is nobody's."""

    name: str
    preset: str
    config: RunConfig
    seeds: tuple[int, ...]
    repeats: int = 1
    ablation: tuple[Variant, ...] = ()  # the variants that the spec names, the baseline first
    gang: Gang = field(default_factory=Gang)
    limits: Limits = field(default_factory=Limits)
    fetch: Mapping[str, Any] | None = None  # data.fetch: how a node gets missing shards
    track: Mapping[str, str] = field(default_factory=dict)  # name of a tracker -> its URI, folder or project
    price_per_gpu_hour: float | None = None  # in whatever currency; None: no money is shown
    priority: int = 0  # among the sweeps of one cluster; a higher one gets the next free place
    preemptible: bool = False  # gangs at work make way for a sweep of higher priority
    out: str = ""
    program: Program | None = None  # somebody else's, in place of our pipeline; preset is "" then

    @property
    def variants(self) -> tuple[Variant, ...]:
        """Every variant, the baseline first; one, named base, where the spec names none."""
        return self.ablation or (Variant(name=BASE, config=self.config),)

    @property
    def keys(self) -> list[RunKey]:
        """Every run: all variants of a seed before the next seed, repeats of all seeds after their first runs."""
        names = [variant.name for variant in self.ablation] or [""]
        return [
            RunKey(variant=name, seed=seed, repeat=repeat)
            for repeat in range(self.repeats)
            for seed in self.seeds
            for name in names
        ]

    @property
    def config_hash(self) -> str:
        """The hash that names the baseline's recipe at this number of ranks."""
        return self.hash_of(self.config)

    @property
    def variant_hashes(self) -> dict[str, str]:
        """The hash of every variant's recipe, by its name."""
        return {variant.name: self.hash_of(variant.config) for variant in self.variants}

    def hash_of(self, config: RunConfig) -> str:
        """Return the hash that names a recipe, or the program, at this number of ranks."""
        if self.program is not None:
            return self.program.hash_at(self.gang.world_size)
        return config_hash(config, world_size=self.gang.world_size)

    def config_for(self, key: RunKey) -> RunConfig:
        """Return the configuration of one run."""
        if not key.variant:
            return replace(self.config, seed=key.seed)
        (config,) = (variant.config for variant in self.ablation if variant.name == key.variant)
        return replace(config, seed=key.seed)

    def settings_for(self, key: RunKey) -> dict[str, Any]:
        """Return everything that was set for one run as plain values, for the records."""
        if self.program is not None:
            return {"program": self.program.to_json(), "seed": key.seed}
        return plain_settings(self.config_for(key))

    def to_json(self) -> dict[str, Any]:
        """Return plain values from which `from_json` makes the same spec."""
        plain = dataclasses.asdict(self) | {"config": plain_settings(self.config)}
        if self.program is None:
            del plain["program"]  # earlier versions read the spec of a recipe
        else:
            plain |= {"program": self.program.to_json(), "config": {}}
        for holder, name in ((plain, "priority"), (plain, "preemptible"), (plain["gang"], "require"),
                             (plain["gang"], "same_gpu")):  # fmt: skip
            if not holder[name]:
                del holder[name]  # earlier versions read the spec of a sweep that uses none of it
        plain["seeds"] = list(self.seeds)
        plain["ablation"] = [{"name": item.name, "config": plain_settings(item.config)} for item in self.ablation]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SweepSpec:
        """Return the spec that sweep.json holds; raises ValueError when it does not fit this version."""
        check_keys("sweep.json spec", plain, [item.name for item in dataclasses.fields(cls)])
        ablation = plain.get("ablation", ())  # not in what earlier versions wrote
        return cls(
            name=check_name(plain["name"]),
            preset=str(plain["preset"]),
            config=update_fields(RunConfig(), plain["config"], ""),
            seeds=check_seeds(plain["seeds"]),
            repeats=check_value(plain["repeats"], int, "repeats"),
            ablation=tuple(
                Variant(name=str(item["name"]), config=update_fields(RunConfig(), item["config"], ""))
                for item in ablation
            ),
            gang=parse_gang(plain["gang"]),
            limits=update_fields(Limits(), plain["limits"], "limits"),
            fetch=plain["fetch"],
            track=dict(plain.get("track") or {}),  # like the price, not in what earlier versions wrote
            price_per_gpu_hour=plain.get("price_per_gpu_hour"),
            out=str(plain["out"]),
            priority=plain.get("priority", 0),
            preemptible=plain.get("preemptible", False),
            program=parse_program(plain["program"]) if plain.get("program") else None,
        )


def check_name(value: object) -> str:
    """Return a sweep name that is safe as a file name; raises ValueError otherwise."""
    if not isinstance(value, str) or not NAME_PATTERN.fullmatch(value) or ".." in value:
        raise ValueError(
            f"name={value!r} must be 1-64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return value


def check_seeds(value: object) -> tuple[int, ...]:
    """Return the seeds; raises ValueError if there are none, or one is no whole number or comes twice."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"seeds must be a list of whole numbers, not {describe(value)}")
    if not value:
        raise ValueError("seeds is empty; name at least one")
    for seed in value:
        if isinstance(seed, bool) or not isinstance(seed, int):
            fix = f"; write {int(seed)}" if isinstance(seed, str) and seed.isdecimal() else ""
            raise ValueError(f"seeds: {seed!r} is not a whole number{fix}")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seeds: {seed} must be between 0 and {MAX_SEED}")
        if value.count(seed) > 1:
            raise ValueError(f"seeds: {seed} is given twice; use repeats to run a seed again")
    return tuple(value)


def seeds_line(spec: SweepSpec) -> str:
    """Return seeds and variants as they were read, for the first line that a command prints."""
    repeats = f", {spec.repeats} times each" if spec.repeats > 1 else ""
    seeds = f"seeds: {', '.join(map(str, spec.seeds))}{repeats}"
    if not spec.ablation:
        return seeds
    names = [variant.name for variant in spec.ablation]
    more = f" and {len(names) - SHOWN_VARIANTS} more" if len(names) > SHOWN_VARIANTS else ""
    return f"{seeds}; variants: {', '.join(names[:SHOWN_VARIANTS])}{more}, compared with {names[0]}"
