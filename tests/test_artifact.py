"""The artifact: codes come back exactly, equal input gives equal bytes, and a file that lies is refused cheaply."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import brotli
import pytest
import torch

from model.audit.reproduction import compare_artifacts
from model.banks import EMBEDDING, parameter_shapes, tensor_shapes
from model.config import ModelConfig
from model.gpt import GPT
from model.presets import PRESETS, tiny
from model.quant.artifact import (
    DIGEST_BYTES,
    MAGIC,
    PREFIX,
    ArtifactReader,
    load_artifact,
    pack_artifact,
    read_artifact_info,
    save_artifact,
)
from model.quant.artifact_header import tensor_entries
from model.quant.low_rank import LowRank
from model.quant.quantized import QuantizedState, QuantizedWeight, dequantize
from model.quant.rounded import check_reload
from tests.fuzz.mutations import changed, fuzz_artifact_once, header_of, places, seal, with_header
from tests.memory import peak_bytes

SMALL = ModelConfig(
    vocab_size=24, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=4, xsa_last_n=2,
    loop_start=0, loop_end=0, num_loops=1, parallel_start_layer=1,
)  # fmt: skip
FIRST_FORMAT_SHA256 = "816438ccdf1ae1f186903f6f1ee4a53f270bf666de9f01d2cd587b1f6e5ecd0b"
META = {"seed": 7, "config_hash": "ab" * 32}


def random_quantized(config: ModelConfig, seed: int, *, keep: tuple[str, ...] = ()) -> QuantizedState:
    """Return a quantized model with bell-shaped codes; matrices of the kinds in keep stay float16."""
    generator = torch.Generator().manual_seed(seed)
    matrices, floats = {}, {}
    for name, shape in tensor_shapes(config).items():
        kind = name.rsplit(".", 1)[-1]
        if len(shape) != 2 or name in parameter_shapes(config) or kind in keep:
            floats[name] = torch.randn(shape, generator=generator).half()
            continue
        bits, std = (8, 6.3) if name == EMBEDDING else (6, 2.4)
        qmax = 2 ** (bits - 1) - 1
        codes = (torch.randn(shape, generator=generator) * std).round().clamp(-qmax, qmax).to(torch.int8)
        scales = (0.01 + 0.01 * torch.rand(shape[0], generator=generator)).half()
        matrices[name] = QuantizedWeight(codes, scales, bits)
    return QuantizedState(matrices=matrices, floats=floats)


def corrected(state: QuantizedState, seed: int, *, rank: int = 2, group: int = 8) -> QuantizedState:
    """Return state with a low-rank correction of its embedding."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = state.matrices[EMBEDDING].codes.shape
    correction = LowRank(
        torch.randint(-2, 2, (rows, rank), generator=generator).to(torch.int8),
        torch.tensor([0.01]).half(),
        torch.randint(-8, 8, (rank, columns), generator=generator).to(torch.int8),
        (0.01 + torch.rand(rank * columns // group, generator=generator)).half(),
    )
    embedding = state.matrices[EMBEDDING]._replace(correction=correction)
    return replace(state, matrices={**state.matrices, EMBEDDING: embedding})


@pytest.fixture(scope="module")
def small_artifact() -> bytes:
    """Return the bytes of a small artifact."""
    return pack_artifact(random_quantized(SMALL, 0), SMALL, META)


@pytest.fixture(scope="module")
def corrected_artifact() -> bytes:
    """Return the bytes of a small artifact whose embedding has a correction."""
    return pack_artifact(corrected(random_quantized(SMALL, 0), 0), SMALL, META)


def refusal(data: bytes, folder: Path) -> str:
    """Return the one line with which data is refused."""
    path = folder / "broken.ssq"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="artifact") as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_parameter_shapes_are_those_of_the_model() -> None:
    for make in PRESETS.values():
        with torch.device("meta"):
            model = GPT(make().model)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(make().model)
    with torch.device("meta"):
        model = GPT(SMALL)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(SMALL)


@pytest.mark.parametrize("codec", ["rans", "brotli"])
@pytest.mark.parametrize("keep", [(), ("k", "v"), ("q", "k", "v", "o", "up", "down", "embedding")])
def test_everything_comes_back_exactly(tmp_path: Path, codec: str, keep: tuple[str, ...]) -> None:
    state, path = random_quantized(SMALL, 1, keep=keep), tmp_path / "model.ssq"
    sizes = save_artifact(path, state, SMALL, META, codec=codec)
    config, loaded = load_artifact(path)
    assert config == SMALL
    assert list(loaded.matrices) == list(state.matrices)
    for name, weight in state.matrices.items():
        assert loaded.matrices[name].bits == weight.bits
        assert torch.equal(loaded.matrices[name].codes, weight.codes), name
        assert torch.equal(loaded.matrices[name].scales, weight.scales), name
    assert all(torch.equal(loaded.floats[name], tensor) for name, tensor in state.floats.items())
    assert sizes.total_bytes == path.stat().st_size == sum(sizes[1:])
    assert set(tmp_path.iterdir()) == {path}  # nothing is left beside it
    restored = dequantize(loaded)
    assert {name: tuple(tensor.shape) for name, tensor in restored.items()} == parameter_shapes(config)


def test_the_restored_state_loads_into_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.ssq"
    save_artifact(path, random_quantized(SMALL, 2), SMALL, {})
    config, state = load_artifact(path)
    model = GPT(config)
    model.load_state_dict(dequantize(state))
    logits = model(torch.arange(12)[None], is_looped=True)
    assert logits.isfinite().all()


def test_equal_models_give_equal_bytes_in_any_codec() -> None:
    for codec in ("rans", "brotli"):
        first = pack_artifact(random_quantized(SMALL, 3), SMALL, META, codec=codec)
        assert first == pack_artifact(random_quantized(SMALL, 3), SMALL, dict(reversed(META.items())), codec=codec)
        assert first != pack_artifact(random_quantized(SMALL, 4), SMALL, META, codec=codec)


def test_rans_takes_fewer_bytes_than_brotli() -> None:
    state = random_quantized(tiny().model, 5)
    by_rans, by_brotli = (len(pack_artifact(state, tiny().model, {}, codec=codec)) for codec in ("rans", "brotli"))
    assert by_rans < 0.995 * by_brotli


def test_info_tells_what_is_inside(tmp_path: Path) -> None:
    path, state = tmp_path / "model.ssq", random_quantized(SMALL, 6, keep=("v",))
    save_artifact(path, state, SMALL, META)
    info = read_artifact_info(path)
    assert info.header.config == SMALL
    assert info.header.meta == META
    assert info.header.tensors == tensor_entries(SMALL, state)
    assert [stream.part for stream in info.header.streams] == ["codes", "scales", "floats"]


def test_another_models_state_is_a_programming_error() -> None:
    with pytest.raises(AssertionError, match="the model wants"):
        pack_artifact(random_quantized(SMALL, 0), replace(SMALL, vocab_size=25), META)


def test_meta_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="meta cannot be written as JSON"):
        pack_artifact(random_quantized(SMALL, 0), SMALL, {"path": Path(".")})
    with pytest.raises(ValueError, match="shorten meta"):
        pack_artifact(random_quantized(SMALL, 0), SMALL, {"note": "x" * (1 << 20)})


