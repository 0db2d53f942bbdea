"""model/files/checkpoint.py: complete or absent, two kept, damage noticed and said."""

import logging
from pathlib import Path

import pytest
import torch

from model.files.checkpoint import CheckpointStore
from model.files.tensors import load_tensors, save_tensors


def fill(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.save(step, {"weights": torch.full((3,), float(step))}, {"elapsed_s": 0.5 * step})


def newest_step(store: CheckpointStore) -> int | None:
    found = store.load_newest()
    return None if found is None else int(found[1]["step"])


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    tensors = {"a": torch.randn(3, 2).bfloat16(), "b": torch.arange(4), "c": torch.tensor(1.5, dtype=torch.float64)}
    store.save(12, tensors, {"elapsed_s": 3.25, "resumed_at": [4]})
    found = store.load_newest()
    assert found is not None
    assert found[1] == {"elapsed_s": 3.25, "resumed_at": [4], "step": 12}
    for name, value in tensors.items():
        assert found[0][name].dtype == value.dtype
        assert torch.equal(found[0][name], value)


def test_the_two_newest_are_kept_and_the_newest_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 5, 10, 200)
    assert store.steps() == [10, 200]
    assert len(list(tmp_path.iterdir())) == 4
    assert newest_step(store) == 200


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "torn record", "record of another kind"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 5, 10)
    tensors, record = tmp_path / "step-0000010.safetensors", tmp_path / "step-0000010.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "flipped":
        content = bytearray(tensors.read_bytes())
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "missing":
        tensors.unlink()
    else:
        record.write_text('{"step": 10' if damage == "torn record" else "[1, 2]")
    with caplog.at_level(logging.WARNING):
        assert newest_step(store) == 5
    assert "checkpoint of step 10 ignored" in caplog.text


def test_with_every_checkpoint_damaged_there_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 5, 10)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    assert newest_step(store) is None
    assert caplog.text.count("ignored") == 2


def test_tensors_without_a_record_do_not_count(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    fill(store, 5)
    save_tensors(tmp_path / "step-0000009.safetensors", {"weights": torch.zeros(3)})  # killed before the record
    assert newest_step(store) == 5
    assert newest_step(CheckpointStore(tmp_path / "nowhere")) is None


def test_what_a_killed_write_left_is_swept_away(tmp_path: Path) -> None:
    store, left = CheckpointStore(tmp_path), tmp_path / ".step-0000003.safetensors.x1.tmp"
    fill(store, 5)
    left.write_bytes(b"half")
    fill(store, 6)
    assert not left.exists()
    left.write_bytes(b"half")
    save_tensors(tmp_path / "step-0000009.safetensors", {"weights": torch.zeros(3)})
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_finished_files_are_announced_the_record_last(tmp_path: Path) -> None:
    heard: list[str] = []
    fill(CheckpointStore(tmp_path, lambda path: heard.append(path.name)), 7)
    assert heard == ["step-0000007.safetensors", "step-0000007.json"]


def test_a_damaged_tensor_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.safetensors"
    save_tensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"tensor file .*train\.safetensors is damaged"):
        load_tensors(path)
