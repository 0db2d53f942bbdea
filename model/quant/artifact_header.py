"""The artifact's JSON header: what it says, and every check that it does not lie, before memory is taken.

Shapes follow from the model configuration, so a header may repeat them but not choose them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from model.banks import BANK_OF_KIND, BANKS, EMBEDDING, parameter_shapes, tensor_shapes
from model.config import ModelConfig, canonical_json
from model.fields import plain_settings
from model.quant.quantized import QuantizedState

FORMAT = 1
FORMAT_CORRECTED = 2  # of a file with a low-rank correction; every other file is of the first format
MAX_HEADER_BYTES = 1 << 20
MAX_NUMEL = 1 << 28  # numbers in one model that we agree to unpack: 256 MiB of codes
MAX_FIELD = 1 << 31  # of any integer in the model configuration
KEYS = ("format", "model", "meta", "tensors", "streams")
CODECS = ("brotli", "rans")
PARTS = ("codes", "scales", "floats")  # in this order in the file


class TensorEntry(NamedTuple):
    """One tensor of the artifact; bits 16 means float16, fewer mean integers with a float16 scale a row.

    A correction of rank K adds integer factors (R, K) and (K, C), and the scales of LowRank.
    """

    name: str
    bits: int
    shape: tuple[int, ...]
    rank: int = 0  # of the correction; 0: none
    group: int = 0  # entries of its second factor that share a scale

    @property
    def is_float(self) -> bool:
        """Whether it is stored as float16."""
        return self.bits == 16

    @property
    def code_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the integer arrays, in the order in which they are stored."""
        factors = [(self.shape[0], self.rank), (self.rank, self.shape[1])] if self.rank else []
        return [] if self.is_float else [self.shape, *factors]

    @property
    def scale_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the arrays of scales, in the order in which they are stored."""
        of_factors = [(1,), (self.rank * self.shape[1] // self.group,)] if self.rank else []
        return [] if self.is_float else [self.shape[:1], *of_factors]

    def to_row(self) -> list[Any]:
        """Return the entry as it stands in the header."""
        return list(self if self.rank else self[:3])

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


class StreamEntry(NamedTuple):
    """One compressed stream: which part of the model, by which codec, bytes before and after."""

    part: str
    codec: str
    raw_bytes: int
    num_bytes: int


class Header(NamedTuple):
    """All that an artifact says about itself."""

    config: ModelConfig
    meta: dict[str, Any]
    tensors: list[TensorEntry]
    streams: list[StreamEntry]

    @property
    def format(self) -> int:
        """Number of the format, the lowest that can hold these tensors."""
        return FORMAT_CORRECTED if any(entry.rank for entry in self.tensors) else FORMAT

    def to_json(self) -> bytes:
        """Return the header as it stands in the file: canonical JSON, so equal headers are equal bytes."""
        content = {
            "format": self.format,
            "model": plain_settings(self.config),
            "meta": self.meta,
            "tensors": [entry.to_row() for entry in self.tensors],
            "streams": [list(entry) for entry in self.streams],
        }
        return canonical_json(content).encode()


def tensor_entries(config: ModelConfig, state: QuantizedState) -> list[TensorEntry]:
    """Return the entries of state's tensors in the artifact's order; asserts that they are the model's."""
    entries = []
    for name, shape in tensor_shapes(config).items():
        matrix = state.matrices.get(name)
        tensor = state.floats[name] if matrix is None else matrix.codes
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, the model wants {shape}"
        correction = None if matrix is None else matrix.correction
        factors = (0, 0) if correction is None else (correction.rank, correction.group)
        entries.append(TensorEntry(name, 16 if matrix is None else matrix.bits, shape, *factors))
    assert len(entries) == len(state.matrices) + len(state.floats), "state has tensors that the model does not have"
    return entries


def raw_sizes(tensors: list[TensorEntry]) -> dict[str, int]:
    """Return part -> bytes before compression."""
    return {
        "codes": sum(math.prod(shape) for entry in tensors for shape in entry.code_shapes),
        "scales": 2 * sum(math.prod(shape) for entry in tensors for shape in entry.scale_shapes),
        "floats": 2 * sum(entry.numel for entry in tensors if entry.is_float),
    }


