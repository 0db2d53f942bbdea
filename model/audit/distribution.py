"""Probes of the distribution (C2): one that sums to 1 over the whole vocabulary, fixed before the token is seen."""

# V vocab, T tokens, B rows

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.audit.system import DOCUMENT_TOKENS, System, join_documents
from model.audit.verdicts import Result, judge, not_run
from model.data.validation import ValidationSet
from model.lora import Adapters
from model.ttt.batches import Batch
from model.ttt.slots import Slots
from model.ttt.windows import Window

RULE = "C2"
LIMIT = 1e-4  # of RULES.md: sum of p = 1 +- 1e-4
NUM_PREFIXES = 2
NUM_SWAPS = 16
CPU_PRODUCTS = 2e12  # multiplications that a CPU may spend on the adapted sum; a GPU spends what it needs


def probe_normalization(system: System) -> Result:
    """Add up the probability of every id in the same place, each scored as if it were the real token."""
    if not system.documents:
        return not_run("normalization", RULE, "no validation document has three chunks; nothing to probe")
    sums = {}
    for document in system.documents[:NUM_PREFIXES]:
        variants, place = make_variants(system, system.validation.document(document)[: DOCUMENT_TOKENS - 1])
        at = variants.document_starts[:-1] + place
        sums[f"plain, document {document}"] = add_probabilities(system.score_plain(variants)[at])
        fresh = system.adapted_nll(variants, range(variants.num_documents - 1))
        sums[f"fresh adapters, document {document}"] = add_probabilities(fresh[at])
    document = system.documents[0]
    vocab_size, chunk = system.config.model.vocab_size, system.chunk(document)
    products = vocab_size * (chunk + DOCUMENT_TOKENS) * sum(p.numel() for p in system.model.parameters())
    skipped = ""
    if system.model.qo_bank.is_cuda or products <= CPU_PRODUCTS:
        sums[f"after an update, document {document}"] = add_adapted_probabilities(system, document)
    else:
        skipped = "; the sum over all ids after an update (too slow on a CPU at this size: gold_swap samples it)"
    where, value = max(sums.items(), key=lambda item: abs(item[1] - 1))
    return judge(
        "normalization", RULE, measured=abs(value - 1), limit=LIMIT, unit="sum of p, distance from 1",
        sample_size=len(sums), sample_of=f"sums over {vocab_size} ids", detail=f"largest: {where}: {value:.8f}",
        not_checked=f"other prefixes{skipped}",
    )  # fmt: skip


def make_variants(system: System, prefix: np.ndarray) -> tuple[ValidationSet, int]:
    """Return one document for every id of the vocabulary, prefix and the id, and the prediction that scores the id.

    Documents have 16 tokens, so that none crosses the edge of a row (rows are multiples of 16 in every preset).
    """
    ids = np.arange(system.config.model.vocab_size, dtype=prefix.dtype)
    return join_documents([np.append(prefix, index) for index in ids]), len(prefix) - 1


def add_probabilities(nll: np.ndarray) -> float:
    """Return the sum of exp(-nll), in float64."""
    return math.fsum(np.exp(-nll.astype(np.float64)).tolist())


def add_adapted_probabilities(system: System, document: int) -> float:
    """Return the sum over all ids at one place of the second chunk, with the adapters that the first one left."""
    adapters = capture_adapters(system, document)
    end = system.chunk(document) + DOCUMENT_TOKENS
    variants, _ = make_variants(system, system.validation.document(document)[:end])
    work, losses = system.make_pass(variants), []
    for first in range(0, variants.num_documents - 1, 64):
        rows = range(first, min(first + 64, variants.num_documents - 1))
        windows = [Window(row, 0, end, DOCUMENT_TOKENS, 1, True) for row in rows]
        losses.append(work.forward(windows, repeat_adapters(adapters, len(rows)))[:, -1])
    return add_probabilities(torch.cat(losses).cpu().numpy())


def capture_adapters(system: System, document: int) -> Adapters:
    """Return the adapters (one set) with which a document's second chunk is scored."""
    captured: list[Adapters] = []

    class Capturing(system.pass_type):  # type: ignore[misc,name-defined]
        def _advance(self, slots: Slots, batch: Batch) -> None:
            if not captured and batch.tasks[0].window.num_updates > 0:
                captured.append(slots.gather(torch.tensor([batch.tasks[0].slot], device=slots.values.device)))
            super()._advance(slots, batch)

    system.adapt(system.validation, [document], pass_type=Capturing)
    return captured[0]


def repeat_adapters(adapters: Adapters, times: int) -> Adapters:
    """Return the same set for several rows, without copying it."""

    def repeat(x: Tensor) -> Tensor:
        return x.expand(times, *x.shape[1:])

    a, b = ({kind: repeat(x) for kind, x in part.items()} for part in (adapters.a, adapters.b))
    return Adapters(a, b, None if adapters.attention_a is None else repeat(adapters.attention_a))


def probe_gold_swap(system: System) -> Result:
    """Swap the realized token for others: each must get what the distribution, known without it, gives it."""
    if not system.documents:
        return not_run("gold_swap", RULE, "no validation document has three chunks; nothing to probe")
    document = system.documents[0]
    adapters = capture_adapters(system, document)
    length = 2 * system.chunk(document)
    tokens = torch.from_numpy(system.validation.document(document)[: length + 1].astype(np.int64))
    row = tokens.to(system.model.qo_bank.device).unsqueeze(0)
    measured = 0.0
    for state in (None, adapters):
        measured = max(measured, measure_largest_swap(system, row, state))
    return judge(
        "gold_swap", RULE, measured=measured, limit=LIMIT, unit="nats from the distribution without the token",
        sample_size=2 * NUM_SWAPS, sample_of="swapped tokens, half of them after an update",
        not_checked="other places and ids; a dependence on the token below the limit",
    )  # fmt: skip


def measure_largest_swap(system: System, row: Tensor, adapters: Adapters | None) -> float:
    """Return how far the nll of swapped targets lies from the logits that were computed without any target."""
    inputs, targets = row[:, :-1], row[:, 1:]
    with torch.no_grad():
        logits = system.model(inputs, is_looped=True, adapters=adapters)
        log_probs = torch.log_softmax(logits.double(), dim=-1)[0]  # (T, V)
        base = system.model(inputs, targets, is_looped=True, adapters=adapters, reduction="none")[0]
        found = float((base.double() + log_probs.gather(1, targets[0][:, None])[:, 0]).abs().max())
        for _ in range(NUM_SWAPS):
            place = int(system.generator.integers(0, targets.size(1)))
            swapped = targets.clone()
            swapped[0, place] = int(system.generator.integers(0, system.config.model.vocab_size))
            nll = system.model(inputs, swapped, is_looped=True, adapters=adapters, reduction="none")[0]
            found = max(found, abs(float(nll[place].double() + log_probs[place, swapped[0, place]])))
            others = torch.arange(targets.size(1), device=nll.device) != place
            found = max(found, float((nll - base)[others].abs().max()))
    return found
