"""Adaptation on a GPU: the same step, in batches of few sizes, each recorded once as a CUDA graph and then replayed.

To launch a step's thousands of kernels one by one takes longer than to compute a small batch; a replay is one launch.
Batches have few numbers of rows, so that few graphs do; the rows too many adapt a spare slot that nobody reads.
"""

# B rows of a batch, T tokens of a window, C chunk_tokens, N tokens of the stream, P numbers of one document

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.banks import visit_plan
from model.config import TTTConfig
from model.gpt import GPT
from model.kernels.graphs import Recorder
from model.ttt.batches import Limits
from model.ttt.document_pass import DocumentPass
from model.ttt.learning_step import LearningStep
from model.ttt.slots import Slots
from model.ttt.windows import chunk_length, longest_chunk

SHORT_ROWS = 4  # times batch_documents: to launch a batch of short windows takes longer than to compute it
ROUND_ROWS = 4  # the most rows of a length are a multiple of it
PADDING_TOKENS = 12_000  # of rows too many: about what a batch costs, whatever its size
MOST_LENGTHS = 32  # of windows that learn: each is recorded with up to five numbers of rows
LAST_STEP_CHUNKS = 4  # windows that learn nothing are padded to multiples of this many chunks
ACTIVATIONS_FRAC, SLOTS_FRAC = 0.25, 0.3  # of the device's memory
ACTIVATION_WIDTHS = 16  # numbers kept per token and visit, in model_dim: measured 260 kB a token at full size


def memory_rows(model: GPT, config: TTTConfig, num_documents: int, num_parameters: int) -> int:
    """Return how many slots to hold: all documents at once where the device's memory allows, else what it does.

    The more documents are at work, the more of them have windows of the same length.
    """
    total = torch.cuda.get_device_properties(model.qo_bank.device).total_memory
    affordable = int(SLOTS_FRAC * total / (8 * num_parameters))
    return max(1, min(num_documents, max(config.batch_documents, affordable)))


def learn_step(config: TTTConfig) -> int | None:
    """Return what windows that learn are padded to multiples of; None where their lengths are few and equal chunks."""
    step = -(-config.window_tokens // MOST_LENGTHS)
    if config.chunk_by_length or config.chunk_tokens < step:
        return max(step, longest_chunk(config))
    return None


class RecordedStep(LearningStep):
    """A learning step of which each size of batch is recorded when it is first met, where the device can record."""

    def __init__(
        self,
        model: GPT,
        tokens: np.ndarray,
        config: TTTConfig,
        slots: Slots,
        *,
        is_looped: bool,
        is_padded: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(model, tokens, config, slots, is_looped=is_looped, is_padded=is_padded)
        self.is_recording = recorder is not None or self.stream.device.type == "cuda"
        self.recorder = recorder if recorder is not None else Recorder()
        self.recorded = self.recorder.recorded

    def run(self, table: Tensor, length: int) -> Tensor:
        """Return what a learning step returns, replayed; a table on the host is copied into the recording's own."""
        if not self.is_recording:
            return super().run(table, length)
        key = (table.size(0), length)
        return self.recorder.run(
            key, lambda static: self.score_and_learn(static, length), table, device=self.stream.device
        )

    def prepare(self, rows: int, length: int) -> None:
        """Run and record the largest batch first, on the spare slot: later ones fit into the memory it leaves.

        It runs once as it is, and so does the smallest, for nothing must be set up or loaded inside a recording.
        """
        table = torch.from_numpy(self.fill_table(rows, length))
        smallest = torch.from_numpy(self.fill_table(1, self.num_columns))
        for batch, time in ((table, length), (smallest, self.num_columns)):
            self.score_and_learn(batch.to(self.stream.device), time)
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.run(table, length)


class RecordedPass(DocumentPass):
    """A pass whose learning steps are recorded; last chunks and unadapted windows run operation by operation.

    Those come in many sizes and cost no backward: recording them would fill the memory for little.
    """

    @property
    def limits(self) -> Limits:
        """Four times the configured rows of short windows, as many tokens as the memory holds."""
        config = self.config
        tokens = config.batch_documents * config.window_tokens
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            visits = visit_plan(self.model.config, is_looped=self.is_looped).num_visits
            token_bytes = ACTIVATION_WIDTHS * visits * self.model.config.model_dim * 2
            tokens = min(tokens, max(config.window_tokens, int(ACTIVATIONS_FRAC * total) // token_bytes))
        return Limits(
            rows=SHORT_ROWS * config.batch_documents,
            tokens=tokens,
            last_step=LAST_STEP_CHUNKS * config.chunk_tokens,
            round_rows=ROUND_ROWS,
            padding_tokens=PADDING_TOKENS,
            learn_step=learn_step(config),
        )

    def _make_step(self, documents: Sequence[int], slots: Slots) -> RecordedStep:
        """Return the step with the largest batch that these documents can bring recorded already."""
        assert slots.num_spare >= 1, slots.num_spare
        limits = self.limits
        step = RecordedStep(
            self.model, self.validation.tokens, self.config, slots,
            is_looped=self.is_looped, is_padded=limits.learn_step is not None,
        )  # fmt: skip
        sizes = [(n, chunk_length(n, self.config)) for n in map(self.num_predictions, documents)]
        longest = max((n // chunk * chunk for n, chunk in sizes), default=0)
        length = limits.pad_length(min(self.config.window_tokens, longest), self.config.window_tokens)
        if length:
            step.prepare(limits.pad_rows(min(len(documents), limits.max_rows(length)), length), length)
        return step
