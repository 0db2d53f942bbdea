"""Golden sets 1, 4, 5, 6 and 7: byte tables, Newton-Schulz and Muon, GPTQ and byte shuffle, packing, schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import brotli
import numpy as np
import torch
from torch import Tensor, nn

from model.config import QuantConfig, TrainConfig
from model.data.packing import cu_seqlens_from_bos
from model.data.tokenizer import load_tokenizer, target_bytes
from model.distributed import Dist
from model.quant.compression import byte_shuffle, compress
from model.quant.quantized import QuantizedWeight
from model.train.optim import Muon, muon_scale, muon_update, newton_schulz
from model.train.schedule import is_looping, lr_factor, muon_momentum, schedule_frac
from tests.parity_core import (
    GoldenSet,
    error_of_largest_entry,
    num_different,
    relative_error,
    rms_error,
    train_config,
)
from tests.rounding import quantize_weight, round_to_nearest

MUON = "muon.npz"
SHUFFLE = "byte_shuffle.npz"
TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"


def check_bytes(golden: GoldenSet) -> None:
    """Set 1: the tokenizer's ids, its byte tables, and the bytes that targets stand for, all exactly."""
    tokenizer = load_tokenizer(TOKENIZER)
    table = tokenizer.byte_table
    for name in ("base_bytes", "has_leading_space", "is_boundary"):
        golden.compare(name, getattr(table, name), tolerance=0)
    texts = [str(text) for text in golden.read("texts")]
    documents = [tokenizer.encode_documents([text])[0] for text in texts]
    per_token = [np.append(0, target_bytes(table, tokens)) for tokens in documents]  # the BOS itself has no bytes
    stream = np.concatenate(documents)
    golden.compare("ids", stream, tolerance=0)
    golden.compare("offsets", np.cumsum([0, *(len(tokens) for tokens in documents)]), tolerance=0)
    golden.compare("token_bytes", np.concatenate(per_token), tolerance=0)
    golden.compare("byte_count", [counts.sum() for counts in per_token], tolerance=0)
    golden.compare("raw_utf8_bytes", [len(text.encode()) for text in texts], tolerance=0)
    decoded = [tokenizer.decode(tokens) for tokens in documents]
    golden.compare("decoded_utf8_bytes", [len(text.encode()) for text in decoded], tolerance=0)
    golden.compare("stream_byte_count", target_bytes(table, stream).sum(dtype=np.int64), tolerance=0)
    random_bytes = target_bytes(table, golden.read("random_ids"))
    golden.compare("random_token_bytes", random_bytes, tolerance=0)
    golden.compare("random_byte_count", random_bytes.sum(dtype=np.int64), tolerance=0)


def check_packing(golden: GoldenSet) -> None:
    """Set 6: where segments start in a row, for each case exactly."""
    wrong = []
    for number, case in enumerate(golden.content[golden.files[0]]["cases"]):
        packing = cu_seqlens_from_bos(
            np.asarray(case["bos"], dtype=np.int64), case["total_len"],
            max_segment=case["max_doc_len"], bucket=case["bucket"],
        )  # fmt: skip
        if packing.cu_seqlens.tolist() != case["cu_seqlens"] or packing.max_seqlen != case["max_seqlen"]:
            wrong.append(number)
    golden.check("cases", is_equal=not wrong)


def check_muon(golden: GoldenSet) -> None:
    """Set 4: Newton-Schulz in bfloat16, and whole Muon steps on several banks."""
    for key in golden.keys("in_"):
        name, G = key.removeprefix("in_"), torch.from_numpy(golden.read(key))
        if name == "zero":
            golden.compare("out_zero", newton_schulz(G), tolerance=0)
            continue
        golden.compare(f"out_{name}", newton_schulz(G), tolerance=3e-2)
        golden.compare(f"out_{name}", newton_schulz(G), tolerance=5e-3, measure=rms_error)
        golden.compare(f"out10_{name}", newton_schulz(G, steps=10), tolerance=6e-2)
    lr, momentum, weight_decay = (float(value) for value in golden.read("hyper_lr_mom_wd", file=MUON))
    config = TrainConfig(matrix_weight_decay=weight_decay)
    for key in golden.keys("p", file=MUON):
        if key.endswith("_init"):
            bank = key.removeprefix("p").removesuffix("_init")
            _check_muon_steps(golden, bank, config, lr=lr, momentum=momentum)


def _check_muon_steps(golden: GoldenSet, bank: str, config: TrainConfig, *, lr: float, momentum: float) -> None:
    """Take the optimizer's steps on one bank, then its two variants."""
    initial = torch.from_numpy(golden.read(f"p{bank}_init", file=MUON))
    steps = sorted(golden.keys(f"g{bank}_step", file=MUON), key=lambda key: int(key.rsplit("step", 1)[1]))
    gradients = [torch.from_numpy(golden.read(key, file=MUON)) for key in steps]
    parameter = nn.Parameter(initial.clone())
    muon = Muon({"bank": parameter}, config, Dist.single())
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        muon.step(lr=lr, momentum=momentum)
        tolerance = 1e-3 if step == 0 else 2e-3
        golden.compare(f"p{bank}_after{step}", parameter.data, tolerance=tolerance, file=MUON)
        golden.compare(
            f"buf{bank}_after{step}", muon.buffers["bank"], tolerance=1e-2, measure=error_of_largest_entry, file=MUON
        )
    for variant, options in (("norow", {"normalize_rows": False}), ("nonest", {"is_nesterov": False})):
        final = _muon_variant(initial, gradients, options, lr=lr, momentum=momentum, decay=config.matrix_weight_decay)
        golden.compare(f"p{bank}_{variant}_final", final, tolerance=2e-3, file=MUON)


