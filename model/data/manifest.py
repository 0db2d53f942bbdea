"""The manifest beside a corpus: what each file must be, written last, so that its presence means completeness.

A corpus without one loads too. The hash of a run's data is taken over the contents of its shards and tokenizer, in
reading order, whether or not there is a manifest; where there is one, contents are compared with it first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from model.config import DataConfig, canonical_json
from model.data import remembered
from model.data.shards import BOS_ID, HEADER_BYTES, TOKEN_DTYPE, list_shards, read_num_tokens
from model.files.atomic import file_sha256, replace_file
from model.files.linked import READ_BYTES
from model.report import Report

MANIFEST_NAME = "manifest.json"
MANIFEST_FORMAT = 1
MANIFEST_LIMIT_BYTES = 16 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
SHA256 = re.compile(r"[0-9a-f]{64}")

NUM_TOKEN_IDS = 1 << (8 * TOKEN_DTYPE.itemsize)


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a corpus: its length and sha256 (hex), and for a shard the documents and tokens in it."""

    bytes: int
    sha256: str
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished corpus. shards by file name; tokenizer is one of files; source says how it was made."""

    name: str
    tokenizer: str
    files: Mapping[str, FileEntry]
    source: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What one reading of a whole shard tells: sha256 of the file, and how often each token is in it.

    counts (m + 1,) int64, m the largest token id.
    """

    sha256: str
    counts: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of the shard."""
        return int(self.counts.sum())

    @property
    def num_documents(self) -> int:
        """BOS tokens in it."""
        return int(self.counts[BOS_ID]) if self.counts.size > BOS_ID else 0

    @property
    def max_token(self) -> int:
        """Its largest token id."""
        return int(self.counts.size) - 1


@dataclass(frozen=True, slots=True)
class DataHashes:
    """data_hash over all shards, the tokenizer and the validation limits; sha256 by path, in reading order.

    train_counts (65,536,) int64: how often each token is in the training shards; (V,) where vocab_size was given.
    """

    data_hash: str
    train: Mapping[str, str]
    val: Mapping[str, str]
    tokenizer: str
    train_counts: np.ndarray


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of folder, the last file of a corpus."""
    content = {"format": MANIFEST_FORMAT, **dataclasses.asdict(manifest)}
    with replace_file(folder / MANIFEST_NAME) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of folder, or None where there is none.

    Raises ValueError if it is not one of ours, or names a file outside its folder.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size > MANIFEST_LIMIT_BYTES:
        raise ValueError(f"manifest {path} has {size} bytes, over the limit of {MANIFEST_LIMIT_BYTES}")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"manifest {path} is not JSON ({error})".replace("\n", " ")) from None
    if not isinstance(content, dict) or content.get("format") != MANIFEST_FORMAT:
        raise ValueError(f"manifest {path} is not of format {MANIFEST_FORMAT}; make the corpus again")
    files, source = content.get("files"), content.get("source", {})
    if not isinstance(files, dict) or not isinstance(source, dict):
        raise ValueError(f"manifest {path} has no table of files; make the corpus again")
    entries = {name: _parse_entry(path, name, entry) for name, entry in files.items()}
    tokenizer = content.get("tokenizer")
    if not isinstance(tokenizer, str) or tokenizer not in entries:
        raise ValueError(f"manifest {path} names tokenizer {tokenizer!r}, which is not among its files")
    return Manifest(str(content.get("name", "")), tokenizer, entries, source)


def _parse_entry(path: Path, name: str, entry: object) -> FileEntry:
    counts = ("bytes", "documents", "tokens")
    is_valid = (
        FILE_NAME.fullmatch(name) is not None
        and isinstance(entry, dict)
        and set(entry) == {*counts, "sha256"}
        and all(type(entry[key]) is int and 0 <= entry[key] < 2**63 for key in counts)
        and isinstance(entry["sha256"], str)
        and SHA256.fullmatch(entry["sha256"]) is not None
    )
    if not is_valid:
        raise ValueError(f"manifest {path} has no valid entry for file {name[:80]!r}; make the corpus again")
    assert isinstance(entry, dict)
    return FileEntry(**entry)


def describe_file(path: Path) -> FileEntry:
    """Return the manifest's entry for a file on disk, a shard's counts included."""
    if path.suffix != ".bin":
        return FileEntry(path.stat().st_size, file_sha256(path))
    facts = scan_shard(path)
    return FileEntry(path.stat().st_size, facts.sha256, facts.num_documents, facts.num_tokens)


