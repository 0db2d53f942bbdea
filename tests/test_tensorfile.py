"""model.files.tensors: safetensors files come back as they were, and damage is told before memory is taken."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model.files.tensors import load_tensors, save_tensors
from tests.memory import peak_bytes

TYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64,
)  # fmt: skip
BANK = torch.arange(12.0).reshape(3, 4)
TENSORS = {
    **{f"{dtype}/x": torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES},
    "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "view": BANK.T,
    "first of a bank": BANK[0], "last of a bank": BANK[2], "the bank": BANK,
}  # fmt: skip


HALF = b'{"dtype":"F32","shape":[2],"data_offsets":[%b]}'


def is_same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether two tensors are equal; some types cannot be compared by torch."""
    return first.shape == second.shape and first.tolist() == second.tolist()


def write(path: Path, header: object, data: bytes = b"\0" * 16) -> Path:
    """Write a tensor file with a header of one's own."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(shape: list[Any], offsets: list[Any], dtype: str = "F32") -> dict[str, Any]:
    """Return one entry of a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_come_back_and_the_library_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, TENSORS)
    for found in (load_tensors(path), safetensors.torch.load_file(path)):
        assert set(found) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert is_same(found[name], tensor)


def test_the_bytes_and_their_hash_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for tensors in ({}, TENSORS, {'\x01"\\/\x7f': torch.zeros(1), "é": torch.ones(3), "😀/B": torch.ones(2)}):
        content = safetensors.torch.save({name: tensor.contiguous().clone() for name, tensor in tensors.items()})
        assert save_tensors(path, tensors) == hashlib.sha256(content).hexdigest()
        assert path.read_bytes() == content


def test_tensors_can_be_picked_by_prefix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {f"{kind}/{name}": tensor for kind in ("ema", "live") for name, tensor in TENSORS.items()})
    found = load_tensors(path, prefix="ema/")
    assert found.keys() == {f"ema/{name}" for name in TENSORS}
    assert all(is_same(found[f"ema/{name}"], tensor) for name, tensor in TENSORS.items())
    assert load_tensors(path, prefix="other/") == {}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    plain = {name: tensor.contiguous().clone() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(plain, path, metadata={"made": "elsewhere"})
    found = load_tensors(path)
    assert all(is_same(found[name], tensor) for name, tensor in plain.items())


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    save_tensors(first, TENSORS)
    save_tensors(second, dict(reversed(TENSORS.items())))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"a":' * 100_000, "invalid JSON"),
        ([], "invalid JSON"),
        ({"a": 1}, "integer `1`"),
        ({"a": entry([4], [0, 16], "F33")}, "unknown variant `F33`"),
        ({"a": entry([32], [0, 16], "F4")}, "F4"),
        ({"a": entry([4], [0, 12])}, "invalid shape, data type, or offset"),
        ({"a": entry([2**40, 2**40], [0, 16])}, "overflow"),
        ({"a": entry([2**63, 0], [0, 0]), "b": entry([4], [0, 16])}, "Overflow"),
        ({"a": entry([-4], [0, -16])}, "invalid value: integer `-4`"),
        ({"a": entry([True, 4], [0, 16])}, "boolean `true`"),
        ({"a": entry([2**34], [0, 2**36])}, "not fully covered"),
        ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, "invalid offset for tensor `b`"),
        ({"a": entry([2], [0, 8])}, "not fully covered"),
        (b'{"a":%b,"a":%b}' % (HALF % b"0,8", HALF % b"8,16"), "invalid offset for tensor `a`"),
    ],
)
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, header: object, message: str) -> None:
    path = write(tmp_path / "a.safetensors", header)

    def load() -> None:
        with pytest.raises(ValueError, match=r"^tensor file .*a\.safetensors is damaged \(") as caught:
            load_tensors(path)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)

    assert peak_bytes(load) < 20_000_000


def test_a_length_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for content in (b"", b"\1", (2**63).to_bytes(8, "little") + b"{}", (100).to_bytes(8, "little") + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged .*header"):
            load_tensors(path)


def test_a_type_that_has_no_name_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot hold numbers of type"):
        save_tensors(tmp_path / "a", {"a": torch.zeros(2, dtype=torch.complex128)})
    assert not (tmp_path / "a").exists()
