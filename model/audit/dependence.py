"""Probe of who depends on whom (C1): one document changed at a time, every other document's score compared.

The answer is a graph with an edge from a document to each other one whose score it moves. A rule that learns from
documents in one order and reads hints in another makes edges in both directions: then no order of scoring exists in
which each score knows only what came before it.
"""

from __future__ import annotations

import graphlib
from collections.abc import Collection, Iterator

import numpy as np

from model.audit.system import System, largest
from model.audit.verdicts import FAIL, PASS, Result, not_run
from model.distributed import Dist
from model.ttt.windows import share_documents

RULE = "C1"
Edge = tuple[int, int]  # the document that was changed, the one whose score moved


def probe_dependencies(system: System) -> Result:
    """Draw the graph of documents, plain and adapted; here every document is on its own, so that it has no edge."""
    if len(system.documents) < 2:
        return not_run("dependencies", RULE, "fewer than two documents of three chunks; none could depend on another")
    edges: set[Edge] = set()
    effect = 0.0
    for source, moved, noise in trace_movements(system):
        effect = max(effect, moved[source])
        edges |= {(source, document) for document, by in moved.items() if document != source and by > noise}
    if effect <= max(system.plain_noise, system.adapted_noise):
        return not_run("dependencies", RULE, "changed documents kept even their own scores: the probe has no power")
    num_pairs = len(system.documents) * (len(system.documents) - 1)
    return Result(
        probe="dependencies", rule=RULE, result=FAIL if edges else PASS, measured=len(edges), limit=0,
        unit="edges between documents", sample_size=2 * num_pairs, sample_of="pairs of documents, plain and adapted",
        detail=describe(edges), not_checked="pairs outside the sample; a dependence too small to change a score",
        evidence={"edges": sorted(map(list, edges))},
    )  # fmt: skip


def trace_movements(system: System) -> Iterator[tuple[int, dict[int, float], float]]:
    """Yield a changed document, how far it moved the scores of each, and the noise; plain and adapted in turn.

    Adaptation follows the run's own order, in half as many slots as documents: some share a batch, some a slot.
    """
    chosen = set(system.documents)
    dist = Dist.single(system.model.qo_bank.device)
    ordered = [d for d in share_documents(system.validation, system.config.ttt, dist) if d in chosen]
    num_slots = len(ordered) // 2
    adapted = system.adapted_nll(system.validation, ordered, num_slots=num_slots)
    in_stream = dict(zip(system.documents, system.stream.document_ranges[:-1].tolist(), strict=True))
    in_text = {document: system.validation.document_ranges[document].tolist() for document in system.documents}
    for source in system.documents:
        start, end = in_stream[source]
        plain = system.score_plain(system.flip_tokens(system.stream, [(start, end - 1)]))
        yield source, group_by_document(plain - system.plain, in_stream), system.plain_noise
        changed = system.flip_tokens(system.validation, [system.bounds(source)])
        again = system.adapted_nll(changed, ordered, num_slots=num_slots)
        yield source, group_by_document(again - adapted, in_text), system.adapted_noise


def group_by_document(moved: np.ndarray, ranges: dict[int, list[int]]) -> dict[int, float]:
    """Return the largest change of a document's scores, by document."""
    return {document: largest(moved[start : end - 1]) for document, (start, end) in ranges.items()}


def describe(edges: Collection[Edge]) -> str:
    """Say which way the edges point: back in the stream only, forward too, or round in a circle."""
    if not edges:
        return "no document moved another's score"
    cycle = find_cycle(edges)
    if cycle:
        return f"no order of scoring is sound, documents depend on each other: {' -> '.join(map(str, cycle))}"
    forward = sorted((source, document) for source, document in edges if source > document)
    if forward:
        return f"document {forward[0][0]} moves the score of document {forward[0][1]}, which comes before it"
    source, document = min(edges)
    return f"document {source} moves the score of document {document} behind it: documents are not independent"


def find_cycle(edges: Collection[Edge]) -> list[int]:
    """Return documents that depend on each other in a circle, the first one again at its end; none if there is none."""
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for source, document in edges:
        sorter.add(document, source)
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []
