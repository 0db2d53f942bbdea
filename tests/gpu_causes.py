"""Which difference to the published code moves the training loss: python -m tests.gpu_causes VARIANT STEPS OUT.json.

Runs the first STEPS steps of bench_500 on a CUDA device with one thing changed, and notes the loss of each. --gradients
then compares the gradients of one row with float32: the fused kernels', and those of the plain operations.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model import gpt
from model.data.loader import SpanLoader
from model.data.packing import pack_row
from model.data.shards import list_shards
from model.distributed import Dist
from model.gpt import GPT, build_model
from model.layers import rotary_tables
from model.presets import bench_500
from model.report import Interrupted
from model.train.gradients import accumulate_gradients
from model.train.trainer import Trainer

VARIANTS = {
    "base": "as the preset",
    "plain": "every fused kernel replaced by its PyTorch twin",
    "e32": "embedding, its gradient and moments in float32",
    "packed": "rotary positions over the packed row, tables rounded to bf16, as published",
    "leak": "Muon starts with the momentum of two steps without and two with loops, as the published code leaves it",
    "packed_leak": "both",
    "ns32": "Newton-Schulz and momentum in float32",
}
CONFIG = bench_500()
CUDA = torch.device("cuda")
ROW_SPAN, ROW_TOKENS = 198, 24_576
KERNELS = ("adapter_update", "adapters", "cross_entropy", "lanes", "mlp", "residual")


@contextmanager
def plain_operations() -> Iterator[None]:
    """Keep every tensor from the fused kernels."""
    with ExitStack() as stack:
        for name in ("gpt", "attention.self_attention", *(f"kernels.{each}" for each in KERNELS)):
            stack.enter_context(mock.patch(f"model.{name}.uses_triton", return_value=False))
        yield


def rounded_tables(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    """Return the rotation tables as bf16 holds them."""
    return tuple(table.bfloat16().float() for table in rotary_tables(*args, **options))


def leave_momentum(trainer: Trainer) -> None:
    """Take the steps of a compile warm-up on real spans, then restore all but Muon's momentum."""
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    train = CONFIG.train
    for step, is_looped in enumerate((False, False, True, True)):
        spans = range(step * train.micro_batches_per_step, (step + 1) * train.micro_batches_per_step)
        batches = [trainer._make_batch(span).to(CUDA) for span in spans]
        accumulate_gradients(
            trainer.model, batches, is_looped=is_looped, clip=train.clip, max_norm=train.grad_clip_norm,
            dist=trainer.dist,
        )  # fmt: skip
        trainer.optimizers.step(lr_factor=1.0, momentum=train.muon_momentum_start)
        trainer.model.zero_grad(set_to_none=True)
    trainer.model.load_state_dict(kept)
    trainer.optimizers.adamw.state.clear()


def run(variant: str, num_steps: int, pattern: str, attention: str) -> tuple[Trainer, list[float]]:
    """Return the trainer after num_steps and the loss of each."""
    train, model_config = CONFIG.train, CONFIG.model
    if "packed" in variant:
        model_config = replace(model_config, rotary_positions="packed")
    if variant == "ns32":
        train = replace(train, newton_schulz_dtype="float32")
    dist = Dist.single(CUDA)
    loader = SpanLoader(
        list_shards(pattern), micro_batch_tokens=train.micro_batch_tokens, span_group=1, vocab_size=8192
    )
    embedding_dtype = "float32" if variant == "e32" else train.embedding_dtype
    model = build_model(model_config, dist.device, embedding_dtype=embedding_dtype, attention=attention)
    model.init_weights(CONFIG.seed)
    stops: list[Trainer] = []
    trainer = Trainer(
        model, loader, train, dist, lambda _phase, step, _total, figures: print(step, figures.get("loss"), flush=True),
        runtime=replace(CONFIG.runtime, report_every_s=10), should_stop=lambda: stops[0].step >= num_steps,
    )  # fmt: skip
    stops.append(trainer)
    with ExitStack() as stack:
        if variant == "plain":
            stack.enter_context(plain_operations())
        if "packed" in variant:
            stack.enter_context(mock.patch.object(gpt, "rotary_tables", rounded_tables))
        if "leak" in variant:
            leave_momentum(trainer)
        with suppress(Interrupted):
            trainer.run()
    return trainer, trainer.log["loss"]


def compare_gradients(model: GPT, loader: SpanLoader) -> dict[str, Any]:
    """Return, for both loop states, each parameter's gradient in bf16 beside float32: relative error and scale."""
    inputs, targets = (x[:, :ROW_TOKENS] for x in loader.span(ROW_SPAN))
    packing = pack_row(inputs, max_segment=2048, max_seqlen=2048).to(CUDA)
    inputs, targets = inputs.to(CUDA), targets.to(CUDA)
    wide = GPT(model.config, compute_dtype=torch.float32).to(CUDA)
    wide.load_state_dict(model.state_dict())

    def gradients(of: GPT, is_looped: bool) -> tuple[float, dict[str, Tensor]]:
        of.zero_grad(set_to_none=True)
        loss = of(inputs, targets, is_looped=is_looped, packing=packing)
        loss.backward()
        return float(loss.detach()), {
            k: p.grad.double().flatten() for k, p in of.named_parameters() if p.grad is not None
        }

    found: dict[str, Any] = {}
    for name, is_looped in (("11_layers", False), ("17_visits", True)):
        wide_loss, wanted = gradients(wide, is_looped)
        fused_loss, fused = gradients(model, is_looped)
        with plain_operations():
            plain_loss, plain = gradients(model, is_looped)
        figures = {
            key: {"norm_float32": float(value.norm())}
            | {
                f"{kind}_{what}": float(figure)
                for kind, other in (("fused", fused[key]), ("plain", plain[key]))
                for what, figure in (
                    ("relative_error", (other - value).norm() / value.norm()),
                    ("scale", other @ value / (value @ value)),
                )
            }
            for key, value in wanted.items()
        }
        losses = {"loss_float32": wide_loss, "loss_bf16_fused": fused_loss, "loss_bf16_plain": plain_loss}
        found[name] = losses | {"gradients": figures}
    return found


def main() -> None:
    """Run one variant and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True)
    parser.add_argument("--attention", default="varlen")
    parser.add_argument("--gradients", action="store_true")
    args = parser.parse_args()
    trainer, losses = run(args.variant, args.steps, args.train, args.attention)
    result: dict[str, Any] = {"variant": args.variant, "what": VARIANTS[args.variant], "loss": losses}
    if args.gradients:
        result["gradients"] = compare_gradients(trainer.model, trainer.loader)
    args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
