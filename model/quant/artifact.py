"""The artifact: one file with a quantized model, readable without executing anything that it contains.

Layout: 8 bytes magic, uint32 length of the header, the header (JSON), the compressed streams end to end, sha256 of all
before it. Codes, scales and float16 tensors each lie end to end in the order of the header's tensor list; the factors
of a low-rank correction follow the matrix that they correct. The same input gives the same bytes.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.files.atomic import replace_file
from model.quant import rans
from model.quant.artifact_header import (
    MAX_HEADER_BYTES,
    PARTS,
    Header,
    StreamEntry,
    TensorEntry,
    check_meta,
    parse_header,
    tensor_entries,
)
from model.quant.compression import SHUFFLE_HEADER_BYTES, byte_shuffle, byte_unshuffle, compress, decompress
from model.quant.low_rank import A_LEVELS, B_LEVELS, LowRank
from model.quant.quantized import QuantizedState, QuantizedWeight

MAGIC = b"SSQMODEL"
PREFIX = struct.Struct("<8sI")
DIGEST_BYTES = 32
MAX_FILE_BYTES = 1 << 30
PIECE_BYTES = 1 << 20  # of codes in one brotli stream: short enough to keep many cores busy
HALF_BYTES = 2


class ArtifactSizes(NamedTuple):
    """Bytes of a written artifact and of its parts after compression."""

    total_bytes: int
    header_bytes: int  # prefix and checksum included
    codes_bytes: int
    scales_bytes: int
    floats_bytes: int


class ArtifactInfo(NamedTuple):
    """Header of a file whose checksum was found right, and the sizes of its parts."""

    header: Header
    sizes: ArtifactSizes


class _Job(NamedTuple):
    """One stream still to be compressed."""

    part: str
    codec: str
    raw_bytes: int
    pack: Callable[[], bytes]


def pack_artifact(
    state: QuantizedState, config: ModelConfig, meta: Mapping[str, object], *, codec: str = "rans"
) -> bytes:
    """Return the artifact's bytes. codec "rans" or "brotli" is for the codes; scales and floats are always brotli."""
    tensors = tensor_entries(config, state)
    jobs = _jobs(state, tensors, codec)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # brotli gives up the GIL
        packed = list(pool.map(lambda job: job.pack(), jobs))
    streams = [StreamEntry(job.part, job.codec, job.raw_bytes, len(data)) for job, data in zip(jobs, packed)]
    header = Header(config, check_meta(meta), tensors, streams).to_json()
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"artifact header would take {len(header)} bytes, at most {MAX_HEADER_BYTES}: shorten meta")
    content = PREFIX.pack(MAGIC, len(header)) + header + b"".join(packed)
    return content + hashlib.sha256(content).digest()


def _jobs(state: QuantizedState, tensors: list[TensorEntry], codec: str) -> list[_Job]:
    """Return the streams to compress: codes in one rans stream or in brotli pieces, scales, floats."""
    integers = [state.matrices[entry.name] for entry in tensors if not entry.is_float]
    codes = [array.cpu().contiguous().numpy().reshape(-1) for weight in integers for array in _code_arrays(weight)]
    jobs = []
    if codes and codec == "rans":
        jobs.append(_Job("codes", "rans", sum(array.size for array in codes), partial(rans.encode, codes)))
    elif codes:
        data = b"".join(array.tobytes() for array in codes)
        pieces = [data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
        jobs += [_Job("codes", "brotli", len(piece), partial(compress, piece)) for piece in pieces]
    halves = {
        "scales": [array for weight in integers for array in _scale_arrays(weight)],
        "floats": [state.floats[entry.name] for entry in tensors if entry.is_float],
    }
    for part, group in halves.items():
        data = b"".join(tensor.cpu().numpy().astype("<f2").tobytes() for tensor in group)
        if data:
            jobs.append(_Job(part, "brotli", len(data), partial(compress, byte_shuffle(data, HALF_BYTES))))
    return jobs


def _code_arrays(weight: QuantizedWeight) -> list[Tensor]:
    """Return the integers of a matrix, its correction's included, in the order of TensorEntry.code_shapes."""
    extra = weight.correction
    return [weight.codes] if extra is None else [weight.codes, extra.a_codes, extra.b_codes]


def _scale_arrays(weight: QuantizedWeight) -> list[Tensor]:
    """Return the scales of a matrix, its correction's included, in the order of TensorEntry.scale_shapes."""
    extra = weight.correction
    return [weight.scales] if extra is None else [weight.scales, extra.a_scale, extra.b_scales]


def save_artifact(
    path: Path, state: QuantizedState, config: ModelConfig, meta: Mapping[str, object], *, codec: str = "rans"
) -> ArtifactSizes:
    """Write the artifact, replacing path only once all of it is on disk; returns its sizes.

    meta: whatever should be read together with the model (seed, hashes), as plain JSON values.
    """
    content = pack_artifact(state, config, meta, codec=codec)
    with replace_file(path) as file:
        file.write(content)
    return read_artifact_info(path).sizes


def read_artifact_info(path: Path) -> ArtifactInfo:
    """Return header and sizes of an artifact whose checksum and header hold; ValueError says what does not."""
    with path.open("rb") as file:
        return _read_info(file, path)


def load_artifact(path: Path) -> tuple[ModelConfig, QuantizedState]:
    """Return the model's configuration and its quantized state, on the CPU.

    Memory is taken only after checksum, header and sizes were found right, and for no more than they announce.
    Raises ValueError, one line, for anything that save_artifact would not have written.
    """
    return ArtifactReader().load(path)


class ArtifactReader:
    """Reads artifacts as load_artifact does, but unpacks one that it has just unpacked only once.

    Every call reads and hashes the whole file, and what it returns is what these bytes hold: the checksum, which is
    found right first, says whether they are those of the call before. Keeps one state, a byte a number.
    """

    def __init__(self) -> None:
        self._checksum = b""
        self._newest: tuple[ModelConfig, QuantizedState] | None = None

    def load(self, path: Path) -> tuple[ModelConfig, QuantizedState]:
        """Return what load_artifact does; the state is shared by all callers, who must not change it."""
        with path.open("rb") as file:
            header, sizes = _read_info(file, path)
            file.seek(-DIGEST_BYTES, os.SEEK_END)
            checksum = file.read(DIGEST_BYTES)
            if self._newest is None or checksum != self._checksum:
                file.seek(sizes.header_bytes - DIGEST_BYTES)
                self._newest = None  # one at a time in memory
                try:
                    self._newest = header.config, _unpack_state(file, header)
                except ValueError as error:
                    raise ValueError(f"artifact {path}: {error}") from None
                self._checksum = checksum
            return self._newest


def _read_info(file: BinaryIO, path: Path) -> ArtifactInfo:
    """Check prefix, checksum and header of an open artifact."""
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX.size)
    if prefix[: len(MAGIC)] != MAGIC[: len(prefix)] or not prefix:
        raise ValueError(f"artifact {path}: this is no seedsweep artifact")
    if len(prefix) < PREFIX.size or file_bytes < PREFIX.size + DIGEST_BYTES:
        raise ValueError(f"artifact {path}: truncated, only {file_bytes} bytes")
    header_bytes = PREFIX.unpack(prefix)[1]
    stream_bytes = file_bytes - PREFIX.size - header_bytes - DIGEST_BYTES
    if file_bytes > MAX_FILE_BYTES or header_bytes > MAX_HEADER_BYTES or stream_bytes < 0:
        raise ValueError(f"artifact {path}: truncated, or its header length of {header_bytes} bytes is a lie")
    if not _is_digest_right(file, file_bytes):
        raise ValueError(f"artifact {path}: checksum does not match, the file is damaged or truncated")
    file.seek(PREFIX.size)
    raw = file.read(header_bytes)
    try:
        header = parse_header(raw, stream_bytes=stream_bytes)
    except ValueError as error:
        raise ValueError(f"artifact {path}: {error}") from None
    by_part = {part: sum(s.num_bytes for s in header.streams if s.part == part) for part in PARTS}
    overhead = PREFIX.size + header_bytes + DIGEST_BYTES
    return ArtifactInfo(header, ArtifactSizes(file_bytes, overhead, *by_part.values()))