def test_every_truncation_is_refused(small_artifact: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.ssq"
    path.write_bytes(small_artifact)
    for length in reversed(range(len(small_artifact))):
        os.truncate(path, length)
        with pytest.raises(ValueError, match=r"truncated|no seedsweep artifact|checksum"):
            load_artifact(path)


def test_every_flipped_byte_is_refused(small_artifact: bytes, tmp_path: Path) -> None:
    for place in range(0, len(small_artifact), 7):
        broken = bytearray(small_artifact)
        broken[place] ^= 0x10
        (tmp_path / "flipped.ssq").write_bytes(broken)
        with pytest.raises(ValueError, match="artifact"):
            load_artifact(tmp_path / "flipped.ssq")


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "no seedsweep artifact" in refusal(b"PK\x03\x04" + bytes(100), tmp_path)
    assert "no seedsweep artifact" in refusal(b"", tmp_path)
    with pytest.raises(FileNotFoundError):
        load_artifact(tmp_path / "absent.ssq")


def test_a_reader_unpacks_the_same_bytes_once_and_others_anew(tmp_path: Path, small_artifact: bytes) -> None:
    path, reader = tmp_path / "model.ssq", ArtifactReader()
    path.write_bytes(small_artifact)
    first = reader.load(path)
    (tmp_path / "copy.ssq").write_bytes(small_artifact)
    assert reader.load(path) is first
    assert reader.load(tmp_path / "copy.ssq") is first
    other = random_quantized(SMALL, 1)
    save_artifact(path, other, SMALL, META)
    found = reader.load(path)[1]
    assert all(torch.equal(found.matrices[name].codes, weight.codes) for name, weight in other.matrices.items())
    assert not all(torch.equal(found.matrices[name].codes, first[1].matrices[name].codes) for name in other.matrices)


def test_a_reader_refuses_bytes_that_were_damaged_since(tmp_path: Path, small_artifact: bytes) -> None:
    path, reader = tmp_path / "model.ssq", ArtifactReader()
    path.write_bytes(small_artifact)
    reader.load(path)
    middle = len(small_artifact) // 2
    path.write_bytes(small_artifact[:middle] + bytes([small_artifact[middle] ^ 1]) + small_artifact[middle + 1 :])
    with pytest.raises(ValueError, match="checksum does not match"):
        reader.load(path)


def test_every_number_of_a_state_must_reload(tmp_path: Path) -> None:
    path, state = tmp_path / "model.ssq", corrected(random_quantized(SMALL, 1, keep=("k",)), 1)
    save_artifact(path, state, SMALL, META)
    check_reload(path, state, ArtifactReader())
    weight, factors = state.matrices["layers.0.q"], state.matrices[EMBEDDING].correction
    assert factors is not None
    altered = {
        "layers.0.q": [
            weight._replace(codes=weight.codes.clone().index_fill_(0, torch.tensor([0]), 0)),
            weight._replace(scales=weight.scales * 2),
            weight._replace(correction=factors),
        ],
        EMBEDDING: [
            state.matrices[EMBEDDING]._replace(correction=other)
            for other in (
                None,
                factors._replace(a_codes=-1 - factors.a_codes),
                factors._replace(a_scale=weight.scales[:1]),
            )
        ],
    }
    for name, others in altered.items():
        for other in others:
            with pytest.raises(ValueError, match=f"does not reload: {name} differs"):
                check_reload(path, replace(state, matrices={**state.matrices, name: other}), ArtifactReader())
    for name, tensor in state.floats.items():
        with pytest.raises(ValueError, match=f"does not reload: {name} differs"):
            check_reload(path, replace(state, floats={**state.floats, name: tensor + 1}), ArtifactReader())


@pytest.mark.parametrize("codec", ["rans", "brotli"])
def test_a_correction_comes_back_exactly(tmp_path: Path, codec: str) -> None:
    state, path = corrected(random_quantized(SMALL, 1), 1), tmp_path / "model.ssq"
    save_artifact(path, state, SMALL, META, codec=codec)
    loaded = load_artifact(path)[1]
    written, read = state.matrices[EMBEDDING].correction, loaded.matrices[EMBEDDING].correction
    assert written is not None
    assert read is not None
    assert all(torch.equal(*pair) for pair in zip(written, read, strict=True))
    for name, tensor in dequantize(state).items():
        assert torch.equal(tensor, dequantize(loaded)[name]), name
    assert [name for name, weight in loaded.matrices.items() if weight.correction is not None] == [EMBEDDING]


def test_the_format_is_the_lowest_that_can_hold_the_tensors(small_artifact: bytes, corrected_artifact: bytes) -> None:
    plain, with_correction = header_of(small_artifact), header_of(corrected_artifact)
    assert plain["format"] == 1
    assert all(len(row) == 3 for row in plain["tensors"])
    assert with_correction["format"] == 2
    assert [row[3:] for row in with_correction["tensors"] if len(row) == 5] == [[2, 8]]


def test_an_artifact_without_a_correction_has_the_bytes_of_the_first_format() -> None:
    """The digest is of the file that the version before corrections wrote for the same state (codec brotli 1.2)."""
    assert hashlib.sha256(pack_artifact(random_quantized(SMALL, 0), SMALL, META)).hexdigest() == FIRST_FORMAT_SHA256


@pytest.mark.parametrize("made", ["small_artifact", "corrected_artifact"])
def test_no_header_value_can_be_changed_unnoticed(made: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    small_artifact = request.getfixturevalue(made)
    header = header_of(small_artifact)
    free = {("model", name) for name in ("rope_base", "logit_softcap", "q_gain_init", "embedding_init_std")}
    free |= {("model", name) for name in ("rope_dims", "xsa_last_n", "parallel_start_layer", "loop_end", "loop_start")}
    checked = 0
    for place in places(header):
        if place[:1] == ("meta",) or place in free:  # decide no shape: only the checksum guards them
            continue
        values: tuple[Any, ...] = (None, -1, 3, 2**62, 1e300, "?", [])
        for new in values:
            lie = changed(header, place, new)
            if lie != header:
                refusal(with_header(small_artifact, json.dumps(lie).encode()), tmp_path)
                checked += 1
    assert checked > 500


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (("format",), 3, "format=3 is unknown"),
        (("format",), 2, "format=2 is not that of its tensors"),
        (("model", "num_layers"), 2**30, "parameters; at most"),
        (("model", "num_loops"), 2**30, "parameters; at most"),
        (("model", "mlp_mult"), 1e300, "model.mlp_mult='1e\\+300' must be a float below"),
        (("model", "num_heads"), 3, "num_heads"),
        (("tensors", 0, 0), "layers.0.k", "stands where layers.0.q"),
        (("tensors", 0, 1), 1, "tensor layers.0.q cannot have 1 bits"),
        (("tensors", 0, 1), 16, "streams of codes declare"),
        (("tensors", 0, 1), 3, "layers.0.q holds codes beyond 3 bits"),
        (("streams", 0, 2), 2**39, "streams of codes declare"),
        (("streams", 1, 3), 10**9, "streams declare"),
        (("streams", 0, 1), "brotli", "brotli stream"),
        (("streams", 1, 1), "rans", "a rans stream must hold all codes"),
    ],
)
def test_a_header_that_lies_is_told_so(
    small_artifact: bytes, tmp_path: Path, place: tuple[Any, ...], new: Any, message: str
) -> None:
    broken = with_header(small_artifact, json.dumps(changed(header_of(small_artifact), place, new)).encode())
    path = tmp_path / "lying.ssq"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=message):
        load_artifact(path)


