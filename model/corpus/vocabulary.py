"""Training a SentencePiece vocabulary with the settings of the public SP8192 model, reproducibly."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import sentencepiece as spm

SENTENCE_CHARACTERS = 1000  # pieces never cross a space, so long documents can be cut at one
TEXT_LIMIT_BYTES = 64 << 20  # SentencePiece holds its text in memory


def train_vocabulary(texts: Iterable[str], *, vocab_size: int) -> bytes:
    """Return a BPE model file of at most vocab_size pieces (fewer if the text has no more to merge).

    One thread and no random sample: the same texts give the same file. No more than the first 64 MiB are used.
    Raises what texts raises, and ValueError if vocab_size leaves no room for the 256 bytes and the characters of the
    text.
    """
    model = io.BytesIO()
    raised: list[BaseException] = []  # SentencePiece turns what its sentences raise into an error of its own

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except BaseException as error:
            raised.append(error)
            raise

    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.999,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, SystemError) as error:
        if not raised:
            reason = str(error).strip().splitlines()[-1]
            raise ValueError(f"--vocab-size {vocab_size} does not suit the text: {reason}") from None
    finally:
        for cause in raised:
            raise cause
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    num_bytes = 0
    for text in texts:
        words = " ".join(text.split())
        while words:
            end = len(words)
            if end > SENTENCE_CHARACTERS:
                end = words.rfind(" ", 1, SENTENCE_CHARACTERS)
                end = SENTENCE_CHARACTERS if end < 0 else end
            yield words[:end]
            num_bytes += len(words[:end].encode())
            words = words[end:]
        if num_bytes >= TEXT_LIMIT_BYTES:
            return