def _is_digest_right(file: BinaryIO, file_bytes: int) -> bool:
    """Return whether the last 32 bytes are the sha256 of all before them, reading a piece at a time."""
    file.seek(0)
    digest, left = hashlib.sha256(), file_bytes - DIGEST_BYTES
    while left > 0:
        piece = file.read(min(left, PIECE_BYTES))
        if not piece:
            return False  # the file shrank while it was read
        digest.update(piece)
        left -= len(piece)
    return digest.digest() == file.read(DIGEST_BYTES)


def _unpack_state(file: BinaryIO, header: Header) -> QuantizedState:
    """Decompress the streams that the file is positioned at, and cut them into tensors."""
    integers = [entry for entry in header.tensors if not entry.is_float]
    raw: dict[str, list[NDArray[Any]]] = {part: [] for part in PARTS}
    for stream in header.streams:
        raw[stream.part] += _unpack_stream(file.read(stream.num_bytes), stream, integers)
    parts: dict[str, NDArray[Any]] = {part: np.concatenate(arrays or [np.empty(0)]) for part, arrays in raw.items()}
    codes = iter(_cut(parts["codes"], [shape for entry in integers for shape in entry.code_shapes]))
    scales = iter(_cut(parts["scales"], [shape for entry in integers for shape in entry.scale_shapes]))
    matrices = {entry.name: _unpack_matrix(entry, codes, scales) for entry in integers}
    small = [entry for entry in header.tensors if entry.is_float]
    floats = {entry.name: t for entry, t in zip(small, _cut(parts["floats"], [entry.shape for entry in small]))}
    for name, tensor in floats.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"tensor {name} holds infinities or NaN")
    return QuantizedState(matrices=matrices, floats=floats)


def _unpack_matrix(entry: TensorEntry, codes: Iterator[Tensor], scales: Iterator[Tensor]) -> QuantizedWeight:
    """Take the arrays of one matrix, and check that its integers and scales are such as rounding gives."""
    qmax = (1 << (entry.bits - 1)) - 1
    levels = [(-qmax, qmax), A_LEVELS, B_LEVELS]
    integers = [next(codes) for _ in entry.code_shapes]
    steps = [next(scales) for _ in entry.scale_shapes]
    for array, (lowest, highest) in zip(integers, levels):
        if int(array.max()) > highest or int(array.min()) < lowest:
            what = f"codes beyond {entry.bits} bits" if array is integers[0] else "a correction beyond its levels"
            raise ValueError(f"tensor {entry.name} holds {what}")
    if not all((torch.isfinite(scale) & (scale > 0)).all() for scale in steps):
        raise ValueError(f"tensor {entry.name} holds a scale that is not positive and finite")
    if not entry.rank:
        return QuantizedWeight(integers[0], steps[0], entry.bits)
    return QuantizedWeight(integers[0], steps[0], entry.bits, LowRank(integers[1], steps[1], integers[2], steps[2]))


def _unpack_stream(data: bytes, stream: StreamEntry, integers: list[TensorEntry]) -> list[NDArray[Any]]:
    """Return the arrays of one stream, int8 or float16."""
    if stream.codec == "rans":
        return [*rans.decode(data, [math.prod(shape) for entry in integers for shape in entry.code_shapes])]
    if stream.part == "codes":
        return [np.frombuffer(decompress(data, num_bytes=stream.raw_bytes), dtype=np.int8)]
    shuffled = decompress(data, num_bytes=stream.raw_bytes + SHUFFLE_HEADER_BYTES)
    plain = byte_unshuffle(shuffled)
    if len(plain) != stream.raw_bytes or len(plain) % HALF_BYTES:
        raise ValueError(f"stream of {stream.part} is not shuffled as announced")
    return [np.frombuffer(plain, dtype="<f2").astype(np.float16)]


def _cut(flat: NDArray[Any], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Cut a flat array into tensors of these shapes, which take all of it."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = torch.split(torch.from_numpy(flat), sizes) if sizes else ()
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]
