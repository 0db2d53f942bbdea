"""model/config.py: presets build, bad values are refused by name, and the hash covers what decides a score."""

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from model import config as configs
from model.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    TTTConfig,
    config_from_plain,
    config_hash,
)
from model.fields import added, plain_settings
from model.presets import PRESETS, published, tiny

SECTIONS = {
    "model": ModelConfig, "train": TrainConfig, "quant": QuantConfig, "evaluation": EvalConfig, "ttt": TTTConfig,
    "data": DataConfig, "runtime": RuntimeConfig,
}  # fmt: skip
BAD_VALUES: list[tuple[str, str, Any]] = [
    ("model", "vocab_size", 0),
    ("model", "vocab_size", 65_537),
    ("model", "num_layers", 0),
    ("model", "num_heads", 7),
    ("model", "num_kv_heads", 3),
    ("model", "num_kv_heads", 0),
    ("model", "mlp_mult", 0.0),
    ("model", "rope_dims", 3),
    ("model", "rope_dims", 66),
    ("model", "rope_base", 0.0),
    ("model", "rope_base", float("inf")),
    ("model", "rotary_positions", "row"),
    ("model", "xsa_last_n", 12),
    ("model", "xsa_last_n", -1),
    ("model", "loop_start", 6),
    ("model", "loop_end", 11),
    ("model", "num_loops", -1),
    ("model", "parallel_start_layer", -1),
    ("model", "logit_softcap", 0.0),
    ("model", "embedding_init_std", -0.1),
    ("model", "lane_routing", "crossed"),
    ("model", "attn_gate_width", 513),
    ("model", "smear_gate_width", -1),
    ("model", "mlp_gate_width", 1024),
    ("model", "leaky_slope", 1.5),
    ("model", "leaky_slope", -0.1),
    ("train", "max_steps", 0),
    ("train", "budget_s", 5.0),
    ("train", "budget_s", float("nan")),
    ("train", "reserve_s", -1.0),
    ("train", "batch_tokens", 100_000),
    ("train", "micro_batch_tokens", 0),
    ("train", "seq_len", 0),
    ("train", "span_group", 0),
    ("train", "warmdown_frac", 1.5),
    ("train", "min_lr_frac", -0.1),
    ("train", "loop_start_frac", 2.0),
    ("train", "embedding_lr", -0.03),
    ("train", "matrix_lr", float("nan")),
    ("train", "vector_lr", float("inf")),
    ("train", "matrix_weight_decay", -1.0),
    ("train", "adam_beta1", 1.0),
    ("train", "adam_beta2", -0.1),
    ("train", "adam_eps", 0.0),
    ("train", "muon_momentum", 1.0),
    ("train", "muon_momentum_start", -0.5),
    ("train", "muon_momentum_warmup_steps", -1),
    ("train", "newton_schulz_steps", 0),
    ("train", "newton_schulz_dtype", "float16"),
    ("train", "embedding_dtype", "float64"),
    ("train", "grad_clip_norm", 0.0),
    ("train", "clip", "per_node"),
    ("train", "ema_decay", 1.1),
    ("train", "orthogonalization", "polar"),
    ("train", "ema_horizon_frac", 0.0),
    ("train", "ema_horizon_frac", 1.5),
    ("train", "muon_momentum_warmup_frac", -0.1),
    ("train", "muon_momentum_warmup_frac", 1.5),
    ("quant", "matrix_bits", 1),
    ("quant", "embedding_bits", 9),
    ("quant", "matrix_clip_sigmas", 0.0),
    ("quant", "embedding_clip_sigmas", -1.0),
    ("quant", "damping_frac", 0.0),
    ("quant", "num_calibration_batches", 0),
    ("quant", "calibration_windows", 0),
    ("quant", "calibration_seq_len", 0),
    ("quant", "calibration_documents", "some"),
    ("quant", "block_columns", 0),
    ("quant", "keep_float_numel", -1),
    ("quant", "size_limit_bytes", 0),
    ("quant", "on_oversize", "ignore"),
    ("quant", "mlp_clip_sigmas", 0.0),
    ("quant", "looped_attention_clip_sigmas", -1.0),
    ("quant", "lqer_rank", -1),
    ("quant", "lqer_group", 0),
    ("quant", "codec", "zip"),
    ("evaluation", "seq_len", 0),
    ("evaluation", "row_tokens", 3000),
    ("evaluation", "row_tokens", 0),
    ("evaluation", "tail", "kept"),
    ("ttt", "lora_rank", 0),
    ("ttt", "lr", -1e-4),
    ("ttt", "weight_decay", -0.5),
    ("ttt", "beta2", 1.0),
    ("ttt", "eps", 0.0),
    ("ttt", "chunk_tokens", 0),
    ("ttt", "chunk_tokens", 4096),
    ("ttt", "window_tokens", 63),
    ("ttt", "updates_per_chunk", 0),
    ("ttt", "adapter_kinds", ("q", "gate")),
    ("ttt", "adapter_kinds", ("q", "q")),
    ("ttt", "adapter_kinds", ()),
    ("ttt", "adapter_key", "slot"),
    ("ttt", "order", "random"),
    ("ttt", "batch_documents", 0),
    ("ttt", "lora_alpha", 0.0),
    ("ttt", "chunk_by_length", ((0, 8), [1, 8])),
    ("ttt", "chunk_by_length", ((256, 8), [256, 16])),
    ("ttt", "chunk_by_length", ((256, 8), [300, 0])),
    ("ttt", "chunk_by_length", ((256, 8), [300, 2049])),
    ("data", "val_documents", 0),
    ("data", "val_tokens", -5),
    ("runtime", "device", "tpu"),
    ("runtime", "attention", "flash"),
    ("runtime", "checkpoint_every_s", -1.0),
    ("runtime", "report_every_s", float("inf")),
]


