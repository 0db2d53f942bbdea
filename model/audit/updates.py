"""Probes of score-before-update (C3) and of the order of documents: adapters watched, poisoned and frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.audit.system import System, largest, read_nll
from model.audit.verdicts import FAIL, PASS, Result, judge, not_run
from model.lora import Adapters
from model.ttt.batches import Batch
from model.ttt.ledger_reading import choose_events
from model.ttt.score_ledger import SCORE, Events
from model.ttt.slots import Slots
from model.ttt.windows import Window

RULE = "C3"
NO_DOCUMENT = "no validation document has three chunks; no update to look at"
POISON_STD = 0.3


class StateEvent(NamedTuple):
    """Something that happened to a document's adapters: "reset", "score" or "update", with their sha256 (hex)."""

    document: int
    kind: str
    num_updates: int  # before a score, after an update; what the ledger says
    sha256: str


def state_hash(adapters: Adapters, row: int, dtype: torch.dtype) -> str:
    """Return the sha256 of one document's adapters as the model reads them: all tensors in their order, in dtype."""
    digest = hashlib.sha256()
    for tensor in adapters.tensors():
        digest.update(tensor[row].detach().to(dtype).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def watch_states(system: System, documents: Sequence[int], *, num_slots: int | None = None) -> list[StateEvent]:
    """Adapt documents and return what their adapters were at every reset, score and update.

    A score's state is what the forward pass took out of the slots. A replayed step cannot be looked into: there it is
    the state before the step.
    """
    seen: list[StateEvent] = []
    holders: dict[int, int] = {}  # the document of each slot
    read: dict[int, str] = {}  # the state that was last read, by document
    dtype = system.model.compute_dtype

    def hash_slot(slots: Slots, slot: int) -> str:
        here = torch.tensor([slot], device=slots.values.device)
        return state_hash(system.slots_type.gather(slots, here), 0, dtype)

    class WatchedSlots(system.slots_type):  # type: ignore[misc,name-defined]
        def reset(self, slot: int, document: int) -> None:
            super().reset(slot, document)
            holders[slot] = document
            seen.append(StateEvent(document, "reset", 0, hash_slot(self, slot)))

        def gather(self, slots: Tensor, gradients: Tensor | None = None) -> Adapters:
            adapters: Adapters = super().gather(slots, gradients)
            if slots.is_cuda and torch.cuda.is_current_stream_capturing():
                return adapters  # a recording runs nothing, and may not wait for the host
            for row, slot in enumerate(slots.tolist()):
                if slot in holders:  # nobody holds a spare one
                    read[holders[slot]] = state_hash(adapters, row, dtype)
            return adapters

    class WatchedPass(system.pass_type):  # type: ignore[misc,name-defined]
        def _advance(self, slots: Slots, batch: Batch) -> None:
            read.update({task.window.document: hash_slot(slots, task.slot) for task in batch.tasks})
            super()._advance(slots, batch)
            for task in () if batch.is_last else batch.tasks:
                updates = int(slots.num_updates[task.slot])
                seen.append(StateEvent(task.window.document, "update", updates, hash_slot(slots, task.slot)))

        def _note(self, windows: list[Window], losses: Tensor) -> None:
            seen.extend(StateEvent(w.document, "score", w.num_updates, read[w.document]) for w in windows)
            super()._note(windows, losses)

    system.adapt(system.validation, documents, slots_type=WatchedSlots, pass_type=WatchedPass, num_slots=num_slots)
    return seen


def probe_adapter_states(system: System) -> Result:
    """Hash the adapters: a score reads the state its ledger names, and a document starts from the drawn one."""
    if not system.documents:
        return not_run("adapter_states", RULE, NO_DOCUMENT)
    documents = system.documents[: max(2, system.sample // 2)]
    seen = watch_states(system, documents, num_slots=min(2, len(documents)))
    wrong: list[str] = []
    states: dict[int, dict[int, str]] = {document: {} for document in documents}
    starts = {event.document: event.sha256 for event in seen if event.kind == "reset"}
    if system.config.ttt.adapter_key == "seed" and len(set(starts.values())) > 1:
        wrong.append("documents start from different adapters")
    for event in seen:
        known = states[event.document]
        if event.kind != "score":
            known[event.num_updates] = event.sha256
        elif known.get(event.num_updates) != event.sha256 or max(known) != event.num_updates:
            wrong.append(
                f"document {event.document}: the score said to come after {event.num_updates} updates read a state "
                f"{'of later updates' if max(known) > event.num_updates else 'that no update left'}"
            )
    num_scores = sum(event.kind == "score" for event in seen)
    return Result(
        probe="adapter_states", rule=RULE, result=FAIL if wrong else PASS, measured=len(wrong), limit=0,
        unit="scores with another state than stated", sample_size=num_scores, sample_of="scored chunks",
        detail=wrong[0] if wrong else "; ".join(f"document {d}: start {starts[d][:12]}" for d in documents),
        not_checked="the states of the other documents, and those of the original run (they are not kept)",
        evidence={"states": {str(d): [known[n] for n in sorted(known)] for d, known in states.items()}},
    )  # fmt: skip


def probe_poisoned_update(system: System) -> Result:
    """Spoil update k: scores of chunks up to k must not move."""
    return _probe_updates(system, "poisoned_update", _poison_slots, reach=0)


def probe_frozen_updates(system: System) -> Result:
    """Learning rate 0 after update k: scores of chunks up to k + 1 must not move."""
    return _probe_updates(system, "lr0_after_k", _freeze_slots, reach=1)


def _probe_updates(system: System, probe: str, change: Any, *, reach: int) -> Result:
    if not system.documents:
        return not_run(probe, RULE, NO_DOCUMENT)
    ttt, measured, effect, size = system.config.ttt, 0.0, 0.0, 0
    chunks = [-(-(b - a) // system.chunk(d)) for d in system.documents for a, b in [system.bounds(d)]]
    for k in sorted({0, max(0, max(chunks) // 2 - 1)}):
        changed = system.adapted_nll(
            system.validation, slots_type=change(system.slots_type, (k + 1) * ttt.updates_per_chunk)
        )
        moved = np.abs(changed - system.adapted)
        for document in system.documents:
            start, end = system.bounds(document)
            border = min(start + (k + 1 + reach) * system.chunk(document), end - 1)
            measured = max(measured, largest(moved[start:border]))
            effect = max(effect, largest(moved[border : end - 1]))
        size += len(system.documents)
    noise = system.adapted_noise
    if effect <= noise:
        return not_run(probe, RULE, "the changed update moved no later score: the probe has no power")
    return judge(
        probe, RULE, measured=measured, limit=noise, unit="nats, largest change before the update's reach",
        sample_size=size, sample_of="documents x updates",
        detail=f"scores behind it moved by up to {effect:.3g}; identical reruns allow {noise:.3g}",
        not_checked="other documents and updates than the sampled ones",
    )  # fmt: skip


def _poison_slots(base: type[Slots], number: int) -> type[Slots]:
    """Return slots whose update of this number (from 1) leaves noise in the adapters."""

    class PoisonedSlots(base):  # type: ignore[misc,valid-type]
        noise: Tensor | None = None

        def step(self, slots: Tensor, gradients: Tensor) -> None:
            super().step(slots, gradients)
            if self.noise is None:  # made before anything is recorded
                generator = torch.Generator().manual_seed(number)
                self.noise = torch.randn(self.values.size(1), generator=generator).to(self.values) * POISON_STD
            is_hit = (self.num_updates[slots] == number).to(self.values.dtype).unsqueeze(1)
            self.values[slots] += is_hit * self.noise

    return PoisonedSlots


def _freeze_slots(base: type[Slots], number: int) -> type[Slots]:
    """Return slots that change nothing any more after the update of this number (from 1)."""

    class FrozenSlots(base):  # type: ignore[misc,valid-type]
        def step(self, slots: Tensor, gradients: Tensor) -> None:
            before = self.values[slots].clone()
            super().step(slots, gradients)
            is_late = (self.num_updates[slots] > number).unsqueeze(1)
            self.values[slots] = torch.where(is_late, before, self.values[slots])

    return FrozenSlots


def probe_order(system: System, events: Events, nll: np.ndarray) -> Result:
    """Say in which order documents were scored, and rescore a sample in stream order, one at a time."""
    scores = choose_events(events, SCORE)
    documents, ranks = scores.column("document"), scores.column("rank")
    displaced = 0
    for rank in np.unique(ranks):
        mine = documents[ranks == rank]
        _, first = np.unique(mine, return_index=True)
        started = mine[np.sort(first)]
        displaced += int((np.diff(started) < 0).sum())
    work = system.adapt(system.validation, sorted(system.documents), num_slots=1)
    again, measured, where = read_nll(work), 0.0, -1
    for document in system.documents:
        start, end = (int(x) for x in system.validation.document_ranges[document])
        gap = abs(float(again[start : end - 1].sum(dtype=np.float64) - nll[start : end - 1].sum(dtype=np.float64)))
        if gap / (end - 1 - start) >= measured:
            measured, where = gap / (end - 1 - start), document
    order = "stream order" if not displaced else f"another order ({displaced} steps back)"
    return judge(
        "order", "order", measured=measured, limit=choose_order_limit(system),
        unit="nats a token, largest over documents",
        sample_size=len(system.documents), sample_of="documents rescored one at a time in stream order",
        detail=f"ttt.order={system.config.ttt.order}: documents were started in {order} on each of "
        f"{len(np.unique(ranks))} ranks, up to {system.config.ttt.batch_documents} at once; largest: document {where}",
        not_checked="documents outside the sample",
    )  # fmt: skip


def choose_order_limit(system: System) -> float:
    """Return what another batch may move a document's mean loss: rounding, as measured for each float type."""
    return 1e-2 if system.model.compute_dtype == torch.bfloat16 else 1e-4
