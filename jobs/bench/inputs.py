"""What a measuring process works on: a preset's configuration, real shards or made-up ones, and a model to run.

Made-up tokens have documents as long as web text's, so that attention has as much to do; scores on them mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.bench.figures import Probe
from model.config import DataConfig, RunConfig, config_hash
from model.corpus.shard_file import write_shard
from model.data.shards import BOS_ID, list_shards
from model.data.tokenizer import ByteTable, load_tokenizer
from model.data.validation import ValidationSet, load_validation
from model.distributed import Dist
from model.files.ledger import Ledger
from model.files.tensors import load_tensors
from model.gpt import GPT, build_model
from model.pipeline.inputs import attention_backend_name
from model.pipeline.run import Run
from model.pipeline.seed import device_name
from model.pipeline.warm_up import TYPICAL_DOCUMENT
from model.presets import PRESETS

EVAL_ROWS = {"cuda": 13, "cpu": 2}  # of made-up validation text; 13 rows of 65,536 are what the published code scored
OUTPUT_STD = 0.02  # of the output matrices, which start at zero: as large as after a short training


@dataclass(slots=True)
class Workplace:
    """One rank's configuration, data and device, and where its figures go."""

    run: Run
    probe: Probe
    ledger: Ledger
    request: dict[str, Any]

    @property
    def config(self) -> RunConfig:
        """The configuration that is measured."""
        return self.run.config

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return self.run.dist.device


def open_workplace(request: dict[str, Any], probe: Probe) -> Workplace:
    """Join the gang, settle the configuration, make missing data, and note what is measured.

    Raises ValueError or FileNotFoundError for data that cannot be used.
    """
    dist = Dist.from_environment(PRESETS[request["preset"]]().runtime.device)
    probe.is_main = dist.is_main
    workdir = Path(request["folder"]) / f"rank{dist.rank}"
    workdir.mkdir(parents=True, exist_ok=True)
    config = configure(request, workdir, dist.device.type)
    run = Run(config, dist, workdir, probe.report, uses_checkpoints=False)
    is_cuda = dist.device.type == "cuda"
    probe.facts |= {
        "gpu_model": device_name(dist.device) if is_cuda else None,
        "num_gpus": dist.world_size if is_cuda else 0,
        "cuda": torch.version.cuda if is_cuda else None,
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "world_size": dist.world_size,
        "config_hash": config_hash(config, world_size=dist.world_size),
        "train_data": Path(request["train"]).name or "made up",
        "val_data": Path(request["val"]).name or "made up",
        "val_tokens": request["val_tokens"],
    }
    return Workplace(run, probe, Ledger("bench", dist.rank), request)


def configure(request: dict[str, Any], folder: Path, device: str) -> RunConfig:
    """Return the preset over the shards that were named, or over made-up ones written into folder."""
    config = PRESETS[request["preset"]]()
    data = DataConfig(
        train=request["train"] or str(folder / "made_train_000000.bin"),
        val=request["val"] or str(folder / "made_val_000000.bin"),
        tokenizer=request["tokenizer"] or "",
        val_tokens=request["val_tokens"],
    )
    if not request["train"]:
        group = config.train.span_group * (config.train.micro_batch_tokens + 1)
        num_tokens = max(2 * group, 2 * config.quant.calibration_windows * config.quant.calibration_seq_len)
        write_shard(Path(data.train), made_up_tokens(num_tokens, config.model.vocab_size, seed=0))
    if not request["val"]:
        num_tokens = EVAL_ROWS[device] * config.evaluation.row_tokens + 1
        write_shard(Path(data.val), made_up_tokens(num_tokens, config.model.vocab_size, seed=1))
    return replace(config, data=data, runtime=replace(config.runtime, attention=request["attention"]))


def made_up_tokens(num_tokens: int, vocab_size: int, *, seed: int) -> np.ndarray:
    """Return random tokens (num_tokens,) uint16 in documents of exponentially distributed lengths, a BOS first."""
    generator = np.random.Generator(np.random.PCG64(seed))
    tokens = generator.integers(BOS_ID + 1, vocab_size, size=num_tokens, dtype=np.uint16)
    lengths = generator.exponential(TYPICAL_DOCUMENT, size=num_tokens // 2 + 1).astype(np.int64) + 2
    starts = np.concatenate(([0], np.cumsum(lengths)))
    tokens[starts[starts < num_tokens]] = BOS_ID
    return tokens


def byte_table(work: Workplace) -> ByteTable:
    """Return the tokenizer's byte table; without a tokenizer every token counts four bytes."""
    size = work.config.model.vocab_size
    if work.config.data.tokenizer:
        return load_tokenizer(Path(work.config.data.tokenizer), vocab_size=size).byte_table
    work.probe.note("no --tokenizer: every token counts as 4 bytes")
    nothing = np.zeros(size, dtype=bool)
    return ByteTable(np.full(size, 4, dtype=np.int16), nothing, nothing)


def open_validation(work: Workplace) -> ValidationSet:
    """Return the validation stream."""
    data = work.config.data
    return load_validation(
        list_shards(data.val, field="--val"), vocab_size=work.config.model.vocab_size, val_tokens=data.val_tokens
    )


def build_bench_model(work: Workplace) -> GPT:
    """Return the averaged weights of --weights, or random weights in which nothing is zero, on the rank's device."""
    run = work.run
    model = build_model(
        run.config.model,
        run.dist.device,
        embedding_dtype=run.config.train.embedding_dtype,
        attention=run.config.runtime.attention,
    )
    path = work.request["weights"]
    if path:
        if not Path(path).is_file():
            raise FileNotFoundError(f"--weights {path} is missing; name a run's train.safetensors")
        tensors = load_tensors(Path(path))
        averaged = {name.removeprefix("ema/"): value for name, value in tensors.items() if name.startswith("ema/")}
        wanted = {name: value.shape for name, value in model.state_dict().items()}
        if {name: value.shape for name, value in averaged.items()} != wanted:
            raise ValueError(
                f"--weights {path} does not fit --preset {work.request['preset']}; name a run's train file"
            )
        model.load_state_dict(averaged)
    else:
        model.init_weights(run.config.seed)
        fill_output_matrices(model)
    return model


def describe_model(work: Workplace, model: GPT) -> None:
    """Note whose weights are measured, and the attention backend."""
    facts = work.probe.facts
    facts["attention_backend"] = attention_backend_name(work.run, model)
    facts["weights"] = "averaged weights of a run" if work.request["weights"] else "random"
    if not work.request["weights"]:
        work.probe.note("random weights: scores mean nothing; name a run's train.safetensors with --weights")


@torch.no_grad()
def fill_output_matrices(model: GPT) -> None:
    """Draw the matrices that start at zero, so that every product has something to do."""
    generator = torch.Generator().manual_seed(1)
    for bank in (model.qo_bank[model.config.num_layers :], model.mlp_down_bank):
        bank.copy_(OUTPUT_STD * torch.randn(bank.shape, generator=generator))


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_s(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that call took, the device's work included, and its result."""
    synchronize(device)
    started = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - started, result


def note_compilation(work: Workplace, ledger: Ledger) -> AbstractContextManager[None]:
    """Return a context that notes every kernel compilation in ledger."""
    from model.pipeline.compile_clock import noting_compilation

    return noting_compilation(ledger, work.device)
