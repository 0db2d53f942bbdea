"""The adapters of the documents at work and their optimizer state, one row of numbers a document."""

# S slots, B rows of a batch, P numbers of one document, N visits, R lora_rank, D model_dim

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from model.banks import visit_plan
from model.config import TTTConfig
from model.gpt import GPT
from model.kernels.adapter_update import AdamSettings, adam_rows_, gather_rows
from model.lora import Adapters, Layout, initial_a


@dataclass(slots=True)
class Slots:
    """Adapters and their optimizer state for S documents at once; weights float32, or float64 in a float64 model.

    num_spare more rows follow the slots: nobody's, for batches that must have a fixed size.
    """

    model: GPT
    config: TTTConfig
    seed: int
    num_slots: int
    initial: Mapping[str, Tensor] | None = None  # A by kind (N, R, D), instead of the drawn one
    is_looped: bool = True
    num_spare: int = 0
    layout: Layout = field(init=False)
    values: Tensor = field(init=False)  # (S, P)
    moments: Tensor = field(init=False)  # (S, P)
    num_updates: Tensor = field(init=False)  # (S,) int64
    start: Tensor | None = field(init=False)  # (P,) what every document starts from, unless it depends on the document

    def __post_init__(self) -> None:
        device, dtype, num_rows = self.model.qo_bank.device, self.dtype, self.num_slots + self.num_spare
        num_visits = visit_plan(self.model.config, is_looped=self.is_looped).num_visits
        self.layout = Layout(self.model.config, num_visits, self.config.lora_rank, self.config.adapter_kinds)
        self.values, self.moments = (
            torch.zeros(num_rows, self.layout.num_parameters, dtype=dtype, device=device) for _ in range(2)
        )
        self.num_updates = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.start = None
        if self.initial is not None or self.config.adapter_key == "seed":
            self.start = torch.empty_like(self.values[0])
            self._fill(self.start, None)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the adapters."""
        return torch.float64 if self.model.compute_dtype == torch.float64 else torch.float32

    @property
    def factor(self) -> float:
        """What every stored number is multiplied by when the model reads it: the root of lora_alpha / lora_rank.

        A times it and B times it give (lora_alpha / lora_rank) (h A^T) B^T: one factor for a whole row of numbers, in
        a pass over them that is made anyway, and no place in the model that could forget it.
        """
        alpha, rank = self.config.lora_alpha, self.config.lora_rank
        return 1.0 if alpha is None else math.sqrt(alpha / rank)

    def _draw(self, document: int | None) -> Mapping[str, Tensor]:
        """Return A by kind before a document's first update, given or drawn on the slots' device."""
        if self.initial is not None:
            return self.initial
        return initial_a(
            self.model.config,
            num_visits=self.layout.num_visits,
            lora_rank=self.config.lora_rank,
            kinds=self.config.adapter_kinds,
            seed=self.seed,
            document=document,
            device=self.values.device,
        )

    def _fill(self, row: Tensor, document: int | None) -> None:
        """Write a document's numbers before its first update into row (P,): A drawn or given, B zero."""
        drawn = self._draw(document)
        row.zero_()
        for kind, value in self.layout.view(row.unsqueeze(0)).a.items():
            value[0].copy_(drawn[kind])

    def reset(self, slot: int, document: int) -> None:
        """Give a slot to a document: A at its start, B and the optimizer state at zero."""
        if self.start is not None:
            self.values[slot].copy_(self.start)
        else:
            self._fill(self.values[slot], document)
        self.moments[slot].zero_()
        self.num_updates[slot].zero_()

    def gather(self, slots: Tensor, gradients: Tensor | None = None) -> Adapters:
        """Return a copy of the adapters of the given slots (B,), times factor, in the model's compute type.

        gradients (B, P) of that type: where a backward through them leaves theirs.
        """
        rows = gather_rows(self.values, slots, self.model.compute_dtype, self.factor)
        if gradients is None:
            return self.layout.view(rows)
        anchor = torch.zeros((), dtype=rows.dtype, device=rows.device, requires_grad=True)
        return replace(self.layout.view(rows), gradients=self.layout.view(gradients), anchor=anchor)

    @torch.no_grad()
    def step(self, slots: Tensor, gradients: Tensor) -> None:
        """Apply one AdamW step (beta1 0, decoupled decay) to the adapters of slots (B,).

        gradients (B, P): with respect to what gather returned.

        TRAP: A's first gradient is exactly zero, for B is, yet its decay and its step count run from the first update.
        """
        config = self.config
        settings = AdamSettings(config.lr, config.weight_decay, config.beta2, config.eps)
        adam_rows_(self.values, self.moments, slots, gradients, self._count_update(slots), settings, self.factor)

    def _count_update(self, slots: Tensor) -> Tensor:
        """Count one more update of each slot and return 1 - beta2^count (B,)."""
        self.num_updates[slots] += 1
        # in float64: 1 - 0.999 in float32 is off by 1e-5 of itself, which shows in the scores
        return (1 - self.config.beta2 ** self.num_updates[slots].double()).to(self.dtype)