EMBEDDING_ROW = 12  # after the six matrices of two layers


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (("format",), 1, "format=1 is not that of its tensors"),
        (("tensors", EMBEDDING_ROW, 3), 0, "correction of rank 0 in runs of 8"),
        (("tensors", EMBEDDING_ROW, 3), 17, "correction of rank 17"),
        (("tensors", EMBEDDING_ROW, 3), 2**62, "correction of rank 4611686018427387904"),
        (("tensors", EMBEDDING_ROW, 3), 1, "streams of codes declare"),
        (("tensors", EMBEDDING_ROW, 3), True, r"tensors\[12\] is malformed"),
        (("tensors", EMBEDDING_ROW, 4), 0, "correction of rank 2 in runs of 0"),
        (("tensors", EMBEDDING_ROW, 4), -8, "correction of rank 2 in runs of -8"),
        (("tensors", EMBEDDING_ROW, 4), 7, "correction of rank 2 in runs of 7"),
        (("tensors", EMBEDDING_ROW, 4), 16, "streams of scales declare"),
        (("tensors", EMBEDDING_ROW, 1), 16, "correction of rank 2"),
        (("tensors", EMBEDDING_ROW), ["embedding", 8, [24, 16]], "streams of codes declare"),
        (("tensors", 13), ["attn_scale", 16, [2, 16], 2, 8], "attn_scale cannot have a correction"),
    ],
)
def test_a_header_that_lies_about_a_correction_is_told_so(
    corrected_artifact: bytes, tmp_path: Path, place: tuple[Any, ...], new: Any, message: str
) -> None:
    header = changed(header_of(corrected_artifact), place, new)
    path = tmp_path / "lying.ssq"
    path.write_bytes(with_header(corrected_artifact, json.dumps(header).encode()))
    with pytest.raises(ValueError, match=message):
        load_artifact(path)


