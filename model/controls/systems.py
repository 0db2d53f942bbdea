"""Negative controls: systems broken on purpose, one way each, that the probes of an audit must catch.

Used by the self-test only. Models, passes and slots are subclasses of the real ones; what a run leaves behind is
changed in a copy. Nothing here is reachable from training or scoring.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import gpt
from model.attention.self_attention import Factors, join
from model.audit.system import System
from model.config import ModelConfig
from model.data.tokenizer import ByteTable
from model.gpt import GPT
from model.ttt.batches import Batch
from model.ttt.document_pass import DocumentPass
from model.ttt.score_ledger import UPDATE, Events
from model.ttt.slots import Slots

LEAK = 0.2  # share of a neighbor's hidden state
HINT = 0.01  # share of its loss that a hint may take off a token
BONUS = 0.05  # probability that an un-normalized head adds to its favorite


def rebuild(system: System, kind: type[GPT]) -> System:
    """Return the system with its weights in a model of another kind."""
    model = kind(system.config.model, compute_dtype=system.model.compute_dtype).to(system.model.qo_bank.device)
    model.load_state_dict(system.model.state_dict())
    return alter(system, model=model.requires_grad_(False))


def alter(system: System, **parts: Any) -> System:
    """Return the system with other parts, nothing of what it remembered kept."""
    names = ("model", "validation", "tokenizer", "config", "sample", "pass_type", "slots_type")
    return System(**{**{name: getattr(system, name) for name in names}, **parts})


@contextlib.contextmanager
def leaking_mask() -> Iterator[None]:
    """Let every position attend to the one after it: the causal mask is off by one."""
    sound: Callable[..., Tensor] = vars(gpt)["self_attention"]

    def leaking(joined: Tensor | Factors, *rest: Any, num_kv_heads: int, **options: Any) -> Tensor:
        qkv, num_heads = join(joined), rest[2].numel()  # cos, sin, q_gain
        width = qkv.size(-1) * num_heads // (num_heads + 2 * num_kv_heads)
        shifted = torch.cat((qkv[..., :width].roll(1, dims=1), qkv[..., width:]), dim=-1)
        ahead = sound(shifted, *rest, num_kv_heads=num_kv_heads, **options)  # row t + 1: the query of t sees t + 1
        own = sound(qkv, *rest, num_kv_heads=num_kv_heads, **options)
        return torch.cat((ahead[:, 1:], own[:, -1:]), dim=1)

    vars(gpt)["self_attention"] = leaking
    try:
        yield
    finally:
        vars(gpt)["self_attention"] = sound


class NeighborGPT(GPT):
    """Mixes the rows of a batch, as a norm over the batch would."""

    def _run_visits(self, *arguments: Any, **options: Any) -> Tensor:
        hidden = super()._run_visits(*arguments, **options)
        return hidden + LEAK * hidden.roll(1, dims=0)


class UnpackedGPT(GPT):
    """Forgets where documents begin in a packed row."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Return what the model returns for one long document."""
        return super().forward(tokens, targets, **{**options, "packing": None})


class UnnormalizedGPT(GPT):
    """Adds probability to a repetition of the last token and takes it from nobody."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Return the loss of the mixture."""
        result = super().forward(tokens, targets, **options)
        if targets is None or options.get("reduction") != "none":
            return result
        return -torch.log(torch.exp(-result) + BONUS * (targets == tokens[:, -targets.size(1) :]))


class GoldPeekingGPT(GPT):
    """Raises the logit of the token that turns out to be the real one, then normalizes."""

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor:
        """Return the loss under a distribution that knows the answer."""
        result = super().forward(tokens, targets, **options)
        if targets is None or options.get("reduction") != "none":
            return result
        raised = torch.exp(-result) * math.exp(BONUS)
        return -torch.log(raised / (raised + 1 - torch.exp(-result)))


class UpdateFirst(DocumentPass):
    """Learns from a chunk before it scores it, and writes a ledger that says otherwise."""

    is_silent = False
    is_honest = False

    def _advance(self, slots: Slots, batch: Batch) -> None:
        if not batch.is_last:
            self.is_silent = True
            super()._advance(slots, batch)
            self.is_silent = False
        super()._advance(slots, batch._replace(is_last=True))  # as a last chunk is: scored, not learned from
        if not batch.is_last and not self.is_honest:
            self._log_updates([task.window for task in batch.tasks], 0)

    def _note(self, windows: Any, losses: Tensor) -> None:
        if not self.is_silent:
            super()._note(windows, losses)

    def _log(self, kind: int, windows: Any, loss_sums: Tensor | None) -> None:
        if not self.is_silent or (self.is_honest and kind == UPDATE):
            super()._log(kind, windows, loss_sums)


