"""Set F6: rounding with clip sigmas by group, a 7-bit embedding, and the low-rank correction of its error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.banks import EMBEDDING
from model.config import QuantConfig
from model.quant.low_rank import LowRank, factor_error, pack_factors
from model.quant.quantized import QuantizedWeight
from model.quant.state import configured_clips, correct, group_of
from tests.parity_core import Comparison, GoldenSet, error_of_largest_entry, num_different, relative_error
from tests.parity_parts import output_error, share_different
from tests.rounding import quantize_weight

OUR_GROUP = {
    "attention": "attention", "attention_looped": "looped_attention", "mlp": "mlp", "mlp_looped": "looped_mlp",
    "embedding": EMBEDDING,
}  # fmt: skip
OUR_KIND = {"query": "q", "key": "k", "value": "v", "output": "o"}


def check_quant(golden: GoldenSet) -> None:
    """Hold groups, codes, scales and output errors against the set, then each step of the correction."""
    settings = golden.settings("quant_config")
    config = our_config(settings)
    clips = configured_clips(config)
    for key in golden.keys("W/"):
        name = key.removeprefix("W/")
        group = settings["groups"][settings["group_of"][name]]
        ours = group_of(our_name(name), settings["looped_layers"])
        golden.check(f"quant_config/group_of/{name}", ours == OUR_GROUP[settings["group_of"][name]])
        compare_rounding(golden, name, config, bits=group["bits"], clip_sigmas=clips[ours])
    bits = settings["groups"][settings["group_of"][EMBEDDING]]["bits"]
    clipping = rounded(golden, EMBEDDING, config, bits=bits, clip_sigmas=settings["clipping_sigmas"])
    compare_codes(golden, clipping, f"Q_clipping/{EMBEDDING}", f"s_clipping/{EMBEDDING}")
    [corrected] = settings["lqer"]["tensors"]
    check_correction(golden, corrected, config, bits=bits)


def our_config(settings: Mapping[str, Any]) -> QuantConfig:
    """Return our settings for those of the set."""
    sigmas = {OUR_GROUP[name]: group["clip_sigmas"] for name, group in settings["groups"].items()}
    return QuantConfig(
        **{f"{group}_clip_sigmas": value for group, value in sigmas.items()},
        embedding_bits=settings["groups"]["embedding"]["bits"],
        matrix_bits=settings["groups"]["mlp"]["bits"],
        damping_frac=settings["damping_frac"],
        block_columns=settings["block_columns"],
        lqer_rank=settings["lqer"]["rank"],
        lqer_group=settings["lqer"]["group"],
    )


def our_name(name: str) -> str:
    """Return our name of a matrix: layers.0.query -> layers.0.q."""
    *path, kind = name.split(".")
    return ".".join([*path, OUR_KIND.get(kind, kind)])


def rounded(golden: GoldenSet, name: str, config: QuantConfig, *, bits: int, clip_sigmas: float) -> QuantizedWeight:
    """Return a matrix of the set rounded by us."""
    weight, hessian = (torch.from_numpy(golden.read(f"{kind}/{name}")) for kind in "WH")
    return quantize_weight(
        weight, hessian, bits=bits, clip_sigmas=clip_sigmas,
        damping_frac=config.damping_frac, block_columns=config.block_columns,
    )  # fmt: skip


def compare_rounding(golden: GoldenSet, name: str, config: QuantConfig, *, bits: int, clip_sigmas: float) -> None:
    """Compare one matrix and its output error, 1 %."""
    ours = rounded(golden, name, config, bits=bits, clip_sigmas=clip_sigmas)
    compare_codes(golden, ours, f"Q/{name}", f"s/{name}")
    weight, hessian = (torch.from_numpy(golden.read(f"{kind}/{name}")) for kind in "WH")
    golden.compare(f"err/{name}", output_error(weight, hessian, ours), tolerance=0.01, measure=relative_error)


def compare_codes(golden: GoldenSet, ours: QuantizedWeight, codes: str, scales: str) -> None:
    """Compare scales exactly; codes may differ by 1 in 0.5 % of the entries."""
    golden.compare(scales, ours.scales, tolerance=0, measure=num_different)
    golden.compare(codes, ours.codes, tolerance=1)
    golden.compare(codes, ours.codes, tolerance=0.005, measure=share_different)


def check_correction(golden: GoldenSet, name: str, config: QuantConfig, *, bits: int) -> None:
    """Compare factors, packing, reconstruction and what is left of the error, all from the set's own codes."""
    weight, codes, scales = (torch.from_numpy(golden.read(f"{kind}/{name}")) for kind in ("W", "Q", "s"))
    plain = QuantizedWeight(codes, scales, bits)
    error = weight - plain.dequantize()
    a, b = (torch.from_numpy(golden.read(f"lqer/{factor}")) for factor in "AB")
    ours = factor_error(error, rank=config.lqer_rank)
    off = float((ours[0] @ ours[1] - a @ b).abs().max())  # the product, for the factors' signs are free
    golden.comparisons += [Comparison(f"lqer/{factor}", off, 1e-5) for factor in "AB"]
    every, _ = factor_error(error, rank=min(error.shape))
    golden.compare("lqer/singular_values", every.norm(dim=0), tolerance=1e-5, measure=error_of_largest_entry)
    packed = pack_factors(a, b, group=config.lqer_group)
    for key, value in zip(("A_codes", "A_scale", "B_codes", "B_scales"), packed, strict=True):
        stored = golden.content[golden.files[0]][f"lqer/{key}"]
        golden.compare(f"lqer/{key}", value.reshape(stored.shape), tolerance=0, measure=num_different)
    restored = plain._replace(correction=stored_correction(golden)).dequantize()
    golden.compare("lqer/reconstruction", restored, tolerance=1e-6)
    compare_remains(golden, name, weight, [plain.dequantize(), plain.dequantize() + ours[0] @ ours[1],
                                           correct(plain, weight, config).dequantize()])  # fmt: skip


def stored_correction(golden: GoldenSet) -> LowRank:
    """Return the set's codes and scales as a correction."""
    keys = ("A_codes", "A_scale", "B_codes", "B_scales")
    a_codes, a_scale, b_codes, b_scales = (torch.from_numpy(np.array(golden.read(f"lqer/{key}"))) for key in keys)
    return LowRank(a_codes, a_scale.reshape(1), b_codes, b_scales)


def compare_remains(golden: GoldenSet, name: str, weight: Tensor, restored: list[Tensor]) -> None:
    """Compare the error without a correction, with it unrounded, and with it rounded: by norm and through the Hessian.

    Rounded factors depend on the signs that a routine gives them: 1 % of the norm, 2 % through the Hessian.
    """
    hessian = torch.from_numpy(golden.read(f"H/{name}")).double()
    errors = [(weight - value).double() for value in restored]
    norms = [float(error.norm()) for error in errors]
    traces = [float(torch.trace(error @ hessian @ error.T)) for error in errors]
    for key, ours, tolerance in (("frobenius", norms, 0.01), ("err", traces, 0.02)):
        golden.compare(f"lqer/{key}", ours, tolerance=tolerance, measure=relative_error)
        golden.compare(f"lqer/{key}", ours, tolerance=1e-4, measure=unrounded_error)


def unrounded_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the relative error of all but the last figure, which alone depends on how factors are rounded."""
    return relative_error(ours[:-1], golden[:-1])