def test_bad_numbers_in_a_correction_are_refused(tmp_path: Path) -> None:
    for field, value, message in (
        ("a_codes", 2, "correction beyond its levels"), ("b_codes", -9, "correction beyond its levels"),
        ("a_scale", 0.0, "scale that is not positive"), ("b_scales", torch.inf, "scale that is not positive"),
    ):  # fmt: skip
        state = corrected(random_quantized(SMALL, 8), 8)
        correction = state.matrices[EMBEDDING].correction
        assert correction is not None
        getattr(correction, field).view(-1)[0] = value
        assert message in refusal(pack_artifact(state, SMALL, {}), tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b"{" * 1000, b"\xff\xfe", b"NaN", b'{"format": 1}', b"9" * 5000, b'{"a":1e999}', b"", b"null"],
)
def test_a_header_that_is_no_header_is_refused(small_artifact: bytes, tmp_path: Path, header: bytes) -> None:
    assert "header" in refusal(with_header(small_artifact, header), tmp_path)


def test_a_header_length_beyond_the_file_is_refused(small_artifact: bytes, tmp_path: Path) -> None:
    for length in (len(small_artifact), 2**20 + 1, 2**32 - 1):
        broken = seal(PREFIX.pack(MAGIC, length) + small_artifact[PREFIX.size : -DIGEST_BYTES])
        assert "is a lie" in refusal(broken, tmp_path)


