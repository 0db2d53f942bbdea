"""`on_oversize: fit`: the clip_sigmas of every group (or matrix) chosen so that the artifact fills the size limit.

The loss that rounding costs grows with the square of a group's step, and its bytes fall with the step's logarithm. So
for given bytes the loss is least where every group's loss for each byte of an e-fold finer step is the same: one
number, that level, decides all groups (water filling). What each group costs is measured once, at the configured
steps. Bytes are foretold from histograms of the weights; what an artifact really takes corrects the next pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.quant.gptq import largest_code
from model.quant.quantized import QuantizedState
from model.quant.state import StateQuantizer, configured_clips

MAX_GROWTH = 4.0  # no group's clip_sigmas goes beyond this many times the configured
CLIPPED_SHARE = 1e-5  # of a group's weights, at most, that the finest step may cut off
LEAST_SHARE = 1 / 16  # of the mean loss a byte that a group counts with; less is within the noise
LARGEST_GAP_BYTES, SMALLEST_GAP_BYTES = 10_000, 250  # a pass that ends so close below the limit is the last
GAP_SHARE = 0.01  # of the codes' bytes, between those two: what counts as close for a small artifact
AIMED_SHARE = 0.2  # of the gap
MAX_PASSES = 8  # three as a rule
BINS_PER_SIGMA, MAX_SIGMAS = 512, 64  # of a histogram
DECIMALS = 4  # of a chosen clip_sigmas: written into a configuration, it gives the same codes

Clips = dict[str, float]  # clip_sigmas by group, and by matrix where a matrix has one of its own


class Fitted(NamedTuple):
    """Outcome of fit_to_limit."""

    state: QuantizedState
    clips: Clips  # as used
    rises: dict[str, float]  # nats a token that each group's rounding costs at the configured clips, as measured
    artifact_bytes: int  # as measured
    num_passes: int


class GroupCurve(NamedTuple):
    """What is known of a group before it is rounded: the bytes of its codes at any step, and how far steps may go."""

    share_below: NDArray[
        np.float64
    ]  # of |weight| / sigma of its row, at the lower edge of every bin and beyond the last
    num_weights: int
    qmax: int
    configured: float  # clip_sigmas
    lowest: float
    highest: float

    def num_bytes(self, clip: float) -> float:
        """Return what an ideal coder takes for the codes of plain rounding."""
        edges = np.append((np.arange(self.qmax) + 0.5) * clip / self.qmax, math.inf) * BINS_PER_SIGMA
        below = np.interp(edges, np.arange(self.share_below.size), self.share_below)
        share = np.diff(below, prepend=0.0)  # of each magnitude
        used = share[share > 0]
        signs = 1.0 - share[0]  # a bit for every code but 0
        return self.num_weights / 8 * float(signs - (used * np.log2(used)).sum())

    def slope(self) -> float:
        """Return the bytes that an e-fold finer step would cost, about the configured one."""
        wider = 1.2  # far enough that a small matrix is no matter of single weights
        saved = self.num_bytes(self.configured) - self.num_bytes(wider * self.configured)
        return max(saved / math.log(wider), 1.0)


class WaterFill:
    """One curve of choices for all groups: from the finest steps, level by level, to the coarsest."""

    def __init__(self, curves: Mapping[str, GroupCurve], rises: Mapping[str, float], others: Clips) -> None:
        self._curves, self._others = curves, others
        slopes = {group: curve.slope() for group, curve in curves.items()}
        mean = sum(max(rises[group], 0.0) for group in curves) / max(sum(slopes.values()), 1.0)
        # at level 0 every group's loss a byte is the mean; with nothing to go by, all groups move alike
        self._at_zero = {
            group: curve.configured / math.sqrt(max(rises[group] / slopes[group] / mean, LEAST_SHARE) if mean else 1.0)
            for group, curve in curves.items()
        }
        self.finest, self.coarsest = self.clips(-math.inf), self.clips(math.inf)

    def clips(self, level: float) -> Clips:
        """Return the clip_sigmas at which every group's loss a byte is exp(2 level) times the mean, within bounds."""
        bounded = {
            group: round(min(max(self._at_zero[group] * math.exp(level), curve.lowest), curve.highest), DECIMALS)
            for group, curve in self._curves.items()
        }
        return {**self._others, **bounded}  # a group without matrices keeps its own

    def code_bytes(self, clips: Clips) -> float:
        """Return the bytes foretold for all codes."""
        return sum(curve.num_bytes(clips.get(unit, curve.configured)) for unit, curve in self._curves.items())

    def fill(self, budget: float) -> Clips:
        """Return the clips of the lowest level whose codes are foretold to be within budget, else the coarsest."""
        low, high = -8.0, 8.0  # e-folds: beyond all bounds
        while high - low > 1e-7:
            middle = (low + high) / 2
            low, high = (low, middle) if self.code_bytes(self.clips(middle)) <= budget else (middle, high)
        return self.clips(high)


