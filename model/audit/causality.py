"""Probes of causality (C1): what comes later, and what stands in other documents, must not move a score."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from model.audit.system import System, largest
from model.audit.verdicts import Result, judge, not_run

RULE = "C1"
NUM_ROUNDS = 3
NO_DOCUMENT = "no validation document has three chunks; nothing to probe"
FLOAT_NOTE = "a leak too small to change a float32 score"


def probe_causality(system: System) -> Result:
    """Flip every token from t on, in every document at once; plain scores of targets before t must stay."""
    if not system.documents:
        return not_run("causality", RULE, NO_DOCUMENT)
    stream, measured, effect = system.stream, 0.0, 0.0
    num_flips = 0
    for _ in range(NUM_ROUNDS):
        cuts = []
        for start, end in stream.document_ranges[:-1]:
            cuts.append((int(start) + int(system.generator.integers(2, end - start - 1)), int(end) - 1))
        moved = np.abs(system.score_plain(system.flip_tokens(stream, cuts)) - system.plain)
        for (start, _), (cut, end) in zip(stream.document_ranges[:-1], cuts, strict=True):
            measured = max(measured, largest(moved[start : cut - 1]))  # targets start+1 .. cut-1
            effect = max(effect, largest(moved[cut - 1 : end]))
        num_flips += len(cuts)
    return _verdict("causality", system.plain_noise, measured, effect, num_flips, "flips, plain evaluation")


def probe_chunk_borders(system: System) -> Result:
    """With test-time training on: flip from just before, at and just behind a chunk's first target."""
    return _probe_adapted(
        system, "chunk_borders", ([_border(system, document) + shift for document in system.documents]
                                  for shift in (0, 1, 2)), "flips at chunk borders, test-time training on"
    )  # fmt: skip


def probe_ttt_causality(system: System) -> Result:
    """With test-time training on: flip from a random place on."""

    def cuts() -> Iterable[list[int]]:
        for _ in range(NUM_ROUNDS):
            yield [int(system.generator.integers(2, np.subtract(*system.bounds(d)[::-1]))) for d in system.documents]

    return _probe_adapted(system, "ttt_causality", cuts(), "flips, test-time training on")


def _border(system: System, document: int) -> int:
    (start, end), chunk = system.bounds(document), system.chunk(document)
    return chunk * int(system.generator.integers(1, (end - start - 3) // chunk + 1))


def _probe_adapted(system: System, probe: str, rounds: Iterable[list[int]], sample_of: str) -> Result:
    """Flip each document from its cut (tokens counted from its BOS) on and compare the scores before it."""
    if not system.documents:
        return not_run(probe, RULE, NO_DOCUMENT)
    measured = effect = 0.0
    num_flips = 0
    for cuts in rounds:
        bounds = [system.bounds(document) for document in system.documents]
        places = [(start + cut, end) for (start, end), cut in zip(bounds, cuts, strict=True)]
        moved = np.abs(system.adapted_nll(system.flip_tokens(system.validation, places)) - system.adapted)
        for (start, end), (first, _) in zip(bounds, places, strict=True):
            measured = max(measured, largest(moved[start : first - 1]))
            effect = max(effect, largest(moved[first - 1 : end - 1]))
        num_flips += len(cuts)
    lengths = (
        "; another length of the same document, by which its chunks go" if system.config.ttt.chunk_by_length else ""
    )
    return _verdict(probe, system.adapted_noise, measured, effect, num_flips, sample_of, f"{FLOAT_NOTE}{lengths}")


def probe_across_documents(system: System) -> Result:
    """Replace every other document of a batch, and of a packed row; the ones between must keep their scores."""
    if len(system.documents) < 2:
        return not_run("across_documents", RULE, "fewer than two documents of three chunks; no neighbors to change")
    measured = effect = 0.0
    for parity in (0, 1):
        ranges = [(int(start), int(end) - 1) for start, end in system.stream.document_ranges[:-1]]
        changed, kept = ranges[parity::2], ranges[1 - parity :: 2]
        moved = np.abs(system.score_plain(system.flip_tokens(system.stream, changed)) - system.plain)
        measured = max(measured, *(largest(moved[a:b]) for a, b in kept))
        effect = max(effect, *(largest(moved[a:b]) for a, b in changed))
        bounds = [system.bounds(document) for document in system.documents]
        moved = np.abs(system.adapted_nll(system.flip_tokens(system.validation, bounds[parity::2])) - system.adapted)
        measured = max(measured, *(largest(moved[a : b - 1]) for a, b in bounds[1 - parity :: 2]))
    noise = max(system.plain_noise, system.adapted_noise)
    return _verdict(
        "across_documents", noise, measured, effect, 2 * len(system.documents), "documents, plain and adapted"
    )


def probe_independence(system: System) -> Result:
    """Adapt document N, then N+1, in one slot; with N replaced by noise, N+1 must score the same."""
    if len(system.documents) < 2:
        return not_run("independence", RULE, "fewer than two documents of three chunks; none comes after another")
    measured = effect = 0.0
    pairs = list(zip(system.documents[:-1], system.documents[1:], strict=True))[: max(2, system.sample // 2)]
    for first, second in pairs:
        spans = [system.bounds(document) for document in (first, second)]
        changed = system.flip_tokens(system.validation, spans[:1])
        before, after = (
            system.adapted_nll(validation, (first, second), num_slots=1) for validation in (system.validation, changed)
        )
        moved = np.abs(after - before)
        effect = max(effect, largest(moved[spans[0][0] : spans[0][1] - 1]))
        measured = max(measured, largest(moved[spans[1][0] : spans[1][1] - 1]))
    return _verdict("independence", system.adapted_noise, measured, effect, len(pairs), "pairs through one slot")


def _verdict(
    probe: str, noise: float, measured: float, effect: float, size: int, sample_of: str, note: str = FLOAT_NOTE
) -> Result:
    if effect <= noise:
        return not_run(probe, RULE, "the changes moved no score at all, not even their own: the probe has no power")
    return judge(
        probe, RULE, measured=measured, limit=noise, unit="nats, largest change", sample_size=size, sample_of=sample_of,
        detail=f"scores behind the change moved by up to {effect:.3g}; identical reruns allow {noise:.3g}",
        not_checked=f"other documents and places than the sampled ones; {note}",
    )  # fmt: skip