def test_a_bomb_in_a_stream_takes_no_memory(small_artifact: bytes, tmp_path: Path) -> None:
    header, bomb = header_of(small_artifact), brotli.compress(bytes(100_000_000), quality=1)
    start = len(small_artifact) - DIGEST_BYTES - sum(row[3] for row in header["streams"])
    header["streams"][0][1], sizes = "brotli", [row[3] for row in header["streams"]]
    header["streams"][0][3] = len(bomb)
    rest = small_artifact[start + sizes[0] : -DIGEST_BYTES]
    raw = json.dumps(header).encode()
    (tmp_path / "bomb.ssq").write_bytes(seal(PREFIX.pack(MAGIC, len(raw)) + raw + bomb + rest))

    def attempt() -> None:
        with pytest.raises(ValueError, match="does not hold exactly"):
            load_artifact(tmp_path / "bomb.ssq")

    assert peak_bytes(attempt) < 30_000_000


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    for value, message in ((0.0, "scale that is not positive"), (float("inf"), "scale that is not positive")):
        state = random_quantized(SMALL, 8)
        state.matrices["layers.1.up"].scales[3] = value
        assert message in refusal(pack_artifact(state, SMALL, {}), tmp_path)
    state = random_quantized(SMALL, 8)
    state.floats["q_gain"][0, 0] = torch.nan
    assert "q_gain holds infinities or NaN" in refusal(pack_artifact(state, SMALL, {}), tmp_path)
    state = random_quantized(SMALL, 8)
    state.matrices["layers.0.q"].codes[0, 0] = 77
    assert "layers.0.q holds codes beyond 6 bits" in refusal(pack_artifact(state, SMALL, {}), tmp_path)


@pytest.mark.parametrize("is_corrected", [False, True])
@pytest.mark.parametrize("codec", ["rans", "brotli"])
def test_mutated_files_are_refused_or_load(tmp_path: Path, codec: str, is_corrected: bool) -> None:
    state = random_quantized(SMALL, 9)
    data = pack_artifact(corrected(state, 9) if is_corrected else state, SMALL, META, codec=codec)
    refusals = [fuzz_artifact_once(data, seed, tmp_path) for seed in range(300)]
    assert all("\n" not in message for message in refusals)
    assert sum(bool(message) for message in refusals) > 240


def test_a_comparison_of_artifacts_sees_another_correction(tmp_path: Path) -> None:
    for number, seed in enumerate((0, 0, 1, None)):
        state = random_quantized(SMALL, 0)
        (tmp_path / str(number)).mkdir()
        written = state if seed is None else corrected(state, seed)
        save_artifact(tmp_path / str(number) / "model.ssq", written, SMALL, META)
    assert compare_artifacts(tmp_path / "0", tmp_path / "1") == (True, "same file")
    for other in ("2", "3"):
        is_equal, detail = compare_artifacts(tmp_path / "0", tmp_path / other)
        assert not is_equal
        assert "1 tensors have other scales, corrections or floats" in detail
