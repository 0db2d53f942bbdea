"""Adaptation on a GPU: batches of fixed sizes, each size recorded once as a CUDA graph and then replayed.

A step reads a small table from the host and everything else from device memory: the token stream, the adapters by slot.
Nothing waits for the device. Batches have few numbers of rows; the rows too many adapt a spare slot.
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
from model.ttt.batches import Batch, Limits
from model.ttt.document_pass import Adapter
from model.ttt.slots import Slots

SHORT_ROWS = 4  # times batch_documents: to launch a batch of short windows takes longer than to compute it
ROUND_ROWS = 4  # the most rows of a length are a multiple of it
PADDING_TOKENS = 12_000  # of rows too many: about what a batch costs, whatever its size
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


class StepRecorder:
    """Scores and learns from whole chunks; on a GPU each size of batch is recorded when it is first met."""

    def __init__(
        self,
        model: GPT,
        tokens: np.ndarray,
        config: TTTConfig,
        slots: Slots,
        *,
        is_looped: bool,
        recorder: Recorder | None = None,
    ) -> None:
        self.model, self.config, self.slots, self.is_looped = model, config, slots, is_looped
        self.stream = torch.from_numpy(tokens.astype(np.int32)).to(model.qo_bank.device)  # (N,)
        self.is_recording = recorder is not None or self.stream.device.type == "cuda"
        self.recorder = recorder if recorder is not None else Recorder()
        self.recorded = self.recorder.recorded

    def run(self, table: Tensor, length: int) -> Tensor:
        """Return the losses (B, C) of the windows' last chunks, then learn from them; valid until the next run.

        table (B, 2) int64, on the host or the device: place in the stream after a window's last input, slot.
        """
        if not self.is_recording:
            return self.step(table, length)
        key = (table.size(0), length)
        return self.recorder.run(key, lambda static: self.step(static, length), table, device=self.stream.device)

    def step(self, table: Tensor, length: int) -> Tensor:
        """Score and learn, operation by operation."""
        ends, slots = table.unbind(1)
        columns, last = self.config.chunk_tokens, self.stream.numel() - 1
        before = torch.arange(-length, 1, device=table.device)
        rows = self.stream[(ends.unsqueeze(1) + before).clamp(0, last)]  # (B, T + 1)
        dtype = self.model.compute_dtype
        gradients = torch.empty(table.size(0), self.slots.layout.num_parameters, dtype=dtype, device=table.device)
        with torch.enable_grad():
            losses = self.model(
                rows[:, :-1],
                rows[:, -columns:],
                is_looped=self.is_looped,
                adapters=self.slots.gather(slots, gradients),
                num_scored=columns,
                reduction="none",
            )
            losses.mean(dim=1).sum().backward()
        self.slots.step(slots, gradients)
        return losses.detach()

    def prepare(self, rows: int, length: int) -> None:
        """Run and record the largest batch first, on the spare slot: later ones fit into the memory it leaves.

        It runs once as it is, and so does the smallest, for nothing must be set up or loaded inside a recording.
        """
        table = torch.tensor([[length, self.slots.num_slots]] * rows)
        for batch, time in ((table, length), (table[:1], self.config.chunk_tokens)):
            self.step(batch.to(self.stream.device), time)
        if self.stream.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self.run(table, length)


class GraphAdapter(Adapter):
    """A pass whose learning steps are recorded; last chunks and unadapted windows run operation by operation."""

    recorder: StepRecorder | None = None

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
        )

    def run_adapted(self, documents: Sequence[int], slots: Slots) -> None:
        """Score and adapt documents, up to slots.num_slots of them at once; slots must have a spare one."""
        assert slots.num_spare >= 1, slots.num_spare
        if self.recorder is None or self.recorder.slots is not slots:
            self.recorder = StepRecorder(
                self.model, self.validation.tokens, self.config, slots, is_looped=self.is_looped
            )
            longest = max((self.num_predictions(document) for document in documents), default=0)
            length = min(self.config.window_tokens, longest // self.config.chunk_tokens * self.config.chunk_tokens)
            if length:
                most = self.limits.max_rows(length)
                self.recorder.prepare(self.limits.padded_rows(min(len(documents), most), length), length)
        super().run_adapted(documents, slots)

    def _advance(self, slots: Slots, batch: Batch) -> None:
        """Score one chunk of each document, then, unless it is the last, learn from it."""
        windows = [task.window for task in batch.tasks]
        if batch.is_last:
            index = self._upload(np.array([task.slot for task in batch.tasks]))
            with torch.no_grad():
                self._forward(windows, slots.gather(index))
            return
        assert self.recorder is not None
        num_rows = self.limits.padded_rows(len(windows), batch.length)
        table = np.tile(np.array([batch.length, slots.num_slots]), (num_rows, 1))
        for row, (slot, window) in enumerate(batch.tasks):
            table[row] = int(self.ranges[window.document][0]) + window.end, slot
        pinned = torch.from_numpy(table)
        if self.device.type == "cuda":
            pinned = pinned.pin_memory()
        for repeat in range(self.config.updates_per_chunk):
            losses = self.recorder.run(pinned, batch.length)
            if repeat == 0:
                self._note(windows, losses[: len(windows)])
            self._log_updates(windows, repeat)