def fit_to_limit(
    quantizer: StateQuantizer,
    measure_bytes: Callable[[QuantizedState, Clips], int],
    measure_rises: Callable[[QuantizedState], Mapping[str, float]],
) -> Fitted:
    """Quantize so that the artifact takes at most quant.size_limit_bytes, and no more than 10,000 fewer.

    A small artifact is filled to within 1 % of its codes, if that is less. measure_bytes returns the artifact's bytes,
    code included; measure_rises the loss of each group's rounding. More bytes are left only where every group is at
    its finest step, one that cuts off a weight in 100,000.
    Raises ValueError if the limit is not met with every group at MAX_GROWTH times its configured clip_sigmas.
    """
    limit, clips = quantizer.config.size_limit_bytes, configured_clips(quantizer.config)
    state = quantizer.quantize(clips)
    total = measure_bytes(state, clips)
    rises = dict(measure_rises(state))
    others = clips if quantizer.config.fit_unit == "group" else {}
    choices = WaterFill(group_curves(quantizer, clips), rises, others)
    accepted = min(max(GAP_SHARE * choices.code_bytes(clips), SMALLEST_GAP_BYTES), LARGEST_GAP_BYTES)
    best, gap, num_passes = None, AIMED_SHARE * accepted, 1
    while num_passes < MAX_PASSES:
        overhead = total - choices.code_bytes(clips)  # all but the codes, and what GPTQ's take beyond the foretold
        clips, num_passes = choices.fill(limit - gap - overhead), num_passes + 1
        state = quantizer.quantize(clips)
        total = measure_bytes(state, clips)
        is_within = total <= limit
        if is_within and (best is None or total > best.artifact_bytes):
            best = Fitted(state, clips, rises, total, num_passes)
        is_at_bound = clips == (choices.finest if is_within else choices.coarsest)
        if is_at_bound or limit - accepted <= total <= limit:
            break
        gap = gap if is_within else 2 * gap
    if best is None:
        raise ValueError(
            f"quant.size_limit_bytes={limit} cannot be met: {total} bytes are left with every quant.*_clip_sigmas at "
            f"{MAX_GROWTH:g} times the configured; raise the limit or lower quant.matrix_bits"
        )
    return best._replace(num_passes=num_passes)


def group_curves(quantizer: StateQuantizer, clips: Clips) -> dict[str, GroupCurve]:
    """Return the curve of every group that has matrices, or of every matrix, as quant.fit_unit says."""
    curves = {}
    for unit, names in quantizer.members().items():
        configured = clips[quantizer.group_of[names[0]]]
        counts = _magnitudes(quantizer.weights(names))
        below = np.concatenate([[0], counts.cumsum()]) / counts.sum()
        uncut = int(np.argmax(below >= 1 - CLIPPED_SHARE)) / BINS_PER_SIGMA
        curves[unit] = GroupCurve(
            share_below=below,
            num_weights=int(counts.sum()),
            qmax=largest_code(quantizer.bits_of(unit)),
            configured=configured,
            lowest=min(uncut, configured),
            highest=MAX_GROWTH * configured,
        )
    return curves


def _magnitudes(weights: Sequence[Tensor]) -> NDArray[np.int64]:
    """Return how many entries of the matrices have |weight| / sigma of the row in each bin."""
    counts = np.zeros(MAX_SIGMAS * BINS_PER_SIGMA, dtype=np.int64)
    for weight in weights:
        sigmas = (weight.abs() / weight.std(dim=-1, keepdim=True)).nan_to_num(0.0)  # 0 / 0 in a row of zeros
        bins = (sigmas * BINS_PER_SIGMA).clamp_max(counts.size - 1).long()
        counts += torch.bincount(bins.flatten(), minlength=counts.size).cpu().numpy()
    return counts
