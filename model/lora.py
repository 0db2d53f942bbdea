"""Low-rank adapters for test-time training: one set a document, all documents of a batch in one tensor a kind.

A set has, for every visit of the plan (not for every layer), the kinds q, k, v, o and mlp, and one for the head.
TRAP: "o" reads the block's normed input, not the attention output.
"""

# S documents held at once, N visits, R lora_rank, D model_dim

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ADAPTER_KINDS, ModelConfig
from model.kernels.adapter_update import scale_rows
from model.kernels.adapters import GradientBuffers, LowRank, ScaleGradients

ATTENTION_KINDS = ("q", "k", "v", "o")  # they read the same input
VISIT_KINDS = (*ATTENTION_KINDS, "mlp")
HEAD = "head"
GOLDEN = 0x9E3779B97F4A7C15  # odd, nearest to 2^64 over the golden ratio


def adapter_widths(config: ModelConfig, kind: str) -> tuple[int, int]:
    """Return (inputs, outputs) of one adapter of this kind."""
    outputs = {"k": config.kv_dim, "v": config.kv_dim, HEAD: config.vocab_size}
    return config.model_dim, outputs.get(kind, config.model_dim)


def num_adapter_parameters(config: ModelConfig, *, num_visits: int, lora_rank: int, kinds: Iterable[str]) -> int:
    """Return how many numbers one document's adapters hold (8,355,840 at full size)."""
    return sum((1 if kind == HEAD else num_visits) * lora_rank * sum(adapter_widths(config, kind)) for kind in kinds)


