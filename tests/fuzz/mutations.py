"""Seeded damage to valid files: bits, bytes, cuts, insertions, odd values in JSON, and checksums made right again."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from model.quant.artifact import DIGEST_BYTES, PREFIX, load_artifact

ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 7, 9, 16, 255, 65_536, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308, "", "codes", "rans",
    [], {}, [[]], {"a": 1},
)  # fmt: skip


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


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a JSON value, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy of a JSON value with new in the place that path names."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


def odd_json(value: Any, rng: random.Random, *more: Any) -> Any:
    """Return a JSON value with an odd one (of ODD_VALUES or more) in one of its places."""
    return changed(value, rng.choice(places(value)), rng.choice((*ODD_VALUES, *more)))


def seal(content: bytes) -> bytes:
    """Return content with the checksum that makes it a complete artifact."""
    return content + hashlib.sha256(content).digest()


def with_header(data: bytes, header: bytes) -> bytes:
    """Return the artifact data with another header, its length and the checksum to match."""
    magic, header_bytes = PREFIX.unpack_from(data)
    streams = data[PREFIX.size + header_bytes : -DIGEST_BYTES]
    return seal(PREFIX.pack(magic, len(header)) + header + streams)


def header_of(data: bytes) -> dict[str, Any]:
    """Return the artifact's header as plain JSON values."""
    header: dict[str, Any] = json.loads(data[PREFIX.size : PREFIX.size + PREFIX.unpack_from(data)[1]])
    return header


def mutate_artifact(data: bytes, rng: random.Random) -> bytes:
    """Return an artifact with a byte, a stretch or a value of its header damaged, and the checksum made right."""
    kind = rng.choice(("byte", "byte", "cut", "insert", "header", "header", "header", "size"))
    if kind in ("header", "size"):
        header = header_of(data)
        choices = [place for place in places(header) if kind == "header" or place[:1] in (("streams",), ("tensors",))]
        place, new = rng.choice(choices), rng.choice(ODD_VALUES)
        if kind == "size":
            new = rng.randrange(1 << rng.randrange(1, 40))
        return with_header(data, json.dumps(changed(header, place, new)).encode())
    content, at = bytearray(data[:-DIGEST_BYTES]), rng.randrange(len(data) - DIGEST_BYTES)
    if kind == "byte":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at : at + rng.randrange(1, 64)]
    else:
        content[at:at] = rng.randbytes(rng.randrange(1, 64))
    return seal(bytes(content))


def fuzz_artifact_once(data: bytes, seed: int, folder: Path) -> str:
    """Load one mutation of an artifact; returns the refusal, or "" if it still loads."""
    path = folder / "mutated.ssq"
    path.write_bytes(mutate_artifact(data, random.Random(seed)))
    try:
        load_artifact(path)
    except ValueError as error:
        return str(error)
    return ""
