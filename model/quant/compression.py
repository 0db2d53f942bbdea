"""Byte-level helpers of the artifact: byte shuffling, and brotli that never returns more than was announced."""

from __future__ import annotations

import brotli
import numpy as np

SHUFFLE_MAGIC = b"BSHF"
SHUFFLE_HEADER_BYTES = len(SHUFFLE_MAGIC) + 1  # the magic, then the stride
MAX_STRIDE = 5  # above it, data too short to be shuffled could look like a header
PIECE_BYTES = 1 << 20  # decompressed at a time


def byte_shuffle(data: bytes, stride: int) -> bytes:
    """Return BSHF, the stride, then all bytes at positions 0 mod stride, 1 mod stride and so on.

    Brings the bytes of equal weight of numbers together, which compressors like: 4 % on float16, nothing on int8.
    Data shorter than the stride comes back unchanged. Source: the reference record's container.
    """
    assert 1 <= stride <= MAX_STRIDE, stride
    if len(data) < stride:
        return data
    flat = np.frombuffer(data, dtype=np.uint8)
    planes = [flat[offset::stride].tobytes() for offset in range(stride)]
    return SHUFFLE_MAGIC + bytes([stride]) + b"".join(planes)


def byte_unshuffle(data: bytes) -> bytes:
    """Return what byte_shuffle was given; ValueError if the stride in the header is impossible."""
    if not data.startswith(SHUFFLE_MAGIC) or len(data) < SHUFFLE_HEADER_BYTES:
        return data
    stride = data[len(SHUFFLE_MAGIC)]
    planes = np.frombuffer(data, dtype=np.uint8, offset=SHUFFLE_HEADER_BYTES)
    if not 1 <= stride <= MAX_STRIDE or planes.size < stride:
        raise ValueError(f"byte shuffle of stride {stride} over {planes.size} bytes is impossible")
    flat = np.empty(planes.size, dtype=np.uint8)
    start = 0
    for offset in range(stride):
        part = flat[offset::stride]
        part[:] = planes[start : start + part.size]
        start += part.size
    return flat.tobytes()


def compress(data: bytes) -> bytes:
    """Return data as one brotli stream of quality 11."""
    return bytes(brotli.compress(data, quality=11))


def decompress(data: bytes, *, num_bytes: int) -> bytes:
    """Return the num_bytes that a brotli stream holds; ValueError if it holds more, fewer, or is damaged.

    Output is taken in pieces and given up at the first byte too many, so a bomb costs one piece.
    """
    decoder = brotli.Decompressor()
    pieces: list[bytes] = []
    room = num_bytes
    try:
        piece = decoder.process(data, output_buffer_limit=PIECE_BYTES)
        while piece and len(piece) <= room:
            pieces.append(piece)
            room -= len(piece)
            piece = b"" if decoder.is_finished() else decoder.process(b"", output_buffer_limit=PIECE_BYTES)
    except brotli.error as error:
        raise ValueError(f"brotli stream of {len(data)} bytes is damaged: {error}") from None
    if piece or room or not decoder.is_finished():
        raise ValueError(f"brotli stream of {len(data)} bytes does not hold exactly {num_bytes} bytes")
    return b"".join(pieces)
