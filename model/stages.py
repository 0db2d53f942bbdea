"""The four stages of a seed: each reads what the one before left in the run directory and leaves its own outputs.

A stage returns (flat metrics, names of its output files); pipeline.py times it and writes the record.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.artifact import load_artifact, save_artifact
from model.calibrate import collect_hessians
from model.checkpoint import CheckpointStore
from model.codesize import code_program
from model.compile_ahead import compile_kernels
from model.config import ATTENTION_BACKENDS, ModelConfig
from model.data.files import replace_file
from model.data.loader import SpanLoader
from model.data.shards import list_shards
from model.data.tokenizer import Tokenizer, load_tokenizer
from model.data.validation import ValidationSet, load_validation
from model.distributed import Dist
from model.evaluate import DocumentScores, RowScorer, evaluate_plain, order0_bpb
from model.gpt import GPT
from model.gptq import fit_to_limit, quantize_state
from model.kernels.attention import resolve_backend
from model.kernels.probe import Choice
from model.ledger import Ledger
from model.own_code import CONVENTION, PACKED_NAME, READABLE_NAME
from model.quantized import QuantizedState, dequantize
from model.run import Run
from model.run_record import note_attention
from model.score_ledger import Events, times_scored
from model.tensorfile import load_tensors, save_tensors
from model.train import NOTHING_REACHED, Reached, Report, Trainer
from model.ttt import score_documents
from model.warm_up import choose_attention, warm_up

Outcome = tuple[dict[str, Any], list[str]]
WEIGHTS, STEPS, ARTIFACT = "train.safetensors", "steps.npz", "model.ssq"
EVALUATED, ADAPTED, SCORE_LOG = "evaluate.npz", "ttt.npz", "ttt_scores.npz"
PROGRESS = "train_progress.json"
SET_UP_S = 120.0  # a scoring pass may take so long to set itself up; after that it reports every batch
TRAIN_COUNTS = "train_counts.npz"  # how often each token occurs in the training shards; written before the stages


def compute_dtype(dist: Dist) -> torch.dtype:
    """Return the activations' type: bf16 on CUDA, float32 on a CPU, where bf16 is many times slower."""
    return torch.bfloat16 if dist.device.type == "cuda" else torch.float32


def build_model(config: ModelConfig, dist: Dist, *, embedding_dtype: str = "float32", attention: str = "auto") -> GPT:
    """Return an unfilled model on the rank's device, its embedding stored in embedding_dtype."""
    model = GPT(config, compute_dtype=compute_dtype(dist), attention_backend=attention).to(dist.device)
    model.tok_emb.weight.data = model.tok_emb.weight.data.to(getattr(torch, embedding_dtype))
    return model


def open_training(run: Run, ledger: Ledger) -> SpanLoader:
    """Return the loader over the training shards."""
    config = run.config
    return SpanLoader(
        list_shards(config.data.train, field="data.train"),
        micro_batch_tokens=config.train.micro_batch_tokens,
        span_group=config.train.span_group,
        vocab_size=config.model.vocab_size,
        on_open=ledger.opened,
    )


def open_validation(run: Run, ledger: Ledger) -> tuple[Tokenizer, ValidationSet]:
    """Return the tokenizer and the validation stream."""
    data = run.config.data
    ledger.opened(Path(data.tokenizer))
    tokenizer = load_tokenizer(Path(data.tokenizer), vocab_size=run.config.model.vocab_size)
    validation = load_validation(
        list_shards(data.val, field="data.val"),
        vocab_size=run.config.model.vocab_size,
        val_documents=data.val_documents,
        val_tokens=data.val_tokens,
        on_open=ledger.opened,
    )
    return tokenizer, validation


def run_train(run: Run, ledger: Ledger) -> Outcome:
    """Train from the seed's initial weights, or from the newest checkpoint."""
    config = run.config
    with ledger.span("load"), run.long_call():
        loader = open_training(run, ledger)
        model = build_model(
            config.model, run.dist, embedding_dtype=config.train.embedding_dtype, attention=config.runtime.attention
        )
        model.init_weights(config.seed)
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger)
        choice = settle_attention(run, model)
        warm_up(model, run)
    store = CheckpointStore(run.checkpoints, run.on_write) if run.uses_checkpoints else None
    trainer = Trainer(
        model,
        loader,
        config.train,
        run.dist,
        remember_progress(run),
        # "auto" goes on with the checkpoint's kernel, unless the change of kernels was allowed
        runtime=replace(config.runtime, attention=model.attention_backend) if run.is_changed else config.runtime,
        checkpoints=store,
        ledger=ledger,
        reached=read_progress(run),
        should_stop=run.should_stop,
        long_call=run.long_call,
    )
    with ledger.span("steps"):
        result = trainer.run()
    if run.dist.is_main:
        live = {f"live/{name}": p.detach() for name, p in model.named_parameters()}
        with run.long_call():
            save_tensors(run.workdir / WEIGHTS, live | {f"ema/{name}": value for name, value in result.ema.items()})
            run.write(STEPS, result.steps)
    result.metrics["warmup_s"] = ledger.seconds("warm_up")
    result.metrics["num_params"] = sum(p.numel() for p in model.parameters())
    result.metrics["attention_backend"] = attention_backend_name(run, model)
    if choice is not None:
        result.metrics["attention_probe"] = choice._asdict()
    return result.metrics, [WEIGHTS, STEPS]


def settle_attention(run: Run, model: GPT) -> Choice | None:
    """Let model attend with the kernel of an earlier attempt, else the one configured or timed; note it in run.json.

    Returns how it was timed, None where it was not.
    """
    known = ATTENTION_BACKENDS.index(run.attention) if run.attention is not None else -1
    known = int(run.dist.broadcast_floats([float(known)])[0])
    choice = choose_attention(run) if known < 0 else None
    if known >= 0:
        model.attention_backend = ATTENTION_BACKENDS[known]
    elif choice is not None:
        model.attention_backend = choice.name
    if run.dist.is_main:
        note_attention(run, attention_backend_name(run, model))
    return choice


def remember_progress(run: Run) -> Report:
    """Return run.report, which also notes the step reached, so that a later attempt knows what a fault cost."""

    def report(phase: str, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        if run.dist.is_main:
            note = {"step": step, "lost_steps": metrics["lost_steps"]}
            with replace_file(run.workdir / PROGRESS, is_synced=False) as file:
                file.write(json.dumps(note).encode())
        run.report(phase, step, total, metrics)

    return report


def read_progress(run: Run) -> Reached:
    """Return how far an earlier attempt said that it came."""
    try:
        note = json.loads((run.workdir / PROGRESS).read_text())
        return Reached(int(note["step"]), int(note["lost_steps"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a torn progress note only loses a statistic
        return NOTHING_REACHED


def attention_backend_name(run: Run, model: GPT) -> str:
    """Return the attention kernel that this model uses on packed rows."""
    probe = torch.empty(1, 1, 1, run.config.model.head_dim, dtype=model.compute_dtype, device=run.dist.device)
    return resolve_backend(model.attention_backend, probe, is_packed=True)


def load_weights(run: Run, ledger: Ledger, kind: str) -> dict[str, Tensor]:
    """Return the "live" or "ema" weights that training left, on the rank's device."""
    ledger.opened(run.workdir / WEIGHTS)
    tensors = load_tensors(run.workdir / WEIGHTS)
    prefix = f"{kind}/"
    return {k.removeprefix(prefix): v.to(run.dist.device) for k, v in tensors.items() if k.startswith(prefix)}


def load_model(run: Run, weights: dict[str, Tensor]) -> GPT:
    """Return a frozen model that holds weights, on the rank's device; the embedding in its training type."""
    model = build_model(
        run.config.model,
        run.dist,
        embedding_dtype=run.config.train.embedding_dtype,
        attention=run.config.runtime.attention,
    )
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def run_quantize(run: Run, ledger: Ledger) -> Outcome:
    """Calibrate on training text, round the averaged weights by GPTQ and write the artifact."""
    config, dist = run.config, run.dist
    if config.quant.num_calibration_batches < dist.world_size:
        raise ValueError(
            f"quant.num_calibration_batches={config.quant.num_calibration_batches} must be at least the number of "
            f"ranks, {dist.world_size}"
        )
    with ledger.span("load"), run.long_call():
        weights = load_weights(run, ledger, "ema")
        model = load_model(run, weights)
        loader = open_training(run, ledger)
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger, "quantize")
    with ledger.span("hessians"):
        hessians = collect_hessians(model, loader, config.quant, dist, run.report, seed=config.seed)
    metrics: dict[str, Any] = {}
    if dist.is_main:
        with run.long_call():
            metrics = _round_and_save(run, ledger, weights, hessians)
    compress_s, rounding_s = ledger.seconds("compress"), ledger.seconds("round")
    metrics |= {
        "quantize_attention_backend": attention_backend_name(run, model),
        "hessian_s": ledger.seconds("hessians"),
        "solve_s": rounding_s - compress_s,
        "compress_s": compress_s,
        "quantize_s": rounding_s
        + sum(ledger.seconds(name) for name in ("load", "warm_up", "hessians", "program", "reload")),
    }
    return metrics, [ARTIFACT, READABLE_NAME, PACKED_NAME]


def _round_and_save(
    run: Run, ledger: Ledger, weights: dict[str, Tensor], hessians: dict[str, Tensor]
) -> dict[str, Any]:
    """Quantize, write the artifact, read it back, and return the size metrics (rank 0)."""
    config, path = run.config, run.workdir / ARTIFACT
    with ledger.span("program"):
        program = code_program(config)
        program.write(run.workdir)
    meta = artifact_meta(run)

    def write(state: QuantizedState) -> int:
        with ledger.span("compress"), run.long_call():
            save_artifact(path, state, config.model, meta, codec=config.quant.codec)
        return path.stat().st_size + program.num_bytes

    with ledger.span("round"):  # what it writes on the way included
        if config.quant.on_oversize == "fit":
            fitted = fit_to_limit(weights, hessians, config.quant, write)
            state, sigmas = fitted.state, fitted.matrix_clip_sigmas
        else:
            state, sigmas = quantize_state(weights, hessians, config.quant), config.quant.matrix_clip_sigmas
        total = write(state)
    with ledger.span("reload"):
        loaded = dequantize(load_artifact(path)[1])
        for name, value in dequantize(state).items():
            if not torch.equal(loaded[name].cpu(), value.cpu()):
                raise ValueError(f"artifact {path} does not reload: {name} differs")
    limit = config.quant.size_limit_bytes
    if total > limit and config.quant.on_oversize == "fail":
        raise ValueError(
            f"artifact of seed {config.seed} has {total} bytes with code, over quant.size_limit_bytes={limit}; "
            "set quant.on_oversize to 'fit' or 'mark', or raise quant.matrix_clip_sigmas"
        )
    return {
        "model_bytes": path.stat().st_size,
        "code_bytes": program.num_bytes,
        "code_bytes_readable": program.readable_bytes,
        "code_bytes_convention": CONVENTION,
        "artifact_bytes": total,
        "size_limit_bytes": limit,
        "within_limit": total <= limit,
        "matrix_clip_sigmas": sigmas,
    }


def artifact_meta(run: Run) -> dict[str, Any]:
    """Return what an artifact says beside its model: where it comes from, and all that scoring it again needs."""
    return {
        "seed": run.config.seed,
        "world_size": run.dist.world_size,
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **run.hashes,
    }


def load_quantized(run: Run, ledger: Ledger) -> dict[str, Tensor]:
    """Return the weights that the artifact holds. Raises ValueError if it is another model's."""
    path = run.workdir / ARTIFACT
    ledger.opened(path)
    config, state = load_artifact(path)
    if config != run.config.model:
        raise ValueError(f"artifact {path} holds a model of another shape than the configuration's; quantize again")
    return dequantize(state)


def run_evaluate(run: Run, ledger: Ledger) -> Outcome:
    """Score live, averaged and quantized weights on the same rows of the validation stream."""
    config, dist = run.config, run.dist
    with ledger.span("load"), run.long_call():
        tokenizer, validation = open_validation(run, ledger)
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger, "evaluate")
    metrics: dict[str, Any] = {}
    scores: DocumentScores | None = None
    scorer: RowScorer | None = None  # one for all three: what it records reads the weights where they are
    for prefix in ("live", "post_ema", "pre_ttt"):
        with ledger.span("load"), run.long_call():
            if prefix == "pre_ttt":
                weights = load_quantized(run, ledger)
            else:
                weights = load_weights(run, ledger, "live" if prefix == "live" else "ema")
            if scorer is None:
                scorer = RowScorer(load_model(run, weights))
            else:
                scorer.model.load_state_dict(weights)
        with ledger.span(prefix), run.long_call(SET_UP_S):
            scores = evaluate_plain(
                scorer.model, validation, tokenizer.byte_table, config.evaluation, dist, run.report, scorer=scorer
            )
        metrics |= scores.metrics(prefix)
        run.report("evaluate", 0, None, {f"{prefix}_bpb": scores.bpb})
    assert scores is not None
    assert scorer is not None
    metrics["evaluate_attention_backend"] = attention_backend_name(run, scorer.model)
    metrics["evaluate_s"] = sum(ledger.seconds(name) for name in ("load", "warm_up", "live", "post_ema", "pre_ttt"))
    with ledger.span("identify"), run.long_call():
        metrics |= describe_validation(tokenizer, validation, dist)
        if dist.is_main:
            metrics["order0_bpb"] = order0_bpb(read_counts(run, ledger), validation, tokenizer.byte_table)
    if dist.is_main:
        run.write(EVALUATED, document_arrays(scores, nats_plain=scores.nats))
    return metrics, [EVALUATED]


def read_counts(run: Run, ledger: Ledger) -> np.ndarray:
    """Return how often each token occurs in the training shards, (V,) int64, as counted when they were hashed."""
    ledger.opened(run.workdir / TRAIN_COUNTS)
    with np.load(run.workdir / TRAIN_COUNTS, allow_pickle=False) as arrays:
        return arrays["count"]


def describe_validation(tokenizer: Tokenizer, validation: ValidationSet, dist: Dist) -> dict[str, Any]:
    """Return what the validation text is: a hash over its decoded documents, their number and bytes.

    Every rank decodes its share of the documents.
    """
    starts = validation.document_starts
    ends, mine = np.append(starts[1:], validation.tokens.size), np.array_split(np.arange(starts.size), dist.world_size)
    digests, sizes = [], []
    for index in mine[dist.rank]:
        text = tokenizer.decode(validation.tokens[starts[index] : ends[index]]).encode()
        digests.append(hashlib.sha256(text).digest())
        sizes.append([len(text)])
    words = np.frombuffer(bytearray(b"".join(digests)), dtype=np.int64).reshape(-1, 4)  # to be written to by gloo
    digest = hashlib.sha256(dist.gather_rows(words).tobytes())
    num_bytes = int(dist.gather_rows(np.array(sizes, dtype=np.int64).reshape(-1, 1)).sum())
    return {
        "val_documents_hash": digest.hexdigest(),
        "val_documents": validation.num_documents,
        "val_bytes": num_bytes,
        "tokenizer_hash": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
    }


def run_ttt(run: Run, ledger: Ledger) -> Outcome:
    """Score every document on its own, first with the base weights, then adapting as it goes."""
    config, dist = run.config, run.dist
    with ledger.span("load"), run.long_call():
        tokenizer, validation = open_validation(run, ledger)
        model = load_model(run, load_quantized(run, ledger))
    with ledger.span("warm_up"), run.long_call():
        compile_kernels(run, ledger, "ttt")
    results = {}
    for prefix in ("ttt_lr0", "post_ttt"):
        with ledger.span(prefix), run.long_call(SET_UP_S):
            results[prefix] = score_documents(
                model,
                validation,
                tokenizer.byte_table,
                config.ttt,
                dist,
                run.report,
                seed=config.seed,
                is_adapting=prefix == "post_ttt",
            )
        run.report("ttt", 0, None, {f"{prefix}_bpb": results[prefix].scores.bpb})
    plain, adapted = results["ttt_lr0"], results["post_ttt"]
    metrics: dict[str, Any] = plain.scores.metrics("ttt_lr0") | adapted.scores.metrics("post_ttt")
    metrics["ttt_s"] = sum(ledger.seconds(name) for name in ("load", "warm_up", "ttt_lr0", "post_ttt"))
    metrics["ttt_attention_backend"] = attention_backend_name(run, model)
    with run.long_call():
        events = gather_events(adapted.events, dist)
        if dist.is_main:
            counts = times_scored(events, validation.document_starts, validation.num_targets)
            metrics |= {
                "score_chain": events.chain,
                "num_targets": validation.num_targets,
                "targets_scored_once": int((counts == 1).sum()),
            }
            run.write(ADAPTED, document_arrays(plain.scores, nats_lr0=plain.scores.nats, nats_ttt=adapted.scores.nats))
            run.write(SCORE_LOG, {**events.arrays(), "nll": adapted.nll.astype(np.float32)})
    return metrics, [ADAPTED, SCORE_LOG]


def gather_events(events: Events, dist: Dist) -> Events:
    """Return the ledgers of all ranks, joined in rank order."""
    heads = dist.gather_rows(np.ascontiguousarray(events.heads).view(np.int64))
    loss_sum = dist.gather_rows(events.loss_sum.view(np.int64)[:, None])[:, 0]
    return Events(dist.gather_rows(events.rows), loss_sum.view(np.float64), heads.view(np.uint8))


def document_arrays(scores: DocumentScores, **nats: np.ndarray) -> dict[str, np.ndarray]:
    """Return the per-document columns of one or more passes over the same targets."""
    return {"index": np.arange(scores.tokens.size), "tokens": scores.tokens, "bytes": scores.bytes, **nats}