@pytest.mark.parametrize(("section", "name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_in_one_line_with_field_and_value(section: str, name: str, value: Any) -> None:
    with pytest.raises(ValueError) as caught:
        SECTIONS[section](**{name: value})
    shown = value[-1] if isinstance(value, tuple) and value else value
    message = str(caught.value)
    assert f"{section}.{name}=" in message
    assert str(list(value) if value == () else shown) in message
    assert "\n" not in message


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_and_looping_changes_its_plan(name: str) -> None:
    from model.banks import visit_plan

    config = PRESETS[name]()
    assert visit_plan(config.model, is_looped=True) != visit_plan(config.model, is_looped=False)
    assert config.train.batch_tokens == config.train.micro_batches_per_step * config.train.micro_batch_tokens


def test_derived_sizes_follow_their_fields() -> None:
    config = published().model
    assert (config.head_dim, config.kv_dim, config.mlp_hidden) == (64, 256, 2048)
    assert published().train.micro_batches_per_step == 8


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        published().train.max_steps = 3  # type: ignore[misc]


def test_the_hash_ignores_seed_data_and_runtime() -> None:
    base = tiny()
    others = [
        replace(base, seed=7),
        replace(base, data=DataConfig(train="elsewhere/*.bin", val_documents=3)),
        replace(base, runtime=RuntimeConfig(device="cpu", checkpoint_every_s=1.0)),
    ]
    assert {config_hash(config, world_size=1) for config in [base, *others]} == {config_hash(base, world_size=1)}


@pytest.mark.parametrize(
    ("section", "field"),
    [
        ("model", "num_loops"), ("train", "max_steps"), ("quant", "calibration_windows"), ("evaluation", "tail"),
        ("ttt", "lora_rank"),
    ],
)  # fmt: skip
def test_the_hash_reacts_to_every_hashed_section(section: str, field: str) -> None:
    base = tiny()
    part = getattr(base, section)
    value = "dropped" if field == "tail" else getattr(part, field) + 1
    other = replace(base, **{section: replace(part, **{field: value})})
    assert config_hash(other, world_size=1) != config_hash(base, world_size=1)


def test_the_hash_reacts_to_the_world_size() -> None:
    assert config_hash(tiny(), world_size=1) != config_hash(tiny(), world_size=2)


def test_settings_of_the_model_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.bos_id=8192 must be a token: 0 to 8191"):
        ModelConfig(smear_gate_width=12, bos_id=8192)
    with pytest.raises(ValueError, match=r"model\.parallel_start_layer=5 above model\.loop_end=5"):
        ModelConfig(pass_embeddings=True, parallel_start_layer=5)


def test_the_hash_is_the_sha256_of_canonical_json() -> None:
    import hashlib
    import json

    base = tiny()
    scored = {name: plain_settings(getattr(base, name)) for name in ("model", "train", "quant", "ttt", "evaluation")}
    text = json.dumps({**scored, "world_size": 4}, sort_keys=True, separators=(",", ":"))
    assert config_hash(base, world_size=4) == hashlib.sha256(text.encode()).hexdigest()


def test_every_section_of_a_run_is_hashed_or_said_not_to_be() -> None:
    names = {entry.name for entry in dataclasses.fields(RunConfig)}
    assert names == {*configs.HASHED_SECTIONS, "data", "runtime", "seed"}


PUBLISHED_HASH = "0906d1ae9bef2b4c0be12363413ef76a9ef5c41384fe50c0bea8b0abecb9f7a7"


def test_the_published_recipe_keeps_its_hash() -> None:
    assert config_hash(published(), world_size=1) == PUBLISHED_HASH


@pytest.mark.parametrize(
    ("section", "name", "written", "same"),
    [
        ("train", "budget_s", 600, 600.0),
        ("model", "mlp_mult", 4, 4.0),
        ("train", "min_lr_frac", -0.0, 0.0),
        ("train", "matrix_lr", np.float64(0.022), 0.022),
        ("model", "num_layers", np.int64(11), 11),
        ("ttt", "adapter_kinds", ["q", "v"], ("q", "v")),
        ("ttt", "lora_alpha", 144, 144.0),
        ("ttt", "chunk_by_length", [[256, 8], (np.int64(2000), 24)], ((256, 8), (2000, 24))),
        ("evaluation", "tail", np.str_("scored"), "scored"),
    ],
)
def test_equal_settings_have_equal_hashes_whatever_they_were_written_as(
    section: str, name: str, written: Any, same: Any
) -> None:
    base = published()
    made = [replace(base, **{section: replace(getattr(base, section), **{name: value})}) for value in (written, same)]
    made.append(config_from_plain({section: {name: written}}))
    found = getattr(getattr(made[0], section), name)
    assert (found, type(found), str(found)) == (same, type(same), str(same))
    assert len({config_hash(config, world_size=1) for config in made}) == 1


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("model", "num_layers", 11.0),
        ("model", "num_layers", "11"),
        ("model", "num_loops", True),
        ("model", "mlp_mult", "4"),
        ("model", "mlp_mult", False),
        ("model", "mlp_mult", None),
        ("train", "budget_s", "600"),
        ("train", "max_steps", np.float64(5.0)),
        ("train", "ema_decay", np.bool_(True)),
        ("train", "clip", 3),
        ("quant", "codec", True),
        ("evaluation", "seq_len", 1024.0),
        ("ttt", "adapter_kinds", "q"),
        ("ttt", "adapter_kinds", ("q", 3)),
        ("data", "train", 3),
        ("data", "val_documents", 3.0),
        ("runtime", "report_every_s", "1"),
    ],
)
def test_a_value_of_another_type_is_refused_in_one_line(section: str, name: str, value: Any) -> None:
    for make in (lambda: SECTIONS[section](**{name: value}), lambda: config_from_plain({section: {name: value}})):
        with pytest.raises(ValueError) as caught:
            make()
        assert f"{section}.{name}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", ["42", 42.0, True, None])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    for make in (lambda: RunConfig(seed=seed), lambda: config_from_plain({"seed": seed})):
        with pytest.raises(ValueError, match="seed must be a whole number"):
            make()
    assert type(RunConfig(seed=np.uint32(7)).seed) is int  # type: ignore[arg-type]


def test_a_section_is_of_its_own_kind() -> None:
    with pytest.raises(ValueError, match="train must be TrainConfig"):
        RunConfig(train={"max_steps": 3})  # type: ignore[arg-type]


def test_a_tilde_is_a_home_in_every_data_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/homes/me")
    data = DataConfig(train="~/a/*_train_*.bin", val="~/a/*_val_*.bin", tokenizer="~/a/t.model")
    assert (data.train, data.val, data.tokenizer) == (
        "/homes/me/a/*_train_*.bin", "/homes/me/a/*_val_*.bin", "/homes/me/a/t.model",
    )  # fmt: skip


def test_a_setting_added_at_its_default_leaves_names_and_records_as_they_were() -> None:
    """Configurations from before a setting was there keep their hashes; any other value is another one."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Section:
        first: int = 1
        later: int = added(0)

    assert plain_settings(Section()) == {"first": 1}
    assert plain_settings(Section(later=2)) == {"first": 1, "later": 2}
    # taken before any setting was added
    assert config_hash(published(), world_size=8).startswith("81b766c88b12a5c5")
