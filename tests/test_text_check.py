"""model/data/text_check.py and the byte tables of other tokenizers: every byte of a text counted, or refused."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

from model.config import DataConfig
from model.corpus.shard_file import write_shard
from model.data import remembered, text_check
from model.data.manifest import hash_data
from model.data.text_check import check_text, text_fault
from model.data.tokenizer import Tokenizer, load_tokenizer, target_bytes
from model.data.validation import ValidationSet, load_validation

SP8192 = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
TEXTS = [
    "a  b   c    d",
    "  hello",
    "def f(x):\n    if x:\n        return [\n            1,\n        ]\n",
    "foo bar  baz",
]
EXACT = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SPACES = {**EXACT, "allow_whitespace_only_pieces": True}


def train(folder: Path, texts: list[str] = TEXTS, **options: Any) -> Path:
    """Train a small tokenizer and return its file."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe", "byte_fallback": True, "vocab_size": 320, "hard_vocab_limit": False, "pad_id": 0,
        "bos_id": 1, "eos_id": 2, "unk_id": 3, "num_threads": 1, "minloglevel": 2,
    }  # fmt: skip
    lines = [line for text in texts for line in text.split("\n")] * 20
    spm.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**settings, **options})
    path = folder / "their.model"
    path.write_bytes(model.getvalue())
    return path


def stream(tokenizer: Tokenizer, texts: list[str]) -> ValidationSet:
    """Return texts as a validation set."""
    documents = [tokenizer.encode_documents([text])[0] for text in texts]
    starts = np.cumsum([0, *(len(tokens) for tokens in documents)])[:-1]
    return ValidationSet(np.concatenate(documents), starts)


@pytest.mark.parametrize(
    "options",
    [
        SPACES,
        {**SPACES, "add_dummy_prefix": False},
        {**SPACES, "add_dummy_prefix": False, "split_by_whitespace": False},
        {**SPACES, "add_dummy_prefix": False, "treat_whitespace_as_suffix": True},
        {**EXACT, "add_dummy_prefix": False},
        {"remove_extra_whitespaces": False, "user_defined_symbols": ["foo bar", "  ", " b", "d "]},
        {"model_type": "unigram", "vocab_size": 300},
        {"normalization_rule_name": "nmt_nfkc_cf", "control_symbols": ["a b"]},
    ],
)
def test_every_space_of_a_piece_is_one_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(train(tmp_path, **options))
    for text in TEXTS:
        tokens = tokenizer.encode_documents([text])[0]
        assert target_bytes(tokenizer.byte_table, tokens).sum() == len(tokenizer.decode(tokens).encode())
    assert text_fault(tokenizer, stream(tokenizer, TEXTS)) == ""


def test_bytes_of_a_tokenizer_that_keeps_the_text_are_those_of_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train(tmp_path, **SPACES))
    assert any("\u2581\u2581" in tokenizer._processor.id_to_piece(i) for i in range(tokenizer.vocab_size))
    for text in TEXTS:
        assert target_bytes(tokenizer.byte_table, tokenizer.encode_documents([text])[0]).sum() == len(text.encode())


def test_a_tokenizer_that_adds_a_space_to_every_document_is_refused(tmp_path: Path) -> None:
    path = train(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(ValueError, match=r"their\.model ends every document with a space that its text does not have"):
        load_tokenizer(path)


def test_a_piece_whose_text_has_another_length_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = spm.SentencePieceProcessor(model_file=str(SP8192))
    from model.data import tokenizer

    table = tokenizer.build_byte_table(sound)
    base_bytes = table.base_bytes.copy()
    base_bytes[300] += 1
    fault = tokenizer.counting_fault(sound, dataclasses.replace(table, base_bytes=base_bytes))
    assert fault.startswith("has piece 300 (")
    assert tokenizer.counting_fault(sound, table) == ""


def test_lost_text_is_counted_and_named(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train(tmp_path, byte_fallback=False, vocab_size=40))
    fault = text_fault(tokenizer, stream(tokenizer, ["foo bar", "\u6587 foo \U0001f600"]))
    assert fault.startswith("2 of ")
    assert "are unknown to tokenizer" in fault
    assert "first in document 1 (" in fault
    assert text_fault(tokenizer, stream(tokenizer, ["foo bar"])) == ""


def test_a_tokenizer_without_a_piece_for_the_space_is_told_by_the_text(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(train(tmp_path, ["zebra", "walrus"], add_dummy_prefix=False))
    assert "has no piece for the space: document 1 " in text_fault(tokenizer, stream(tokenizer, ["zebra", "a walrus"]))
    assert text_fault(tokenizer, stream(tokenizer, ["zebra", "walrus"])) == ""


def test_tokens_that_are_no_text_are_named() -> None:
    tokenizer = load_tokenizer(SP8192)
    validation = stream(tokenizer, ["one two", "three"])
    tokens = np.concatenate((validation.tokens, [1, 4 + 0xE2, 500])).astype(np.uint16)
    fault = text_fault(tokenizer, ValidationSet(tokens, np.append(validation.document_starts, validation.tokens.size)))
    assert fault.startswith("document 2 (")
    assert "bytes of text, tokenizer" in fault


def test_a_stream_cut_inside_a_character_is_sound() -> None:
    tokenizer = load_tokenizer(SP8192)
    whole = stream(tokenizer, ["one two", "a \U0001f600"])
    assert tokenizer.is_byte(int(whole.tokens[-1]))
    for cut in range(4):
        assert (
            text_fault(tokenizer, ValidationSet(whole.tokens[: whole.tokens.size - cut], whole.document_starts)) == ""
        )


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    tokenizer = load_tokenizer(SP8192)
    for split in ("train", "val"):
        texts = [f"{split} one", "two  three"]
        write_shard(tmp_path / f"toy_{split}_0.bin", stream(tokenizer, texts).tokens)
    return DataConfig(
        train=str(tmp_path / "toy_train_*.bin"), val=str(tmp_path / "toy_val_*.bin"), tokenizer=str(SP8192)
    )


def test_the_answer_for_a_large_set_is_remembered(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(remembered, "LEAST_BYTES", 1)
    hashes = hash_data(data, vocab_size=8192)
    check_text(data, hashes, vocab_size=8192)

    def fail(*_: object) -> str:
        raise AssertionError("decoded again")

    monkeypatch.setattr(text_check, "text_fault", fail)
    check_text(data, hashes, vocab_size=8192)
    with pytest.raises(AssertionError, match="decoded again"):
        check_text(dataclasses.replace(data, val_documents=1), hashes, vocab_size=8192)


def test_documents_of_several_batches_are_all_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_check, "BATCH_TOKENS", 4)
    tokenizer = load_tokenizer(SP8192)
    good = stream(tokenizer, [f"number {n} is one more" for n in range(20)])
    assert text_fault(tokenizer, good) == ""
    tokens = np.array(good.tokens)
    tokens[good.document_starts[13] + 1] = 4 + 0xE2
    assert text_fault(tokenizer, ValidationSet(tokens, good.document_starts)).startswith("document 13 (")


def test_a_run_over_text_that_cannot_be_counted_is_refused(data: DataConfig, tmp_path: Path) -> None:
    from runner.provenance import data_hash

    assert data_hash(data, vocab_size=8192)
    write_shard(Path(data.val.replace("*", "0")), np.array([1, 500, 3, 501], dtype=np.uint16))
    with pytest.raises(ValueError, match=r"data\.val=.*1 of 4 tokens are unknown to tokenizer"):
        data_hash(data, vocab_size=8192)
    assert load_validation([Path(data.val.replace("*", "0"))], vocab_size=8192).num_documents == 1
