"""Made-up sweeps with plausible figures, committed through the real store: fixtures for everything in results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from results.store.reader import latest_attempts
from results.store.writer import commit_attempt
from results.tables import TABLE_COLUMNS, SeedTable, read_spent, table_of_rows

BYTES_PER_TOKEN = 3.7266
STAGE_LEVELS = {"live": 1.0763, "post_ema": 1.0767, "pre_ttt": 1.0879, "ttt_lr0": 1.0834, "post_ttt": 1.0775}


def fake_documents(num_documents: int = 40, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return per-document rows: lengths heavy-tailed, texts shared by all seeds, scores near 1.09 bpb."""
    texts = np.random.default_rng(7)
    tokens = np.clip(texts.lognormal(6.2, 1.0, num_documents), 20, 20_000).astype(np.int32)
    difficulty = texts.normal(0.0, 0.1, num_documents)
    num_bytes = np.maximum(1, tokens * BYTES_PER_TOKEN + texts.normal(0, 3, num_documents)).astype(np.int32)
    noise = np.random.default_rng(seed).normal(0.0, 0.004, num_documents)
    plain = num_bytes * math.log(2) * (1.0879 + difficulty + noise)
    lr0 = plain * (1 - 0.004 * np.minimum(1, tokens / 4096))
    return {
        "index": np.arange(num_documents, dtype=np.int32),
        "tokens": tokens,
        "bytes": num_bytes,
        "nats_plain": plain,
        "nats_lr0": lr0,
        "nats_ttt": lr0 * (1 - 0.006 * np.minimum(1, tokens / 1024)),
    }


