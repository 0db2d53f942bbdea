"""Calibration: windows of training text run through the averaged weights while the Hessian collector listens."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from model.config import QuantConfig
from model.data.loader import SpanLoader
from model.data.packing import Packing, cu_seqlens_from_bos
from model.data.shards import BOS_ID
from model.distributed import Dist
from model.gpt import GPT
from model.kernels.pace import Pace
from model.quant.hessians import HessianCollector
from model.report import Report


def draw_windows(loader: SpanLoader, config: QuantConfig, *, seed: int, batch: int) -> np.ndarray:
    """Return (calibration_windows, calibration_seq_len) int64 tokens at places that depend on (seed, batch) only.

    Every place of every training shard is equally likely, so the batches do not depend on the number of ranks.
    """
    digest = hashlib.sha256(f"calibration/{seed}/{batch}".encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "big")))
    places = np.array([max(0, size - config.calibration_seq_len + 1) for size in loader.shard_sizes])
    if not places.sum():
        raise ValueError(
            f"quant.calibration_seq_len={config.calibration_seq_len} is longer than every training shard; lower it"
        )
    ends = np.cumsum(places)
    rows = []
    for place in generator.integers(0, ends[-1], size=config.calibration_windows):
        shard = int(np.searchsorted(ends, place, side="right"))
        start = int(place - (ends[shard - 1] if shard else 0))
        rows.append(loader.shard_tokens(shard)[start : start + config.calibration_seq_len].astype(np.int64))
    return np.stack(rows)


def window_packing(windows: np.ndarray) -> Packing:
    """Return the packing of windows laid end to end: a segment at every window's start and at every BOS."""
    starts = np.flatnonzero(windows.ravel() == BOS_ID)
    edges = np.arange(0, windows.size, windows.shape[1])
    return cu_seqlens_from_bos(np.union1d(starts, edges), windows.size, max_segment=windows.shape[1])


@torch.no_grad()
def collect_hessians(
    model: GPT, loader: SpanLoader, config: QuantConfig, dist: Dist, report: Report, *, seed: int
) -> dict[str, Tensor]:
    """Return the Hessian (in, in) float32 of every projection: sum of x x^T over the inputs / number of batches.

    Looping is on, so repeated layers add all their visits. Batches are shared over the ranks and the sums all-reduced.
    """
    pace = Pace(dist.device)
    with HessianCollector(model) as collector:
        for batch in range(dist.rank, config.num_calibration_batches, dist.world_size):
            windows = draw_windows(loader, config, seed=seed, batch=batch)
            tokens, packing = torch.from_numpy(windows), None
            if config.calibration_documents == "masked":
                tokens, packing = tokens.reshape(1, -1), window_packing(windows)
            if dist.device.type == "cuda":  # from other memory a copy would wait for the batch before
                tokens, packing = tokens.pin_memory(), None if packing is None else packing.pin_memory()
            tokens = tokens.to(dist.device, non_blocking=True)
            packing = None if packing is None else packing.to(dist.device, non_blocking=True)
            model.visit(tokens, is_looped=True, packing=packing)
            pace.step()
            report("quantize", batch + 1, config.num_calibration_batches, {})
        dist.meet()
        return collector.finish(config.num_calibration_batches, dist.all_reduce_)
