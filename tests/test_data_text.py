"""model/corpus/text.py and writer.py: people's documents become a corpus, unchanged and in order, or one clear line."""

import fcntl
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.corpus.text import TextOptions, build_text, gather_inputs, read_documents
from model.corpus.vocabulary import train_vocabulary
from model.corpus.writer import LOCK_NAME, Corpus, ShardWriter
from model.data.shards import list_shards, open_shard
from model.data.tokenizer import load_tokenizer
from tests.test_text_check import train

SP8192 = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
TEXTS = [f"Document {number}:  two  spaces,\na line, caf\u00e9 \u6587 \U0001f600" for number in range(10)]


def ignore(phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
    """A report callback that nobody reads."""


def write_lines(path: Path, rows: list[Any]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "docs.jsonl", [{"text": text, "id": 1} for text in TEXTS])


def build(paths: list[Path], out: Path, **options: Any) -> Corpus:
    return build_text(paths, out, TextOptions(**{"tokenizer": SP8192, **options}), ignore)


def stream(corpus: Corpus, split: str) -> list[int]:
    return [
        int(token) for path in list_shards(str(corpus.folder / f"text_{split}_*.bin")) for token in open_shard(path)
    ]


def expected(texts: list[str]) -> list[int]:
    tokenizer = load_tokenizer(SP8192)
    return [int(token) for text in texts for token in tokenizer.encode_documents([text])[0]]


def test_all_kinds_of_files_give_the_same_documents(tmp_path: Path, lines: Path) -> None:
    zipped = write_lines(tmp_path / "docs.jsonl.gz", [{"text": text} for text in TEXTS])
    table = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"n": list(range(10)), "text": TEXTS}), table, row_group_size=3)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number:02}.txt").write_bytes(text.encode())
    for path in (lines, zipped, table, folder):
        assert list(read_documents(gather_inputs([path]).files)) == TEXTS


def test_without_a_split_option_all_documents_are_validation(tmp_path: Path, lines: Path) -> None:
    corpus = build([lines], tmp_path / "out")
    assert stream(corpus, "val") == expected(TEXTS)
    assert corpus.splits["val"].documents == 10
    assert corpus.splits["val"].text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert corpus.splits["train"].documents == 0
    assert sorted(path.name for path in corpus.folder.iterdir()) == [
        "manifest.json",
        "text.model",
        "text_val_000000.bin",
    ]


def test_the_first_documents_become_validation(tmp_path: Path, lines: Path) -> None:
    corpus = build([lines], tmp_path / "out", val_documents=3)
    assert stream(corpus, "val") == expected(TEXTS[:3])
    assert stream(corpus, "train") == expected(TEXTS[3:])


def test_a_fraction_is_spread_evenly(tmp_path: Path, lines: Path) -> None:
    corpus = build([lines], tmp_path / "out", val_frac=0.2)
    assert stream(corpus, "val") == expected([TEXTS[4], TEXTS[9]])
    assert stream(corpus, "train") == expected([*TEXTS[:4], *TEXTS[5:9]])


def test_shards_are_cut_between_documents(tmp_path: Path) -> None:
    documents = [np.array([1, *range(10, 10 + size)], dtype=np.uint16) for size in (3, 4, 30, 2)]
    with ShardWriter(tmp_path, "toy_train", shard_tokens=9) as writer:
        for tokens in documents:
            writer.add(tokens)
    sizes = [open_shard(path).size for path in list_shards(str(tmp_path / "toy_train_*.bin"))]
    assert sizes == [9, 31, 3]


def test_a_tokenizer_is_trained_on_the_training_part(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "docs.jsonl", [{"text": "zebra " * 40}] + [{"text": "walrus " * 40}] * 3)
    corpus = build([path], tmp_path / "out", tokenizer=None, vocab_size=270, val_documents=1)
    tokenizer = load_tokenizer(corpus.tokenizer)
    assert corpus.vocab_size == tokenizer.vocab_size == 270
    assert tokenizer.encode_documents(["walrus"])[0].size < tokenizer.encode_documents(["zebra"])[0].size