def fake_steps(num_steps: int = 60, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Return a loss curve with looping on from 35 % and a linear decay; every seed has its own."""
    step = np.arange(1, num_steps + 1)
    frac = (step - 1) / num_steps
    return {
        "step": step,
        "loss": 2.8 + 6.2 * np.exp(-4 * frac) + 0.02 * np.sin(step + seed),
        "grad_norm": 0.3 + np.exp(-3 * frac),
        "lr_factor": np.minimum(1.0, (1 - frac) / 0.667),
        "momentum": 0.92 + 0.05 * np.minimum(step / 30, 1),
        "is_looped": frac >= 0.35,
        "elapsed_s": 588.0 * step / num_steps,
        "tokens_per_s": np.where(frac >= 0.35, 5.9e6, 8.4e6),
    }


def fake_run(seed: int, *, repeat: int = 0, attempt: int = 1, shift: float = 0.0, **changes: Any) -> dict[str, Any]:
    """Return the runs row of one finished attempt; `shift` moves every score (bpb), `changes` replace columns."""
    wobble = 0.0008 * math.sin(seed * 1.7 + 0.1 * repeat) + shift
    row: dict[str, Any] = {
        "seed": seed, "repeat": repeat, "attempt": attempt, "attempts": attempt, "config_hash": "c" * 64,
        "state": "DONE", "sweep": "fake", "source": "run", "config_json": {"seed": seed}, "data_hash": "d" * 64,
        "code_hash": "e" * 64, "code_changed": False, "git_commit": "f" * 40, "git_dirty": False,
        "versions_json": {"python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}, "node_label": "node-0",
        "gpu_model": "H100", "num_cpus": 64, "num_gpus": 8, "world_size": 8,
        "started_at": "2026-04-11T10:00:00+00:00", "ended_at": "2026-04-11T10:25:00+00:00",
        "val_documents_hash": "a" * 64, "val_documents": 40, "tokenizer_hash": "b" * 64, "vocab_size": 8192,
        "model_bytes": 15_968_000 + seed % 97, "code_bytes": 26_505, "artifact_bytes": 15_994_505 + seed % 97,
        "code_bytes_convention": "lzma of the model package", "size_limit_bytes": 16_000_000, "within_limit": True,
        "order0_bpb": 2.9231, "matrix_clip_sigmas": 12.85, "attention_backend": "flash",
    }  # fmt: skip
    tokens, num_bytes = 40_540_160, 151_078_000
    for stage, level in STAGE_LEVELS.items():
        bpb = level + wobble
        row |= {
            f"{stage}_bpb": bpb, f"{stage}_nats": bpb * math.log(2) * num_bytes, f"{stage}_tokens": tokens,
            f"{stage}_bytes": num_bytes, f"{stage}_s": 8.0,
        }  # fmt: skip
    return row | changes


def fake_stages(seed: int) -> list[dict[str, Any]]:
    """Return the four stage records; their metrics fill the columns that fake_run leaves out."""
    train = {"steps": 4820 + seed % 7, "train_s": 588.1, "train_tokens": 3_790_000_000, "tokens_per_s": 6.4e6,
             "train_loss_last": 2.81, "num_resumes": 0, "resumed_at_steps": [], "lost_steps": 0}  # fmt: skip
    return [
        {"format": 1, "stage": "train", "seconds": 588.1, "metrics": train, "outputs": {}, "data_hash": "d" * 64},
        {"format": 1, "stage": "quantize", "seconds": 80.0, "metrics": {"quantize_s": 80.0}, "outputs": {}},
        {"format": 1, "stage": "evaluate", "seconds": 16.0, "metrics": {"evaluate_s": 16.0}, "outputs": {}},
        {"format": 1, "stage": "ttt", "seconds": 251.0, "metrics": {"ttt_s": 251.0}, "outputs": {}},
    ]


def commit_fake(out: Path | str, seed: int, *, num_documents: int = 40, **changes: Any) -> str:
    """Commit one finished made-up attempt and return its file name.

    num_documents: the row's sums are those of its document rows; 0 stands for a run on the challenge's validation set
    (151.078 MB) whose document rows are not there. reused: stages taken from the run of `donor` with the same seed.
    """
    reused, donor = changes.pop("reused", ()), changes.pop("donor", "variant=base")
    run = fake_run(seed, **changes)
    documents = fake_documents(num_documents, seed=seed) if num_documents else {}
    if documents:
        run |= _sums_of(documents, run) | {name: value for name, value in changes.items() if name != "shift"}
    stages = [
        {**record, "identity": f"{record['stage']}-{seed}", "reused_from": f"{donor}-seed={seed}-repeat=0"}
        if record["stage"] in reused
        else record
        for record in fake_stages(seed)
    ]
    return commit_attempt(out, run=run, stages=stages, steps=fake_steps(seed=seed), documents=documents)


def _sums_of(documents: dict[str, np.ndarray], run: dict[str, Any]) -> dict[str, Any]:
    """Scale the documents' nats to the bits per byte in run, in place, and return the sums that follow."""
    tokens, num_bytes = int(documents["tokens"].sum()), int(documents["bytes"].sum())
    sums: dict[str, Any] = {"val_bytes": num_bytes, "val_documents": len(documents["tokens"])}
    columns = {"pre_ttt": "nats_plain", "ttt_lr0": "nats_lr0", "post_ttt": "nats_ttt"}
    for stage in STAGE_LEVELS:
        nats = (run[f"{stage}_bpb"] or 1.0) * math.log(2) * num_bytes
        if stage in columns:
            column = columns[stage]
            documents[column] *= nats / documents[column].sum() if math.isfinite(nats) else 1.0
            nats = float(documents[column].sum())
        sums |= {f"{stage}_nats": nats, f"{stage}_tokens": tokens, f"{stage}_bytes": num_bytes}
    return sums


def commit_failed(
    out: Path | str, seed: int, *, attempt: int = 1, error: str = "rank 3: out of memory", variant: str = ""
) -> str:
    """Commit one failed attempt, which has no figures."""
    keys = {"variant": variant, "seed": seed, "repeat": 0, "attempt": attempt, "config_hash": "c" * 64}
    return commit_attempt(out, run={**keys, "state": "FAILED", "error": error, "sweep": "fake", "data_hash": "d" * 64})


def fake_sweep(out: Path | str, seeds: tuple[int, ...] = (42, 0, 1337), **changes: Any) -> Path:
    """Commit a finished sweep and return its directory."""
    for seed in seeds:
        commit_fake(out, seed, **changes)
    return Path(out)


class FakeVariant(NamedTuple):
    """A made-up variant: bpb added for each seed, and the stages that it takes from the baseline's runs."""

    name: str
    gains: dict[int, float]
    reused: tuple[str, ...] = ()


def fake_ablation(out: Path | str, variants: Sequence[FakeVariant], **changes: Any) -> Path:
    """Commit a finished sweep of variants, the first one the baseline, with its sweep.json; return its directory."""
    hashes = {variant.name: f"{place + 16:02x}" * 32 for place, variant in enumerate(variants)}
    for variant in variants:
        for seed, gain in variant.gains.items():
            commit_fake(
                out, seed, variant=variant.name, shift=gain, config_hash=hashes[variant.name], reused=variant.reused,
                donor=f"variant={variants[0].name}", **changes,
            )  # fmt: skip
    seeds = list(dict.fromkeys(seed for variant in variants for seed in variant.gains))
    announced = {"time": "2026-04-11T09:59:00+00:00", "seeds": seeds, "repeats": 1, "variants": list(hashes)}
    sweep = {"format": 1, "sweep": "fake", "config_hash": hashes[variants[0].name], "data_hash": "d" * 64,
             "code_hash": "e" * 64, "world_size": 8, "variants": hashes, "announcements": [announced]}  # fmt: skip
    Path(out, "sweep.json").write_text(json.dumps(sweep, indent=1))
    return Path(out)


def seed_table(out: object) -> SeedTable:
    """Return the seed table of a run directory (path or URI).

    Raises FileNotFoundError without a results folder and ValueError when no row of it could be read.
    """
    return table_of_rows(latest_attempts(read_spent(out, TABLE_COLUMNS)), shown=str(out))
