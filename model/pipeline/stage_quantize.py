"""The quantization stage: calibration, GPTQ, and the artifact with the code that is counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.bundle.ahead import making_program
from model.bundle.program import CONVENTION, PACKED_NAME, READABLE_NAME, Program, code_program
from model.config import recipe_hash
from model.files.atomic import replace_file
from model.files.ledger import Ledger
from model.kernels.dispatch import has_triton
from model.pipeline.inputs import (
    ARTIFACT,
    Outcome,
    attention_backend_name,
    load_model,
    load_weights,
    open_training,
)
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.run import Run
from model.quant.calibrate import collect_hessians
from model.quant.rounded import save_rounded
from model.quant.sensitivity import LossProbe


def run_quantize(run: Run, ledger: Ledger) -> Outcome:
    """Calibrate on training text, round the averaged weights by GPTQ and write the artifact."""
    config, dist = run.config, run.dist
    if config.quant.num_calibration_batches < dist.world_size:
        raise ValueError(
            f"quant.num_calibration_batches={config.quant.num_calibration_batches} must be at least the number of "
            f"ranks, {dist.world_size}"
        )
    metrics: dict[str, Any] = {}
    with making_program(config) if dist.is_main else nullcontext(lambda: None) as wait_for_program:
        with ledger.span("load"), run.long_call():
            weights = load_weights(run, ledger, "ema")
            model = load_model(run, weights)
            loader = open_training(run, ledger)
        with ledger.span("warm_up"), run.long_call():
            compile_kernels(run, ledger, "quantize")
        with ledger.span("hessians"):
            hessians = collect_hessians(model, loader, config.quant, dist, run.report, seed=config.seed)
        with ledger.span("program"), run.long_call():
            wait_for_program()
    if dist.is_main:
        with run.long_call(), device_coding(dist.device):
            probe = LossProbe(model, loader, config.quant, seed=config.seed)
            metrics = _round_and_save(run, ledger, weights, hessians, probe)
    compress_s, rounding_s = ledger.seconds("compress"), ledger.seconds("round")
    sensitivity_s = ledger.seconds("sensitivity")
    metrics |= {
        "quantize_attention_backend": attention_backend_name(run, model),
        "hessian_s": ledger.seconds("hessians"),
        "solve_s": rounding_s - compress_s - sensitivity_s,
        "compress_s": compress_s,
        **({"sensitivity_s": sensitivity_s} if sensitivity_s else {}),
        "quantize_s": rounding_s
        + sum(ledger.seconds(name) for name in ("load", "warm_up", "hessians", "program", "reload")),
    }
    return metrics, [ARTIFACT, READABLE_NAME, PACKED_NAME]


def device_coding(device: torch.device) -> AbstractContextManager[None]:
    """Return what has the artifact's codes packed, and read back, by the GPU where there is one."""
    if device.type != "cuda" or not has_triton():
        return nullcontext()
    from model.quant.rans_triton import coding_on

    return coding_on(device)


def _round_and_save(
    run: Run, ledger: Ledger, weights: dict[str, Tensor], hessians: dict[str, Tensor], probe: LossProbe
) -> dict[str, Any]:
    """Write the artifact and the program that scores it, and return the size metrics (rank 0)."""
    with ledger.span("program"):
        program = code_program(run.config)
        write_program(program, run.workdir)

    @contextmanager
    def span(name: str) -> Iterator[None]:
        with ledger.span(name), run.long_call() if name == "compress" else nullcontext():
            yield

    metrics = save_rounded(
        run.workdir / ARTIFACT, weights, hessians, run.config,
        probe=probe, meta=artifact_meta(run), code_bytes=program.num_bytes, span=span, reader=run.artifacts,
    )  # fmt: skip
    return {**metrics, "code_bytes_readable": program.readable_bytes, "code_bytes_convention": CONVENTION}


def write_program(program: Program, folder: Path) -> list[str]:
    """Write both files of a program, each whole or not at all, and return their names."""
    for name, content in ((READABLE_NAME, program.readable.encode()), (PACKED_NAME, program.packed)):
        with replace_file(folder / name) as file:
            file.write(content)
    return [READABLE_NAME, PACKED_NAME]


def artifact_meta(run: Run) -> dict[str, Any]:
    """Return what an artifact holds besides its model: where it comes from, and all that scoring it again needs.

    How it is scored is not in it, so that runs that differ in that alone have the same artifact; but where
    quant.on_oversize is "fit" the program's bytes, and with them every setting that it carries, move the weights.
    """
    return {
        "seed": run.config.seed,
        "world_size": run.dist.world_size,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe_hash": recipe_hash(run.config, world_size=run.dist.world_size),
        "data_hash": run.hashes["data_hash"],
        "code_hash": run.hashes["code_hash"],
    }
