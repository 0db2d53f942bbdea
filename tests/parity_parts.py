"""Golden sets 1, 4, 5, 6 and 7: byte tables, Newton-Schulz and Muon, GPTQ and byte shuffle, packing, schedule."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from model.config import TrainConfig
from model.data.packing import cu_seqlens_from_bos
from model.distributed import Dist
from model.optim import Muon, muon_scale, muon_update, newton_schulz
from tests.parity_core import GoldenSet, error_of_largest_entry, rms_error

MUON = "muon.npz"


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
