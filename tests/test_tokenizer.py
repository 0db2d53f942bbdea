"""model/data/tokenizer.py against golden set 1, the tokenizer's own decoding, and damaged files."""

from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given
from hypothesis import strategies as st

from model.data.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data"
GOLDEN = Path(__file__).parent / "golden" / "bpb_luts.npz"
SP8192 = DATA / "fineweb_8192_bpe.model"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(SP8192, vocab_size=8192)


def num_target_bytes(tokenizer: Tokenizer, tokens: np.ndarray) -> int:
    """The rule of golden set 1, written down once more as a check on the table."""
    table = tokenizer.byte_table
    previous, target = tokens[:-1], tokens[1:]
    spaces = table.has_leading_space[target] & ~table.is_boundary[previous]
    return int(table.base_bytes[target].sum(dtype=np.int64) + spaces.sum())


def test_the_table_agrees_with_the_published_one(tokenizer: Tokenizer) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for name in ("base_bytes", "has_leading_space", "is_boundary"):
            array = getattr(tokenizer.byte_table, name)
            assert array.dtype == golden[name].dtype
            assert np.array_equal(array, golden[name])


def test_ids_and_byte_counts_agree_with_the_published_ones(tokenizer: Tokenizer) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        for index, text in enumerate(golden["texts"]):
            start, end = golden["offsets"][index : index + 2]
            tokens = tokenizer.encode_documents([str(text)])[0]
            assert tokens.dtype == np.uint16
            assert np.array_equal(tokens, golden["ids"][start:end])
            assert num_target_bytes(tokenizer, tokens) == golden["byte_count"][index]
        assert num_target_bytes(tokenizer, golden["random_ids"]) == golden["random_byte_count"]


@given(text=st.text(max_size=60))
def test_counted_bytes_are_those_of_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode_documents([text])[0]
    assert num_target_bytes(tokenizer, tokens) == len(tokenizer.decode(tokens).encode())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.model is missing"):
        load_tokenizer(tmp_path / "gone.model")


def test_another_size_than_the_models_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 8192 pieces, but model\.vocab_size=1024"):
        load_tokenizer(SP8192, vocab_size=1024)


def test_another_bos_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a few words to learn pieces from\n" * 20)
    spm.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "toy"), vocab_size=280, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=2, eos_id=1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has BOS id 2, documents must start with id 1"):
        load_tokenizer(tmp_path / "toy.model")


@pytest.mark.parametrize("content", [b"", b"not a model", SP8192.read_bytes()[:5000]])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.model is not a usable SentencePiece model \(.+\)") as error:
        load_tokenizer(path)
    assert "\n" not in str(error.value)
