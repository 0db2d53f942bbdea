"""What differs between two records of a run, in words."""

from __future__ import annotations

from model.pipeline.differences import code_words, data_words, settings_words


def test_settings_are_named_with_both_values_and_what_is_not_scored_is_left_out() -> None:
    before = {"seed": 1, "data": {"val_tokens": 1}, "train": {"max_steps": 3, "betas": [0.9, 0.95]}, "world_size": 1}
    now = {"seed": 2, "data": {"val_tokens": 2}, "train": {"max_steps": 4, "betas": (0.9, 0.95)}, "world_size": 8}
    assert settings_words(before, now) == "train.max_steps 3, now 4; world_size 1, now 8"
    assert settings_words({"train": {}}, {"train": {"max_steps": 4}}) == "train.max_steps not set, now 4"


def test_a_long_list_is_cut() -> None:
    before, now = ({"train": {f"s{i}": value for i in range(9)}} for value in (1, 2))
    assert settings_words(before, now).endswith("train.s3 1, now 2; and 5 more")


def test_data_is_compared_by_file_name_and_limits_by_value() -> None:
    before = {
        "train": {"/a/t0.bin": "1", "/a/t1.bin": "2"},
        "val": {"/a/v.bin": "3"},
        "tokenizer": "4",
        "val_tokens": 5,
    }
    now = {"train": {"/b/t0.bin": "9", "/b/t2.bin": "2"}, "val": {"/b/v.bin": "3"}, "tokenizer": "5", "val_tokens": 6}
    assert data_words(before, now).split("; ") == [
        "train t2.bin is new", "train t1.bin is gone", "train t0.bin differs", "the tokenizer differs", "and 1 more"
    ]  # fmt: skip
    assert data_words(before, {**before, "val_tokens": 6}) == "data.val_tokens 5, now 6"
    assert data_words(before, before) == data_words({}, now) == ""


def test_code_has_a_commit_where_one_is_known() -> None:
    now = {"code_hash": "b" * 64, "git_commit": "c" * 40, "git_dirty": True}
    assert code_words({"code_hash": "a" * 64, "git_commit": "unknown"}, now) == (
        "code aaaaaaaaaaaa, now code bbbbbbbbbbbb (commit cccccccccc, with uncommitted changes)"
    )
