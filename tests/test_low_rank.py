"""The correction of a rounding error: golden figures, levels, signs, scales, and bits that no device can change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig, QuantConfig, RunConfig
from model.presets import PRESETS, published, tiny
from model.quant.low_rank import A_LEVELS, B_LEVELS, LowRank, factor_error, pack_factors
from tests.rounding import quantize_state
from tests.test_gptq import random_state


def low_rank_error(seed: int, rows: int, columns: int) -> Tensor:
    """Return noise with three strong directions in it."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(size, 3, generator=generator) for size in (rows, columns))
    return left * torch.tensor([9.0, 5.0, 3.0]) @ right.T + torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(40, 16), (16, 16), (12, 24)])
def test_the_product_is_the_best_of_its_rank(rows: int, columns: int) -> None:
    error = low_rank_error(0, rows, columns)
    values = torch.linalg.svdvals(error.double())
    for rank in (1, 3, min(rows, columns)):
        a, b = factor_error(error, rank=rank)
        assert float((error - a @ b).norm()) == pytest.approx(float(values[rank:].norm()), abs=1e-4)


def test_signs_are_ours_whatever_the_sign_of_a_vector() -> None:
    error = low_rank_error(1, 30, 16)
    a, b = factor_error(error, rank=4)
    peaks = a.gather(0, a.abs().argmax(dim=0, keepdim=True))
    assert (peaks < 0).all()
    turned, same_b = factor_error(-error, rank=4)  # every left vector turns round, and so both factors of each pair do
    assert torch.equal((turned @ same_b), -(a @ b))
    assert (turned.gather(0, turned.abs().argmax(dim=0, keepdim=True)) < 0).all()


def test_levels_and_scales_hold_their_bounds() -> None:
    packed = pack_factors(*factor_error(low_rank_error(2, 64, 32), rank=4), group=16)
    assert A_LEVELS[0] <= int(packed.a_codes.min()) < 0 <= int(packed.a_codes.max()) <= A_LEVELS[1]
    assert B_LEVELS[0] <= int(packed.b_codes.min()) < int(packed.b_codes.max()) <= B_LEVELS[1]
    assert packed.b_scales.shape == (4 * 32 // 16,)
    assert (packed.rank, packed.group) == (4, 16)
    assert packed.a_scale.dtype == packed.b_scales.dtype == torch.float16


def test_a_run_of_entries_may_go_over_a_rows_end() -> None:
    b = torch.arange(24.0).view(3, 8) - 11
    packed = pack_factors(torch.ones(5, 3), b, group=12)
    assert packed.b_scales.tolist() == [torch.tensor(11 / 7.5).half(), torch.tensor(12 / 7.5).half()]
    own = torch.cat([packed.b_scales[:1].expand(12), packed.b_scales[1:].expand(12)]).float()
    expected = (torch.ones(5, 3) * packed.a_codes * packed.a_scale.float()) @ (packed.b_codes.flatten() * own).view(
        3, 8
    )
    torch.testing.assert_close(packed.product(), expected)


def test_an_error_of_zero_has_a_correction_of_zero() -> None:
    packed = pack_factors(*factor_error(torch.zeros(8, 4), rank=2), group=4)
    assert (packed.a_scale > 0).all()
    assert (packed.b_scales > 0).all()
    assert torch.equal(packed.product(), torch.zeros(8, 4))


def test_the_product_adds_one_rank_at_a_time() -> None:
    """A matrix product may fuse multiplication and addition, differently on every device."""
    generator = torch.Generator().manual_seed(3)
    packed = LowRank(
        torch.randint(-2, 2, (33, 5), generator=generator).to(torch.int8), torch.tensor([0.3]).half(),
        torch.randint(-8, 8, (5, 20), generator=generator).to(torch.int8), torch.rand(10, generator=generator).half(),
    )  # fmt: skip
    a = packed.a_codes.numpy().astype("float32") * packed.a_scale.numpy().astype("float32")
    scales = packed.b_scales.numpy().astype("float32").repeat(10).reshape(5, 20)
    b = packed.b_codes.numpy().astype("float32") * scales
    total = a[:, :1] * b[:1]
    for k in range(1, 5):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    assert (packed.product().numpy() == total).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_the_embedding_alone_is_corrected_and_comes_closer(rank: int) -> None:
    state, hessians = random_state(8)
    state["tok_emb.weight"] += 0.02 * low_rank_error(4, *state["tok_emb.weight"].shape)
    config = replace(tiny().quant, embedding_bits=4, embedding_clip_sigmas=3.0)  # clips: an error with directions
    plain = quantize_state(state, hessians, config)
    corrected = quantize_state(state, hessians, replace(config, lqer_rank=rank))
    assert [name for name, weight in corrected.matrices.items() if weight.correction is not None] == ["embedding"]
    for name, weight in plain.matrices.items():
        assert torch.equal(weight.codes, corrected.matrices[name].codes), name
    embedding = state["tok_emb.weight"]
    before, after = (float((embedding - s.matrices["embedding"].dequantize()).norm()) for s in (plain, corrected))
    assert after < (0.98 if rank == 4 else 0.995) * before


def test_emptied_columns_are_part_of_the_error() -> None:
    state, hessians = random_state(9)
    hessians["embedding"][3] = 0
    hessians["embedding"][:, 3] = 0
    state["tok_emb.weight"][:, 3] += 1.0
    correction = quantize_state(state, hessians, replace(tiny().quant, lqer_rank=1)).matrices["embedding"].correction
    assert correction is not None
    assert int(correction.product().abs().mean(dim=0).argmax()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lqer_rank": 3, "lqer_group": 1024}, r"quant\.lqer_rank=3 .* multiple of quant\.lqer_group=1024"),
        ({"lqer_rank": 129}, r"quant\.lqer_rank=129 must be at most the embedding's smaller side"),
    ],
)
def test_a_correction_that_cannot_be_packed_is_refused_before_training(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        RunConfig(model=tiny().model, quant=QuantConfig(**changes))
    assert "\n" not in str(caught.value)


def test_presets_allow_a_correction_of_rank_4() -> None:
    for make in (published, *PRESETS.values()):
        assert replace(make(), quant=replace(make().quant, lqer_rank=4)).quant.lqer_rank == 4
    assert RunConfig(model=ModelConfig(vocab_size=3)).quant.lqer_rank == 0