def parse_header(raw: bytes, *, stream_bytes: int) -> Header:
    """Return the checked header; stream_bytes is what the file holds after it. ValueError names what is wrong."""
    try:
        content = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("header is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"header is not JSON: {error}") from None
    if not isinstance(content, dict) or set(content) != set(KEYS):
        raise ValueError(f"header must have exactly the keys {', '.join(KEYS)}")
    if type(content["format"]) is not int or content["format"] not in (FORMAT, FORMAT_CORRECTED):
        raise ValueError(
            f"format={content['format']!r} is unknown; this version reads formats {FORMAT} and {FORMAT_CORRECTED}"
        )
    if not isinstance(content["meta"], dict):
        raise ValueError("meta must be an object")
    config = _parse_config(content["model"])
    tensors = _parse_tensors(content["tensors"], config)
    streams = _parse_streams(content["streams"], tensors, stream_bytes)
    header = Header(config, content["meta"], tensors, streams)
    if header.format != content["format"]:
        raise ValueError(f"format={content['format']} is not that of its tensors, {header.format}")
    return header


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _parse_config(content: object) -> ModelConfig:
    """Return the model configuration, every field of the first version present, each of its type and bounded."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(ModelConfig)}
    added = {field.name for field in dataclasses.fields(ModelConfig) if field.metadata.get("is_added")}
    if not isinstance(content, dict) or not set(fields) - added <= set(content) <= set(fields):
        raise ValueError(f"model must have exactly the fields {', '.join(fields)}")
    values: dict[str, Any] = {}
    for name, value in content.items():
        kind = fields[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        allowed = is_number if kind is float else type(value) is kind
        if not allowed or (is_number and not abs(value) < MAX_FIELD):
            raise ValueError(f"model.{name}={str(value)[:40]!r} must be a {kind.__name__} below {MAX_FIELD}")
        values[name] = float(value) if kind is float else value
    config = ModelConfig(**values)
    numel = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    if numel > MAX_NUMEL:
        raise ValueError(f"the model would have {numel} parameters; at most {MAX_NUMEL} are unpacked")
    return config


def _parse_rows(content: object, name: str, is_row: Callable[[list[Any]], bool]) -> list[list[Any]]:
    """Return content if it is a list of lists that each satisfy is_row."""
    if not isinstance(content, list):
        raise ValueError(f"{name} must be a list")
    for index, row in enumerate(content):
        if not isinstance(row, list) or not is_row(row):
            raise ValueError(f"{name}[{index}] is malformed")
    return content


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 40


def _parse_tensors(content: object, config: ModelConfig) -> list[TensorEntry]:
    """Return the tensor list, which must be the model's, with bits that the artifact can hold."""
    rows = _parse_rows(
        content,
        "tensors",
        lambda row: len(row) in (3, 5) and [type(item) for item in row] == [str, int, list, int, int][: len(row)],
    )
    # counted before they are listed: a lying num_layers must not make us list millions of names
    num_expected = len(BANK_OF_KIND) * config.num_layers + len(parameter_shapes(config)) - len(BANKS)
    if len(rows) != num_expected:
        raise ValueError(f"header lists {len(rows)} tensors, its model has {num_expected}")
    entries = []
    for (name, shape), row in zip(tensor_shapes(config).items(), rows, strict=True):
        if row[0] != name or row[2] != list(shape):
            raise ValueError(f"tensor {str(row[0])[:40]!r} {str(row[2])[:40]} stands where {name} {list(shape)} should")
        is_matrix = name == EMBEDDING or name.startswith("layers.")
        if row[1] != 16 and not (is_matrix and 2 <= row[1] <= 8):
            raise ValueError(f"tensor {name} cannot have {row[1]} bits")
        entry = TensorEntry(name, row[1], shape, *row[3:])
        if len(row) == 5 and not _can_correct(entry):
            raise ValueError(f"tensor {name} cannot have a correction of rank {entry.rank} in runs of {entry.group}")
        entries.append(entry)
    return entries


def _can_correct(entry: TensorEntry) -> bool:
    """Return whether a correction as announced is one that could have been written."""
    if entry.is_float or not 1 <= entry.rank <= min(entry.shape):
        return False
    return entry.group >= 1 and entry.rank * entry.shape[1] % entry.group == 0


def _parse_streams(content: object, tensors: list[TensorEntry], stream_bytes: int) -> list[StreamEntry]:
    """Return the stream list, whose sizes must add up to the tensors before and to the file after compression."""
    rows = _parse_rows(
        content,
        "streams",
        lambda row: len(row) == 4 and row[0] in PARTS and row[1] in CODECS and _is_size(row[2]) and _is_size(row[3]),
    )
    streams = [StreamEntry(*row) for row in rows]
    if [PARTS.index(stream.part) for stream in streams] != sorted(PARTS.index(stream.part) for stream in streams):
        raise ValueError(f"streams must come in the order {', '.join(PARTS)}")
    for part, expected in raw_sizes(tensors).items():
        declared = sum(stream.raw_bytes for stream in streams if stream.part == part)
        if declared != expected:
            raise ValueError(f"streams of {part} declare {declared} bytes, its tensors take {expected}")
    declared = sum(stream.num_bytes for stream in streams)
    if declared != stream_bytes:
        raise ValueError(f"streams declare {declared} bytes, the file holds {stream_bytes}")
    for stream in streams:
        if stream.num_bytes > 2 * stream.raw_bytes + MAX_HEADER_BYTES:
            raise ValueError(f"a stream of {stream.part} takes {stream.num_bytes} bytes for {stream.raw_bytes}")
        if stream.codec == "rans" and (stream.part != "codes" or stream.raw_bytes != raw_sizes(tensors)["codes"]):
            raise ValueError("a rans stream must hold all codes and nothing else")
    return streams


def check_meta(meta: Mapping[str, object]) -> dict[str, Any]:
    """Return meta as a dict if it can be written as JSON; ValueError otherwise."""
    try:
        canonical_json(dict(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta cannot be written as JSON: {error}") from None
    return dict(meta)