def _muon_variant(
    initial: Tensor, gradients: list[Tensor], options: dict[str, bool], *, lr: float, momentum: float, decay: float
) -> Tensor:
    """Return the bank after steps without row normalization, or without Nesterov's look ahead."""
    bank, buffer = initial.clone(), torch.zeros_like(initial, dtype=torch.bfloat16)
    for gradient in gradients:
        update = muon_update(gradient, buffer, momentum=momentum, **options)
        bank.mul_(1 - lr * decay).sub_(lr * muon_scale(*bank.shape[-2:]) * update.float())
    return bank


def check_gptq(golden: GoldenSet) -> None:
    """Set 5: GPTQ codes, scales and output errors for each case, then byte shuffling and compressed sizes."""
    for key in golden.keys("W_"):
        case = key.removeprefix("W_")
        weight, hessian = torch.from_numpy(golden.read(key)), torch.from_numpy(golden.read(f"H_{case}"))
        clip_range, clip_sigmas = int(golden.read(f"cfg_{case}")[2]), float(golden.read(f"cfg_{case}")[3])
        bits = (clip_range + 1).bit_length()
        published = QuantConfig()
        ours = quantize_weight(
            weight, hessian, bits=bits, clip_sigmas=clip_sigmas,
            damping_frac=published.damping_frac, block_columns=published.block_columns,
        )  # fmt: skip
        nearest = round_to_nearest(weight, bits=bits, clip_sigmas=clip_sigmas)
        golden.compare(f"s_{case}", ours.scales, tolerance=0, measure=num_different)
        for name, quantized in (("Q", ours), ("Qrtn", nearest)):
            golden.compare(f"{name}_{case}", quantized.codes, tolerance=1)
            golden.compare(f"{name}_{case}", quantized.codes, tolerance=0.005, measure=share_different)
        for name in ("err_gptq", "err_gptq_f64"):
            error = output_error(weight, hessian, ours)
            golden.compare(f"{name}_{case}", error, tolerance=0.01, measure=relative_error)
        golden.compare(f"dead_{case}", (hessian.diagonal() == 0).nonzero()[:, 0], tolerance=0)
    _check_shuffle(golden)


def share_different(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the share of entries that differ at all."""
    return num_different(ours, golden) / max(golden.size, 1)


def output_error(weight: Tensor, hessian: Tensor, quantized: QuantizedWeight) -> float:
    """Return trace(E H E^T) with E = weight minus what it became, in float64."""
    E = (weight - quantized.dequantize()).double()
    return float(torch.trace(E @ hessian.double() @ E.T))


def check_schedule(golden: GoldenSet) -> None:
    """Set 7: learning-rate factor, looping and momentum, with and without a time limit."""
    hyper = golden.read("hyper")
    by_steps = train_config(hyper)
    by_time = train_config(hyper, budget_s=hyper["max_wallclock_seconds"], reserve_s=hyper["gptq_reserve_seconds"])
    fractions, steps = golden.read("frac"), golden.read("steps")
    golden.compare("lr_mul", [lr_factor(frac, by_steps) for frac in fractions], tolerance=1e-12)
    golden.compare("looping_active", [is_looping(frac, by_steps) for frac in fractions], tolerance=0)
    golden.compare("muon_momentum", [muon_momentum(step, 0.0, by_steps) for step in steps], tolerance=1e-12)
    first = {}
    for iterations in golden.content[golden.files[0]]["first_looping_step_by_iterations"]:
        config = replace(by_steps, max_steps=int(iterations))
        grid = range(config.max_steps + 1)
        first[iterations] = next((s for s in grid if is_looping(schedule_frac(s, 0.0, config), config)), None)
    golden.check("first_looping_step_by_iterations", first == golden.read("first_looping_step_by_iterations"))
    budget_ms = 1000.0 / schedule_frac(0, 1.0, by_time)  # the elapsed time at which the schedule is over
    golden.compare("effective_wallclock_ms", budget_ms, tolerance=1e-12, measure=relative_error)


def _check_shuffle(golden: GoldenSet) -> None:
    """Compare shuffled bytes exactly, and the compressed sizes that follow from stored bytes."""
    raw = golden.read("raw", file=SHUFFLE).tobytes()
    for key in golden.keys("shuffled_stride", file=SHUFFLE):
        stride = int(key.removeprefix("shuffled_stride"))
        golden.compare(key, _bytes(byte_shuffle(raw, stride)), tolerance=0, file=SHUFFLE)
    for key in golden.keys("edge_in_", file=SHUFFLE):
        edge = byte_shuffle(golden.read(key, file=SHUFFLE).tobytes(), 2)
        golden.compare(key.replace("in", "out"), _bytes(edge), tolerance=0, file=SHUFFLE)
    payload = b"".join(golden.read(key, file=SHUFFLE).tobytes() for key in ("q_sample", "s_sample"))
    shuffled = len(compress(byte_shuffle(payload, 2)))
    ours = np.array([len(payload), len(compress(payload)), shuffled, shuffled])  # the rest needs weights not stored
    is_same_brotli = brotli.__version__.startswith("1.2")

    def error_of_first(ours: np.ndarray, expected: np.ndarray) -> float:
        return relative_error(ours[:4], expected[:4])

    sizes = np.concatenate([ours, golden.content[SHUFFLE]["sizes"][4:]])
    golden.compare("sizes", sizes, tolerance=0 if is_same_brotli else 0.01, measure=error_of_first, file=SHUFFLE)


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)
