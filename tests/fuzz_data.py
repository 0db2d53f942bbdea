"""Mutations of shards, manifests and tokenizers for hostile-input tests.

Each fuzz_* function loads one mutation, made from its seed, and returns the refusal, or "" if it still loads and gives
what the file says. Anything but a ValueError of one line goes through to the caller.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from model.data.manifest import MANIFEST_NAME, read_manifest, scan_shard
from model.data.shards import HEADER_BYTES, find_documents, open_shard, shard_header
from model.data.tokenizer import load_tokenizer
from tests.fuzz_artifact import ODD_VALUES, changed, places

TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
HEADER_VALUES = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 20240520)


def mutate_bytes(data: bytes, rng: random.Random, *, reach: int | None = None) -> bytes:
    """Return data with one to twenty random damages among its first reach bytes: a byte, a cut or an insertion."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        at = rng.randrange(max(1, min(len(content), reach or len(content))))
        kind = rng.choice(("bit", "byte", "cut", "insert"))
        if kind == "bit" and content:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "byte" and content:
            content[at] = rng.randrange(256)
        elif kind == "cut":
            del content[at : at + rng.randrange(1, 64)]
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 64))
    return bytes(content)


def refusal(load: Callable[[], None]) -> str:
    """Return the one line with which load refuses, or ""."""
    try:
        load()
    except ValueError as error:
        line = str(error)
    else:
        return ""
    assert line
    assert "\n" not in line, line
    return line


def fuzz_shard(seed: int, folder: Path) -> str:
    """Open and search one mutated shard of some twenty tokens; what loads must agree with the bytes on disk."""
    rng = random.Random(seed)
    path = folder / "fuzz_train_000000.bin"
    ids = np.array([1, *(rng.randrange(1024) for _ in range(rng.randrange(1, 40)))], dtype="<u2")
    data = shard_header(ids.size) + ids.tobytes()
    if rng.random() < 0.5:
        header = np.frombuffer(data[:HEADER_BYTES], dtype="<i4").copy()
        header[rng.randrange(4)] = rng.choice(HEADER_VALUES) if rng.random() < 0.7 else rng.randrange(-(2**31), 2**31)
        data = header.tobytes() + data[HEADER_BYTES:]
    else:
        data = mutate_bytes(data, rng, reach=rng.choice((12, HEADER_BYTES, len(data))))
    path.write_bytes(data)

    def load() -> None:
        tokens = open_shard(path)
        assert tokens.tobytes() == data[HEADER_BYTES:]
        facts = scan_shard(path)
        assert (facts.num_tokens, facts.num_documents) == (tokens.size, find_documents(tokens).size)

    return refusal(load)


def fuzz_manifest(seed: int, folder: Path) -> str:
    """Read one mutated manifest; every file name that loads must stay inside the folder."""
    rng = random.Random(seed)
    entry = {"bytes": 1032, "documents": 1, "tokens": 4, "sha256": "0123456789abcdef" * 4}
    value = {
        "format": 1,
        "name": "toy",
        "tokenizer": "toy.model",
        "files": {"toy.model": entry, "toy_val_000000.bin": entry},
        "source": {"kind": "text", "inputs": ["a.jsonl"]},
    }
    if rng.random() < 0.5:
        odd = (*ODD_VALUES, "../../etc/passwd", "\x00", "/dev/zero", float("nan"))
        data = json.dumps(changed(value, rng.choice(places(value)), rng.choice(odd))).encode()
    else:
        data = mutate_bytes(json.dumps(value).encode(), rng)
    (folder / MANIFEST_NAME).write_bytes(data)

    def load() -> None:
        manifest = read_manifest(folder)
        assert manifest is not None
        assert all((folder / name).parent == folder and ".." not in name for name in manifest.files)

    return refusal(load)


def fuzz_tokenizer(seed: int, folder: Path) -> str:
    """Load one mutated SP8192 model, then encode and decode with what still loads."""
    rng = random.Random(seed)
    path = folder / "fuzz.model"
    path.write_bytes(mutate_bytes(TOKENIZER.read_bytes(), rng))

    def load() -> None:
        tokenizer = load_tokenizer(path)
        characters = "".join(
            chr(rng.choice((rng.randrange(1, 0x300), rng.randrange(0x2000, 0x3100)))) for _ in range(99)
        )
        tokenizer.decode(tokenizer.encode_document(characters))
        assert tokenizer.byte_table.base_bytes.size == tokenizer.vocab_size

    return refusal(load)
