"""The built-in corpus: real text that every installation already has, so the demo needs no network."""

from __future__ import annotations

from pathlib import Path

from model.corpus.docstrings import MIN_CHARACTERS, Docstrings, gather_docstrings
from model.corpus.vocabulary import train_vocabulary
from model.corpus.writer import Corpus, CorpusWriter, claim_folder, content_hash, save_tokenizer
from model.data.tokenizer import load_tokenizer
from model.report import Report

NAME = "builtin"
MAX_BYTES = 6_000_000
VOCAB_SIZE = 1024
VAL_DOCUMENTS = 240  # about 90,000 tokens
ENCODE_BATCH = 256  # documents


def build_builtin(
    out: Path,
    report: Report,
    *,
    max_bytes: int = MAX_BYTES,
    vocab_size: int = VOCAB_SIZE,
    val_documents: int = VAL_DOCUMENTS,
) -> Corpus:
    """Make the built-in corpus in folder out: shards, a tokenizer trained on the training part, a manifest.

    One docstring is one document. Documents are ordered by the sha256 of their text, a shuffle that every machine
    with the same package versions repeats; the first val_documents are for validation.
    What an interrupted or damaged build left in out is made again. Raises ValueError if out holds anything else.
    """
    with claim_folder(out, NAME, is_remade=True):
        found = Docstrings()
        for found in gather_docstrings(max_bytes):
            report("gather", sum(found.bytes_by_package.values()), max_bytes, {"documents": len(found.texts)})
        texts = sorted(found.texts, key=content_hash)
        split = {"val": texts[:val_documents], "train": texts[val_documents:]}
        if not split["train"]:
            raise ValueError(f"val_documents={val_documents} leaves none of {len(texts)} documents for training")
        overlap = {content_hash(text) for text in split["val"]} & {content_hash(text) for text in split["train"]}
        if overlap:
            raise ValueError(f"{len(overlap)} validation documents are among the training documents")
        report("vocabulary", 0, vocab_size, {})
        model_path = save_tokenizer(out, NAME, train_vocabulary(split["train"], vocab_size=vocab_size))
        tokenizer = load_tokenizer(model_path, vocab_size=vocab_size)
        report("vocabulary", vocab_size, vocab_size, {})
        with CorpusWriter(out, NAME, tokenizer) as writer:
            done = 0
            for name, documents in split.items():
                for start in range(0, len(documents), ENCODE_BATCH):
                    batch = documents[start : start + ENCODE_BATCH]
                    writer.add(name, batch)
                    done += len(batch)
                    report("encode", done, len(texts), {"split": name})
        return writer.finish(model_path, _describe_source(found))


def _describe_source(found: Docstrings) -> dict[str, object]:
    return {
        "kind": "docstrings",
        "min_characters": MIN_CHARACTERS,
        "order": "sha256 of the text",
        "versions": found.versions,
        "bytes_by_package": found.bytes_by_package,
        "unreadable_files": found.unreadable_files,
    }
