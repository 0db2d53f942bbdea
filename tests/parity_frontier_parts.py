"""Set F4: the rounds of Polar Express alone and in Muon, and the floor of the learning rate."""

from __future__ import annotations

import torch
from torch import nn

from model.config import TrainConfig
from model.distributed import Dist
from model.train.optim import COEFFICIENTS, Muon, newton_schulz
from model.train.schedule import lr_factor
from tests.parity_core import GoldenSet, Measure, error_of_largest_entry, largest_error, rms_error

KIND = "polar_express"
# suffix of the golden keys -> type of gradient, momentum and iteration, and what is held against its figures
ROUNDS: dict[str, tuple[torch.dtype, tuple[tuple[float, Measure], ...]]] = {
    "out64": (torch.float64, ((1e-12, largest_error),)),
    "out32": (torch.float32, ((5e-5, largest_error),)),
    "out": (torch.bfloat16, ((8e-2, largest_error), (1.8e-2, rms_error))),
}
STEPS: dict[str, tuple[torch.dtype, tuple[tuple[float, Measure], ...], tuple[float, Measure]]] = {
    "": (torch.bfloat16, ((4e-3, largest_error), (1e-3, rms_error)), (1e-2, error_of_largest_entry)),
    "_f32": (torch.float32, ((1e-6, largest_error),), (1e-7, largest_error)),
    "_f64": (torch.float64, ((1e-12, largest_error),), (1e-12, largest_error)),
}


def check_polar_express(golden: GoldenSet) -> None:
    """Set F4: the iteration in three types, two Muon steps on each bank in three types, the learning-rate factor."""
    golden.compare("coefficients", COEFFICIENTS[KIND], tolerance=0)
    for key in golden.keys("in_"):
        G = torch.from_numpy(golden.read(key))
        for prefix, (dtype, measures) in ROUNDS.items():
            ours = newton_schulz(G, dtype=dtype, coefficients=KIND)
            for tolerance, measure in measures:
                name = f"{prefix}_{key.removeprefix('in_')}"
                golden.compare(name, ours, tolerance=0 if name.endswith("zero") else tolerance, measure=measure)
    for key in golden.keys("p"):
        if key.endswith("_init"):
            for suffix in STEPS:
                _check_steps(golden, key.removeprefix("p").removesuffix("_init"), suffix)
    warmdown, floor = (float(value) for value in golden.read("lr_warmdown_floor"))
    config = TrainConfig(warmdown_frac=warmdown, min_lr_frac=floor)
    golden.compare("lr_factor", [lr_factor(float(x), config) for x in golden.read("lr_frac")], tolerance=1e-12)


def _check_steps(golden: GoldenSet, bank: str, suffix: str) -> None:
    """Take the optimizer's steps on one bank, everything in one type."""
    dtype, measures, (buffer_tolerance, buffer_measure) = STEPS[suffix]
    lr, momentum, weight_decay = (float(value) for value in golden.read("hyper_lr_mom_wd"))
    initial = torch.from_numpy(golden.read(f"p{bank}_init"))
    parameter = nn.Parameter(initial.to(torch.promote_types(dtype, torch.float32), copy=True))
    muon = Muon(
        {"bank": parameter}, TrainConfig(orthogonalization=KIND, matrix_weight_decay=weight_decay), Dist.single()
    )
    muon.dtype, muon.buffers = dtype, {"bank": muon.buffers["bank"].to(dtype)}
    steps = sorted(golden.keys(f"g{bank}_step"), key=lambda key: int(key.rsplit("step", 1)[1]))
    for step, key in enumerate(steps):
        parameter.grad = torch.from_numpy(golden.read(key)).to(parameter.dtype)
        muon.step(lr=lr, momentum=momentum)
        after = f"{bank}_after{step}{suffix}"
        for tolerance, measure in measures:
            golden.compare(f"p{after}", parameter.data, tolerance=tolerance, measure=measure)
        golden.compare(f"buf{after}", muon.buffers["bank"], tolerance=buffer_tolerance, measure=buffer_measure)
