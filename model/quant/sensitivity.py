"""How much of the loss each group's rounding costs, measured on calibration text.

Errors of layers cannot be compared with each other: a unit of error in the head's logits costs more than one in a
repeated block's attention, and by how much differs from model to model. So the loss itself is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.banks import split_banks
from model.config import QuantConfig
from model.data.loader import SpanLoader
from model.data.packing import Packing
from model.gpt import GPT, fits_row_graphs
from model.kernels.graphs import Recorder
from model.quant.calibrate import draw_windows, window_packing

NUM_DRAWS = 4  # batches of text, each with signs of its own
FULL_BATCH_UNITS = 12  # so many groups or matrices are tried on whole batches; more on smaller parts, in the same time
AMPLIFIED = 2.0  # the errors are made larger, so that their effect stands out of bfloat16's


class LossProbe:
    """A model with its averaged weights, and calibration text to try changes of them on. Leaves the model as it was."""

    def __init__(
        self, model: GPT, loader: SpanLoader, config: QuantConfig, *, seed: int, recorder: Recorder | None = None
    ) -> None:
        self._model, self._loader, self._config, self._seed = model, loader, config, seed
        self._is_recording = recorder is not None  # else where the device can
        self._recorder = recorder if recorder is not None else Recorder()
        self._seen: set[tuple[object, ...]] = set()  # sizes whose kernels are compiled and loaded

    @torch.no_grad()
    def measure_rises(self, members: Mapping[str, Sequence[str]], changes: Mapping[str, Tensor]) -> dict[str, float]:
        """Return group -> rise of the loss in nats a token when changes (out, in) are added to its matrices.

        Only the part that grows with the square is measured: a change is tried with both signs. The rows' signs are
        drawn anew for every batch of text, which keeps the size of each row's error but not how errors of rows happen
        to fall together. A small negative value is noise.
        """
        num_draws = min(NUM_DRAWS, self._config.num_calibration_batches)
        num_windows = max(1, FULL_BATCH_UNITS * self._config.calibration_windows // max(len(members), FULL_BATCH_UNITS))
        rises = dict.fromkeys(members, 0.0)
        for draw in range(num_draws):
            windows = draw_windows(self._loader, self._config, seed=self._seed, batch=draw)[:num_windows]
            generator = torch.Generator().manual_seed(draw)
            unchanged = self._loss(windows)
            for group, names in members.items():
                signed = {name: _with_row_signs(changes[name], generator) for name in names}
                both = sum(self._loss(windows, signed, factor=factor) for factor in (AMPLIFIED, -AMPLIFIED))
                rises[group] += (both / 2 - unchanged) / AMPLIFIED**2 / num_draws
        return rises

    def _loss(self, windows: np.ndarray, changes: Mapping[str, Tensor] | None = None, *, factor: float = 0.0) -> float:
        """Return the mean nll of the windows' targets with factor * changes added to the matrices meanwhile."""
        matrices = split_banks({name: parameter.data for name, parameter in self._model.named_parameters()})
        kept = {name: matrices[name].clone() for name in changes or {}}
        for name, change in (changes or {}).items():
            matrices[name].copy_(kept[name] + factor * change)
        try:
            return self._nll(windows)
        finally:
            for name, matrix in kept.items():
                matrices[name].copy_(matrix)

    def _nll(self, windows: np.ndarray) -> float:
        """Return the mean nll over all targets inside windows (N, T), looping on, in rows as calibration has them.

        On CUDA the first try on windows of a size runs as it is, the second is recorded, and later ones replay it: a
        part of a batch costs the host more than the device. A change is made where the weights lie, which a replay
        reads.
        """
        device = next(self._model.parameters()).device
        tokens = torch.from_numpy(windows)  # (N, T)
        targets = tokens.roll(-1, dims=1)  # the last of each window has no target, and is left out below
        rows, longest = [tokens, targets], None
        if self._config.calibration_documents == "masked":
            packing = window_packing(windows)
            rows, longest = [tokens.reshape(1, -1), targets.reshape(1, -1), packing.cu_seqlens], packing.max_seqlen

        def forward(inputs: Tensor, targets: Tensor, *bounds: Tensor) -> Tensor:
            packing = None if longest is None else Packing(bounds[0], longest)
            return self._model(inputs, targets, is_looped=True, packing=packing, reduction="none")

        size = (*(tensor.shape for tensor in rows), longest)
        if size in self._seen and (self._is_recording or (device.type == "cuda" and fits_row_graphs(self._model))):
            nll = self._recorder.run(size, forward, *rows, device=device)
        else:
            self._seen.add(size)
            nll = forward(*(tensor.to(device) for tensor in rows))
        return float(nll.view(tokens.shape)[:, :-1].double().mean())


def _with_row_signs(change: Tensor, generator: torch.Generator) -> Tensor:
    """Return change (out, in) with a random sign for every row."""
    signs = torch.randint(0, 2, (change.shape[0], 1), generator=generator) * 2 - 1
    return change * signs.to(change.device, change.dtype)
