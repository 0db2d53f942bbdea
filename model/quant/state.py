"""A whole model rounded: which matrices go together, how far each group's steps reach, and what stays float16.

Matrices that read the same kind of input are rounded in one batch, an entry a layer. How coarsely a matrix is rounded
(its clip_sigmas) is set by group: attention, MLP, both again inside the repeated block, and the embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.banks import EMBEDDING, KINDS_OF_HESSIAN, matrix_name, split_banks
from model.config import ModelConfig, QuantConfig
from model.quant.gptq import HessianFactor, factor_hessians, largest_code, round_batch
from model.quant.low_rank import factor_error, pack_factors
from model.quant.quantized import QuantizedState, QuantizedWeight

# Shapes: N matrices of one batch, R rows (out), C columns (in)
ATTENTION_KINDS = ("q", "k", "v", "o")


def looped_layers(model: ModelConfig) -> range:
    """Return the layers that a pass visits more than once."""
    return range(model.loop_start, model.loop_end + 1) if model.num_loops else range(0)


def configured_clips(config: QuantConfig) -> dict[str, float]:
    """Return the clip_sigmas of each group; a group without one of its own has its wider group's."""

    def first(*values: float | None) -> float:
        return next(value for value in values if value is not None)

    attention = first(config.attention_clip_sigmas, config.matrix_clip_sigmas)
    mlp = first(config.mlp_clip_sigmas, config.matrix_clip_sigmas)
    return {
        "attention": attention,
        "looped_attention": first(config.looped_attention_clip_sigmas, attention),
        "mlp": mlp,
        "looped_mlp": first(config.looped_mlp_clip_sigmas, mlp),
        EMBEDDING: config.embedding_clip_sigmas,
    }


def group_of(name: str, looped: Collection[int]) -> str:
    """Return the group of a matrix: `layers.<i>.<kind>` or `embedding`."""
    if name == EMBEDDING:
        return EMBEDDING
    _, layer, kind = name.split(".")
    group = "attention" if kind in ATTENTION_KINDS else "mlp"
    return f"looped_{group}" if int(layer) in looped else group


