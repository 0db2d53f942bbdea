"""Fetching the published FineWeb shards and their tokenizer from the Hugging Face hub.

Each file is checked against the hub's own hash as it arrives and only then takes its place, so a run that was stopped
continues with the file it was at. The manifest comes last and names the revision everything is from.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from model.corpus.writer import Corpus, SplitCounts, hold_folder
from model.data.manifest import Manifest, describe_file, read_manifest, scan_shard, write_manifest
from model.data.tokenizer import load_tokenizer
from model.fields import require
from model.files.atomic import file_sha256
from model.files.linked import READ_BYTES
from model.report import Report

NAME = "fineweb"
# holds the 8,192-piece variant; named by the published record (PR #1536 builds on it) for --variant sp8192
DEFAULT_REPO = "kevclark/parameter-golf"
DEFAULT_VARIANT = "sp8192"
STAGING = ".fetch"
POLL_S = 0.5
MORE_INFORMATION = "For more information check"  # a page on what the number means
MESSAGE_CHARACTERS = 600
REFUSALS = (401, 403)
# requests of older hub versions, httpx of newer ones: both raise these bases of the hub's own error
NETWORK_ERRORS: tuple[type[BaseException], ...] = (OSError, EntryNotFoundError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchOptions:
    """What to fetch. num_shards counts training shards from the first; None: all. endpoint None: HF_ENDPOINT's."""

    repo: str = DEFAULT_REPO
    variant: str = DEFAULT_VARIANT  # sp<vocabulary size>
    revision: str = "main"
    num_shards: int | None = None
    endpoint: str | None = None

    def __post_init__(self) -> None:
        require(re.fullmatch(r"sp\d{3,5}", self.variant) is not None, f"--variant {self.variant} must be like sp8192")
        require(
            re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.repo) is not None,
            f"--repo {self.repo} must be like owner/repository",
        )
        require(self.num_shards is None or self.num_shards >= 1, f"--shards {self.num_shards} must be at least 1")

    @property
    def vocab_size(self) -> int:
        """Pieces of the variant's tokenizer."""
        return int(self.variant[2:])


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the hub: sha256 where it is stored by content, else git_sha1 of its blob."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str

    @property
    def name(self) -> str:
        """Name without folders, the name it gets here."""
        return self.path.rsplit("/", 1)[-1]

    def is_file(self, path: Path) -> bool:
        """Return whether the file at path is this one, by length and hash."""
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        return file_sha256(path) == self.sha256 if self.sha256 else git_blob_sha1(path) == self.git_sha1


