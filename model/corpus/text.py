"""Turning people's own documents into a corpus, streaming: inputs may be larger than memory.

A .txt file is one document; a line of .jsonl or .jsonl.gz and a row of .parquet are one each. Order is kept and the
text goes to SentencePiece as it is.
"""

from __future__ import annotations

import difflib
import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from model.corpus.vocabulary import train_vocabulary
from model.corpus.writer import SHARD_TOKENS, Corpus, CorpusWriter, claim_folder, save_tokenizer
from model.data.cpus import usable_cpus
from model.data.tokenizer import load_tokenizer
from model.fields import require
from model.report import Report

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
DEFAULT_VOCAB_SIZE = 1024
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How documents become a corpus. Without a tokenizer file one is trained; without a split all are validation."""

    tokenizer: Path | None = None
    vocab_size: int | None = None  # of the tokenizer to train
    column: str = "text"  # of .jsonl and .parquet
    val_documents: int | None = None  # the first ones
    val_frac: float | None = None  # evenly spread
    name: str = "text"
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        require(self.tokenizer is None or self.vocab_size is None, "--tokenizer and --vocab-size exclude each other")
        require(
            self.val_documents is None or self.val_frac is None, "--val-documents and --val-frac exclude each other"
        )
        require(
            self.vocab_size is None or 260 < self.vocab_size <= 65_536,
            f"--vocab-size {self.vocab_size} must be between 261 (bytes and special pieces) and 65536",
        )
        require(
            self.val_documents is None or self.val_documents >= 1,
            f"--val-documents {self.val_documents} must be at least 1",
        )
        require(self.val_frac is None or 0 < self.val_frac < 1, f"--val-frac {self.val_frac} must be between 0 and 1")
        require(self.shard_tokens >= 1, f"--shard-tokens {self.shard_tokens} must be at least 1")

    @property
    def has_split(self) -> bool:
        """Whether some documents are for training."""
        return self.val_documents is not None or self.val_frac is not None

    def split_of(self, index: int) -> str:
        """Return the split of document index, "train" or "val"."""
        if self.val_documents is not None:
            return "val" if index < self.val_documents else "train"
        if self.val_frac is not None:
            return "val" if int((index + 1) * self.val_frac) > int(index * self.val_frac) else "train"
        return "val"


@dataclass(slots=True)
class Inputs:
    """The files to read, in order, and what lay beside them in the folders given and is left out."""

    files: list[Path] = field(default_factory=list)
    hidden: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Return a line for each thing about the files that the person who gave the folders may not expect."""
        lines = []
        if self.others:
            kinds = Counter(path.suffix or "no ending" for path in self.others)
            named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
            lines.append(f"{len(self.others)} files of other kinds are left out ({named}, such as {self.others[0]})")
        if self.hidden:
            lines.append(f"{len(self.hidden)} hidden files are left out, such as {self.hidden[0]}")
        times = Counter(path.resolve() for path in self.files)
        again = [path for path in self.files if times[path.resolve()] > 1]
        if again:
            distinct = len({path.resolve() for path in again})
            lines.append(f"{distinct} of {len(times)} files are read more than once, such as {again[0]}")
        return lines


def gather_inputs(paths: Sequence[Path]) -> Inputs:
    """Find the files behind paths in the order given; a folder stands for its files, sorted by path.

    What is hidden in a folder (a name with a dot first, or Python's caches) is left out, as are files of other kinds.
    Raises FileNotFoundError or ValueError naming a path that is missing, of unknown kind, or an empty folder.
    """
    found = Inputs()
    for path in paths:
        if path.is_dir():
            num_before = len(found.files)
            for file in sorted(file for file in path.rglob("*") if file.is_file()):
                is_known = file.name.endswith(SUFFIXES)
                place = found.hidden if is_hidden(file, path) else found.files if is_known else found.others
                place.append(file)
            if len(found.files) == num_before:
                notes = "".join(f"; {line}" for line in found.notes())
                raise ValueError(f"folder {path} has no file ending in {', '.join(SUFFIXES)}{notes}")
        elif not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give files or folders of {', '.join(SUFFIXES)}")
        else:
            require(path.name.endswith(SUFFIXES), f"{path} is of no known kind; use {', '.join(SUFFIXES)}")
            found.files.append(path)
    return found


def is_hidden(file: Path, folder: Path) -> bool:
    """Return whether a file is out of sight in a folder: itself, or by a folder between them."""
    return any(part.startswith(".") or part == "__pycache__" for part in file.relative_to(folder).parts)