class HonestUpdateFirst(UpdateFirst):
    """Learns before it scores, and its ledger shows it."""

    is_honest = True


class Rescoring(DocumentPass):
    """Scores a chunk again after having learned from it."""

    def _advance(self, slots: Slots, batch: Batch) -> None:
        super()._advance(slots, batch)
        if not batch.is_last:
            super()._advance(slots, batch._replace(is_last=True))


class Skipping(DocumentPass):
    """Leaves out its last document."""

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt all documents but one."""
        super().run_adapted(documents[:-1], slots)


class StaleSlots(Slots):
    """Hands a slot to the next document with the adapters of the one before."""

    def reset(self, slot: int, document: int) -> None:
        """Reset a slot the first time only."""
        used: set[int] = self.__dict__.setdefault("used", set())
        if slot in used:
            self.num_updates[slot] = 0
        else:
            super().reset(slot, document)
        used.add(slot)


class LongestFirst(DocumentPass):
    """Adapts documents one after another, the longest first (with StaleSlots: in one state that they share)."""

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt the documents one by one."""
        for document in sorted(documents, key=self.num_predictions, reverse=True):
            super().run_adapted([document], slots)


class HintedLongestFirst(LongestFirst):
    """Learns from the longest documents first, and takes hints from all that stand before a document in the stream."""

    def _note(self, windows: Any, losses: Tensor) -> None:
        starts = [int(self.ranges[window.document][0]) for window in windows]
        hints = [float(self.validation.tokens[:start].sum(dtype=np.int64) % 97) / 97 for start in starts]
        super()._note(windows, losses * (1 - HINT * torch.tensor(hints).unsqueeze(1)))


class Gated(DocumentPass):
    """Mixes the model with the tokens seen so far where the realized token is one of them: a gate that looks at it."""

    def _note(self, windows: Any, losses: Tensor) -> None:
        mixed = losses.clone()
        for row, window in enumerate(windows):
            document = self.validation.document(window.document)
            for place in range(window.end - window.num_scored, window.end):
                seen, column = set(document[: place + 1].tolist()), losses.size(1) - (window.end - place)
                if int(document[place + 1]) in seen:
                    share = (1 - BONUS) * torch.exp(-losses[row, column]) + BONUS / len(seen)
                    mixed[row, column] = -torch.log(share)
        super()._note(windows, mixed)


class GatelessGPT(GPT):
    """Its forward for adaptation was written a second time, and the gates of the skip connections were forgotten."""

    forgotten, stand_in = "skip_gates", -math.inf  # sigmoid 0: the skip connection takes all

    def _run_visits(
        self,
        tokens: Tensor,
        is_looped: bool,
        packing: Any,
        left_padding: Any,
        adapters: Any,
        n: Any,
        weights: Any = None,
    ) -> Tensor:
        if adapters is None:
            return super()._run_visits(tokens, is_looped, packing, left_padding, adapters, n, weights)
        part = self.get_parameter(self.forgotten)
        kept = part.data
        part.data = torch.full_like(kept, self.stand_in)
        try:
            return super()._run_visits(tokens, is_looped, packing, left_padding, adapters, n)
        finally:
            part.data = kept


class UngatedHeadsGPT(GatelessGPT):
    """Its forward for adaptation lacks the gates of the attention heads."""

    forgotten, stand_in = "attn_gate", 0.0  # a factor of 1


class SmearingGPT(GPT):
    """Adds a share of the token before to every token, also where that one ends another document."""

    def __init__(self, config: ModelConfig, **options: Any) -> None:
        super().__init__(replace(config, smear_bos_mask=False), **options)


def record_events(system: System, pass_type: type[DocumentPass]) -> tuple[Events, np.ndarray]:
    """Return ledger and nll of all documents, scored by a broken pass."""
    documents = [d for d, (start, end) in enumerate(system.validation.document_ranges) if end - start > 1]
    work = system.adapt(system.validation, documents, pass_type=pass_type)
    return work.close_ledger(), np.asarray(work.nll.cpu().numpy())


def count_spaces_twice(table: ByteTable) -> ByteTable:
    """Return a table in which a leading space is in the piece's bytes and counted on top."""
    return replace(table, base_bytes=(table.base_bytes + table.has_leading_space).astype(np.int16))


def count_fallback_as_three(table: ByteTable, byte_ids: Sequence[int]) -> ByteTable:
    """Return a table in which a byte piece has the 3 bytes of the replacement character it decodes to alone."""
    base_bytes = table.base_bytes.copy()
    base_bytes[list(byte_ids)] = 3
    return replace(table, base_bytes=base_bytes)