def test_more_pieces_than_the_text_has_are_refused(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(ValueError, match=r"--vocab-size 5000 is more than the text has pieces for; give \d+ or less"):
        build([lines], tmp_path / "out", tokenizer=None, vocab_size=5000)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_second_corpus_in_one_folder_is_refused(tmp_path: Path, lines: Path) -> None:
    build([lines], tmp_path / "out")
    with pytest.raises(ValueError, match="already holds a corpus"):
        build([lines], tmp_path / "out")


def test_a_folder_with_other_shards_is_refused_and_left_alone(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "fineweb_val_000000.bin").write_bytes(b"theirs")
    with pytest.raises(ValueError, match=r"already holds fineweb_val_000000\.bin"):
        build([lines], out)
    assert (out / "fineweb_val_000000.bin").read_bytes() == b"theirs"


def test_what_an_interrupted_run_left_is_made_again(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "text_val_000007.bin").write_bytes(b"half")
    (out / ".text_val_000008.bin.abc.tmp").write_bytes(b"half")
    assert len(list_shards(str(build([lines], out).folder / "*.bin"))) == 1


def test_two_commands_at_once_do_not_share_a_folder(tmp_path: Path, lines: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / LOCK_NAME).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is being written by another"):
            build([lines], out)


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, lines: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .*docs\.jsonl/corpus is not writable"):
        build([lines], lines / "corpus")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"txet": "b"}], r"docs\.jsonl line 2 has no field 'text'; nearest is 'txet'"),
        ([{"text": "a"}, {"text": 5}], r"line 2: field 'text' is int, not text"),
        ([{"text": "a"}, None], r"line 2 is not a JSON object"),
        ([{"text": "\ud800"}], r"line 1: field 'text' has half a surrogate pair"),
        ([], r"docs\.jsonl has no document"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build([write_lines(tmp_path / "docs.jsonl", rows)], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b"\xff\xfe\x00", "line 1 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], r"damaged after line \d"),
        ("a.jsonl.gz", b"no gzip", "damaged after line 0"),
        ("a.parquet", b"no parquet at all", "not readable Parquet"),
        ("a.txt", b"caf\xe9", "not UTF-8 text .* at byte 3"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        build([tmp_path / name], tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "docs.parquet"
    pq.write_table(pa.table({"content": ["x"], "url": ["y"]}), path)
    with pytest.raises(ValueError, match=r"no column 'contents'; nearest is 'content'; it has content, url"):
        build([path], tmp_path / "out", column="contents")


def test_missing_unknown_and_empty_inputs_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a\.csv is of no known kind"):
        gather_inputs([tmp_path / "a.csv"])
    with pytest.raises(ValueError, match="empty has no file ending in"):
        gather_inputs([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        gather_inputs([tmp_path / "gone.jsonl"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_documents": 1, "val_frac": 0.5}, "exclude each other"),
        ({"vocab_size": 300}, "exclude each other"),
        ({"val_documents": 0}, "--val-documents 0"),
        ({"val_frac": 1.0}, r"--val-frac 1\.0 must be between 0 and 1"),
        ({"tokenizer": None, "vocab_size": 70_000}, "--vocab-size 70000"),
        ({"name": "../x"}, r"--name '\.\./x'"),
        ({"val_documents": 99}, "leaves no document of 10 for train"),
        ({"tokenizer": Path("gone.model")}, r"gone\.model is missing"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, lines: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build([lines], tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", "caf\u00e9".encode("latin-1"), r"b\.txt is not UTF-8 text"),
        ("b.jsonl", b'{"text": "a"}\n{"text": null}\n', r"b\.jsonl line 2: field 'text' is NoneType, not text"),
        ("b.jsonl", b'{"text": "a"}\n{"txet": "b"}\n', r"b\.jsonl line 2 has no field 'text'"),
        ("b.jsonl", b'{"text": "a"}\n{"text": \n', r"b\.jsonl line 2 is not JSON"),
        ("b.parquet", None, r"b\.parquet row 2: field 'text' is NoneType, not text"),
    ],
)
def test_an_error_behind_the_first_document_is_named_while_a_tokenizer_is_trained(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a.txt").write_text("some words to learn pieces from\n" * 9)
    if content is None:
        pq.write_table(pa.table({"text": ["a", None]}), folder / name)
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        build([folder], tmp_path / "out", tokenizer=None, vocab_size=300)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_while_a_tokenizer_is_trained_stays_one() -> None:
    def texts() -> Iterator[str]:
        yield "some words"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_vocabulary(texts(), vocab_size=300)


def test_hidden_files_and_other_kinds_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / ".cache" / "docs"  # what the user names is not hidden
    for name in ("a.txt", ".ipynb_checkpoints/a-checkpoint.txt", ".git/b.txt", "__pycache__/c.txt", "sub/.d.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")
    for name in ("notes.md", "more.md", "sub/code.py"):
        (folder / name).write_text("text")
    found = gather_inputs([folder, folder / ".git" / "b.txt"])
    assert found.files == [folder / "a.txt", folder / ".git" / "b.txt"]
    assert found.notes()[0].startswith("3 files of other kinds are left out (2 .md, 1 .py, such as ")
    assert found.notes()[1].startswith("4 hidden files are left out, such as ")
    assert gather_inputs([folder / "a.txt"]).notes() == []


def test_a_folder_given_twice_is_said_with_the_validation_documents_in_training(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(f"document {number}")
    assert gather_inputs([folder, folder]).notes()[0].startswith("3 of 3 files are read more than once, such as ")
    corpus = build([folder, folder], tmp_path / "out", val_documents=3)
    assert corpus.num_in_both == 3
    assert build([folder], tmp_path / "other", val_documents=1).num_in_both == 0


def test_equal_documents_in_both_splits_are_counted(tmp_path: Path) -> None:
    rows = [{"text": text} for text in ("one two", "three", "four", "one  two\n", "four", "five")]
    corpus = build([write_lines(tmp_path / "docs.jsonl", rows)], tmp_path / "out", val_documents=3)
    assert corpus.num_in_both == 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["source"]["documents_in_both_splits"] == 2


def test_validation_text_that_the_tokenizer_loses_is_refused_with_the_users_file_named(tmp_path: Path) -> None:
    model = train(tmp_path, ["one two three"], byte_fallback=False, vocab_size=30)
    rows = [{"text": "one two"}, {"text": "one \u6587"}]
    path = write_lines(tmp_path / "docs.jsonl", rows)
    with pytest.raises(ValueError, match=r"validation: 1 of \d+ tokens are unknown to tokenizer .*their\.model"):
        build([path], tmp_path / "out", tokenizer=model)
    assert list((tmp_path / "out").iterdir()) == []
    corpus = build([path], tmp_path / "out", tokenizer=model, val_documents=1)
    assert (corpus.splits["train"].unknown_tokens, corpus.splits["val"].unknown_tokens) == (1, 0)
