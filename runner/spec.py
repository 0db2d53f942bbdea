"""A sweep, as its YAML file says it: which recipe, which seeds, on what gang, into which folder.

The file is checked whole before anything starts; every refusal names the key and the nearest valid name.
Relative paths in a spec are taken from the current directory, not from the file's place.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from model.config import DataConfig, RunConfig, config_hash
from model.fields import check_keys, checked, describe, nearest, updated
from model.presets import PRESETS

MAX_RANKS = 8  # one gang lives on one host
MAX_SEED = 2**32 - 1  # numpy's generators take no more
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
URI_PATTERN = re.compile(r"[a-z][a-z0-9+.-]*://")
SPEC_LIMIT_BYTES = 1 << 20
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
OVERRIDE_SECTIONS = ("model", "train", "quant", "evaluation", "ttt", "runtime")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gang:
    """The processes of one seed. gpus > 0: that many ranks with one GPU each; gpus = 0: `ranks` CPU ranks."""

    gpus: int = 0
    cpus: int = 1  # of each rank; also its number of threads
    ranks: int | None = None  # CPU gangs only; 1 where left out

    def __post_init__(self) -> None:
        if not 0 <= self.gpus <= MAX_RANKS:
            raise ValueError(f"gang.gpus={self.gpus} must be between 0 and {MAX_RANKS}: one gang fits on one host")
        if self.cpus < 1:
            raise ValueError(f"gang.cpus={self.cpus} must be at least 1 (CPUs of each rank)")
        if self.ranks is not None and not 1 <= self.ranks <= MAX_RANKS:
            raise ValueError(f"gang.ranks={self.ranks} must be between 1 and {MAX_RANKS}")
        if self.gpus and self.ranks not in (None, self.gpus):
            raise ValueError(f"gang.ranks={self.ranks} must equal gang.gpus={self.gpus}, or be left out")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.gpus or self.ranks or 1

    @property
    def bundle(self) -> dict[str, float]:
        """What one rank asks of its node, in Ray's words."""
        return {"CPU": float(self.cpus), "GPU": 1.0} if self.gpus else {"CPU": float(self.cpus)}

    @property
    def total(self) -> dict[str, float]:
        """What the whole gang asks of one node."""
        return {name: amount * self.world_size for name, amount in self.bundle.items()}

    def describe(self) -> str:
        """Return the gang in words, as errors and the plan print it."""
        each = ", ".join(f"{amount:g} {name}" for name, amount in sorted(self.bundle.items(), reverse=True))
        return f"{self.world_size} rank(s) on one node, {each} each"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long to wait for what, and how often to try again."""

    attempts: int = 3  # starts that may fail, the first included; preemptions do not count
    preemptions: int = 20  # starts lost to nodes that went away
    backoff_s: float = 5.0  # before the first retry; doubles with each further one
    backoff_max_s: float = 300.0
    start_s: float = 300.0  # from placed to all ranks ready, rendezvous and preflight included
    stall_s: float = 900.0  # without progress of one rank; that its peers go on does not help it
    heartbeat_s: float = 60.0  # without an answer from a rank's process
    seed_s: float | None = None  # of one attempt; None: no limit
    wait_s: float = 0.0  # for a node that can hold a gang
    disk_s: float = 60.0  # for room on a full disk, at the start of an attempt
    stop_grace_s: float | None = None  # from stop to kill; None: 2 under a Ray job, else 30
    restart: Literal["checkpoint", "scratch"] = "checkpoint"  # where a broken training starts again

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"limits.attempts={self.attempts} must be at least 1")
        if self.preemptions < 0:
            raise ValueError(f"limits.preemptions={self.preemptions} must not be negative")
        for name in ("start_s", "stall_s", "heartbeat_s", "seed_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"limits.{name}={value} must be positive")
        for name in ("backoff_s", "backoff_max_s", "wait_s", "disk_s", "stop_grace_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"limits.{name}={value} must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True, order=True)
class RunKey:
    """One run of a sweep: a seed and which repeat of it."""

    seed: int
    repeat: int = 0

    @property
    def name(self) -> str:
        """The run's folder and the stem of its result files."""
        return f"seed={self.seed}-repeat={self.repeat}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSpec:
    """A checked sweep. config has seed 0; each run replaces it."""

    name: str
    preset: str
    config: RunConfig
    seeds: tuple[int, ...]
    repeats: int = 1
    gang: Gang = field(default_factory=Gang)
    limits: Limits = field(default_factory=Limits)
    fetch: Mapping[str, Any] | None = None  # data.fetch: how a node gets missing shards
    out: str = ""

    @property
    def keys(self) -> list[RunKey]:
        """Every run, seeds in the order of the spec, repeats of all seeds after their first runs."""
        return [RunKey(seed=seed, repeat=repeat) for repeat in range(self.repeats) for seed in self.seeds]

    @property
    def config_hash(self) -> str:
        """The hash that names this recipe at this number of ranks."""
        return config_hash(self.config, world_size=self.gang.world_size)

    def config_for(self, key: RunKey) -> RunConfig:
        """Return the configuration of one run."""
        return replace(self.config, seed=key.seed)

    def to_json(self) -> dict[str, Any]:
        """Return plain values from which `from_json` makes the same spec."""
        plain = dataclasses.asdict(self)
        plain["seeds"] = list(self.seeds)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> SweepSpec:
        """Return the spec that sweep.json holds; raises ValueError when it does not fit this version."""
        check_keys("sweep.json spec", plain, [item.name for item in dataclasses.fields(cls)])
        return cls(
            name=check_name(plain["name"]),
            preset=str(plain["preset"]),
            config=updated(RunConfig(), plain["config"], ""),
            seeds=check_seeds(plain["seeds"]),
            repeats=checked(plain["repeats"], int, "repeats"),
            gang=updated(Gang(), plain["gang"], "gang"),
            limits=updated(Limits(), plain["limits"], "limits"),
            fetch=plain["fetch"],
            out=str(plain["out"]),
        )


