"""Before the clock starts on a GPU: find the fastest attention backend, then run every kernel once."""

from __future__ import annotations

import numpy as np
import torch

from model.attention.backends import is_available
from model.attention.probe import Choice, probe_backends
from model.config import ATTENTION_BACKENDS, RunConfig
from model.data.loader import inputs_and_targets
from model.data.packing import Packing, pack_row
from model.data.shards import BOS_ID
from model.distributed import Dist
from model.gpt import GPT
from model.report import Report

TYPICAL_DOCUMENT = 700  # tokens; the mean of web text in 8,192 pieces is 800


def synthetic_row(config: RunConfig) -> tuple[np.ndarray, Packing]:
    """Return a training row (T + 1,) int64 of random documents of typical lengths, and its packing on the CPU."""
    train = config.train
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = generator.integers(BOS_ID + 1, config.model.vocab_size, size=train.micro_batch_tokens + 1)
    lengths = generator.exponential(TYPICAL_DOCUMENT, size=train.micro_batch_tokens).astype(np.int64) + 2
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens[starts[starts < tokens.size]] = BOS_ID
    return tokens, pack_row(tokens[:-1], max_segment=train.seq_len, max_seqlen=train.seq_len)


def choose_attention(config: RunConfig, dist: Dist) -> Choice | None:
    """Check every importable backend on what training hands it, and time those that are right where there are several.

    None on a CPU, or where the configuration names one. Rank 0's choice holds for all ranks.
    """
    if dist.device.type != "cuda" or config.runtime.attention != "auto":
        return None
    model = config.model
    _, packing = synthetic_row(config)
    shape = (1, config.train.micro_batch_tokens, 3 * model.num_heads, model.head_dim)
    generator = torch.Generator(dist.device).manual_seed(0)
    turned = torch.randn(shape, generator=generator, device=dist.device, dtype=torch.bfloat16)
    q, k, v = turned.chunk(3, dim=2)  # views of one tensor, a copy of its key head for each query head
    candidates, fallback = list_candidates()
    choice = probe_backends(q, k, v, packing.to(dist.device), candidates=candidates, fallback=fallback)
    agreed = dist.broadcast_floats([float(ATTENTION_BACKENDS.index(choice.name))])
    return choice._replace(name=ATTENTION_BACKENDS[int(agreed[0])])


def list_candidates() -> tuple[list[str], str | None]:
    """Return the backends that may be the fastest here, and one to fall back on.

    PyTorch's own kernel is FlashAttention-2. Where ours runs it took 1.6 to 1.75 times as long in every probe on record
    (docs/bench), and to import it brings PyTorch's whole compiler: so it is tried only where ours is not right.
    """
    found = [name for name in ATTENTION_BACKENDS if name not in ("auto", "sdpa") and is_available(name)]
    if "triton" not in found:
        return found, None
    return [name for name in found if name != "varlen"], "varlen"


def warm_up(model: GPT, config: RunConfig, report: Report) -> None:
    """Run both loop states forward and backward on synthetic tokens (CUDA only: kernels are built there).

    Nothing is left behind: no optimizer has been stepped, and the gradients are dropped.
    """
    device = model.qo_bank.device
    if device.type != "cuda":
        return
    tokens, packing = synthetic_row(config)
    packing = packing.to(device)
    # Two copies, aligned as in training: kernels tell it apart.
    inputs, targets = (x.to(device) for x in inputs_and_targets(tokens))
    for is_looped in (False, True):
        report("warm_up", int(is_looped), 2, {})
        model(inputs, targets, is_looped=is_looped, packing=packing).backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
