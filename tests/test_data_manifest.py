"""model/data/manifest.py: what is checked against a manifest, and what enters the data hash."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.config import DataConfig
from model.corpus.shard_file import write_shard
from model.data.manifest import (
    MANIFEST_NAME,
    Manifest,
    check_data,
    describe_file,
    hash_data,
    read_manifest,
    write_manifest,
)

TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two training shards, one for validation, a tokenizer in another folder, no manifest."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_shard(corpus / "toy_train_000000.bin", np.array([1, 5, 6, 7]))
    write_shard(corpus / "toy_train_000001.bin", np.array([1, 8, 9]))
    write_shard(corpus / "toy_val_000000.bin", np.array([1, 30, 1, 31]))
    shutil.copy(TOKENIZER, tmp_path / "toy.model")
    return DataConfig(
        train=str(corpus / "toy_train_*.bin"), val=str(corpus / "toy_val_*.bin"), tokenizer=str(tmp_path / "toy.model")
    )


def add_manifest(data: DataConfig) -> Path:
    folder = Path(data.train).parent
    shutil.copy(data.tokenizer, folder / "toy.model")
    files = {path.name: describe_file(path) for path in sorted(folder.iterdir())}
    write_manifest(folder, Manifest("toy", "toy.model", files, {"why": "test"}))
    return folder


def test_a_manifest_round_trips(data: DataConfig) -> None:
    folder = add_manifest(data)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.source == {"why": "test"}
    entry = manifest.files["toy_val_000000.bin"]
    assert (entry.documents, entry.tokens, entry.bytes) == (2, 4, 1032)


def test_the_hash_follows_contents_and_limits_and_not_names(data: DataConfig, tmp_path: Path) -> None:
    before = hash_data(data)
    assert list(map(len, (before.train, before.val))) == [2, 1]
    moved = tmp_path / "moved"
    shutil.copytree(Path(data.train).parent, moved)
    elsewhere = replace(data, train=str(moved / "toy_train_*.bin"), val=str(moved / "toy_val_*.bin"))
    assert hash_data(elsewhere).data_hash == before.data_hash
    assert hash_data(replace(data, val_documents=1)).data_hash != before.data_hash
    assert hash_data(replace(data, val_tokens=3)).data_hash != before.data_hash
    write_shard(moved / "toy_train_000001.bin", np.array([1, 8, 10]))
    assert hash_data(elsewhere).data_hash != before.data_hash


def test_a_manifest_leaves_the_hash_alone(data: DataConfig) -> None:
    before = hash_data(data).data_hash
    add_manifest(data)
    assert hash_data(data).data_hash == before


def test_a_changed_shard_is_found_by_content_only_when_asked(data: DataConfig) -> None:
    folder = add_manifest(data)
    write_shard(folder / "toy_train_000001.bin", np.array([1, 8, 10]))
    assert check_data(data) == []
    assert len(check_data(data, is_deep=True)) == 1
    with pytest.raises(ValueError, match=r"000001\.bin differs from the sha256 in its manifest"):
        hash_data(data)


def test_each_missing_or_damaged_thing_is_one_line(data: DataConfig) -> None:
    folder = add_manifest(data)
    (folder / "toy_train_000000.bin").unlink()
    (folder / "toy_val_000000.bin").write_bytes((folder / "toy_val_000000.bin").read_bytes()[:-1])
    Path(data.tokenizer).unlink()
    write_shard(folder / "toy_train_000007.bin", np.array([1, 8]))
    lines = check_data(data)
    for part in ("000000.bin is missing", "val_000000.bin is truncated", "data.tokenizer=", "000007.bin is not in"):
        assert sum(part in line for line in lines) == 1, (part, lines)
    assert len(lines) == 4
    with pytest.raises(ValueError, match=r"\(and 3 more\)"):
        hash_data(data)


def test_empty_globs_and_fields_are_named(tmp_path: Path) -> None:
    lines = check_data(DataConfig(train="", val=str(tmp_path / "*.bin")))
    assert [line.split("=")[0].split()[0] for line in lines] == ["data.train", "data.val", "data.tokenizer"]


def test_ids_outside_the_vocabulary_and_missing_bos_are_found(data: DataConfig) -> None:
    assert hash_data(data, vocab_size=32)
    with pytest.raises(ValueError, match=r"token id 31, outside model\.vocab_size=31"):
        hash_data(data, vocab_size=31)
    write_shard(Path(data.val).parent / "toy_val_000000.bin", np.array([5, 6]))
    with pytest.raises(ValueError, match="has no BOS"):
        hash_data(data)


def test_a_validation_shard_among_the_training_shards_is_refused(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"of data\.val is also in data\.train"):
        hash_data(replace(data, train=str(Path(data.train).parent / "*.bin")))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[" * 100_000,
        "[1]",
        '{"format": 2}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {}, "tokenizer": "x.model"}',
        '{"format": 1, "files": {"../x": {"bytes": 1, "documents": 0, "tokens": 0, "sha256": "' + "0" * 64 + '"}}}',
        '{"format": 1, "files": {"x": {"bytes": -1, "documents": 0, "tokens": 0, "sha256": "' + "0" * 64 + '"}}}',
        '{"format": 1, "files": {"x": {"bytes": 1e3, "documents": 0, "tokens": 0, "sha256": "' + "0" * 64 + '"}}}',
        '{"format": 1, "files": {"x": {"bytes": 1, "documents": 0, "tokens": 0, "sha256": 5}}}',
        '{"format": ' + "1" * 5000 + "}",
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ValueError, match=r"manifest .*manifest\.json") as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_a_manifest_is_plain_json_with_a_format_number(data: DataConfig) -> None:
    content = json.loads((add_manifest(data) / MANIFEST_NAME).read_text())
    assert sorted(content) == ["files", "format", "name", "source", "tokenizer"]
