"""The command line of a generated train_gpt.py: train a seed, or score an artifact.

Errors that a user can fix end in one line and exit code 2, as those of seedsweep do.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.config import RunConfig, config_from_plain, recipe_hash
from model.data.loader import SpanLoader
from model.data.shards import find_documents, list_shards
from model.data.tokenizer import ByteTable, load_tokenizer
from model.data.validation import ValidationSet, load_validation
from model.distributed import Dist
from model.gpt import GPT, build_model
from model.pipeline.warm_up import choose_attention, synthetic_row, warm_up
from model.quant.artifact import ArtifactReader, load_artifact, read_artifact_info
from model.quant.calibrate import collect_hessians
from model.quant.quantized import dequantize
from model.quant.rounded import save_rounded
from model.quant.sensitivity import LossProbe
from model.report import Report
from model.score.identity import describe_validation
from model.score.plain import evaluate_plain
from model.train.trainer import Trainer
from model.ttt.documents import score_documents

PROGRESS_EVERY_S = 10.0
SCORE_LABELS = {"pre_ttt": "quantized", "ttt_lr0": "diagnostic quantized_ttt_lr0", "post_ttt": "quantized_ttt_lora"}


def build_options() -> argparse.ArgumentParser:
    """Return the parser of train_gpt.py."""
    parser = argparse.ArgumentParser(
        prog="train_gpt.py", description="Train one seed of the recipe in this file, or score its artifact."
    )
    parser.add_argument("--eval", type=Path, metavar="ARTIFACT", help="score this artifact instead of training")
    parser.add_argument("--train", nargs="+", metavar="SHARDS", help="training shards: a glob, or files")
    parser.add_argument("--val", nargs="+", metavar="SHARDS", help="validation shards: a glob, or files")
    parser.add_argument("--tokenizer", type=Path, metavar="T", help="SentencePiece model file")
    parser.add_argument("--seed", type=int, default=42, help="seed to train (default 42)")
    parser.add_argument("--out", type=Path, help="where training leaves its artifact (default runs/seed=SEED)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads (default: the artifact's when scoring, else PyTorch's)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: as in SETTINGS")
    parser.add_argument("--plain-only", action="store_true", help="leave out test-time training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON, too")
    return parser


def main(argv: Sequence[str], settings: str, code_bytes: int) -> int:
    """Run the program; settings are the JSON at the head of the generated file, code_bytes what its code counts."""
    args = build_options().parse_args(argv)
    try:
        config = config_from_plain(json.loads(settings))
        if args.device is not None:
            config = replace(config, runtime=replace(config.runtime, device=args.device))
        return score_artifact(config, args) if args.eval is not None else train_seed(config, args, code_bytes)
    except (ValueError, OSError) as error:
        print(f"train_gpt.py: error: {error}", file=sys.stderr)
        return 2


def train_seed(config: RunConfig, args: argparse.Namespace, code_bytes: int) -> int:
    """Train one seed, round it, and score it: live, averaged and quantized weights, then with test-time training."""
    require_options(args, "train", "val", "tokenizer")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dist = Dist.from_environment(config.runtime.device)
    try:
        metrics = run_training(attend_here(replace(config, seed=args.seed), dist), args, dist, code_bytes)
    finally:
        dist.close()
    if dist.is_main:
        show_scores(metrics, args.json)
    return 0


def run_training(config: RunConfig, args: argparse.Namespace, dist: Dist, code_bytes: int) -> dict[str, Any]:
    """Return every metric of a seed that is trained here; rank 0 leaves the artifact in --out."""
    report = Progress() if dist.is_main else silent
    loader = SpanLoader(
        list_shards(as_glob("train", args.train)), micro_batch_tokens=config.train.micro_batch_tokens,
        span_group=config.train.span_group, vocab_size=config.model.vocab_size,
    )  # fmt: skip
    model = new_model(config, dist)
    model.init_weights(config.seed)
    choice = choose_attention(config, dist)
    if choice is not None:
        model.attention_backend = choice.name
    warm_up(model, config, report)
    runtime = replace(config.runtime, attention=model.attention_backend)
    trained = Trainer(model, loader, config.train, dist, report, runtime=runtime).run()
    metrics, model = dict(trained.metrics), model.requires_grad_(False)
    tokenizer = load_tokenizer(args.tokenizer, vocab_size=config.model.vocab_size)
    validation = read_validation(config, args.val)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    for prefix, weights in (("live", live), ("post_ema", trained.ema)):
        model.load_state_dict(weights)
        scores = evaluate_plain(model, validation, tokenizer.byte_table, config.evaluation, dist, report)
        metrics |= scores.metrics(prefix)
    hessians = collect_hessians(model, loader, config.quant, dist, report, seed=config.seed)
    path, artifacts = (args.out or Path("runs") / f"seed={args.seed}") / "model.ssq", ArtifactReader()
    if dist.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = {
            "seed": config.seed, "world_size": dist.world_size, "num_threads": torch.get_num_threads(),
            "torch": torch.__version__, "recipe_hash": recipe_hash(config, world_size=dist.world_size),
        }  # fmt: skip
        probe = LossProbe(model, loader, config.quant, seed=config.seed)
        metrics |= save_rounded(
            path, trained.ema, hessians, config, probe=probe, meta=meta, code_bytes=code_bytes, reader=artifacts
        )
    dist.barrier()
    metrics |= describe_validation(tokenizer, validation, dist)
    model.load_state_dict(dequantize(artifacts.load(path)[1]))
    warm_up_scoring(model, tokenizer.byte_table, config, dist)
    return metrics | score_model(model, validation, tokenizer.byte_table, config, dist, report)


def score_artifact(config: RunConfig, args: argparse.Namespace) -> int:
    """Score an artifact plainly, along the TTT path without adaptation, and with it."""
    require_options(args, "val", "tokenizer")
    meta = read_artifact_info(args.eval).header.meta
    model_config, state = load_artifact(args.eval)
    if model_config != config.model:
        raise ValueError(f"artifact {args.eval} holds another model than SETTINGS describe; use its own train_gpt.py")
    check_recipe(config, meta, args.eval)
    config = replace(config, seed=seed_of(meta, args.eval))
    threads = args.threads or meta.get("num_threads")
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    dist = Dist.from_environment(config.runtime.device)
    try:
        table = load_tokenizer(args.tokenizer, vocab_size=config.model.vocab_size).byte_table
        validation = read_validation(config, args.val)
        config = attend_here(config, dist)
        model = new_model(config, dist).requires_grad_(False)
        model.load_state_dict(dequantize(state))
        report = Progress() if dist.is_main else silent
        warm_up_scoring(model, table, config, dist, is_plain_only=args.plain_only)
        metrics = score_model(model, validation, table, config, dist, report, is_plain_only=args.plain_only)
    finally:
        dist.close()
    if dist.is_main:
        show_scores({"num_threads": torch.get_num_threads(), "torch": torch.__version__, **metrics}, args.json)
    return 0


def attend_here(config: RunConfig, dist: Dist) -> RunConfig:
    """Return config; where it names an attention backend of GPUs and there is none, with "auto", and say so."""
    name = config.runtime.attention
    if dist.device.type == "cuda" or name in ("auto", "sdpa"):
        return config
    print(f"runtime.attention={name} needs a GPU: going on with auto on {dist.device}", file=sys.stderr)
    return replace(config, runtime=replace(config.runtime, attention="auto"))


def new_model(config: RunConfig, dist: Dist) -> GPT:
    """Return an unfilled model of the recipe."""
    return build_model(
        config.model, dist.device, embedding_dtype=config.train.embedding_dtype, attention=config.runtime.attention
    )


def warm_up_scoring(
    model: GPT, table: ByteTable, config: RunConfig, dist: Dist, *, is_plain_only: bool = False
) -> None:
    """Score synthetic documents, so that on a GPU every kernel is compiled before a pass is timed."""
    if dist.device.type == "cuda":
        tokens, _ = synthetic_row(config)
        validation = ValidationSet(tokens, find_documents(tokens))
        score_model(model, validation, table, config, dist, silent, is_plain_only=is_plain_only)


def score_model(
    model: GPT, validation: ValidationSet, table: ByteTable, config: RunConfig, dist: Dist, report: Report,
    *, is_plain_only: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the metrics of the quantized weights: plain, each document on its own, and adapted to each document."""
    metrics: dict[str, Any] = {}
    scores = evaluate_plain(model, validation, table, config.evaluation, dist, report)
    metrics |= scores.metrics("pre_ttt")
    for prefix in () if is_plain_only else ("ttt_lr0", "post_ttt"):
        result = score_documents(
            model, validation, table, config.ttt, dist, report, seed=config.seed, is_adapting=prefix == "post_ttt"
        )
        metrics |= result.scores.metrics(prefix)
    return metrics


def check_recipe(config: RunConfig, meta: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the artifact says that it was made under other settings."""
    made_by, world_size = meta.get("recipe_hash"), meta.get("world_size")
    if isinstance(made_by, str) and isinstance(world_size, int):
        ours = recipe_hash(config, world_size=world_size)
        if ours != made_by:
            raise ValueError(
                f"artifact {path} was made under other settings (recipe_hash {made_by[:12]}, these are {ours[:12]}); "
                "use its own train_gpt.py"
            )


def seed_of(meta: dict[str, Any], path: Path) -> int:
    """Return the seed that an artifact was made with: adapters start from it."""
    seed = meta.get("seed")
    if not isinstance(seed, int):
        raise ValueError(f"artifact {path} does not name its seed, from which adapters are drawn")
    return seed


def read_validation(config: RunConfig, shards: Sequence[str]) -> ValidationSet:
    """Return the validation stream, cut as SETTINGS say."""
    return load_validation(
        list_shards(as_glob("val", shards)),
        vocab_size=config.model.vocab_size,
        val_documents=config.data.val_documents,
        val_tokens=config.data.val_tokens,
    )


def as_glob(option: str, words: Sequence[str]) -> str:
    """Return one pattern for what the shell made of a glob: itself, or files of one folder and ending."""
    if len(words) == 1:
        return words[0]
    names = sorted(str(Path(word)) for word in words)
    prefix = names[0]
    while not all(name.startswith(prefix) for name in names):
        prefix = prefix[:-1]
    pattern = f"{glob.escape(prefix)}*{Path(names[0]).suffix}"
    if sorted(glob.glob(pattern)) != names:
        raise ValueError(f"--{option} names {len(names)} files that no single glob names; quote a glob instead")
    return pattern


def require_options(args: argparse.Namespace, *names: str) -> None:
    """Raise ValueError naming the first option that is missing."""
    for name in names:
        if getattr(args, name) is None:
            raise ValueError(f"--{name} is missing (see --help)")


def show_scores(metrics: dict[str, Any], path: Path | None) -> None:
    """Print the scores in the lines that reviewers' tools read, then every figure with all its digits as JSON."""
    for prefix, label in SCORE_LABELS.items():
        if f"{prefix}_bpb" in metrics:
            loss = metrics[f"{prefix}_nats"] / metrics[f"{prefix}_tokens"]
            milliseconds = 1000 * metrics[f"{prefix}_s"]
            print(f"{label} val_loss:{loss:.8f} val_bpb:{metrics[f'{prefix}_bpb']:.8f} eval_time:{milliseconds:.0f}ms")
    if "artifact_bytes" in metrics:
        print(f"Serialized model: {metrics['model_bytes']} bytes")
        print(f"Code size: {metrics['code_bytes']} bytes")
        print(f"Total submission size: {metrics['artifact_bytes']} bytes")
    text = json.dumps(metrics, sort_keys=True)
    print(text, flush=True)
    if path is not None:
        path.write_text(text + "\n")


def silent(_phase: str, _step: int, _total: int | None, _metrics: dict[str, Any]) -> None:
    """Report nothing: rank 0 speaks."""


class Progress:
    """Prints a line to stderr when the phase changes, and every few seconds."""

    def __init__(self) -> None:
        self.phase, self.last = "", 0.0

    def __call__(self, phase: str, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        """Hear of progress."""
        now = time.monotonic()
        if phase == self.phase and now - self.last < PROGRESS_EVERY_S:
            return
        self.phase, self.last = phase, now
        shown = " ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                         for name, value in metrics.items())  # fmt: skip
        print(f"{phase} step={step}/{total or '?'} {shown}".rstrip(), file=sys.stderr, flush=True)
