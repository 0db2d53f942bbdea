"""Every kernel that the stages launch, compiled at once before the first is needed (CUDA only).

Each stage's kind of forward and backward pass is rehearsed on a small input: kernels are named, not launched. The
compiler tells sizes apart only by whether they are multiples of 16, so small inputs name the kernels of large ones.
"""

# B rows, T tokens of a row, P numbers of one document's adapters

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from model.banks import visit_plan
from model.config import RunConfig
from model.data.cpus import usable_cpus
from model.data.loader import Batch, inputs_and_targets
from model.data.packing import pack_row
from model.data.shards import BOS_ID
from model.files.ledger import Ledger
from model.gpt import GPT
from model.kernels.compile_ahead import compiling_ahead
from model.kernels.dispatch import has_triton
from model.lora import Layout
from model.pipeline.compile_clock import COMPILE
from model.pipeline.run import Run
from model.quant.hessians import HessianCollector
from model.ttt.learning_step import LearningStep
from model.ttt.recorded_pass import learn_step
from model.ttt.slots import Slots
from model.ttt.windows import longest_chunk

ROW_TOKENS = 2048
WINDOW_CHUNKS = 4  # of a rehearsed window
_compiled: set[tuple[RunConfig, torch.device, str]] = set()


def compile_kernels(run: Run, ledger: Ledger, *stages: str) -> None:
    """Compile what these stages launch (default: all four), unless this process has done so; nothing on a CPU.

    The ledger notes it as compilation.
    """
    config, device = run.config, run.dist.device
    missing = [name for name in stages or REHEARSALS if (config, device, name) not in _compiled]
    if device.type != "cuda" or not has_triton() or not missing:
        return
    with ledger.span(COMPILE):
        _rehearse(run, missing)
    _compiled.update((config, device, name) for name in missing)


def _rehearse(run: Run, stages: list[str]) -> None:
    config, device = run.config, run.dist.device
    with device:
        model = GPT(config.model, compute_dtype=torch.bfloat16, attention_backend=config.runtime.attention)
        model.tok_emb.weight.data = model.tok_emb.weight.data.to(getattr(torch, config.train.embedding_dtype))
    # A backward pass runs in a thread of its own, where cuBLAS wants to find that CUDA has been used.
    torch.ones(1, device=device, requires_grad=True).exp().sum().backward()
    with compiling_ahead(device, usable_cpus()):
        for name in stages:
            model.requires_grad_(name == "train")
            REHEARSALS[name](model, config)
    torch.cuda.synchronize(device)


def _documents(config: RunConfig, num_tokens: int) -> np.ndarray:
    """Return two documents of made-up tokens (num_tokens,)."""
    tokens = np.arange(num_tokens) % (config.model.vocab_size - BOS_ID - 1) + BOS_ID + 1
    tokens[:: -(-num_tokens // 2)] = BOS_ID
    return tokens


def _packed_row(config: RunConfig, num_tokens: int, seq_len: int) -> Batch:
    """Return a row of num_tokens inputs, packed as in training and evaluation, on the CPU."""
    inputs, targets = inputs_and_targets(_documents(config, num_tokens + 1))
    packing = pack_row(inputs, max_segment=seq_len, max_seqlen=seq_len)
    return Batch(inputs, targets, packing)


def _train(model: GPT, config: RunConfig) -> None:
    """Forward and backward over a packed row, in both loop states."""
    row = _packed_row(config, ROW_TOKENS, config.train.seq_len).to(model.qo_bank.device)
    for is_looped in (False, True):
        model(row.inputs, row.targets, is_looped=is_looped, packing=row.packing).backward()
        model.zero_grad(set_to_none=True)


@torch.no_grad()
def _quantize(model: GPT, config: RunConfig) -> None:
    """Forward over calibration windows, packed or as whole rows; with the loss where the artifact is made to fit."""
    from model.quant.rans_triton import rehearse

    device = model.qo_bank.device
    rehearse(device)
    windows, packing = torch.from_numpy(_documents(config, ROW_TOKENS)).to(device).view(4, -1), None
    if config.quant.calibration_documents == "masked":
        windows = windows.view(1, -1)
        packing = pack_row(windows[0].cpu(), max_segment=config.quant.calibration_seq_len).to(device)
    with HessianCollector(model):
        model.visit(windows, is_looped=True, packing=packing)
    if config.quant.on_oversize == "fit":
        model(windows, windows, is_looped=True, packing=packing, reduction="none")


@torch.no_grad()
def _evaluate(model: GPT, config: RunConfig) -> None:
    """Forward over packed rows: a whole one, and a last one of odd length."""
    for length in (ROW_TOKENS, ROW_TOKENS - 1):
        row = _packed_row(config, length, config.evaluation.seq_len).to(model.qo_bank.device)
        model(row.inputs, row.targets, is_looped=True, packing=row.packing, reduction="none")


def _adapt(model: GPT, config: RunConfig) -> None:
    """Learn from windows, then score: with and without adapters, with and without padding; one row and several."""
    ttt, device = config.ttt, model.qo_bank.device
    columns = longest_chunk(ttt)
    length = WINDOW_CHUNKS * columns
    num_visits = visit_plan(model.config, is_looped=True).num_visits
    layout = Layout(model.config, num_visits, ttt.lora_rank, ttt.adapter_kinds)
    zeros = layout.view(torch.zeros(1, layout.num_parameters)).a
    slots = Slots(model, ttt, 0, 1, {kind: value[0] for kind, value in zeros.items()}, num_spare=1)
    tokens = _documents(config, 2 * length)
    learning = LearningStep(model, tokens, ttt, slots, is_looped=True, is_padded=learn_step(ttt) is not None)
    for rows, time in ((1, columns), (4, columns), (4, length)):
        table = torch.from_numpy(learning.fill_table(rows, time)).to(device)
        learning.score_and_learn(table, time)
        windows = torch.from_numpy(np.resize(tokens, (rows, time))).to(device)
        for padding in (None, torch.ones(rows, dtype=torch.int64, device=device)):
            for adapters in (None, slots.gather(table[:, 1])):
                with torch.no_grad():
                    model(
                        windows,
                        windows[:, -columns:],
                        is_looped=True,
                        left_padding=padding,
                        adapters=adapters,
                        num_scored=columns,
                        reduction="none",
                    )


REHEARSALS: dict[str, Callable[[GPT, RunConfig], None]] = {
    "train": _train,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "ttt": _adapt,
}
