"""A sweep, as its YAML file says it: which recipe, which seeds, on what gang, into which folder.

The file is checked whole before anything starts; every refusal names the key and the nearest valid name.
Relative paths in a spec are taken from the current directory, not from the file's place.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from model.config import DataConfig, RunConfig
from model.fields import check_value, describe, nearest
from model.presets import PRESETS
from runner.spec.gang import Limits, parse_gang
from runner.spec.keys import check_keys, update_fields
from runner.spec.places import absolute_path, is_uri
from runner.spec.plain_yaml import SpecLoader
from runner.spec.program import parse_program
from runner.spec.sweep import SweepSpec, check_name, check_seeds
from runner.spec.variants import parse_variants

SPEC_LIMIT_BYTES = 1 << 20
MAX_PRIORITY = 1_000_000
TRACKERS = ("mlflow", "tensorboard", "wandb")
OVERRIDE_SECTIONS = ("model", "train", "quant", "evaluation", "ttt", "runtime")
KNOWN_KEYS = (
    "name", "preset", "overrides", "variants", "grid", "data", "seeds", "repeats", "gang", "limits", "restart",
    "wait_s", "max_gangs", "out", "program", "track", "price_per_gpu_hour", "priority", "preemptible",
)  # fmt: skip
OF_RECIPES = ("preset", "overrides", "variants", "grid", "data")  # what a program has no use for


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
    if "program" in given:
        return parse_program_spec(given, out=out)
    for name in ("name", "preset", "seeds"):
        if name not in given:
            raise ValueError(f"{name} is missing; a spec needs name, preset, seeds, data and out")
    preset = given["preset"]
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not a preset; {nearest(str(preset), PRESETS)}")
    data, fetch = parse_data(given.get("data", {}))
    base = replace(PRESETS[preset](), data=data, seed=0)
    overrides = check_keys("overrides", given.get("overrides") or {}, OVERRIDE_SECTIONS)
    baseline = update_fields(base, overrides, "")
    ablation = parse_variants(given, baseline)
    spec = SweepSpec(
        name=check_name(given["name"]),
        preset=preset,
        config=ablation[0].config if ablation else baseline,
        ablation=ablation,
        fetch=fetch,
        limits=parse_limits(given),
        **parse_course(given, out),
    )
    check_gang(spec)
    return spec


def parse_program_spec(given: Mapping[str, Any], *, out: str | None) -> SweepSpec:
    """Return the checked spec of a sweep over somebody else's program; it always starts again from scratch."""
    for name in OF_RECIPES:
        if name in given:
            raise ValueError(
                f"{name} is of our own recipes and program of somebody else's program; keep one of the two"
            )
    for name in ("name", "seeds"):
        if name not in given:
            raise ValueError(f"{name} is missing; a spec of a program needs name, program, seeds and out")
    limits = parse_limits(given)
    named = given.get("restart", (given.get("limits") or {}).get("restart"))
    if named not in (None, "scratch"):
        raise ValueError(f"restart={named} is of our own recipes; a program starts again from scratch")
    course = parse_course(given, out)
    if course["gang"].hosts > 1:
        raise ValueError(f"gang.hosts={course['gang'].hosts}: a program's processes meet on one host; leave hosts out")
    program = parse_program(given["program"])
    check_apart(course["out"], program.folder)
    return SweepSpec(
        name=check_name(given["name"]), preset="", config=RunConfig(), program=program,
        limits=replace(limits, restart="scratch"), **course,
    )  # fmt: skip


def check_apart(out: str, folder: str) -> None:
    """Raise ValueError if a sweep would write into the folder of its program, which must stay as it is."""
    if not is_uri(out) and Path(out).resolve().is_relative_to(Path(folder).resolve()):
        raise ValueError(f"out={out} is in program.folder={folder}, which is copied whole; name a folder outside it")


