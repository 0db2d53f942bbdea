"""model/quant/calibrate.py and hessians.py: which text is used, how documents see each other, and what a Hessian is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import QuantConfig
from model.corpus.shard_file import write_shard
from model.data.loader import SpanLoader
from model.distributed import Dist
from model.gpt import GPT
from model.quant import hessians
from model.quant.calibrate import collect_hessians, draw_windows, window_packing
from model.quant.hessians import mirror_lower
from tests.fake_triton import as_value, load_kernels
from tests.micro_model import VOCAB_SIZE, ignore, micro_loader, random_model

CONFIG = QuantConfig(num_calibration_batches=3, calibration_windows=4, calibration_seq_len=48)


def collect(model: GPT, loader: SpanLoader, config: QuantConfig, *, seed: int = 9) -> dict[str, torch.Tensor]:
    return collect_hessians(model, loader, config, Dist.single(), ignore, seed=seed)


def test_windows_depend_on_seed_and_batch_only(tmp_path: Path) -> None:
    loader = micro_loader(tmp_path)
    first = draw_windows(loader, CONFIG, seed=1, batch=2)
    assert first.shape == (4, 48)
    assert np.array_equal(first, draw_windows(micro_loader(tmp_path), CONFIG, seed=1, batch=2))
    for seed, batch in ((2, 2), (1, 1)):
        assert not np.array_equal(first, draw_windows(loader, CONFIG, seed=seed, batch=batch))


def test_windows_are_pieces_of_the_training_shards_from_all_of_them(tmp_path: Path) -> None:
    loader = micro_loader(tmp_path)
    texts = [loader.shard_tokens(shard).tobytes() for shard in range(2)]
    windows = np.concatenate([draw_windows(loader, CONFIG, seed=1, batch=batch) for batch in range(8)])
    found = [[window.astype(np.uint16).tobytes() in text for text in texts] for window in windows]
    assert all(any(row) for row in found)
    assert all(any(column) for column in zip(*found))


def test_a_window_longer_than_every_shard_is_refused(tmp_path: Path) -> None:
    loader = micro_loader(tmp_path, num_tokens=300)
    config = QuantConfig(calibration_seq_len=301)
    with pytest.raises(ValueError, match=r"quant\.calibration_seq_len=301 is longer than every training shard"):
        draw_windows(loader, config, seed=1, batch=0)


def test_a_shard_that_just_holds_one_window_is_used(tmp_path: Path) -> None:
    write_shard(tmp_path / "one.bin", np.append(1, np.arange(4, 51)).astype(np.uint16))
    loader = SpanLoader([tmp_path / "one.bin"], micro_batch_tokens=8, span_group=1, vocab_size=VOCAB_SIZE)
    windows = draw_windows(loader, CONFIG, seed=1, batch=0)
    assert np.array_equal(windows, np.tile(loader.shard_tokens(0), (4, 1)))


def test_masked_segments_start_at_every_window_and_every_bos() -> None:
    windows = np.array([[5, 1, 6, 7], [1, 8, 9, 1], [4, 4, 4, 4]])
    packing = window_packing(windows)
    assert sorted(set(packing.cu_seqlens.tolist())) == [0, 1, 4, 7, 8, 12]
    assert packing.max_seqlen == 4


def test_a_hessian_is_the_sum_of_outer_products_over_the_number_of_batches(tmp_path: Path) -> None:
    loader, model = micro_loader(tmp_path), random_model()
    total = torch.zeros(32, 32)

    def listen(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, 32)
        total.add_(rows.T @ rows)

    handle = model.projections["layers_1_qkv"].register_forward_pre_hook(listen)
    hessians = collect(model, loader, CONFIG)
    handle.remove()
    assert torch.allclose(hessians["layers.1.qkv"], total / 3, rtol=1e-5)
    # normed inputs: every token of every visit adds its squared length, 32 / (layer + 1); layer 1 is visited twice
    assert float(hessians["layers.1.qkv"].trace()) == pytest.approx(2 * 4 * 48 * 32 / 2, rel=1e-4)
    assert float(hessians["layers.4.qkv"].trace()) == pytest.approx(4 * 48 * 32 / 5, rel=1e-4)
    assert float(hessians["embedding"].trace()) == pytest.approx(4 * 48 * 32, rel=1e-4)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, calibration_documents="unmasked")])
def test_hessians_are_symmetric_positive_and_of_every_projection(tmp_path: Path, config: QuantConfig) -> None:
    hessians = collect(random_model(), micro_loader(tmp_path), config)
    assert set(hessians) == {
        "embedding",
        *(f"layers.{i}.{kind}" for i in range(5) for kind in ("qkv", "o", "up", "down")),
    }
    for name, hessian in hessians.items():
        assert hessian.dtype == torch.float32
        assert torch.allclose(hessian, hessian.T, rtol=1e-5, atol=1e-6), name
        values = torch.linalg.eigvalsh(hessian.double())
        assert float(values.min()) > -1e-5 * float(values.max()), name


def test_masked_and_unmasked_differ_exactly_where_documents_would_see_each_other(tmp_path: Path) -> None:
    def both(tokens: np.ndarray, name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        path = tmp_path / f"{name}.bin"
        write_shard(path, tokens.astype(np.uint16))
        loader = SpanLoader([path], micro_batch_tokens=32, span_group=1, vocab_size=VOCAB_SIZE)
        base = QuantConfig(num_calibration_batches=1, calibration_windows=3, calibration_seq_len=24)
        configs = [replace(base, calibration_documents=how) for how in ("masked", "unmasked")]
        masked, unmasked = (collect(random_model(), loader, config) for config in configs)
        return masked, unmasked

    rng = np.random.default_rng(0)
    one_document = np.append(1, rng.integers(4, VOCAB_SIZE, 400))
    masked, unmasked = both(one_document, "one")
    for name, hessian in masked.items():
        assert torch.allclose(hessian, unmasked[name], rtol=1e-3, atol=1e-3), name
    many = np.where(np.arange(401) % 6 == 0, 1, one_document)
    masked, unmasked = both(many, "many")
    assert torch.allclose(masked["layers.0.qkv"], unmasked["layers.0.qkv"], rtol=1e-3, atol=1e-3)  # before attention
    change = (masked["layers.4.qkv"] - unmasked["layers.4.qkv"]).norm() / masked["layers.4.qkv"].norm()
    assert float(change) > 0.05


def test_listening_leaves_no_hook_behind(tmp_path: Path) -> None:
    model = random_model()
    collect(model, micro_loader(tmp_path), CONFIG)
    assert not any(module._forward_pre_hooks for module in model.projections.values())


def test_the_kernel_of_half_a_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than its parts have whole steps for, and more columns than a tile; the other half is never written."""
    kernels = load_kernels(Path(hessians.__file__).with_name("hessians_triton.py"), monkeypatch)
    kernels.tl.__dict__.update(minimum=lambda x, y: as_value(np.minimum(x, y)))
    for name, size in (("TILE_M", 4), ("TILE_N", 8), ("DEPTH", 4), ("PARTS", 3)):
        monkeypatch.setattr(kernels, name, size)
    for num_rows in (1, 29):
        x = torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(num_rows))
        whole = mirror_lower(kernels.half_moment(x))
        assert torch.equal(whole, whole.T)
        torch.testing.assert_close(whole, x.T @ x, rtol=1e-5, atol=1e-5)


def test_what_stands_above_the_diagonal_is_not_looked_at() -> None:
    half = torch.tensor([[1.0, torch.nan, torch.inf], [2.0, 3.0, torch.nan], [4.0, 5.0, 6.0]])
    assert mirror_lower(half).tolist() == [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [4.0, 5.0, 6.0]]


@pytest.mark.gpu
def test_half_a_hessian_on_a_gpu_is_the_whole_one() -> None:
    for num_rows, width in ((98_304, 2048), (1000, 2048), (65, 1024)):
        x = torch.randn(num_rows, width, device="cuda").bfloat16()
        total = torch.zeros(width, width, device="cuda")
        for _ in range(2):
            hessians.add_second_moment(total, x)
        wanted = 2 * (x.double().T @ x.double())
        assert float((mirror_lower(total).double() - wanted).norm() / wanted.norm()) < 1e-4
        again = torch.zeros_like(total)
        for _ in range(2):
            hessians.add_second_moment(again, x)
        assert torch.equal(mirror_lower(total), mirror_lower(again))