KNOWN_KEYS = (
    "name", "preset", "overrides", "data", "seeds", "repeats", "gang", "limits", "restart", "wait_s", "out",
)  # fmt: skip


def load_spec(path: str | Path, *, out: str | None = None) -> SweepSpec:
    """Return the checked spec in the YAML file at path; out replaces the file's own.

    Raises FileNotFoundError without the file, ValueError (one line) for anything that does not fit.
    """
    file = Path(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"spec {file} is {kind_of_file(file)}, not a file; give the YAML file of a sweep")
    if not file.is_file():
        choices = [str(item) for item in sorted(file.parent.glob("*.yaml"))] if file.parent.is_dir() else []
        raise FileNotFoundError(f"spec {file} not found" + (f"; {nearest(str(file), choices)}" if choices else ""))
    if file.stat().st_size > SPEC_LIMIT_BYTES:
        raise ValueError(f"spec {file} has {file.stat().st_size} bytes, over the limit of {SPEC_LIMIT_BYTES}")
    try:
        plain = yaml.load(file.read_text(encoding="utf-8"), Loader=SpecLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"spec {file} is not readable YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"spec {file} is not readable YAML: it is nested too deeply") from None
    try:
        return parse_spec(plain, out=out)
    except ValueError as error:
        raise ValueError(f"spec {file}: {error}") from None


def kind_of_file(path: Path) -> str:
    """Return what stands at a path that is no regular file."""
    kinds = ((path.is_dir, "a folder"), (path.is_fifo, "a FIFO"), (path.is_socket, "a socket"))
    return next((words for is_kind, words in kinds if is_kind()), "a device")


def parse_spec(plain: object, *, out: str | None = None) -> SweepSpec:
    """Return the checked spec of a YAML document already read into plain values."""
    given = check_keys("spec", plain, KNOWN_KEYS)
    for name in ("name", "preset", "seeds"):
        if name not in given:
            raise ValueError(f"{name} is missing; a spec needs name, preset, seeds, data and out")
    preset = given["preset"]
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not a preset; {nearest(str(preset), PRESETS)}")
    data, fetch = parse_data(given.get("data", {}))
    base = replace(PRESETS[preset](), data=data, seed=0)
    overrides = check_keys("overrides", given.get("overrides") or {}, OVERRIDE_SECTIONS)
    gang = updated(Gang(), given.get("gang") or {}, "gang")
    repeats = checked(given.get("repeats", 1), int, "repeats")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    spec = SweepSpec(
        name=check_name(given["name"]),
        preset=preset,
        config=updated(base, overrides, ""),
        seeds=check_seeds(given["seeds"]),
        repeats=repeats,
        gang=gang,
        limits=parse_limits(given),
        fetch=fetch,
        out=absolute_path(out if out is not None else checked(given.get("out", ""), str, "out")),
    )
    if not spec.out:
        raise ValueError("out is missing; name a folder (or pass --out DIR)")
    micro_batches = spec.config.train.micro_batches_per_step
    if micro_batches % gang.world_size:
        raise ValueError(
            f"gang of {gang.world_size} ranks must divide the {micro_batches} micro-batches a step "
            f"(train.batch_tokens / train.micro_batch_tokens)"
        )
    return spec


def parse_limits(given: Mapping[str, Any]) -> Limits:
    """Return the limits; `restart` and `wait_s` may stand at the top of the spec as well."""
    limits = dict(check_keys("limits", given.get("limits") or {}, [item.name for item in dataclasses.fields(Limits)]))
    for name in ("restart", "wait_s"):
        if name in given:
            if name in limits:
                raise ValueError(f"{name} is given twice, at the top and under limits; keep one")
            limits[name] = given[name]
    return updated(Limits(), limits, "limits")


def parse_data(given: object) -> tuple[DataConfig, Mapping[str, Any] | None]:
    """Return the data section with absolute paths, and its `fetch` part."""
    known = [item.name for item in dataclasses.fields(DataConfig)]
    section = dict(check_keys("data", given, [*known, "fetch"]))
    fetch = section.pop("fetch", None)
    if fetch is not None:
        fetch = dict(check_keys("data.fetch", fetch, ("repo", "variant", "revision", "shards", "endpoint")))
        for name, value in fetch.items():
            checked(value, int if name == "shards" else str, f"data.fetch.{name}")
    data = updated(DataConfig(), section, "data")
    for name in ("train", "val", "tokenizer"):
        if not getattr(data, name):
            raise ValueError(f"data.{name} is missing; name the {'file' if name == 'tokenizer' else 'shards (a glob)'}")
    train, val, tokenizer = (absolute_path(path) for path in (data.train, data.val, data.tokenizer))
    return replace(data, train=train, val=val, tokenizer=tokenizer), fetch


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
    """Return the seeds as they were read, for the first line that a command prints."""
    repeats = f", {spec.repeats} times each" if spec.repeats > 1 else ""
    return f"seeds: {', '.join(map(str, spec.seeds))}{repeats}"


def is_uri(path: str) -> bool:
    """Return whether path is a URI (s3://, gs://, file://) and not a local path."""
    return bool(URI_PATTERN.match(path))


def absolute_path(path: str) -> str:
    """Return a local path made absolute from the current directory; a URI, or nothing, as it is."""
    return path if not path or is_uri(path) else os.path.abspath(os.path.expanduser(path))


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
