"""model/data/validation.py: documents of the stream, its limits, and what is refused."""

from pathlib import Path

import numpy as np
import pytest

from model.corpus.shard_file import write_shard
from model.data.validation import ValidationSet, load_validation

STREAM = np.array([1, 10, 11, 1, 20, 1, 30, 31, 32], dtype=np.uint16)


def load(
    folder: Path, *arrays: np.ndarray, val_documents: int | None = None, val_tokens: int | None = None
) -> ValidationSet:
    paths = [folder / f"toy_val_{number:06}.bin" for number in range(len(arrays))]
    for path, tokens in zip(paths, arrays, strict=True):
        write_shard(path, tokens)
    return load_validation(paths, vocab_size=64, val_documents=val_documents, val_tokens=val_tokens)


def test_a_document_ends_with_the_next_bos_and_the_last_with_the_stream(tmp_path: Path) -> None:
    validation = load(tmp_path, STREAM)
    assert [validation.document(index).tolist() for index in range(3)] == [
        [1, 10, 11, 1],
        [1, 20, 1],
        [1, 30, 31, 32],
    ]


@pytest.mark.parametrize("val_tokens", range(2, 10))
def test_every_token_but_the_first_is_a_target_once(tmp_path: Path, val_tokens: int) -> None:
    validation = load(tmp_path, STREAM, val_tokens=val_tokens)
    targets = [place for start, end in validation.document_ranges for place in range(start + 1, end)]
    assert targets == list(range(1, val_tokens))
    assert validation.num_targets == len(targets)


def test_a_lone_bos_at_the_end_is_a_document_without_targets(tmp_path: Path) -> None:
    validation = load(tmp_path, STREAM, val_tokens=4)
    assert validation.document_ranges.tolist() == [[0, 4], [3, 4]]


def test_val_documents_keeps_what_lies_before_the_next_bos(tmp_path: Path) -> None:
    assert load(tmp_path, STREAM, val_documents=2).tokens.tolist() == [1, 10, 11, 1, 20]
    assert load(tmp_path, STREAM, val_documents=3).tokens.size == STREAM.size
    assert load(tmp_path, STREAM, val_documents=99).num_documents == 3
    assert load(tmp_path, STREAM, val_documents=2, val_tokens=3).tokens.tolist() == [1, 10, 11]


def test_one_shard_stays_mapped_and_several_are_joined(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, STREAM, val_documents=2).tokens, np.memmap)
    joined = load(tmp_path, STREAM[:5], STREAM[4:])
    assert joined.tokens.tolist() == [*STREAM[:5], *STREAM[4:]]


def test_each_shard_is_announced(tmp_path: Path) -> None:
    opened: list[Path] = []
    load(tmp_path, STREAM)
    load_validation([tmp_path / "toy_val_000000.bin"], vocab_size=64, on_open=opened.append)
    assert [path.name for path in opened] == ["toy_val_000000.bin"]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([9, 1, 2], {}, "starts with token 9, not with BOS"),
        ([5, 6], {}, "has no BOS"),
        ([1, 64], {}, "token id 64 at 1, outside vocab_size=64"),
        ([1], {}, "validation set is empty: 1 token left"),
        ([1, 2, 3], {"val_tokens": 1}, r"data\.val_tokens=1\), at least 2"),
        ([1, 1, 3], {"val_documents": 1}, r"data\.val_documents=1"),
    ],
)
def test_a_bad_stream_is_refused(tmp_path: Path, tokens: list[int], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(tmp_path, np.array(tokens), **options)


def test_no_shard_at_all_is_an_empty_validation() -> None:
    with pytest.raises(ValueError, match="validation set is empty"):
        load_validation([], vocab_size=64)
