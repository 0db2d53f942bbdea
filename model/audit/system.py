"""The system that an audit probes: an artifact's model with its validation text, and the two ways it is scored.

Probes change the text, the adapters' updates or the batch, score again through the very functions that made the
figures, and compare. A deliberately broken system is another model, or another kind of pass or slots.
"""

# D documents, N targets of the stream

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from model.config import RunConfig
from model.data.shards import BOS_ID
from model.data.tokenizer import Tokenizer
from model.data.validation import ValidationSet
from model.distributed import Dist
from model.gpt import GPT, fits_graphs
from model.score.plain import score_rows
from model.ttt.document_pass import DocumentPass
from model.ttt.recorded_pass import RecordedPass
from model.ttt.slots import Slots
from model.ttt.windows import chunk_length

NUM_RERUNS = 2  # identical repetitions that the noise is measured on
DOCUMENT_TOKENS = 16  # of a made-up document, and what a probe reads behind a first chunk
NOISE_FACTOR = 2.0  # two repetitions show about half of the largest difference that more would


@dataclass
class System:
    """One model under audit. sample: how many documents are probed; all draws depend on config.seed only."""

    model: GPT
    validation: ValidationSet
    tokenizer: Tokenizer
    config: RunConfig
    sample: int = 8
    pass_type: type[DocumentPass] | None = None  # None: the one that scores this model
    slots_type: type[Slots] = Slots
    generator: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        if self.pass_type is None:
            self.pass_type = RecordedPass if fits_graphs(self.model) else DocumentPass
        self.generator = np.random.Generator(np.random.PCG64(self.config.seed))

    @cached_property
    def documents(self) -> list[int]:
        """Documents under probe: spread over the stream, of at least three chunks, one longer than the window."""
        lengths = np.diff(self.validation.document_ranges, axis=1)[:, 0] - 1  # predictions
        ttt = self.config.ttt
        chunks = np.array([chunk_length(int(n), ttt) for n in lengths])
        enough = np.flatnonzero(lengths > chunks + np.maximum(chunks, DOCUMENT_TOKENS))
        short = enough[lengths[enough] <= 2 * ttt.window_tokens]
        long = enough[lengths[enough] > ttt.window_tokens]
        pool = short if short.size else enough
        chosen = set(pool[np.linspace(0, pool.size - 1, min(self.sample, pool.size)).astype(int)].tolist())
        if long.size and self.sample > 1 and chosen.isdisjoint(long.tolist()):
            chosen.discard(max(chosen))
            chosen.add(int(long[lengths[long].argmin()]))
        return sorted(chosen)

    @cached_property
    def stream(self) -> ValidationSet:
        """The documents under probe as a stream of their own, a BOS at its end."""
        return join_documents([self.validation.document(index)[:-1] for index in self.documents])

    def score_plain(self, stream: ValidationSet) -> np.ndarray:
        """Return the nll (N,) of every target by plain evaluation."""
        dist = Dist.single(self.model.qo_bank.device)
        return score_rows(self.model, stream, replace(self.config.evaluation, tail="scored"), dist, ignore)

    def adapt(
        self,
        validation: ValidationSet,
        documents: Sequence[int] | None = None,
        *,
        slots_type: type[Slots] | None = None,
        pass_type: type[DocumentPass] | None = None,
        num_slots: int | None = None,
    ) -> DocumentPass:
        """Score and adapt documents (default: those under probe) of a stream; return the pass with nll and ledger."""
        chosen = self.documents if documents is None else list(documents)
        work = self.make_pass(validation, pass_type)
        count = num_slots or min(len(chosen), self.config.ttt.batch_documents)
        slots = (slots_type or self.slots_type)(self.model, self.config.ttt, self.config.seed, count, num_spare=1)
        work.run_adapted(chosen, slots)
        return work

    def make_pass(self, validation: ValidationSet, pass_type: type[DocumentPass] | None = None) -> DocumentPass:
        """Return a pass over a stream that has not begun."""
        kind = pass_type or self.pass_type
        assert kind is not None
        return kind(self.model, validation, self.config.ttt, ignore, label="audit")

    def adapted_nll(
        self, validation: ValidationSet, documents: Sequence[int] | None = None, **options: Any
    ) -> np.ndarray:
        """Return the nll (N,) that adapt gives; targets of other documents are 0."""
        return read_nll(self.adapt(validation, documents, **options))

    @cached_property
    def plain(self) -> np.ndarray:
        """Plain nll of the stream under probe."""
        return self.score_plain(self.stream)

    @cached_property
    def adapted(self) -> np.ndarray:
        """Adapted nll of the documents under probe, by target of the whole stream."""
        return self.adapted_nll(self.validation)

    @cached_property
    def plain_noise(self) -> float:
        """Largest difference that counts as none: 0 where identical reruns of the plain score agree bit by bit."""
        return NOISE_FACTOR * max(largest(self.score_plain(self.stream) - self.plain) for _ in range(NUM_RERUNS))

    @cached_property
    def adapted_noise(self) -> float:
        """Largest difference that counts as none, with test-time training on."""
        return NOISE_FACTOR * max(largest(self.adapted_nll(self.validation) - self.adapted) for _ in range(NUM_RERUNS))

    def chunk(self, document: int) -> int:
        """Return how many predictions a chunk of a document has."""
        start, end = self.validation.document_ranges[document]
        return chunk_length(int(end - start) - 1, self.config.ttt)

    def bounds(self, document: int) -> tuple[int, int]:
        """Return first token and one past the last token of a document's own text (the next BOS left out)."""
        start, end = self.validation.document_ranges[document]
        is_last = document + 1 == self.validation.num_documents
        return int(start), int(end) if is_last else int(end) - 1

    def draw_other_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Return random tokens, each different from the one in its place and none a BOS."""
        first, size = BOS_ID + 1, self.config.model.vocab_size
        steps = self.generator.integers(1, size - first, size=tokens.size)
        return ((tokens.astype(np.int64) - first + steps) % (size - first) + first).astype(tokens.dtype)

    def flip_tokens(self, validation: ValidationSet, places: Sequence[tuple[int, int]]) -> ValidationSet:
        """Return the stream with all tokens of the given [first, end) ranges replaced; BOS tokens stay."""
        tokens = np.array(validation.tokens)
        for first, end in places:
            span = tokens[first:end]
            tokens[first:end] = np.where(span == BOS_ID, span, self.draw_other_tokens(span))
        return ValidationSet(tokens, validation.document_starts)


def join_documents(documents: Sequence[np.ndarray]) -> ValidationSet:
    """Return a stream of documents (each opens with its BOS), with a BOS at the end."""
    lengths = np.array([len(document) for document in documents])
    tokens = np.concatenate([*documents, np.array([BOS_ID])]).astype(np.uint16)
    return ValidationSet(tokens, np.concatenate(([0], np.cumsum(lengths))))


def read_nll(work: DocumentPass) -> np.ndarray:
    """Return the nll (N,) of a finished pass."""
    return np.asarray(work.nll.cpu().numpy())


def largest(values: np.ndarray) -> float:
    """Return the largest absolute value, 0 for none; a NaN counts as infinite."""
    if not values.size:
        return 0.0
    found = float(np.abs(values).max())
    return found if found == found else float("inf")


def ignore(_phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
    """Report nothing."""
