"""Before the clock starts on a GPU: find the fastest attention backend, then run every kernel once."""

from __future__ import annotations

import numpy as np
import torch

from model.config import ATTENTION_BACKENDS
from model.data.loader import inputs_and_targets
from model.data.packing import Packing, pack_row
from model.data.shards import BOS_ID
from model.gpt import GPT
from model.kernels.attention import is_available
from model.kernels.probe import Choice, probe_backends
from model.run import Run

TYPICAL_DOCUMENT = 700  # tokens; the mean of web text in 8,192 pieces is 800


def synthetic_row(run: Run) -> tuple[np.ndarray, Packing]:
    """Return a training row (T + 1,) int64 of random documents of typical lengths, and its packing on the CPU."""
    train = run.config.train
    generator = np.random.Generator(np.random.PCG64(0))
    tokens = generator.integers(BOS_ID + 1, run.config.model.vocab_size, size=train.micro_batch_tokens + 1)
    lengths = generator.exponential(TYPICAL_DOCUMENT, size=train.micro_batch_tokens).astype(np.int64) + 2
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens[starts[starts < tokens.size]] = BOS_ID
    return tokens, pack_row(tokens[:-1], bos_id=BOS_ID, max_segment=train.seq_len, max_seqlen=train.seq_len)


def choose_attention(run: Run) -> Choice | None:
    """Time every importable backend on what training hands it; None on a CPU or where the configuration names one.

    Rank 0's choice holds for all ranks. FlexAttention compiles for many seconds, so it is taken by name only.
    """
    if run.dist.device.type != "cuda" or run.config.runtime.attention != "auto":
        return None
    model = run.config.model
    _, packing = synthetic_row(run)
    shape = (1, run.config.train.micro_batch_tokens, 3 * model.num_heads, model.head_dim)
    generator = torch.Generator(run.dist.device).manual_seed(0)
    turned = torch.randn(shape, generator=generator, device=run.dist.device, dtype=torch.bfloat16)
    q, k, v = turned.chunk(3, dim=2)  # views of one tensor, a copy of its key head for each query head
    candidates = [name for name in ATTENTION_BACKENDS if name not in ("auto", "sdpa", "flex") and is_available(name)]
    choice = probe_backends(q, k, v, packing.to(run.dist.device), candidates=candidates)
    agreed = run.dist.broadcast_floats([float(ATTENTION_BACKENDS.index(choice.name))])
    return choice._replace(name=ATTENTION_BACKENDS[int(agreed[0])])


def warm_up(model: GPT, run: Run) -> None:
    """Run both loop states forward and backward on synthetic tokens (CUDA only: kernels are built there).

    Nothing is left behind: no optimizer has been stepped, and the gradients are dropped.
    """
    if run.dist.device.type != "cuda":
        return
    tokens, packing = synthetic_row(run)
    packing = packing.to(run.dist.device)
    # Two copies, aligned as in training: kernels tell it apart.
    inputs, targets = (x.to(run.dist.device) for x in inputs_and_targets(tokens))
    for is_looped in (False, True):
        run.report("warm_up", int(is_looped), 2, {})
        model(inputs, targets, is_looped=is_looped, packing=packing).backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.synchronize(run.dist.device)
