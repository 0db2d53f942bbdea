"""Training spans by number: which tokens micro-batch k sees is a pure function of k.

A span is micro_batch_tokens + 1 consecutive tokens: inputs are all but the last, targets all but the first. Groups of
`span_group` spans come from one shard, starting at its first BOS; what is left of a shard after its last whole group is
dropped, and after the last shard the first one comes again. Nothing is remembered between calls, so a resumed run, or
a run on another number of ranks, reads the same tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.data.packing import Packing, pack_row
from model.data.shards import BOS_ID, check_token_range, find_first_bos, open_shard


class Batch(NamedTuple):
    """One micro-batch: a packed row. inputs and targets (1, T) int64."""

    inputs: Tensor
    targets: Tensor
    packing: Packing

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on device, without waiting where the source is page-locked."""
        return Batch(
            self.inputs.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.packing.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU overlap with work."""
        return Batch(self.inputs.pin_memory(), self.targets.pin_memory(), self.packing.pin_memory())


class SpanLoader:
    """Random access to the training spans of a list of shards, in the order of the reference record.

    Shards are opened (and on_open called with the path) once each. num_spans is the length of one pass.
    Raises ValueError if a shard has no BOS, or is shorter than one group after its first BOS. The published code reads
    a shard without a BOS from its first token; of a real corpus such a shard is one of another tokenizer.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        micro_batch_tokens: int,
        span_group: int,
        vocab_size: int,
        on_open: Callable[[Path], None] | None = None,
    ) -> None:
        if not shards:
            raise ValueError("data.train matches no shard")
        self.micro_batch_tokens = micro_batch_tokens
        self.span_group = span_group
        self.vocab_size = vocab_size
        self.shards = [Path(path) for path in shards]
        self._tokens: list[np.memmap] = []
        self._first_bos: list[int] = []
        group_tokens = span_group * (micro_batch_tokens + 1)
        num_groups = []
        for path in self.shards:
            if on_open is not None:
                on_open(path)
            tokens = open_shard(path)
            first_bos = find_first_bos(tokens)
            if first_bos is None:
                raise ValueError(f"shard {path} has no BOS (id {BOS_ID}); it was made with another tokenizer")
            if tokens.size - first_bos < group_tokens:
                raise ValueError(
                    f"shard {path} has {tokens.size - first_bos} tokens from its first BOS on, fewer than one group of "
                    f"train.span_group={span_group} spans of {micro_batch_tokens + 1}; lower train.span_group or "
                    "train.micro_batch_tokens, or join shards"
                )
            self._tokens.append(tokens)
            self._first_bos.append(first_bos)
            num_groups.append((tokens.size - first_bos) // group_tokens)
        self._group_end = np.cumsum(num_groups)  # groups of one pass up to and including each shard

    @property
    def num_spans(self) -> int:
        """Spans of one pass over all shards."""
        return int(self._group_end[-1]) * self.span_group

    @property
    def shard_sizes(self) -> list[int]:
        """Tokens of each shard."""
        return [int(tokens.size) for tokens in self._tokens]

    def shard_tokens(self, shard: int) -> np.ndarray:
        """Return one shard's tokens (n,) uint16, memory-mapped."""
        return self._tokens[shard]

    def locate(self, index: int) -> tuple[int, int]:
        """Return (shard number, first token) of span index, counted from 0 and wrapping round after num_spans."""
        if index < 0:
            raise ValueError(f"span index {index} must not be negative")
        group, place = divmod(index % self.num_spans, self.span_group)
        shard = int(np.searchsorted(self._group_end, group, side="right"))
        group -= int(self._group_end[shard - 1]) if shard else 0
        span = group * self.span_group + place
        return shard, self._first_bos[shard] + span * (self.micro_batch_tokens + 1)

    def tokens(self, index: int) -> np.ndarray:
        """Return the micro_batch_tokens + 1 tokens of span index, uint16.

        Raises ValueError naming the shard if one of them is outside the vocabulary.
        """
        shard, start = self.locate(index)
        span = self._tokens[shard][start : start + self.micro_batch_tokens + 1]
        check_token_range(span, self.vocab_size, self.shards[shard])
        return np.asarray(span)

    def span(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of span index, each (1, T) int64, T = micro_batch_tokens."""
        return inputs_and_targets(self.tokens(index))

    def batch(self, index: int, *, max_segment: int, max_seqlen: int | None = None) -> Batch:
        """Return span index with its packing; max_segment and max_seqlen as pack_row takes them."""
        inputs, targets = self.span(index)
        packing = pack_row(inputs, max_segment=max_segment, max_seqlen=max_seqlen)
        return Batch(inputs, targets, packing)


def inputs_and_targets(tokens: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return tokens (T + 1,) as inputs and targets, (1, T) int64 each: views of one tensor, shifted by a token."""
    row = torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)  # (1, T + 1)
    return row[:, :-1], row[:, 1:]


def prefetch_batches(
    make_batch: Callable[[int], Batch], indices: Iterable[int], *, depth: int = 2, pin_memory: bool = False
) -> Generator[Batch, None, None]:
    """Yield make_batch(index) for each index in order, up to depth of them prepared ahead by one thread.

    An error in the thread is raised here; closing the iterator ends the thread.
    """

    def prepare(index: int) -> Batch:
        batch = make_batch(index)
        return batch.pin_memory() if pin_memory else batch

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    waiting: deque[Future[Batch]] = deque()
    try:
        for index in indices:
            waiting.append(executor.submit(prepare, index))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
