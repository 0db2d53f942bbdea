"""Probes that hold the scoring paths against the model's one forward pass: a gate, or a part that is missing in one.

A gate on the realized token (C2) changes the distribution after the token is known. A second forward for test-time
training that lacks a part of the first scores another model.
"""

# V vocab, T tokens, B rows

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.audit.distribution import NUM_PREFIXES
from model.audit.system import DOCUMENT_TOKENS, System, join_documents, largest, read_nll
from model.audit.verdicts import Result, judge, not_run
from model.data.shards import BOS_ID
from model.data.validation import ValidationSet
from model.lora import Adapters
from model.ttt.batches import Batch
from model.ttt.document_pass import DocumentPass
from model.ttt.slots import Slots

NO_DOCUMENT = "no validation document has three chunks; nothing to probe"
NUM_OF_A_KIND = 6  # swapped ids of each kind
LIMITS = {torch.bfloat16: 0.1, torch.float32: 1e-4}  # a logit of 16 has steps of 0.06 in bfloat16
MEAN_LIMITS = {torch.bfloat16: 0.03, torch.float32: 1e-4}


class Captured(NamedTuple):
    """The adapters (one set a row) with which the documents (B,) were scored."""

    documents: list[int]
    adapters: Adapters


def probe_target_gate(system: System) -> Result:
    """Swap the realized token: what each gets must be what the model gives it, asked without any target.

    The swapped ids are those that a gate would look at: tokens that occurred before, also behind the same one, pieces
    that begin a word and pieces that do not.
    """
    if not system.documents:
        return not_run("target_gate", "C2", NO_DOCUMENT)
    measured, num_swaps = 0.0, 0
    for document in system.documents[:NUM_PREFIXES]:
        tokens, end = system.validation.document(document), system.chunk(document) + DOCUMENT_TOKENS
        ids = pick_tempting_ids(system, tokens[:end], realized=int(tokens[end]))
        gaps = measure_swaps(system, tokens[:end], ids)
        measured, num_swaps = max(measured, largest(gaps)), num_swaps + gaps.size
    return judge(
        "target_gate", "C2", measured=measured, limit=LIMITS.get(system.model.compute_dtype, LIMITS[torch.float32]),
        unit="nats from the distribution without the token", sample_size=num_swaps,
        sample_of="swapped tokens, plain and after an update",
        not_checked="other places and ids; a gate that moves a score by less than the limit",
    )  # fmt: skip


def pick_tempting_ids(system: System, prefix: np.ndarray, *, realized: int) -> list[int]:
    """Return ids to swap in behind a prefix, those first that a hint or a gate would single out."""
    table, vocab_size = system.tokenizer.byte_table, system.config.model.vocab_size
    behind_same = prefix[1:][prefix[:-1] == prefix[-1]]
    seen = np.unique(prefix)[:: max(1, np.unique(prefix).size // NUM_OF_A_KIND)]
    kinds = [np.flatnonzero(table.has_leading_space), np.flatnonzero(~table.has_leading_space), np.arange(vocab_size)]
    drawn = [system.generator.choice(kind, NUM_OF_A_KIND) for kind in kinds if kind.size]
    found = [realized, int(prefix[-1]), *behind_same.tolist(), *seen.tolist(), *np.concatenate(drawn).tolist()]
    return [index for index in dict.fromkeys(found) if index != BOS_ID]


def measure_swaps(system: System, prefix: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """Return how far each id's score behind a prefix lies from its log-probability, plain scores first."""
    documents = [np.append(prefix, index).astype(prefix.dtype) for index in ids]
    plain = np.array([system.score_plain(join_documents([tokens]))[len(prefix) - 1] for tokens in documents])
    stated = log_probabilities(system, prefix, None)[0, list(ids)].cpu().numpy()
    gaps = [plain + stated]
    variants = join_documents(documents)
    work, captured = capture_all(system, variants, len(prefix) - 1)
    scores = read_nll(work)[variants.document_starts[:-1] + len(prefix) - 1]
    for group in captured:
        log_probs = log_probabilities(system, prefix, group.adapters)
        rows = torch.arange(len(group.documents), device=log_probs.device)
        chosen = torch.tensor([ids[document] for document in group.documents], device=log_probs.device)
        gaps.append(scores[group.documents] + log_probs[rows, chosen].cpu().numpy())
    found = np.concatenate(gaps)
    assert found.size == 2 * len(ids), (found.size, len(ids))
    return found


def log_probabilities(system: System, prefix: np.ndarray, adapters: Adapters | None) -> Tensor:
    """Return the log-probabilities (B, V) float64 behind a prefix, one row for each set of adapters (1 for None)."""
    num_rows = 1 if adapters is None else next(iter(adapters.tensors())).size(0)
    row = torch.from_numpy(prefix.astype(np.int64)).to(system.model.qo_bank.device)
    with torch.no_grad():
        logits = system.model(
            row.expand(num_rows, -1).contiguous(), is_looped=True, adapters=adapters, num_scored=1
        )  # (B, 1, V)
    return torch.log_softmax(logits[:, -1].double(), dim=-1)


def capture_all(system: System, variants: ValidationSet, prediction: int) -> tuple[DocumentPass, list[Captured]]:
    """Adapt every variant and return the pass, with the adapters that scored this prediction of each."""
    captured: list[Captured] = []

    class Capturing(system.pass_type):  # type: ignore[misc,name-defined]
        def _advance(self, slots: Slots, batch: Batch) -> None:
            tasks = [t for t in batch.tasks if t.window.end - t.window.num_scored <= prediction < t.window.end]
            if tasks:
                places = torch.tensor([task.slot for task in tasks], device=slots.values.device)
                captured.append(Captured([task.window.document for task in tasks], slots.gather(places)))
            super()._advance(slots, batch)

    documents = range(variants.num_documents - 1)
    return system.adapt(variants, documents, pass_type=Capturing), captured


def probe_two_forwards(system: System) -> Result:
    """Adapt with learning rate 0 from zero adapters: the scores must be those of the plain evaluation.

    Compared are the predictions of a document that both paths make from the same tokens: those of its first window.
    """
    if not system.documents:
        return not_run("two_forwards", "C3", NO_DOCUMENT)
    ttt, evaluation = system.config.ttt, system.config.evaluation
    still = replace(system, config=replace(system.config, ttt=replace(ttt, lr=0.0)))
    adapted = still.adapted_nll(system.validation)
    mean, token, where, size = 0.0, 0.0, -1, 0
    for document in system.documents:
        (start, end), chunk = system.bounds(document), system.chunk(document)
        # whole chunks: one that reaches over the window's end is scored from a window that begins later
        reach = min(ttt.window_tokens // chunk * chunk, evaluation.seq_len, evaluation.row_tokens)
        count = min(end - start - 1, reach)
        plain = system.score_plain(join_documents([system.validation.tokens[start : start + count + 1]]))
        gaps = np.abs(plain[:count].astype(np.float64) - adapted[start : start + count])
        token, size = max(token, largest(gaps)), size + count
        if largest(gaps.mean(keepdims=True)) >= mean:
            mean, where = largest(gaps.mean(keepdims=True)), document
    return judge(
        "two_forwards", "C3", measured=mean,
        limit=MEAN_LIMITS.get(system.model.compute_dtype, MEAN_LIMITS[torch.float32]),
        unit="nats a token, largest mean over documents", sample_size=size, sample_of="predictions scored both ways",
        detail=f"largest: document {where}; a single prediction differs by up to {token:.3g}",
        not_checked="predictions behind a document's first window, which the two paths make from other tokens; "
        "parts whose absence moves scores by less than the limit",
    )  # fmt: skip