def initial_a(
    config: ModelConfig,
    *,
    num_visits: int,
    lora_rank: int,
    kinds: Iterable[str],
    seed: int,
    document: int | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Draw the starting A of every kind: (N, R, D) float32 on device, uniform in +-1/sqrt(D); the head's N is 1.

    A value depends on (seed, kind, visit), and on the document's index where one is given: never on a batch, a rank or
    the device. A document's are counted, not drawn in a row, so that a GPU makes them where they are needed.
    """
    shapes = {kind: (1 if kind == HEAD else num_visits, lora_rank, config.model_dim) for kind in kinds}
    bound = config.model_dim**-0.5
    if document is not None:
        return _count_a(shapes, bound, _key(f"adapter/{seed}/document/{document}", 8), torch.device(device))
    drawn = {}
    for kind, (visits, rank, dim) in shapes.items():
        rows = []
        for visit in range(visits):
            generator = torch.Generator().manual_seed(_key(f"adapter/{seed}/{kind}/{visit}/", 7))
            rows.append(torch.rand(rank, dim, generator=generator) * (2 * bound) - bound)
        drawn[kind] = torch.stack(rows).to(device)
    return drawn


def _key(name: str, num_bytes: int) -> int:
    """Return the first bytes of the name's sha256 as a number."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:num_bytes], "big")


def _count_a(
    shapes: Mapping[str, tuple[int, int, int]], bound: float, key: int, device: torch.device
) -> dict[str, Tensor]:
    """Return A by kind, shaped as shapes say: 24 bits of a hash of the key and each number's place."""
    bits = mix_(_places(tuple(shapes.items()), device) + _to_signed(key))
    values = (bits >> 40).bitwise_and_((1 << 24) - 1).float().mul_(2 * bound / (1 << 24)).sub_(bound)
    parts = values.split([math.prod(shape) for shape in shapes.values()])
    return {kind: part.view(shape) for (kind, shape), part in zip(shapes.items(), parts, strict=True)}


@functools.lru_cache(maxsize=2)
def _places(shapes: tuple[tuple[str, tuple[int, int, int]], ...], device: torch.device) -> Tensor:
    """Return what SplitMix64 adds to its key for each number of A, all kinds laid end to end, int64.

    A number counts on from 2^32 times the place of its kind among ADAPTER_KINDS plus 2^48 times its visit, so that
    it does not depend on what other kinds or visits there are.
    """
    parts = []
    for kind, (visits, rank, dim) in shapes:
        blocks = (torch.arange(visits, device=device) << 48) + (ADAPTER_KINDS.index(kind) << 32)
        parts.append((blocks.unsqueeze(1) + torch.arange(1, rank * dim + 1, device=device)).flatten())
    return torch.cat(parts).mul_(_to_signed(GOLDEN))


def mix_(x: Tensor) -> Tensor:
    """Return the output function of SplitMix64 over x (any shape) int64, in place; the sums and products wrap round.

    Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014. With the key plus i times
    GOLDEN as x it gives the i-th number of that key's sequence. Integers only: the same on every device.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x ^= (x >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # >> repeats the sign, the mask takes it away
        x *= _to_signed(factor)
    return x


def _to_signed(x: int) -> int:
    """Return the int64 that has the bits of a number below 2^64."""
    return x - (1 << 64) if x >> 63 else x


class VisitAdapters(NamedTuple):
    """The adapters of one visit: those of the attention part, which share their input, and the MLP's."""

    attention: LowRank | None
    mlp: LowRank | None


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of S documents, views of their rows by Layout: a[kind] (S, N, R, in), b[kind] (S, N, out, R).

    The head's N is 1. attention_a (S, N, K R, in): the A of the attention kinds present, in VISIT_KINDS order, as they
    lie together in memory; None where there is no such kind. gradients: where the backward writes, in place of
    autograd's own (then anchor requires a gradient).
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    attention_a: Tensor | None
    gradients: Adapters | None = None
    anchor: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """Return all tensors, A before B, kinds in their order."""
        return [*self.a.values(), *self.b.values()]

    def scaled(self, scales: Mapping[str, Tensor]) -> Adapters:
        """Return the adapters with B of the kinds in scales times scales[kind] (N, out); gradients stay those of B."""
        kinds = [kind for kind in scales if kind in self.b]
        b = {**self.b, **{kind: scale_rows(self.b[kind], scales[kind]) for kind in kinds}}
        anchor, gradients = self.anchor, self.gradients
        if gradients is not None and kinds:
            anchor = ScaleGradients.apply(anchor, [(gradients.b[kind], scales[kind]) for kind in kinds])
        return replace(self, b=b, anchor=anchor)

    def visits(self, num_visits: int) -> list[VisitAdapters]:
        """Return each visit's adapters; the head is left out."""
        attention = [kind for kind in ATTENTION_KINDS if kind in self.a]
        return [
            VisitAdapters(
                self._low_rank(visit, attention, self.attention_a) if attention else None,
                self._low_rank(visit, ["mlp"], self.a["mlp"]) if "mlp" in self.a else None,
            )
            for visit in range(num_visits)
        ]

    def head(self) -> LowRank | None:
        """Return the head's adapter, or None where the head is not adapted."""
        return self._low_rank(0, [HEAD], self.a[HEAD]) if HEAD in self.a else None

    def _low_rank(self, visit: int, kinds: Sequence[str], a: Tensor | None) -> LowRank:
        """Return the adapters of these kinds at one visit; a (S, N, K R, in) holds their A."""
        assert a is not None, kinds
        b = {kind: self.b[kind][:, visit] for kind in kinds}
        if self.gradients is None:
            return LowRank(a[:, visit], b)
        grad_a = self.gradients.a[kinds[0]] if kinds[0] in ("mlp", HEAD) else self.gradients.attention_a
        assert grad_a is not None
        assert self.anchor is not None
        grad_b = {kind: self.gradients.b[kind][:, visit] for kind in kinds}
        return LowRank(a[:, visit], b, GradientBuffers(grad_a[:, visit], grad_b, self.anchor))


@dataclass(frozen=True, slots=True)
class Layout:
    """How one document's adapters lie in one row of numbers: what shares an input lies together.

    The attention kinds' A by visit and kind, the MLP's A by visit, each kind's B by visit, then the head's A and B.
    """

    config: ModelConfig
    num_visits: int
    lora_rank: int
    kinds: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Numbers in a row."""
        return num_adapter_parameters(
            self.config, num_visits=self.num_visits, lora_rank=self.lora_rank, kinds=self.kinds
        )

    def view(self, rows: Tensor) -> Adapters:
        """Return the adapters that rows (S, num_parameters) hold, sharing their memory."""
        at, num_visits, rank = 0, self.num_visits, self.lora_rank

        def take(*shape: int) -> Tensor:
            nonlocal at
            first, at = at, at + math.prod(shape)
            return rows[:, first:at].view(-1, *shape)

        attention = [kind for kind in ATTENTION_KINDS if kind in self.kinds]
        a, b, joined = {}, {}, None
        if attention:
            block = take(num_visits, len(attention), rank, self.config.model_dim)
            joined = block.flatten(2, 3)
            a = {kind: block[:, :, place] for place, kind in enumerate(attention)}
        if "mlp" in self.kinds:
            a["mlp"] = take(num_visits, rank, self.config.model_dim)
        for kind in VISIT_KINDS:
            if kind in self.kinds:
                b[kind] = take(num_visits, adapter_widths(self.config, kind)[1], rank)
        if HEAD in self.kinds:
            a[HEAD] = take(1, rank, self.config.model_dim)
            b[HEAD] = take(1, self.config.vocab_size, rank)
        return Adapters({kind: a[kind] for kind in self.kinds}, {kind: b[kind] for kind in self.kinds}, joined)
