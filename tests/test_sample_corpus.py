"""The SP8192 sample corpus end to end, where SEEDSWEEP_DATA names its folder: bytes counted are the decoded text's.

Run by hand: SEEDSWEEP_DATA=FOLDER pytest -m slow -s tests/test_sample_corpus.py. FOLDER holds datasets/*/*.bin and
tokenizers/*.model, apart from each other and without a manifest, as the public data have them.
"""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from model.config import DataConfig, EvalConfig, RunConfig
from model.data.shards import list_shards
from model.data.tokenizer import load_tokenizer
from model.data.validation import load_validation
from model.distributed import Dist
from model.pipeline.seed import run_seed
from model.presets import tiny
from tests.micro_model import ignore

NUM_DOCUMENTS = 100
VOCAB_SIZE = 8192


@pytest.fixture(scope="module")
def data() -> DataConfig:
    """Return the corpus that the environment names."""
    folder = os.environ.get("SEEDSWEEP_DATA")
    if not folder:
        pytest.skip("SEEDSWEEP_DATA names no corpus folder: the SP8192 sample is not checked")
    tokenizers = sorted(Path(folder).glob("tokenizers/*.model"))
    assert tokenizers, f"{folder}/tokenizers has no .model file"
    return DataConfig(
        train=f"{folder}/datasets/*/*_train_*.bin",
        val=f"{folder}/datasets/*/*_val_*.bin",
        tokenizer=str(tokenizers[0]),
        val_documents=NUM_DOCUMENTS,
    )


def small(data: DataConfig) -> RunConfig:
    """Return the demo's recipe over 8,192 pieces, made smaller: minutes on one core."""
    base = tiny()
    return replace(
        base,
        model=replace(base.model, vocab_size=VOCAB_SIZE, model_dim=64, num_heads=2, num_kv_heads=1),
        train=replace(base.train, max_steps=60, batch_tokens=4096, micro_batch_tokens=2048, seq_len=256),
        quant=replace(base.quant, num_calibration_batches=2, calibration_windows=4, calibration_seq_len=256),
        evaluation=EvalConfig(row_tokens=2048, seq_len=512),
        ttt=replace(base.ttt, lora_rank=4, window_tokens=256, chunk_tokens=128),
        data=data,
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_sample_trains_quantizes_and_scores_with_bytes_of_the_decoded_text(
    data: DataConfig, tmp_path: Path
) -> None:
    result = run_seed(small(data), Dist.single(), tmp_path, ignore)
    metrics = result.metrics
    tokenizer = load_tokenizer(Path(data.tokenizer), vocab_size=VOCAB_SIZE)
    validation = load_validation(list_shards(data.val), vocab_size=VOCAB_SIZE, val_documents=NUM_DOCUMENTS)
    assert validation.num_documents == NUM_DOCUMENTS
    starts = [*validation.document_starts.tolist(), validation.tokens.size]
    texts = [tokenizer.decode(validation.tokens[a:b]) for a, b in pairwise(starts)]
    sizes = [len(text.encode()) for text in texts]
    with np.load(tmp_path / "evaluate.npz") as documents:
        assert documents["bytes"].tolist() == sizes
        assert int(documents["tokens"].sum()) == validation.num_targets
    for prefix in ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt"):
        assert metrics[f"{prefix}_bytes"] == sum(sizes)
        assert metrics[f"{prefix}_tokens"] == validation.num_targets
        print(f"{prefix}_bpb={metrics[f'{prefix}_bpb']:.4f}", end=" ")
    print(f"order0_bpb={metrics['order0_bpb']:.4f} bytes={sum(sizes)} targets={validation.num_targets}")
    assert metrics["pre_ttt_bpb"] < metrics["order0_bpb"]
    assert metrics["post_ttt_bpb"] < metrics["ttt_lr0_bpb"]