def scan_shard(path: Path) -> ShardFacts:
    """Read a whole shard once and return what it holds.

    Remembered in this process, and for large shards on this node, while the file is unchanged.

    Raises FileNotFoundError or ValueError as read_num_tokens does.
    """
    read_num_tokens(path)
    info = path.stat()
    return _scan_shard(path.resolve(), info.st_size, info.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _scan_shard(path: Path, size: int, mtime_ns: int) -> ShardFacts:
    place = remembered.place_of(path)
    known = parse_facts(remembered.recall(place))
    if known is not None:
        return known
    # plain reads, not the memory map: pages of a map would count as this process's memory
    counts = np.zeros(NUM_TOKEN_IDS, dtype=np.int64)
    with path.open("rb") as file:
        header = file.read(HEADER_BYTES)
        digest = hashlib.sha256(header)
        while block := file.read(READ_BYTES):
            digest.update(block)
            counts += np.bincount(np.frombuffer(block, dtype=TOKEN_DTYPE), minlength=NUM_TOKEN_IDS)
    facts = ShardFacts(digest.hexdigest(), counts[: int(counts.nonzero()[0].max(initial=0)) + 1].copy())
    if remembered.place_of(path) == place:  # nobody wrote to the file meanwhile
        remembered.remember(place, {"sha256": facts.sha256, "counts": facts.counts.tolist()})
    return facts


def parse_facts(known: Mapping[str, Any] | None) -> ShardFacts | None:
    """Return what was remembered of a shard, None where that is nothing or not of this version's kind."""
    if known is None or set(known) != {"sha256", "counts"} or not isinstance(known["counts"], list):
        return None
    counts = np.array(known["counts"] or [0])
    is_whole = counts.ndim == 1 and counts.dtype.kind == "i" and counts.size <= NUM_TOKEN_IDS
    return ShardFacts(str(known["sha256"]), counts.astype(np.int64)) if is_whole else None


def check_data(
    data: DataConfig, *, vocab_size: int | None = None, is_deep: bool = False, report: Report | None = None
) -> list[str]:
    """Return one line for each thing of data that is missing or damaged, none if all is well.

    Headers, sizes and manifests are always checked; is_deep also reads every file: sha256 against the manifest, a BOS
    in every shard, token ids below vocab_size (where given), and no shard in both splits.
    """
    problems: list[str] = []
    shards: dict[str, list[Path]] = {}
    for split in ("train", "val"):
        try:
            shards[split] = list_shards(getattr(data, split), field=f"data.{split}")
        except (ValueError, OSError) as error:
            problems.append(str(error))
    tokenizer = Path(data.tokenizer)
    if not data.tokenizer or not tokenizer.is_file():
        problems.append(f"data.tokenizer={data.tokenizer}: no such file; give a SentencePiece .model file")
    else:
        problems += _check_file(tokenizer, is_deep=is_deep)
    total_bytes = sum(path.stat().st_size for paths in shards.values() for path in paths)
    done_bytes = 0
    for split, paths in shards.items():
        problems += _check_listed(paths, Path(getattr(data, split)).name)
        for path in paths:
            problems += _check_file(path, is_deep=is_deep, vocab_size=vocab_size)
            done_bytes += path.stat().st_size
            if report is not None:
                report("check", done_bytes, total_bytes, {"file": path.name})
    if is_deep and not problems and len(shards) == 2:
        train = {scan_shard(path).sha256: path for path in shards["train"]}
        twice = [path for path in shards["val"] if scan_shard(path).sha256 in train]
        problems += [f"shard {path} of data.val is also in data.train; keep the splits apart" for path in twice]
    return problems


def _check_listed(paths: list[Path], pattern: str) -> list[str]:
    """Files that a manifest lists, the glob would match, and nobody can find."""
    lines = []
    for folder in dict.fromkeys(path.parent for path in paths):
        present = {path.name for path in paths if path.parent == folder}
        try:
            manifest = read_manifest(folder)
        except ValueError as error:
            lines.append(str(error))
            continue
        names = [] if manifest is None else sorted(name for name in manifest.files if fnmatch(name, pattern))
        lines += [f"shard {folder / name} is missing, {folder / MANIFEST_NAME} lists it" for name in names
                  if name not in present]  # fmt: skip
    return lines


def _check_file(path: Path, *, is_deep: bool, vocab_size: int | None = None) -> list[str]:
    is_shard = path.suffix != ".model"
    try:
        if is_shard:
            read_num_tokens(path)
        manifest = read_manifest(path.parent)
    except (ValueError, OSError) as error:
        return [str(error)]
    kind = "shard" if is_shard else "tokenizer"
    if manifest is not None:
        entry = manifest.files.get(path.name)
        if entry is None:
            # a tokenizer may be kept beside a corpus that was made with another one
            return [f"shard {path} is not in {path.parent / MANIFEST_NAME}; remove it"] if is_shard else []
        if entry.bytes != path.stat().st_size:
            return [f"{kind} {path} has {path.stat().st_size} bytes, its manifest says {entry.bytes}; make it again"]
        if is_deep and entry.sha256 != (scan_shard(path).sha256 if is_shard else file_sha256(path)):
            return [f"{kind} {path} differs from the sha256 in its manifest; make or fetch it again"]
    if is_deep and is_shard:
        facts = scan_shard(path)
        if facts.num_documents == 0:
            return [f"shard {path} has no BOS (id {BOS_ID}); it was made with another tokenizer"]
        if vocab_size is not None and facts.max_token >= vocab_size:
            return [f"shard {path} has token id {facts.max_token}, outside model.vocab_size={vocab_size}"]
    return []


def hash_data(data: DataConfig, *, vocab_size: int | None = None, report: Report | None = None) -> DataHashes:
    """Check everything that data names and return its hashes.

    Files are read once per process while they are unchanged. Names and places of files do not enter the hash.
    Raises ValueError with the first problem that check_data(is_deep=True) finds.
    """
    problems = check_data(data, vocab_size=vocab_size, is_deep=True, report=report)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    hashes = {
        split: {str(path): scan_shard(path).sha256 for path in list_shards(getattr(data, split))}
        for split in ("train", "val")
    }
    tokenizer = file_sha256(Path(data.tokenizer))
    data_hash = combine_hashes(hashes["train"], hashes["val"], tokenizer, data)
    counts = np.zeros(NUM_TOKEN_IDS if vocab_size is None else vocab_size, dtype=np.int64)
    for path in hashes["train"]:
        found = scan_shard(Path(path)).counts
        counts[: found.size] += found
    return DataHashes(data_hash, hashes["train"], hashes["val"], tokenizer, counts)


def combine_hashes(train: Mapping[str, str], val: Mapping[str, str], tokenizer: str, data: DataConfig) -> str:
    """Return the data hash: over the contents of all shards by path, in reading order, the tokenizer and the limits."""
    content = {
        "train": list(train.values()),
        "val": list(val.values()),
        "tokenizer": tokenizer,
        "val_documents": data.val_documents,
        "val_tokens": data.val_tokens,
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