class Batch(NamedTuple):
    """Matrices that are rounded together: one entry a Hessian, rows of its matrices side by side."""

    names: list[list[str]]  # of the matrices of each entry, in the order of their rows
    num_rows: list[int]  # of each matrix of an entry
    weights: Tensor  # (N, R, C) float32
    factor: HessianFactor
    bits: int

    def row_clips(self, clips: Mapping[str, float]) -> Tensor:
        """Return the clip_sigmas of every row (N, R) from those of every matrix."""
        rows = [
            [clips[name] for name, count in zip(names, self.num_rows) for _ in range(count)] for names in self.names
        ]
        return torch.tensor(rows, dtype=torch.float32, device=self.weights.device)

    def cut(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the part of each matrix of a tensor (N, R, ...)."""
        return {
            name: part
            for names, entry in zip(self.names, rows, strict=True)
            for name, part in zip(names, entry.split(self.num_rows), strict=True)
        }


def _batch(
    names: list[list[str]],
    hessian_names: list[str],
    bits: int,
    tensors: dict[str, Tensor],
    hessians: dict[str, Tensor],
    config: QuantConfig,
) -> Batch | None:
    """Stack the matrices above keep_float_numel and factor their Hessians; None if none is that large."""
    names = [[name for name in row if tensors[name].numel() > config.keep_float_numel] for row in names]
    if not names[0]:  # sizes depend on the kind only, so all layers agree
        return None
    missing = [name for name in hessian_names if name not in hessians]
    assert not missing, f"no hessian for {missing}, only {sorted(hessians)}"
    weights = torch.stack([torch.cat([tensors[name].float() for name in row]) for row in names])
    stacked = torch.stack([hessians[name].to(weights.device, torch.float32) for name in hessian_names])
    factor = factor_hessians(stacked, damping_frac=config.damping_frac, names=hessian_names)
    return Batch(names, [tensors[name].shape[0] for name in names[0]], weights, factor, bits)


def _batches(tensors: dict[str, Tensor], hessians: dict[str, Tensor], config: QuantConfig) -> list[Batch]:
    """Return the batches of a model's split tensors, the embedding last."""
    layers = range(sum(name.endswith(".up") for name in tensors))
    batches = [
        _batch(
            [[matrix_name(i, kind) for kind in kinds] for i in layers],
            [matrix_name(i, shared) for i in layers],
            config.matrix_bits,
            tensors,
            hessians,
            config,
        )
        for shared, kinds in KINDS_OF_HESSIAN.items()
    ]
    batches.append(_batch([[EMBEDDING]], [EMBEDDING], config.embedding_bits, tensors, hessians, config))
    return [batch for batch in batches if batch is not None]


def _require_finite(tensors: Mapping[str, Tensor], problem: str) -> None:
    """Raise ValueError naming the first tensor that holds an infinity or NaN (one look at the device for all)."""
    if not tensors:
        return
    is_finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    broken = [name for name, fine in zip(tensors, is_finite, strict=True) if not fine]
    if broken:
        raise ValueError(f"cannot quantize {broken[0]}: {problem}")


class StateQuantizer:
    """A model's tensors beside their factored Hessians: rounds at any clip_sigmas without factoring again."""

    def __init__(
        self,
        state: dict[str, Tensor],
        hessians: dict[str, Tensor],
        config: QuantConfig,
        *,
        looped: Collection[int] = (),
    ) -> None:
        tensors = split_banks(state)
        _require_finite(tensors, "it holds infinities or NaN, training diverged")
        self.config = config
        self.batches = _batches(tensors, hessians, config)
        rounded = [name for batch in self.batches for row in batch.names for name in row]
        self.group_of = {name: group_of(name, looped) for name in rounded}
        self._floats = {name: tensor.half() for name, tensor in tensors.items() if name not in self.group_of}
        _require_finite(self._floats, "its values do not fit float16")

    def quantize(self, clips: Mapping[str, float]) -> QuantizedState:
        """Round every matrix with its own clip_sigmas, or its group's. Shares float tensors with earlier results."""
        of_matrix = {name: clips[name] if name in clips else clips[group] for name, group in self.group_of.items()}
        matrices: dict[str, QuantizedWeight] = {}
        for batch in self.batches:
            matrices.update(self._round(batch, batch.row_clips(of_matrix)))
        _require_finite({name: weight.scales for name, weight in matrices.items()}, "its scales do not fit float16")
        return QuantizedState(matrices=matrices, floats=self._floats)

    def _round(self, batch: Batch, row_clips: Tensor) -> dict[str, QuantizedWeight]:
        """Round one batch, and correct the embedding where that is asked for."""
        codes, scales = round_batch(
            batch.weights, batch.factor,
            qmax=largest_code(batch.bits), clip_sigmas=row_clips, block_columns=self.config.block_columns,
        )  # fmt: skip
        of_matrix = batch.cut(scales)
        rounded = {name: QuantizedWeight(part, of_matrix[name], batch.bits) for name, part in batch.cut(codes).items()}
        if EMBEDDING in rounded and self.config.lqer_rank:
            rounded[EMBEDDING] = correct(rounded[EMBEDDING], batch.weights[0], self.config)
        return rounded

    def changes(self, quantized: QuantizedState) -> dict[str, Tensor]:
        """Return what rounding added to each matrix (out, in), float32."""
        return {
            name: quantized.matrices[name].dequantize() - weight
            for batch in self.batches
            for name, weight in batch.cut(batch.weights).items()
        }

    def members(self) -> dict[str, list[str]]:
        """Return unit of the fit -> its matrices: groups that have any, or every matrix, as quant.fit_unit says."""
        if self.config.fit_unit == "matrix":
            return {name: [name] for name in self.group_of}
        groups = configured_clips(self.config)
        found = {group: [name for name, own in self.group_of.items() if own == group] for group in groups}
        return {group: names for group, names in found.items() if names}

    def bits_of(self, unit: str) -> int:
        """Return the bits of the codes of a group or a matrix."""
        return self.config.embedding_bits if unit == EMBEDDING else self.config.matrix_bits

    def weights(self, names: Collection[str]) -> list[Tensor]:
        """Return the named matrices (out, in) float32."""
        return [w for batch in self.batches for name, w in batch.cut(batch.weights).items() if name in names]


def correct(weight: QuantizedWeight, original: Tensor, config: QuantConfig) -> QuantizedWeight:
    """Return weight with a low-rank correction of what rounding changed of original (out, in) float32."""
    a, b = factor_error(original - weight.dequantize(), rank=config.lqer_rank)
    return weight._replace(correction=pack_factors(a, b, group=config.lqer_group))
