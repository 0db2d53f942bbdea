"""model/data/loader.py against the batches that the published loader gave, and its properties."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from model.corpus.shard_file import write_shard
from model.data.loader import SpanLoader, prefetch_batches

# golden set 8: shard0 and shard1, and the batches x, y, cu_seqlens that the published
# training loop (parameter-golf PR #1536) produced with micro batches of 96 tokens and segments of at most 32
GOLDEN = Path(__file__).parent / "golden" / "train_tiny.npz"


def write_shards(folder: Path, *arrays: np.ndarray) -> list[Path]:
    paths = [folder / f"toy_train_{number:06}.bin" for number in range(len(arrays))]
    for path, tokens in zip(paths, arrays, strict=True):
        write_shard(path, tokens)
    return paths


def counting_shards(folder: Path) -> list[Path]:
    """Three shards of 30, 22 and 41 tokens; token = 100 * shard + place, a BOS at places 2, 0 and 5."""
    arrays = [np.arange(size) + 100 * (number + 1) for number, size in enumerate((30, 22, 41))]
    for tokens, place in zip(arrays, (2, 0, 5), strict=True):
        tokens[place] = 1
    return write_shards(folder, *arrays)


def test_batches_agree_with_the_published_loader(tmp_path: Path) -> None:
    with np.load(GOLDEN, allow_pickle=False) as golden:
        paths = write_shards(tmp_path, golden["shard0"], golden["shard1"])
        loader = SpanLoader(paths, micro_batch_tokens=96, span_group=1, vocab_size=256)
        for index in range(len(golden["x"])):
            batch = loader.batch(index, max_segment=32)
            assert np.array_equal(batch.inputs[0], golden["x"][index])
            assert np.array_equal(batch.targets[0], golden["y"][index])
            assert np.array_equal(batch.packing.cu_seqlens, golden["cu_seqlens"][index])


def test_a_group_stays_in_one_shard_and_the_rest_is_dropped(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=2, vocab_size=512)
    # groups of 10 tokens: two fit the 28 tokens from place 2, two the 22 from place 0, three the 36 from place 5
    starts = [loader.locate(index) for index in range(loader.num_spans)]
    assert starts == [
        *[(0, 2), (0, 7), (0, 12), (0, 17)],
        *[(1, 0), (1, 5), (1, 10), (1, 15)],
        *[(2, 5), (2, 10), (2, 15), (2, 20), (2, 25), (2, 30)],
    ]
    assert loader.tokens(1).tolist() == [107, 108, 109, 110, 111]


def test_the_first_shard_follows_the_last(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=2, vocab_size=512)
    for index in (0, 5, 13):
        assert np.array_equal(loader.tokens(index), loader.tokens(index + 3 * loader.num_spans))


def test_the_last_token_of_a_span_is_a_target_and_never_an_input(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=1, vocab_size=512)
    inputs, targets = loader.span(0)
    assert inputs.tolist() == [[1, 103, 104, 105]]
    assert targets.tolist() == [[103, 104, 105, 106]]
    assert loader.span(1)[0].tolist() == [[107, 108, 109, 110]]
    assert inputs.dtype == targets.dtype == torch.int64


def test_each_shard_is_announced_once(tmp_path: Path) -> None:
    paths = counting_shards(tmp_path)
    opened: list[Path] = []
    loader = SpanLoader(paths, micro_batch_tokens=4, span_group=1, vocab_size=512, on_open=opened.append)
    loader.span(3)
    assert opened == paths


def test_a_shard_shorter_than_a_group_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"000001\.bin has 22 tokens .* train\.span_group=6 spans of 4"):
        SpanLoader(counting_shards(tmp_path), micro_batch_tokens=3, span_group=6, vocab_size=512)


def test_a_shard_without_bos_is_refused(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, np.array([1, 2, 3, 4]), np.array([5, 6, 7, 8]))
    with pytest.raises(ValueError, match=r"000001\.bin has no BOS \(id 1\)"):
        SpanLoader(paths, micro_batch_tokens=2, span_group=1, vocab_size=512)


def test_a_token_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=1, vocab_size=105)
    with pytest.raises(ValueError, match=r"000000\.bin has token id 105 at 3, outside vocab_size=105"):
        loader.span(0)


def test_prefetched_batches_come_in_order_and_the_thread_ends(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=1, vocab_size=512)
    order = [3, 0, 11, 5, 5]
    batches = list(prefetch_batches(lambda index: loader.batch(index, max_segment=2), order, depth=3))
    assert [batch.inputs.tolist() for batch in batches] == [loader.span(index)[0].tolist() for index in order]
    endless = prefetch_batches(lambda index: loader.batch(index, max_segment=2), iter(lambda: 0, 1))
    next(endless)
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_an_error_while_prefetching_reaches_the_reader(tmp_path: Path) -> None:
    loader = SpanLoader(counting_shards(tmp_path), micro_batch_tokens=4, span_group=1, vocab_size=105)
    with pytest.raises(ValueError, match="outside vocab_size=105"):
        next(prefetch_batches(lambda index: loader.batch(index, max_segment=2), [0]))
