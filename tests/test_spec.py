"""Sweep specs: what is accepted, what every refusal says, and that a spec survives its own JSON."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.presets import published, tiny
from runner.spec import SweepSpec, absolute_path, load_spec, parse_spec

SPECS = Path(__file__).parent.parent / "jobs" / "specs"


def plain(**changes: Any) -> dict[str, Any]:
    """Return a small valid spec with changes."""
    base: dict[str, Any] = {
        "name": "small", "preset": "tiny", "seeds": [42, 0], "out": "runs/small",
        "data": {"train": "a_train_*.bin", "val": "a_val_*.bin", "tokenizer": "a.model"},
    }  # fmt: skip
    return {**base, **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds'"),
        ({"preset": "tinny"}, "did you mean 'tiny'"),
        ({"overrides": {"trian": {}}}, "unknown key 'trian'; did you mean 'train'"),
        ({"overrides": {"train": {"max_step": 3}}}, "train: unknown key 'max_step'; did you mean 'max_steps'"),
        ({"overrides": {"train": {"max_steps": "many"}}}, "train.max_steps must be a whole number"),
        ({"overrides": {"train": {"max_steps": True}}}, "train.max_steps must be a whole number"),
        ({"overrides": {"train": {"max_steps": 0}}}, "train.max_steps=0 must be at least 1"),
        ({"overrides": {"train": {"clip": "global_"}}}, "did you mean 'global'"),
        ({"overrides": {"train": [1]}}, "train must be a mapping"),
        ({"overrides": {"ttt": {"adapter_kinds": "q"}}}, "ttt.adapter_kinds must be a list"),
        ({"overrides": {"data": {}}}, "unknown key 'data'"),
        ({"seeds": []}, "seeds is empty"),
        ({"seeds": [1, 2, 1]}, "1 is given twice"),
        ({"seeds": [1.5]}, "1.5 is not a whole number"),
        ({"seeds": ["42"]}, "'42' is not a whole number"),
        ({"seeds": [True]}, "True is not a whole number"),
        ({"seeds": [-1]}, "-1 must be between"),
        ({"seeds": 42}, "seeds must be a list"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
        ({"gang": {"gpu": 8}}, "gang: unknown key 'gpu'; did you mean 'gpus'"),
        ({"gang": {"gpus": 9}}, "gang.gpus=9 must be between 0 and 8"),
        ({"gang": {"cpus": 0}}, "gang.cpus=0 must be at least 1"),
        ({"gang": {"gpus": 2, "ranks": 3}}, "gang.ranks=3 must equal gang.gpus=2"),
        ({"gang": {"ranks": 3}}, "3 ranks must divide the 2 micro-batches"),
        ({"limits": {"attempts": 0}}, "limits.attempts=0 must be at least 1"),
        ({"limits": {"stall": 3}}, "did you mean 'stall_s'"),
        ({"limits": {"stall_s": -1}}, "limits.stall_s=-1.0 must be positive"),
        ({"restart": "scrach"}, "did you mean 'scratch'"),
        ({"wait_s": 5, "limits": {"wait_s": 6}}, "wait_s is given twice"),
        ({"name": "../up"}, "name='../up' must be"),
        ({"name": "a/b"}, "name='a/b' must be"),
        ({"name": 7}, "name=7 must be"),
        ({"out": ""}, "out is missing"),
        ({"data": {"train": "a", "val": "b"}}, "data.tokenizer is missing"),
        ({"data": {"train": "a", "val": "b", "tokenizer": "c", "val_documents": 0}}, "data.val_documents=0"),
        ({"data": {"train": "a", "val": "b", "tokenizer": "c", "fetch": {"rep": "x"}}}, "data.fetch: unknown key"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        parse_spec(plain(**changes))
    assert "\n" not in str(caught.value)


def test_overrides_reach_the_config_and_whole_numbers_serve_as_numbers() -> None:
    spec = parse_spec(
        plain(overrides={"train": {"max_steps": 7, "matrix_lr": 1}, "ttt": {"adapter_kinds": ["q", "v"]}})
    )
    assert (spec.config.train.max_steps, spec.config.train.matrix_lr) == (7, 1.0)
    assert spec.config.ttt.adapter_kinds == ("q", "v")
    assert spec.config.model == tiny().model


def test_hash_names_recipe_and_ranks_but_not_seeds_places_or_limits() -> None:
    base = parse_spec(plain()).config_hash
    assert parse_spec(plain(seeds=[7], out="elsewhere", name="other", limits={"attempts": 9})).config_hash == base
    assert parse_spec(plain(gang={"ranks": 2})).config_hash != base
    assert parse_spec(plain(overrides={"train": {"max_steps": 7}})).config_hash != base


def test_relative_paths_are_taken_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = parse_spec(plain())
    assert spec.out == str(tmp_path / "runs" / "small")
    assert spec.config.data.train == str(tmp_path / "a_train_*.bin")
    assert absolute_path("s3://bucket/x") == "s3://bucket/x"


def test_runs_are_in_the_order_of_the_spec_repeats_last() -> None:
    keys = parse_spec(plain(seeds=[5, 3], repeats=2)).keys
    assert [(key.seed, key.repeat) for key in keys] == [(5, 0), (3, 0), (5, 1), (3, 1)]


def test_a_spec_survives_json() -> None:
    spec = parse_spec(plain(gang={"ranks": 2, "cpus": 2}, restart="scratch", repeats=3, overrides={"ttt": {"lr": 0.5}}))
    assert SweepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_file_with_a_key_twice_or_broken_yaml_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(ValueError, match="key 'name' twice"):
        load_spec(file)
    file.write_text("name: [unclosed\n")
    with pytest.raises(ValueError, match="not readable YAML") as caught:
        load_spec(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_the_nearest_one() -> None:
    with pytest.raises(FileNotFoundError, match=r"did you mean .*demo\.yaml"):
        load_spec(SPECS / "dem.yaml")


def test_exponents_without_a_point_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(plain()) + "overrides: {ttt: {lr: 1e-3}}\n")
    assert load_spec(file).config.ttt.lr == 1e-3


@pytest.mark.parametrize("name", ["demo", "published", "bench_500"])
def test_shipped_specs_are_valid(name: str) -> None:
    assert load_spec(SPECS / f"{name}.yaml").name == name


def test_published_spec_is_the_published_recipe_on_eight_gpus_from_scratch() -> None:
    spec = load_spec(SPECS / "published.yaml")
    assert (spec.gang.gpus, spec.seeds, spec.limits.restart) == (8, (42, 0, 1337), "scratch")
    assert spec.config.train == published().train


def test_demo_gangs_have_one_cpu_each() -> None:
    assert load_spec(SPECS / "demo.yaml").gang.total == {"CPU": 1.0}


@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a socket", "a device"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "spec.yaml"
    with socket.socket(socket.AF_UNIX) as server:
        match kind:
            case "a folder":
                path.mkdir()
            case "a FIFO":
                os.mkfifo(path)
            case "a socket":
                monkeypatch.chdir(tmp_path)  # the name of a socket is short
                server.bind(path.name)
            case _:
                path = Path(os.devnull)
        with pytest.raises(ValueError, match=f"spec {path} is {kind}, not a file"):
            load_spec(path)
