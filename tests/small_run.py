"""A sweep of two seeds on made-up tokens, run once a test session: what a finished run leaves, in five seconds."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from jobs.cli import main
from model.corpus.shard_file import write_shard

TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
SEEDS = (42, 0)
SPEC = """
name: small
preset: tiny
overrides:
  model: {vocab_size: 8192, num_layers: 2, model_dim: 32, num_heads: 2, num_kv_heads: 1, mlp_mult: 2.0, rope_dims: 8,
          xsa_last_n: 2, loop_start: 0, loop_end: 0, parallel_start_layer: 1}
  train: {max_steps: 4, batch_tokens: 512, micro_batch_tokens: 256, seq_len: 128}
  quant: {num_calibration_batches: 1, calibration_windows: 2, calibration_seq_len: 64}
  evaluation: {row_tokens: 256, seq_len: 64}
  ttt: {lora_rank: 2, batch_documents: 4, chunk_tokens: 32, window_tokens: 64}
  runtime: {device: cpu}
seeds: [42, 0]
gang: {gpus: 0, cpus: 1}
"""


def write_data(folder: Path) -> dict[str, str]:
    """Write the shards of made-up tokens and return the data section of a spec."""
    generator = np.random.Generator(np.random.PCG64(1))
    for split, num_documents in (("train", 40), ("val", 6)):
        documents = [
            np.concatenate(([1], 300 + generator.zipf(1.3, size=int(generator.integers(5, 180))) % 7000))
            for _ in range(num_documents)
        ]
        write_shard(folder / f"toy_{split}_000000.bin", np.concatenate(documents))
    shards = {split: f"{folder}/toy_{split}_*.bin" for split in ("train", "val")}
    return {**shards, "tokenizer": str(TOKENIZER)}


@functools.cache
def small_sweep() -> Path:
    """Return the run directory of a finished sweep; do not write to it (copy_sweep gives one to write to)."""
    folder = Path(tempfile.mkdtemp(prefix="seedsweep-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    data = write_data(folder / "data")
    spec = folder / "small.yaml"
    spec.write_text(f"{SPEC}data: {json.dumps(data)}\nout: {folder / 'out'}\n")
    assert main(["run", str(spec), "--local", "--progress", "plain"]) == 0
    return folder / "out"


def seed_directory(out: Path, seed: int = 42) -> Path:
    """Return the run directory of one seed."""
    return out / "seeds" / f"seed={seed}-repeat=0"


def validation_glob(out: Path) -> str:
    """Return the glob of the sweep's validation shards."""
    return f"{out.parent}/data/toy_val_*.bin"


def copy_sweep(to: Path) -> Path:
    """Return a copy of the finished sweep that a test may damage."""
    shutil.copytree(small_sweep(), to)
    return to