def git_blob_sha1(path: Path) -> str:
    """Return the id (hex) that git gives the contents of a file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def list_published(options: FetchOptions) -> tuple[str, list[RemoteFile]]:
    """Return the commit that the revision stands for, and the files wanted: tokenizer, validation, training shards.

    Raises ValueError if the hub cannot be reached, or does not have them.
    """
    api = HfApi(endpoint=options.endpoint)
    try:
        commit = api.dataset_info(options.repo, revision=options.revision).sha
        tree = api.list_repo_tree(options.repo, recursive=True, revision=commit, repo_type="dataset")
        entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    except NETWORK_ERRORS as error:
        raise ValueError(f"cannot list dataset {options.repo} at {api.endpoint}: {explain(error)}") from None
    files = [
        RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id) for entry in entries
    ]
    folder = rf"(?:[\w-][\w.-]*/)*fineweb10B_{options.variant}/fineweb"
    tokenizers = _matching(files, rf"(?:[\w-][\w.-]*/)*fineweb_{options.vocab_size}_bpe\.model")
    val = _matching(files, rf"{folder}_val_\d{{6}}\.bin")
    train = _matching(files, rf"{folder}_train_\d{{6}}\.bin")
    for what, found in (("tokenizer", tokenizers), ("validation shard", val), ("training shard", train)):
        require(bool(found), f"dataset {options.repo} has no {what} of --variant {options.variant}")
    wanted = train[: options.num_shards]
    require(
        options.num_shards is None or len(wanted) == options.num_shards,
        f"--shards {options.num_shards}: dataset {options.repo} has {len(train)} training shards of {options.variant}",
    )
    return str(commit), [tokenizers[0], *val, *wanted]


def _matching(files: list[RemoteFile], pattern: str) -> list[RemoteFile]:
    found = [file for file in files if re.fullmatch(pattern, file.path)]
    return sorted(found, key=lambda file: (file.name, file.path))


def explain(error: BaseException) -> str:
    """Return all that the hub and its library say about an error, in one line, and what became of the user's token.

    The first line of such an error is only its number; that the data are gated comes in the last.
    """
    cause = error.__cause__
    if isinstance(error, LocalEntryNotFoundError) and cause is not None:
        return explain(cause)  # "check your connection", whatever the reason was
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and MORE_INFORMATION not in line]
    said = " ".join(lines)[:MESSAGE_CHARACTERS] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status not in REFUSALS:
        return said
    if get_token() is None:
        return f"{said}; no HF_TOKEN is set"
    return f"{said}; HF_TOKEN is set and was refused (or the token that `hf auth login` keeps)"


def fetch_fineweb(out: Path, options: FetchOptions, report: Report) -> Corpus:
    """Bring the published shards and tokenizer into folder out, skipping what is there, and write its manifest.

    Another process that fetches into out is waited for. More shards can be added later by the same call.
    Raises ValueError if the hub has no such data, the disk is too small, or out holds other data; ConnectionError if
    the network fails on the way (call again to continue).
    """
    disable_progress_bars()
    commit, files = list_published(options)
    with hold_folder(out, on_wait=lambda: report("fetch", 0, None, {"file": "another process is at it"})):
        source = {"kind": "hub", "repo": options.repo, "variant": options.variant, "revision": commit}
        present = _check_folder(out, source, files, report)
        staging = out / STAGING
        missing = [file for file in files if file.name not in present]
        needed = sum(file.size for file in missing)
        out_free = shutil.disk_usage(out).free
        require(needed <= out_free, f"--out {out} has {out_free} bytes free, {needed} are needed; lower --shards")
        total = sum(file.size for file in files)
        done = total - needed
        report("fetch", done, total, {"file": missing[0].name if missing else "nothing missing"})
        for file in missing:
            with _progress(staging, done, total, file.name, report):
                _fetch_file(out, file, commit, options)
            done += file.size
            report("fetch", done, total, {"file": file.name})
        shutil.rmtree(staging, ignore_errors=True)
        return _finish(out, files, options, source)


def _check_folder(out: Path, source: dict[str, str], files: list[RemoteFile], report: Report) -> set[str]:
    """Return the names of the wanted files that are there; remove damaged ones of ours, refuse another corpus."""
    manifest = read_manifest(out)
    if manifest is not None:
        is_same = {key: manifest.source.get(key) for key in source} == source
        require(is_same, f"--out {out} already holds another corpus ({manifest.name}); choose an empty folder")
    is_ours = manifest is not None or (out / STAGING).is_dir()
    wanted = {file.name: file for file in files}
    listed = set(manifest.files) if manifest is not None else set()
    present: set[str] = set()
    found = sorted([*out.glob("*.bin"), *out.glob("*.model")])
    for number, path in enumerate(found, start=1):
        if path.name in wanted and wanted[path.name].is_file(path):
            present.add(path.name)
        elif path.name in wanted and is_ours:
            path.unlink()
        elif path.name not in listed and (path.name in wanted or not is_ours):
            raise ValueError(f"--out {out} already holds {path.name}, which is not the published one; remove it")
        report("verify", number, len(found), {"file": path.name})
    return present


def _fetch_file(out: Path, file: RemoteFile, commit: str, options: FetchOptions) -> None:
    staging = out / STAGING
    try:
        hf_hub_download(
            options.repo,
            file.path,
            repo_type="dataset",
            revision=commit,
            local_dir=staging,
            endpoint=options.endpoint,
        )
    except NETWORK_ERRORS as error:
        raise ConnectionError(
            f"fetching {file.name} failed ({explain(error)}); run the same command again to continue"
        ) from None
    arrived = staging / file.path
    if not file.is_file(arrived):
        arrived.unlink()
        raise ConnectionError(f"{file.name} arrived damaged; run the same command again to fetch it anew")
    arrived.replace(out / file.name)


@contextlib.contextmanager
def _progress(staging: Path, done: int, total: int, name: str, report: Report) -> Iterator[None]:
    """Report the growth of what is being fetched, measured on disk, while the block runs."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_S):
            partial = sum(path.stat().st_size for path in staging.rglob("*.incomplete"))
            report("fetch", min(done + partial, total), total, {"file": name})

    thread = threading.Thread(target=watch, name="fetch-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _finish(out: Path, files: list[RemoteFile], options: FetchOptions, source: dict[str, str]) -> Corpus:
    """Check what arrived as a corpus and write its manifest, earlier shards of the same revision included."""
    tokenizer = load_tokenizer(out / files[0].name, vocab_size=options.vocab_size)
    shards = sorted(out.glob("fineweb_*_??????.bin"))
    counts = {"train": SplitCounts(), "val": SplitCounts()}
    for path in shards:
        facts = scan_shard(path)
        require(
            facts.max_token < options.vocab_size,
            f"shard {path} has token id {facts.max_token}, outside the {options.vocab_size} pieces of its tokenizer",
        )
        split = counts["val" if "_val_" in path.name else "train"]
        split.documents += facts.num_documents
        split.tokens += facts.num_tokens
    entries = {path.name: describe_file(path) for path in [*shards, tokenizer.path]}
    write_manifest(out, Manifest(NAME, tokenizer.path.name, entries, {**source, "vocab_size": options.vocab_size}))
    return Corpus(out, NAME, tokenizer.path, options.vocab_size, counts)
