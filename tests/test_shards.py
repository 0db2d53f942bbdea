"""model/data/shards.py: the format, and every way in which a file can lie about it."""

import glob
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model.corpus.shard_file import write_shard
from model.data import shards
from model.data.shards import find_documents, find_first_bos, list_shards, open_shard, read_num_tokens

TOKENS = np.array([7, 1, 300, 65_535, 1, 9], dtype=np.uint16)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "toy_train_000000.bin"
    write_shard(path, TOKENS)
    return path


def patch_header(path: Path, place: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[4 * place : 4 * place + 4] = int(value).to_bytes(4, "little", signed=True)
    path.write_bytes(data)


def test_tokens_round_trip_in_the_stated_bytes(shard: Path) -> None:
    data = shard.read_bytes()
    assert len(data) == 1024 + 2 * TOKENS.size
    assert np.frombuffer(data[:12], "<i4").tolist() == [20240520, 1, TOKENS.size]
    assert not any(data[12:1024])
    assert np.array_equal(np.frombuffer(data[1024:], "<u2"), TOKENS)
    assert np.array_equal(open_shard(shard), TOKENS)


def test_shards_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("b_train_000001.bin", "b_train_000000.bin", "b_val_000000.bin"):
        write_shard(tmp_path / name, TOKENS)
    names = [path.name for path in list_shards(str(tmp_path / "*_train_*.bin"))]
    assert names == ["b_train_000000.bin", "b_train_000001.bin"]


@pytest.mark.parametrize("name", ["[v2] exp", "what?", "[!x]", "a*b", "[[]v2] exp"])
def test_brackets_of_a_folder_that_is_there_are_no_pattern(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ("v exp", "2 exp", "whatx", "y", "aab")  # what the name would match as a pattern
    for folder in (name, *others):
        (tmp_path / folder / "data").mkdir(parents=True)
        write_shard(tmp_path / folder / "data" / "toy_0.bin", TOKENS)
    inside = tmp_path / name / "data" / "toy_0.bin"
    assert list_shards(str(tmp_path / name / "data" / "*.bin")) == [inside]
    assert list_shards(str(tmp_path / name / "d*" / "toy_[0-9].bin")) == [inside]
    assert list_shards(str(inside)) == [inside]
    assert list_shards(f"{glob.escape(str(tmp_path / name))}/data/*.bin") == [inside]
    monkeypatch.chdir(tmp_path / name)
    assert list_shards("data/*.bin") == [Path("data/toy_0.bin")]
    monkeypatch.chdir(tmp_path)
    assert len(list_shards("[v2] ex[p]/data/*.bin")) == 2  # no such folder: a pattern


def test_a_glob_without_matches_names_the_field_and_the_glob(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.train=.*nothing.*no such shard"):
        list_shards(str(tmp_path / "nothing*.bin"), field="data.train")


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.bin is missing"):
        read_num_tokens(tmp_path / "gone.bin")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 7, "magic number 7, not 20240520"),
        (1, 2, "format version 2"),
        (2, 7, "truncated: 7 tokens take 1038 bytes, it has 1036"),
        (2, 5, "of wrong length: 5 tokens"),
        (2, 2**31 - 1, "truncated"),
        (2, 0, "says it has 0 tokens"),
        (2, -4, "says it has -4 tokens"),
    ],
)
def test_a_header_that_lies_is_refused(shard: Path, place: int, value: int, message: str) -> None:
    patch_header(shard, place, value)
    with pytest.raises(ValueError, match=message):
        open_shard(shard)


@pytest.mark.parametrize("size", [0, 11, 1023])
def test_a_file_shorter_than_its_header_is_refused(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"truncated: {size} bytes"):
        open_shard(shard)


def test_a_folder_is_not_a_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a regular file"):
        open_shard(tmp_path)


def test_documents_are_found_across_block_borders(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SCAN_TOKENS", 2)
    tokens = open_shard(shard)
    assert find_documents(tokens).tolist() == [1, 4]
    assert find_first_bos(tokens) == 1
    assert find_first_bos(tokens[2:]) == 2
    assert find_first_bos(tokens[5:]) is None


def test_ids_that_do_not_fit_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    for tokens in ([1, 65_536], [-1, 1], []):
        with pytest.raises(ValueError):
            write_shard(tmp_path / "x.bin", np.array(tokens))
    assert list(tmp_path.iterdir()) == []


def test_opening_ten_million_tokens_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    write_shard(path, np.full(10_000_000, 1, dtype=np.uint16))
    code = (
        "import resource, sys; from pathlib import Path; from model.data.shards import *;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "tokens = open_shard(Path(sys.argv[1])); assert find_first_bos(tokens) == 0;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 50_000  # KiB
