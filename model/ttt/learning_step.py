"""The one step of adaptation, the same on a CPU and on a GPU: whole chunks are scored, then learned from.

Shaped so that it can be recorded as a CUDA graph: a small table comes from outside, everything else is read from
tensors that stay where they are, and nothing waits for the device.
"""

# B windows of a batch, T tokens of a window, C of the longest chunk, N tokens of the stream, P numbers of one document

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.banks import layer_weights
from model.config import TTTConfig
from model.gpt import GPT
from model.ttt.slots import Slots
from model.ttt.windows import longest_chunk


class Table(NamedTuple):
    """The columns (B,) int64 of what a step reads about its windows."""

    ends: Tensor  # place in the stream after a window's last input
    slots: Tensor
    lengths: Tensor  # inputs of its own
    num_scored: Tensor


class LearningStep:
    """Scores the last chunk of windows and makes one update of their documents' adapters, operation by operation.

    is_padded: windows of one batch may be shorter than it, and differ in how much they score.
    """

    def __init__(
        self,
        model: GPT,
        tokens: np.ndarray,
        config: TTTConfig,
        slots: Slots,
        *,
        is_looped: bool,
        is_padded: bool = False,
    ) -> None:
        self.model, self.config, self.slots, self.is_looped = model, config, slots, is_looped
        self.is_padded, self.num_columns = is_padded, longest_chunk(config)
        with torch.no_grad():
            self.weights = layer_weights(model)  # frozen, so that no step casts them
        # the whole stream lies on the device (int32, for indexing is not made for uint16), so that no step copies text
        self.stream = torch.from_numpy(tokens.astype(np.int32)).to(model.qo_bank.device)  # (N,)

    def fill_table(self, rows: int, length: int) -> np.ndarray:
        """Return a table of rows (B, 4) that read the stream's first tokens and adapt the spare slot."""
        return np.tile(np.array([length, self.slots.num_slots, length, self.num_columns]), (rows, 1))

    def run(self, table: Tensor, length: int) -> Tensor:
        """Return losses (B, C), then learn from them; valid until the next run. A row's own are its last num_scored.

        table (B, 4) int64, on the host or the device: Table's columns. Every window has length inputs (T), or is padded
        to them.
        """
        return self.score_and_learn(table.to(self.stream.device, non_blocking=True), length)

    def score_and_learn(self, table: Tensor, length: int) -> Tensor:
        """Do what run does, with a table on the device."""
        columns = Table(*table.unbind(1))
        tokens = self._read(columns, length)  # (B, T + 1)
        # uninitialized, for the backward writes every number of it: no kind of adapter is left out of a window
        shape = (table.size(0), self.slots.layout.num_parameters)
        gradients = torch.empty(shape, dtype=self.model.compute_dtype, device=table.device)
        with torch.enable_grad():
            losses = self.model(
                tokens[:, :-1],
                tokens[:, -self.num_columns :],
                is_looped=self.is_looped,
                left_padding=length - columns.lengths if self.is_padded else None,
                adapters=self.slots.gather(columns.slots, gradients),
                num_scored=self.num_columns,
                reduction="none",
                weights=self.weights,
            )  # (B, C)
            # The sum, not the mean, over documents: each learns as if it were alone.
            self._mean_of_chunks(losses, columns.num_scored).sum().backward()
        # The losses exist before the update is made: a chunk is scored by adapters that have not seen it.
        self.slots.step(columns.slots, gradients)
        return losses.detach()

    def _read(self, columns: Table, length: int) -> Tensor:
        """Return the windows' inputs and the target after them, padding 0: (B, T + 1)."""
        before = torch.arange(-length, 1, device=columns.ends.device)
        # only a row that nobody reads, and padding, can reach over the ends, hence the clamp
        tokens = self.stream[(columns.ends.unsqueeze(1) + before).clamp(0, self.stream.numel() - 1)]
        return tokens.masked_fill(before < -columns.lengths.unsqueeze(1), 0) if self.is_padded else tokens

    def _mean_of_chunks(self, losses: Tensor, num_scored: Tensor) -> Tensor:
        """Return the mean loss (B,) of each window's own chunk."""
        if not self.is_padded:
            return losses.mean(dim=1)
        counts = num_scored.unsqueeze(1)
        is_scored = torch.arange(losses.size(1), device=losses.device) >= losses.size(1) - counts  # (B, C)
        return (losses * is_scored / counts).sum(dim=1)