def parse_course(given: Mapping[str, Any], out: str | None) -> dict[str, Any]:
    """Return what every sweep has, whatever its gangs do: seeds, repeats, gang, folder, trackers and price."""
    repeats = check_value(given.get("repeats", 1), int, "repeats")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    place = absolute_path(out if out is not None else check_value(given.get("out", ""), str, "out"))
    if not place:
        raise ValueError("out is missing; name a folder (or pass --out DIR)")
    gang = parse_gang(given.get("gang") or {})
    track = parse_track(given["track"] if given.get("track") is not None else {})
    return {
        "seeds": check_seeds(given["seeds"]), "repeats": repeats, "gang": gang, "out": place, "track": track,
        "price_per_gpu_hour": parse_price(given.get("price_per_gpu_hour")),
        "priority": parse_priority(given.get("priority", 0)),
        "preemptible": check_value(given.get("preemptible", False), bool, "preemptible"),
    }  # fmt: skip


def check_gang(spec: SweepSpec) -> None:
    """Raise ValueError if the gang cannot share out a step of some variant."""
    for variant in spec.variants:
        micro_batches = variant.config.train.micro_batches_per_step
        if micro_batches % spec.gang.world_size:
            where = f"variants.{variant.name}: " if spec.ablation else ""
            raise ValueError(
                f"{where}gang of {spec.gang.world_size} ranks must divide the {micro_batches} micro-batches a step "
                f"(train.batch_tokens / train.micro_batch_tokens)"
            )


def parse_limits(given: Mapping[str, Any]) -> Limits:
    """Return the limits; `restart`, `wait_s` and `max_gangs` may stand at the top of the spec as well."""
    limits = dict(check_keys("limits", given.get("limits") or {}, [item.name for item in dataclasses.fields(Limits)]))
    for name in ("restart", "wait_s", "max_gangs"):
        if name in given:
            if name in limits:
                raise ValueError(f"{name} is given twice, at the top and under limits; keep one")
            limits[name] = given[name]
    return update_fields(Limits(), limits, "limits")


def parse_track(given: object) -> dict[str, str]:
    """Return where each tracker writes: mlflow a URI, tensorboard a folder (made absolute), wandb a project."""
    track = check_keys("track", given, TRACKERS)
    for name, place in track.items():
        if not isinstance(place, str) or not place.strip():
            raise ValueError(f"track.{name} must be text that names a place, not {describe(place)}")
        if re.search(r"://[^/]*:[^/]*@", place):  # sweep.json keeps the spec, and is given to others
            raise ValueError(
                f"track.{name} holds a password; give it in the environment, as the tracker's client reads it"
            )
    return {name: absolute_path(place) if name == "tensorboard" else place for name, place in track.items()}


def parse_priority(given: object) -> int:
    """Return the priority of a sweep among those of its cluster."""
    priority: int = check_value(given, int, "priority")
    if abs(priority) > MAX_PRIORITY:
        raise ValueError(f"priority={priority} must be between -{MAX_PRIORITY} and {MAX_PRIORITY}; 0 is the default")
    return priority


def parse_price(given: object) -> float | None:
    """Return the price of a GPU for an hour, None where the spec names none."""
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 <= given < float("inf"):
        raise ValueError(f"price_per_gpu_hour must be a number of 0 or more, without a currency, not {describe(given)}")
    return float(given)


def parse_data(given: object) -> tuple[DataConfig, Mapping[str, Any] | None]:
    """Return the data section with absolute paths, and its `fetch` part."""
    known = [item.name for item in dataclasses.fields(DataConfig)]
    section = dict(check_keys("data", given, [*known, "fetch"]))
    fetch = section.pop("fetch", None)
    if fetch is not None:
        fetch = dict(check_keys("data.fetch", fetch, ("repo", "variant", "revision", "shards", "endpoint")))
        for name, value in fetch.items():
            check_value(value, int if name == "shards" else str, f"data.fetch.{name}")
    data = update_fields(DataConfig(), section, "data")
    for name in ("train", "val", "tokenizer"):
        if not getattr(data, name):
            raise ValueError(f"data.{name} is missing; name the {'file' if name == 'tokenizer' else 'shards (a glob)'}")
    train, val, tokenizer = (absolute_path(path) for path in (data.train, data.val, data.tokenizer))
    return replace(data, train=train, val=val, tokenizer=tokenizer), fetch
