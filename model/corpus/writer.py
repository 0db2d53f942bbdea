"""Writing a corpus into a folder: the claim on it, its shards, and its manifest at the very end.

A folder with a manifest is a finished corpus and is never written into. A folder without one may hold what an
interrupted run of the same corpus left; that is removed and made again, anything else is left alone and refused.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import time
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from model.corpus.shard_file import shard_header
from model.data.manifest import MANIFEST_NAME, Manifest, describe_file, read_manifest, write_manifest
from model.data.shards import TOKEN_DTYPE
from model.data.text_check import text_fault
from model.data.tokenizer import Tokenizer, target_bytes
from model.data.validation import load_validation
from model.files.atomic import NOT_THERE, replace_file

LOCK_NAME = ".seedsweep-data.lock"
HELD = ".held"  # ends the name of a file whose being there is the lock
SHARD_TOKENS = 100_000_000  # as the published shards
CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
SPLITS = ("train", "val")
WAIT_S = 1.0  # between looks at a folder that another process holds


@dataclass(slots=True)
class SplitCounts:
    """What a split holds: documents, tokens (a BOS each included) and UTF-8 bytes of the text as given.

    counted_bytes are those that the tokenizer gives back, which bits per byte are told over; unknown_tokens stand for
    text that it lost. text_bytes and counted_bytes are 0 where only tokens are known.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    counted_bytes: int = 0
    unknown_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """A finished corpus in a folder. num_in_both: validation documents that are training documents too."""

    folder: Path
    name: str
    tokenizer: Path
    vocab_size: int
    splits: Mapping[str, SplitCounts]
    num_in_both: int = 0


def is_intact(folder: Path, *, name: str | None = None) -> bool:
    """Return whether folder has a manifest (of corpus name, where given) and every file in it at its stated length."""
    try:
        manifest = read_manifest(folder)
    except ValueError:
        return False
    if manifest is None or name not in (None, manifest.name):
        return False
    paths = {folder / name: entry for name, entry in manifest.files.items()}
    return all(path.is_file() and path.stat().st_size == entry.bytes for path, entry in paths.items())


