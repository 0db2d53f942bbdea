"""Sweep specs: what is accepted, what every refusal says, and that a spec survives its own JSON."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import HASHED_SECTIONS
from model.fields import plain_settings
from model.presets import bench_500, bench_frontier, frontier, published, tiny
from runner.spec.places import absolute_path
from runner.spec.read import load_spec, parse_spec
from runner.spec.sweep import SweepSpec

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
        ({"limits": {"log_bytes": 0}}, "limits.log_bytes=0 must be positive"),
        ({"limits": {"log_bytes": "2 GiB"}}, "limits.log_bytes must be a whole number"),
        ({"restart": "scrach"}, "did you mean 'scratch'"),
        ({"wait_s": 5, "limits": {"wait_s": 6}}, "wait_s is given twice"),
        ({"max_gangs": 2, "limits": {"max_gangs": 2}}, "max_gangs is given twice"),
        ({"max_gangs": 0}, "limits.max_gangs=0 must be at least 1; leave it out for as many as the nodes hold"),
        ({"limits": {"max_gangs": -2}}, "limits.max_gangs=-2 must be at least 1"),
        ({"max_gangs": 2.0}, "limits.max_gangs must be a whole number, not a number ('2.0')"),
        ({"max_gangs": True}, "limits.max_gangs must be a whole number, not true or false ('True')"),
        ({"max_gangs": "all"}, "limits.max_gangs must be a whole number, not text ('all')"),
        ({"gang": {"max_gangs": 2}}, "gang: unknown key 'max_gangs'"),
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


def test_all_variants_of_a_seed_come_before_the_next_seed() -> None:
    keys = parse_spec(plain(seeds=[5, 3], variants={"base": {}, "gate": {"ttt": {"lr": 0.5}}})).keys
    assert [key.name for key in keys] == [
        f"variant={name}-seed={seed}-repeat=0" for seed in (5, 3) for name in ("base", "gate")
    ]


def test_a_variant_changes_the_overrides_and_the_first_is_the_baseline() -> None:
    spec = parse_spec(
        plain(
            overrides={"ttt": {"lr": 0.25, "lora_rank": 4}},
            variants={"control": None, "fast": {"ttt": {"lr": 0.5}, "train": {"max_steps": 7}}},
        )
    )
    configs = {variant.name: variant.config for variant in spec.variants}
    assert spec.config == configs["control"]
    assert (configs["fast"].ttt.lr, configs["fast"].ttt.lora_rank, configs["fast"].train.max_steps) == (0.5, 4, 7)
    key = next(key for key in spec.keys if key.variant == "fast")
    assert (spec.config_for(key).ttt.lr, spec.config_for(key).seed) == (0.5, 42)
    assert spec.variant_hashes["control"] == spec.config_hash != spec.variant_hashes["fast"]


def test_a_grid_is_named_by_its_values_as_they_were_fitted() -> None:
    grid = {"ttt.lr": [1, 0.001], "quant.matrix_bits": [5, 6], "ttt.adapter_kinds": [["q", "v"]]}
    names = [variant.name for variant in parse_spec(plain(grid=grid)).variants]
    assert names == [
        f"lr={lr}+matrix_bits={bits}+adapter_kinds=q,v" for lr in ("1", "0.001") for bits in (5, 6)
    ]  # fmt: skip
    alike = parse_spec(plain(grid={"train.seq_len": [256], "evaluation.seq_len": [256, 512]})).variants
    assert [variant.name for variant in alike] == [
        f"train.seq_len=256+evaluation.seq_len={length}" for length in (256, 512)
    ]


def test_variants_stand_before_the_grid_and_are_not_multiplied_by_it() -> None:
    spec = parse_spec(plain(variants={"base": {}}, grid={"ttt.lr": [0.5, 0.25]}))
    assert [variant.name for variant in spec.variants] == ["base", "lr=0.5", "lr=0.25"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": {}}, "unknown key 'variant'; did you mean 'variants'"),
        ({"variants": {}}, "variants is empty"),
        ({"variants": ["base"]}, "variants must be a mapping of names to overrides, not a list"),
        ({"variants": {"a": {"ttt": {"lrr": 1}}}}, "variants.a: ttt: unknown key 'lrr'; did you mean 'lr'"),
        ({"variants": {"a": {"tt": {"lr": 1}}}}, "variants.a: unknown key 'tt'; did you mean 'ttt'"),
        ({"variants": {"a": {"ttt": {"lr": -1}}}}, "variants.a: ttt.lr=-1.0 must not be negative"),
        ({"variants": {"a": 3}}, "variants.a must be a mapping of names to values, not a whole number"),
        ({"variants": {"a": {"seed": 3}}}, "variants.a: seed may not vary between variants"),
        ({"variants": {"a": {"data": {}}}}, "variants.a: data may not vary between variants"),
        ({"variants": {"a": {"runtime": {"device": "cpu"}}}}, "variants.a: runtime may not vary"),
        ({"variants": {"a": {"model": {"vocab_size": 99}}}}, "variants.a: model.vocab_size may not vary"),
        ({"variants": {"a": {}, "b": {"ttt": {"lora_rank": 8}}}}, "'a' and 'b' have equal configurations"),
        ({"variants": {"a": {}, "A": {"ttt": {"lr": 1}}}}, "'a' and 'A' have the same name"),
        ({"variants": {"a/b": {}}}, "name 'a/b' must be text of 1-80 letters"),
        ({"variants": {".a": {}}}, "name '.a' must be"),
        ({"variants": {"-a": {}}}, "name '-a' must be"),
        ({"variants": {"": {}}}, "name '' must be"),
        ({"variants": {"a" * 81: {}}}, "must be text of 1-80 letters"),
        ({"variants": {1: {}}}, "name 1 must be text"),
        ({"variants": {f"v{i}": {"ttt": {"lr": i + 1}} for i in range(201)}}, "201 variants are over the limit of 200"),
        ({"variants": {"a": {"train": {"micro_batch_tokens": 2048}}}, "gang": {"ranks": 2}}, "variants.a: gang of 2"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": [1]}, "grid must be a mapping of settings to lists"),
        ({"grid": {"ttt.lrr": [1]}}, "grid: unknown setting 'ttt.lrr'; did you mean 'ttt.lr'"),
        ({"grid": {"lr": [1]}}, "grid: unknown setting 'lr'; did you mean 'ttt.lr'"),
        ({"grid": {"seq_len": [1]}}, "did you mean 'train.seq_len' or 'evaluation.seq_len'"),
        ({"grid": {"ttt": [1]}}, "grid: unknown setting 'ttt'"),
        ({"grid": {"seed": [1, 2]}}, "grid: seed may not vary"),
        ({"grid": {"runtime.device": ["cpu"]}}, "grid: runtime.device may not vary"),
        ({"grid": {"ttt.lr": []}}, "grid.ttt.lr must be a list of one or more values"),
        ({"grid": {"ttt.lr": 1}}, "grid.ttt.lr must be a list"),
        ({"grid": {"ttt.lr": ["x"]}}, "grid (ttt.lr=x): ttt.lr must be a number"),
        ({"grid": {"ttt.lr": [1, 1.0]}}, "grid makes lr=1 2 times"),
        ({"grid": {"ttt.lr": list(range(1, 16)), "train.max_steps": list(range(1, 15))}}, "grid has 210 combinations"),
        ({"variants": {"a": {}}, "grid": {"ttt.lora_rank": [8, 9]}}, "'a' and 'lora_rank=8' have equal"),
    ],
)
def test_variants_that_do_not_fit_are_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        parse_spec(plain(**changes))
    assert "\n" not in str(caught.value)


def test_an_ablation_survives_json_and_a_spec_without_variants_is_as_before() -> None:
    spec = parse_spec(plain(variants={"base": {}, "x": {"quant": {"matrix_bits": 4}}}))
    assert SweepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    earlier = {name: value for name, value in parse_spec(plain()).to_json().items() if name != "ablation"}
    read = SweepSpec.from_json(json.loads(json.dumps(earlier)))
    assert [key.name for key in read.keys] == ["seed=42-repeat=0", "seed=0-repeat=0"]
    assert [variant.name for variant in read.variants] == ["base"]


def test_max_gangs_stands_at_the_top_or_under_limits_and_survives_json() -> None:
    spec = parse_spec(plain(max_gangs=4))
    assert spec.limits.max_gangs == 4
    assert parse_spec(plain(limits={"max_gangs": 4})) == spec
    assert SweepSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    earlier = spec.to_json()
    del earlier["limits"]["max_gangs"]  # as versions without it wrote it
    assert SweepSpec.from_json(earlier).limits.max_gangs is None


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


@pytest.mark.parametrize("name", ["demo", "ablation_demo", "published", "frontier", "bench_500", "ablation_frontier"])
def test_shipped_specs_are_valid(name: str) -> None:
    assert load_spec(SPECS / f"{name}.yaml").name == name


def test_published_spec_is_the_published_recipe_on_eight_gpus_from_scratch() -> None:
    spec = load_spec(SPECS / "published.yaml")
    assert (spec.gang.gpus, spec.seeds, spec.limits.restart) == (8, (42, 0, 1337), "scratch")
    assert spec.config.train == published().train


def test_the_frontiers_spec_is_its_preset_on_eight_gpus() -> None:
    spec = load_spec(SPECS / "frontier.yaml")
    assert (spec.gang.gpus, len(spec.seeds), spec.limits.restart) == (8, 3, "scratch")
    assert replace(spec.config, data=frontier().data, seed=frontier().seed) == frontier()


def test_the_frontiers_ablation_adds_up_to_its_preset_on_paired_seeds_with_the_same_horizons() -> None:
    spec = load_spec(SPECS / "ablation_frontier.yaml")
    configs = {variant.name: variant.config for variant in spec.variants}
    whole = replace(bench_frontier(), data=spec.config.data, seed=0)
    assert configs["all"] == whole
    assert len(spec.seeds) == 3
    horizons = {(config.train.ema_horizon_frac, config.train.muon_momentum_warmup_frac) for config in configs.values()}
    assert horizons == {(whole.train.ema_horizon_frac, whole.train.muon_momentum_warmup_frac)}
    base = configs["base"]
    assert replace(base, train=bench_500().train, data=whole.data) == replace(bench_500(), data=whole.data, seed=0)
    parts: dict[str, dict[str, object]] = {}  # what the parts change, by section, joined
    left_out = {"mlp_gate", "passes", "slope", "quant", "ttt", "ttt_chunk_48"}  # they gained nothing, or others more
    for name in set(configs) - {"base", "all", "all_but_ttt", "all_chunk_48"} - left_out:
        for section in HASHED_SECTIONS:
            ours, theirs = (plain_settings(getattr(config, section)) for config in (configs[name], base))
            changed = {key: value for key, value in ours.items() if theirs.get(key) != value}
            parts.setdefault(section, {}).update(changed)
    assert base != whole
    assert replace(base, **{name: replace(getattr(base, name), **parts[name]) for name in parts}) == whole


def test_demo_gangs_have_one_cpu_each() -> None:
    assert load_spec(SPECS / "demo.yaml").gang.share == {"CPU": 1.0}


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
