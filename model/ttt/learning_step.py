"""The one step of adaptation, the same on a CPU and on a GPU: whole chunks are scored, then learned from.

Shaped so that it can be recorded as a CUDA graph: a small table comes from outside, everything else is read from
tensors that stay where they are, and nothing waits for the device.
"""

# B windows of a batch, T tokens of a window, C chunk_tokens, N tokens of the stream, P numbers of one document

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.config import TTTConfig
from model.gpt import GPT
from model.ttt.slots import Slots


class LearningStep:
    """Scores the last chunk of windows and makes one update of their documents' adapters, operation by operation."""

    def __init__(self, model: GPT, tokens: np.ndarray, config: TTTConfig, slots: Slots, *, is_looped: bool) -> None:
        self.model, self.config, self.slots, self.is_looped = model, config, slots, is_looped
        # the whole stream lies on the device (int32, for indexing is not made for uint16), so that no step copies text
        self.stream = torch.from_numpy(tokens.astype(np.int32)).to(model.qo_bank.device)  # (N,)

    def run(self, table: Tensor, length: int) -> Tensor:
        """Return the losses (B, C) of the windows' last chunks, then learn from them; valid until the next run.

        table (B, 2) int64, on the host or the device: place in the stream after a window's last input, slot. Every
        window has length inputs (T).
        """
        return self.score_and_learn(table.to(self.stream.device, non_blocking=True), length)

    def score_and_learn(self, table: Tensor, length: int) -> Tensor:
        """Do what run does, with a table on the device."""
        ends, slots = table.unbind(1)
        columns, last = self.config.chunk_tokens, self.stream.numel() - 1
        before = torch.arange(-length, 1, device=table.device)
        # inputs and the target after them; only a row that nobody reads can reach over the end, hence the clamp
        rows = self.stream[(ends.unsqueeze(1) + before).clamp(0, last)]  # (B, T + 1)
        # uninitialized, for the backward writes every number of it: no kind of adapter is left out of a window
        shape = (table.size(0), self.slots.layout.num_parameters)
        gradients = torch.empty(shape, dtype=self.model.compute_dtype, device=table.device)
        with torch.enable_grad():
            losses = self.model(
                rows[:, :-1],
                rows[:, -columns:],
                is_looped=self.is_looped,
                adapters=self.slots.gather(slots, gradients),
                num_scored=columns,
                reduction="none",
            )  # (B, C)
            # The sum, not the mean, over documents: each learns as if it were alone.
            losses.mean(dim=1).sum().backward()
        # The losses exist before the update is made: a chunk is scored by adapters that have not seen it.
        self.slots.step(slots, gradients)
        return losses.detach()