@contextlib.contextmanager
def hold_folder(out: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Make folder out if need be and keep other seedsweep data commands off it.

    With on_wait, they are waited for, and it is called every WAIT_S meanwhile.

    Raises ValueError if out is not writable, or is held by another process and nobody waits.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = _acquire(out / LOCK_NAME, on_wait)
    except Timeout as error:
        hint = f"; if none runs, remove {error.lock_file}" if error.lock_file.endswith(HELD) else ""
        raise ValueError(f"--out {out} is being written by another seedsweep data command{hint}") from None
    except OSError as error:
        raise ValueError(f"--out {out} is not writable ({error.strerror}); choose another folder") from None
    try:
        yield
    finally:
        (out / LOCK_NAME).unlink(missing_ok=True)  # while it is held: who gets a removed file's lock tries again
        lock.release()


def _acquire(path: Path, on_wait: Callable[[], None] | None) -> BaseFileLock:
    """Return the lock of a file, held; on a filesystem without flock that of a file which one process alone can make.

    Raises Timeout if another process has it and nobody waits.
    """
    lock: BaseFileLock = FileLock(path, blocking=False, fallback_to_soft=False)
    while True:
        try:
            lock.acquire()
        except Timeout:
            if on_wait is None:
                raise
            on_wait()
            time.sleep(WAIT_S)
        except OSError as error:
            if isinstance(lock, SoftFileLock) or error.errno not in NOT_THERE | {errno.ENOLCK}:
                raise
            lock = SoftFileLock(f"{path}{HELD}", blocking=False)
        else:
            return lock


@contextlib.contextmanager
def claim_folder(out: Path, name: str, *, is_remade: bool = False) -> Iterator[None]:
    """Hold folder out for one writer of corpus name, and clear what an interrupted one of that name left there.

    is_remade: a damaged corpus, one with a manifest and files missing or of wrong length, is cleared as well.
    Raises ValueError as hold_folder does, or if out holds another corpus.
    """
    if not CORPUS_NAME.fullmatch(name):
        raise ValueError(f"--name {name!r} must be letters, digits, dots and hyphens, at most 64")
    with hold_folder(out):
        _clear_leftovers(out, name, is_remade=is_remade)
        try:
            yield
        finally:
            if not (out / MANIFEST_NAME).exists():
                _clear_leftovers(out, name)


def _clear_leftovers(out: Path, name: str, *, is_remade: bool = False) -> None:
    own = re.compile(
        rf"\.?{re.escape(name)}_(train|val)_\d{{6}}\.bin(\..*\.tmp)?|\.?{re.escape(name)}\.model(\..*\.tmp)?"
    )
    has_manifest = (out / MANIFEST_NAME).exists()
    if has_manifest and not (is_remade and not is_intact(out)):
        raise ValueError(f"--out {out} already holds a corpus ({MANIFEST_NAME}); choose an empty folder, or remove it")
    present = sorted(path for path in out.iterdir() if path.suffix in (".bin", ".model", ".tmp"))
    foreign = [path for path in present if not own.fullmatch(path.name) and not path.name.startswith(".")]
    if foreign:
        raise ValueError(f"--out {out} already holds {foreign[0].name}, of another corpus; choose an empty folder")
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    for path in present:
        if own.fullmatch(path.name):
            path.unlink()


class ShardWriter:
    """Documents into shards <prefix>_NNNNNN.bin of at most shard_tokens each, streamed to disk.

    Every shard starts with a document; one longer than shard_tokens gets a shard of its own. Use as a context
    manager: the last shard appears when the block ends well.
    """

    def __init__(self, folder: Path, prefix: str, *, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.prefix, self.shard_tokens = folder, prefix, shard_tokens
        self.paths: list[Path] = []
        self._open = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._num_tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, (n,) uint16."""
        if self._file is not None and self._num_tokens + tokens.size > self.shard_tokens:
            self._finish_shard()
        if self._file is None:
            path = self.folder / f"{self.prefix}_{len(self.paths):06}.bin"
            self._file = self._open.enter_context(replace_file(path))
            self._file.write(shard_header(1))  # its place; the count is known when the shard is full
            self.paths.append(path)
        self._file.write(tokens.astype(TOKEN_DTYPE).tobytes())
        self._num_tokens += int(tokens.size)

    def _finish_shard(self) -> None:
        if self._file is not None:
            self._file.seek(0)
            self._file.write(shard_header(self._num_tokens))
            self._open.close()
        self._file, self._num_tokens = None, 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: Any) -> None:
        if kind is None:
            self._finish_shard()
        self._open.__exit__(kind, *details)


@dataclass(slots=True)
class CorpusWriter:
    """The shards of both splits of one corpus, its counts, and at the end its manifest."""

    out: Path
    name: str
    tokenizer: Tokenizer
    shard_tokens: int = SHARD_TOKENS
    counts: dict[str, SplitCounts] = field(default_factory=lambda: {split: SplitCounts() for split in SPLITS})
    _contents: dict[str, array[int]] = field(default_factory=lambda: {split: array("Q") for split in SPLITS})
    _writers: dict[str, ShardWriter] = field(default_factory=dict)
    _open: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> CorpusWriter:
        for split in SPLITS:
            writer = ShardWriter(self.out, f"{self.name}_{split}", shard_tokens=self.shard_tokens)
            self._writers[split] = self._open.enter_context(writer)
        return self

    def __exit__(self, *details: Any) -> None:
        self._open.__exit__(*details)

    def add(self, split: str, texts: list[str], *, num_threads: int = 1) -> None:
        """Encode and append documents to a split."""
        counts = self.counts[split]
        for text, tokens in zip(texts, self.tokenizer.encode_documents(texts, num_threads=num_threads), strict=True):
            self._writers[split].add(tokens)
            counts.documents += 1
            counts.tokens += int(tokens.size)
            counts.text_bytes += len(text.encode())
            counts.counted_bytes += int(target_bytes(self.tokenizer.byte_table, tokens).sum(dtype=np.int64))
            counts.unknown_tokens += int(np.count_nonzero(tokens == self.tokenizer.unknown_id))
            self._contents[split].append(int(content_hash(text)[:16], 16))

    @property
    def num_in_both(self) -> int:
        """Validation documents whose text (white space apart) is also that of a training document."""
        return int(np.isin(np.array(self._contents["val"]), np.array(self._contents["train"])).sum())

    def finish(self, tokenizer_path: Path, source: Mapping[str, Any]) -> Corpus:
        """Describe every file in the manifest, after the block of this writer has ended.

        Raises ValueError if the bytes of the validation text cannot be counted with the tokenizer.
        """
        if self.counts["val"].tokens > 1:
            validation = load_validation(self._writers["val"].paths, vocab_size=self.tokenizer.vocab_size)
            fault = text_fault(self.tokenizer, validation)
            if fault:
                raise ValueError(f"validation: {fault}")
        paths = [path for split in SPLITS for path in self._writers[split].paths]
        files = {path.name: describe_file(path) for path in [*paths, tokenizer_path]}
        splits = {
            split: {"documents": counts.documents, "tokens": counts.tokens, "text_bytes": counts.text_bytes}
            for split, counts in self.counts.items()
        }
        overlap = self.num_in_both
        facts = {"vocab_size": self.tokenizer.vocab_size, "splits": splits, "documents_in_both_splits": overlap}
        write_manifest(self.out, Manifest(self.name, tokenizer_path.name, files, {**facts, **source}))
        return Corpus(self.out, self.name, tokenizer_path, self.tokenizer.vocab_size, self.counts, overlap)


def save_tokenizer(out: Path, name: str, model: bytes) -> Path:
    """Write a SentencePiece model as <name>.model into out and return its path."""
    path = out / f"{name}.model"
    with replace_file(path) as file:
        file.write(model)
    return path


def content_hash(text: str) -> str:
    """Return the sha256 (hex) of a document's text; two that differ in white space only are the same document."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()
