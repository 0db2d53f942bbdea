"""Low-rank adapters for test-time training: one set a document, all documents of a batch in one tensor a kind.

A set has, for every visit of the plan (not for every layer), the kinds q, k, v, o and mlp, and one for the head.
TRAP: "o" reads the block's normed input, not the attention output.
"""

# S documents held at once, N visits, R lora_rank, D model_dim

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelConfig

VISIT_KINDS = ("q", "k", "v", "o", "mlp")
HEAD = "head"
Pair = tuple[Tensor, Tensor]


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
) -> dict[str, Tensor]:
    """Draw the starting A of every kind: (N, R, D) float32, uniform in +-1/sqrt(D); the head's N is 1.

    A value depends on (seed, kind, visit), and on the document's index where one is given: never on a batch or a rank.
    """
    bound = config.model_dim**-0.5
    drawn = {}
    for kind in kinds:
        rows = []
        for visit in range(1 if kind == HEAD else num_visits):
            key = f"adapter/{seed}/{kind}/{visit}/{'' if document is None else document}"
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
            rows.append(torch.rand(lora_rank, config.model_dim, generator=generator) * (2 * bound) - bound)
        drawn[kind] = torch.stack(rows)
    return drawn


@dataclass(frozen=True, slots=True)
class Adapters:
    """Adapters of S documents: a[kind] (S, N, R, in) and b[kind] (S, N, out, R); the head's N is 1."""

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    @classmethod
    def zeros(
        cls,
        config: ModelConfig,
        *,
        num_slots: int,
        num_visits: int,
        lora_rank: int,
        kinds: Iterable[str],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Adapters:
        """Return adapters whose A and B are both zero."""
        a, b = {}, {}
        for kind in kinds:
            inputs, outputs = adapter_widths(config, kind)
            visits = 1 if kind == HEAD else num_visits
            a[kind] = torch.zeros(num_slots, visits, lora_rank, inputs, dtype=dtype, device=device)
            b[kind] = torch.zeros(num_slots, visits, outputs, lora_rank, dtype=dtype, device=device)
        return cls(a, b)

    def tensors(self) -> list[Tensor]:
        """Return all tensors, A before B, kinds in their order."""
        return [*self.a.values(), *self.b.values()]

    def select(self, slots: Tensor) -> Adapters:
        """Return a copy of the adapters of the given slots (int64 indices)."""
        return Adapters(
            {kind: value[slots] for kind, value in self.a.items()},
            {kind: value[slots] for kind, value in self.b.items()},
        )

    def requires_grad_(self) -> Adapters:
        """Ask autograd for the gradient of every tensor."""
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self

    def by_visit(self, num_visits: int) -> list[dict[str, Pair]]:
        """Return, for each visit, its pairs (A (S, R, in), B (S, out, R)) by kind; the head is left out."""
        visits: list[dict[str, Pair]] = [{} for _ in range(num_visits)]
        for kind in VISIT_KINDS:
            if kind in self.a:
                for visit, pair in enumerate(zip(self.a[kind].unbind(1), self.b[kind].unbind(1), strict=True)):
                    visits[visit][kind] = pair
        return visits

    def head(self) -> Pair | None:
        """Return the head's pair, or None where the head is not adapted."""
        return (self.a[HEAD][:, 0], self.b[HEAD][:, 0]) if HEAD in self.a else None