def read_documents(files: Iterable[Path], *, column: str = "text") -> Iterator[str]:
    """Yield the documents of files one after another.

    Raises ValueError naming file and line (or row) if one cannot be read, has no text, or cannot be UTF-8.
    """
    for path in files:
        if path.name.endswith(".txt"):
            try:
                yield path.read_bytes().decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        elif path.name.endswith(".parquet"):
            yield from _read_parquet(path, column)
        else:
            yield from _read_json_lines(path, column)


def _read_json_lines(path: Path, column: str) -> Iterator[str]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _text_of_line(line, column, f"{path} line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged after line {number} ({error})") from None


def _text_of_line(line: bytes, column: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error})".replace("\n", " ")) from None
    require(isinstance(row, dict), f"{place} is not a JSON object with a field {column!r}")
    if column not in row:
        raise ValueError(f"{place} has no field {column!r}{_nearest(column, list(row))}")
    return _check_text(row[column], column, place)


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise ValueError(f"{path} has no column {column!r}{_nearest(column, file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=BATCH_DOCUMENTS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _check_text(value, column, f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not readable Parquet after row {number} ({error})".replace("\n", " ")) from None


def _check_text(value: object, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {column!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{place}: field {column!r} has half a surrogate pair, which UTF-8 cannot hold") from None
    return value


def _nearest(column: str, names: list[str]) -> str:
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
    hint = f"; nearest is {close[0]!r}" if close else ""
    return f"{hint}; it has {', '.join(names[:8]) or 'none'} (option --column)"


def build_text(paths: Sequence[Path], out: Path, options: TextOptions, report: Report) -> Corpus:
    """Make a corpus of people's documents in folder out: shards <name>_train_NNNNNN.bin, <name>_val_NNNNNN.bin.

    The tokenizer lies beside them as <name>.model. A trained one sees the training documents only; where there are
    none it sees the validation documents, and the manifest says so.
    Raises ValueError or FileNotFoundError as the functions above do, and if a split asked for stays empty.
    """
    files = gather_inputs(paths).files
    with claim_folder(out, options.name):
        source: dict[str, object] = {"kind": "text", "inputs": [path.name for path in files][:1000]}
        if options.tokenizer is not None:
            load_tokenizer(options.tokenizer)  # refused before anything is written
            model = options.tokenizer.read_bytes()
        else:
            split = "train" if options.has_split else "val"
            source["tokenizer_trained_on"] = split
            model = _train_on(files, options, split, report)
        tokenizer_path = save_tokenizer(out, options.name, model)
        tokenizer = load_tokenizer(options.tokenizer or tokenizer_path)
        if options.vocab_size not in (None, tokenizer.vocab_size):
            raise ValueError(
                f"--vocab-size {options.vocab_size} is more than the text has pieces for; "
                f"give {tokenizer.vocab_size} or less, or more text"
            )
        with CorpusWriter(out, options.name, tokenizer, shard_tokens=options.shard_tokens) as writer:
            _encode_all(files, options, writer, report)
        return writer.finish(tokenizer_path, source)


def _train_on(files: list[Path], options: TextOptions, split: str, report: Report) -> bytes:
    def texts() -> Iterator[str]:
        for index, text in enumerate(read_documents(files, column=options.column)):
            if options.split_of(index) == split:
                yield text
            if index % BATCH_DOCUMENTS == 0:
                report("vocabulary", index, None, {})

    first = list(itertools.islice(texts(), 1))
    require(bool(first), f"no document of {files[0]} is for {split}; a tokenizer needs some, or give --tokenizer FILE")
    return train_vocabulary(texts(), vocab_size=options.vocab_size or DEFAULT_VOCAB_SIZE)


def _encode_all(files: list[Path], options: TextOptions, writer: CorpusWriter, report: Report) -> None:
    num_threads = usable_cpus()
    waiting: dict[str, list[str]] = {"train": [], "val": []}
    num_characters = index = 0
    for index, text in enumerate(read_documents(files, column=options.column), start=1):
        waiting[options.split_of(index - 1)].append(text)
        num_characters += len(text)
        if index % BATCH_DOCUMENTS == 0 or num_characters >= BATCH_CHARACTERS:
            _flush(waiting, writer, num_threads)
            num_characters = 0
            report("encode", index, None, {"tokens": sum(counts.tokens for counts in writer.counts.values())})
    _flush(waiting, writer, num_threads)
    require(index > 0, f"{files[0]} has no document")
    for split in ("train", "val") if options.has_split else ("val",):
        require(
            writer.counts[split].documents > 0,
            f"the split leaves no document of {index} for {split}; change --val-documents or --val-frac",
        )


def _flush(waiting: dict[str, list[str]], writer: CorpusWriter, num_threads: int) -> None:
    for split, texts in waiting.items():
        if texts:
            writer.add(split, texts, num_threads=num_threads)
            texts.clear()
