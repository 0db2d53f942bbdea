"""model/corpus/builtin.py, docstrings.py and vocabulary.py: the built-in corpus is real, split and reproducible."""

from pathlib import Path

import numpy as np
import pytest

from model.corpus.builtin import build_builtin
from model.corpus.docstrings import gather_docstrings, read_docstrings
from model.corpus.vocabulary import train_vocabulary
from model.corpus.writer import Corpus, is_intact
from model.data.manifest import MANIFEST_NAME, read_manifest
from model.data.shards import open_shard
from model.data.tokenizer import load_tokenizer
from model.data.validation import load_validation


def ignore(phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
    """A report callback that nobody reads."""


def build_small(out: Path) -> Corpus:
    return build_builtin(out, ignore, max_bytes=60_000, vocab_size=400, val_documents=6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_small(tmp_path_factory.mktemp("builtin") / "corpus")


def documents(corpus: Corpus, split: str) -> list[bytes]:
    validation = load_validation([corpus.folder / f"builtin_{split}_000000.bin"], vocab_size=corpus.vocab_size)
    return [np.asarray(validation.tokens[start : end - 1]).tobytes() for start, end in validation.document_ranges]


def test_two_builds_are_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    again = build_small(tmp_path / "again")
    names = sorted(path.name for path in corpus.folder.iterdir())
    assert names == ["builtin.model", "builtin_train_000000.bin", "builtin_val_000000.bin", "manifest.json"]
    for name in names:
        assert (corpus.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_validation_documents_are_not_among_the_training_documents(corpus: Corpus) -> None:
    train, val = documents(corpus, "train"), documents(corpus, "val")
    assert (len(train), len(val)) == (corpus.splits["train"].documents, 6)
    assert not set(train) & set(val)


def test_every_package_is_in_and_the_manifest_counts_it(corpus: Corpus) -> None:
    manifest = read_manifest(corpus.folder)
    assert manifest is not None
    used = manifest.source["bytes_by_package"]
    assert sorted(used) == ["numpy", "pandas", "pyarrow", "python", "torch"]
    assert all(used[package] > 5_000 for package in used)
    assert sum(used.values()) <= 60_000
    assert sum(used.values()) == sum(counts.text_bytes for counts in corpus.splits.values())
    assert manifest.files["builtin_val_000000.bin"].documents == 6


def test_the_tokenizer_is_like_the_public_one(corpus: Corpus) -> None:
    tokenizer = load_tokenizer(corpus.tokenizer, vocab_size=400)
    assert tokenizer.byte_table.is_boundary[:5].tolist() == [True] * 4 + [False]
    assert tokenizer.byte_table.base_bytes[4:260].tolist() == [1] * 256
    assert tokenizer.decode(tokenizer.encode_documents(["a  b\nc \u6587"])[0]) == "a b c \u6587"


def test_a_half_made_corpus_is_made_again(corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "half"
    build_small(out)
    for damage in ("manifest.json", "builtin_val_000000.bin"):
        (out / damage).unlink()
        (out / ".builtin_train_000000.bin.x7.tmp").write_bytes(b"left by a killed process")
        assert not is_intact(out)
        build_small(out)
        assert is_intact(out)
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in corpus.folder.iterdir())


def test_a_finished_corpus_is_not_written_into(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"already holds a corpus \(manifest\.json\)"):
        build_small(corpus.folder)


def test_a_build_that_fails_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def fail(phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
        if phase == "encode":
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        build_builtin(tmp_path, fail, max_bytes=60_000, vocab_size=400, val_documents=6)
    assert not (tmp_path / MANIFEST_NAME).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_split_without_training_documents_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="val_documents=9999 leaves none"):
        build_builtin(tmp_path, ignore, max_bytes=20_000, vocab_size=400, val_documents=9999)


def test_docstrings_are_read_without_running_the_file(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        'raise SystemExit\n"not a docstring"\ndef f():\n    """First.\n\n    Indented.\n    """\nclass C:\n    "One."\n'
    )
    assert read_docstrings(source, []) == ["First.\n\nIndented.", "One."]
    cython = tmp_path / "module.pyx"
    cython.write_text(
        'cdef class D(E):\n    """\n    A class.\n    """\n    def g(self,\n          int n):\n        """Of g."""\n'
    )
    assert read_docstrings(cython, []) == ["A class.", "Of g."]


def test_a_file_that_cannot_be_parsed_is_listed(tmp_path: Path) -> None:
    broken, unreadable = tmp_path / "broken.py", list[str]()
    broken.write_text('def f(:\n    """text"""\n')
    assert read_docstrings(broken, unreadable) == []
    assert unreadable == ["broken.py"]


def test_documents_are_distinct_and_long_enough() -> None:
    *_, found = gather_docstrings(60_000)
    assert len({" ".join(text.split()) for text in found.texts}) == len(found.texts)
    assert min(map(len, found.texts)) >= 300


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="--vocab-size 100 does not suit the text"):
        train_vocabulary(["some words"], vocab_size=100)


def test_long_documents_reach_the_vocabulary() -> None:
    # SentencePiece drops sentences over 4,192 bytes
    model = train_vocabulary(["elephantine " * 1000], vocab_size=300)
    assert "\u2581elephantine".encode() in model


def test_shards_start_with_a_document(corpus: Corpus) -> None:
    assert open_shard(corpus.folder / "builtin_train_000000.bin")[0] == 1
