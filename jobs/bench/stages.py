"""Speed of what follows training: quantization with the artifact, plain evaluation, test-time training.

First passes run in a process whose kernel cache is empty, so that they include every compilation; the passes after
them do not compile. Only the stages' own functions are timed.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from jobs.bench.figures import Probe
from jobs.bench.inputs import (
    Workplace,
    build_bench_model,
    byte_table,
    describe_model,
    made_up_tokens,
    note_compilation,
    open_validation,
    open_workplace,
    timed_s,
)
from model.data.loader import SpanLoader
from model.data.shards import BOS_ID
from model.data.tokenizer import ByteTable
from model.data.validation import ValidationSet
from model.files.ledger import Ledger
from model.gpt import GPT
from model.pipeline.compile_clock import COMPILE
from model.pipeline.inputs import open_training
from model.pipeline.memory import peak_memory_bytes
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.stage_quantize import device_coding
from model.quant.artifact import ArtifactSizes, load_artifact, pack_artifact, read_artifact_info, save_artifact
from model.quant.calibrate import collect_hessians
from model.quant.compression import compress
from model.quant.quantized import QuantizedState, dequantize
from model.quant.state import StateQuantizer, configured_clips, looped_layers
from model.score.plain import RowScorer, evaluate_plain
from model.ttt.documents import TTTResult, score_documents
from model.ttt.ledger_reading import choose_events
from model.ttt.score_ledger import SCORE
from model.ttt.windows import chunk_length

NUM_GPTQ_PASSES = 2
NUM_EVAL_PASSES = 5  # after the first
NUM_STEP_SAMPLES = 3
# chunks behind the first full window in the shorter and the longer of two timed passes
STEP_CHUNKS = {"cuda": (9, 25), "cpu": (1, 3)}
SAMPLE_SEED = 42


def measure_gptq(request: dict[str, Any], probe: Probe) -> None:
    """Time calibration, solving, compression and reload, twice in one process: kernels new, then compiled."""
    work = open_workplace(request, probe)
    loader = open_training(work.run, work.ledger)
    model = build_bench_model(work).requires_grad_(False)
    describe_model(work, model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(NUM_GPTQ_PASSES):
        model.load_state_dict(weights)
        state, sizes = _quantize_once(work, "first pass" if number == 0 else "second pass", model, weights, loader)
    probe.add("model bytes", "bytes", [sizes.total_bytes])
    if request["process"] == 0:
        _compare_with_brotli(work, state, sizes.total_bytes)
    probe.add("peak memory", "GiB", [peak_memory_bytes(work.device) / 2**30])


def _quantize_once(
    work: Workplace, label: str, model: GPT, weights: dict[str, Tensor], loader: SpanLoader
) -> tuple[QuantizedState, ArtifactSizes]:
    """Add the seconds of each part; model holds the weights before, and those of the artifact afterwards."""
    run, probe, quant = work.run, work.probe, work.config.quant
    path = run.workdir / "model.ssq"

    def calibrate() -> dict[str, Tensor]:
        compile_kernels(run, work.ledger, "quantize")
        return collect_hessians(model, loader, quant, run.dist, probe.report, seed=run.config.seed)

    def solve() -> QuantizedState:
        quantizer = StateQuantizer(weights, hessians, quant, looped=looped_layers(run.config.model))
        return quantizer.quantize(configured_clips(quant))

    def reload() -> None:
        model.load_state_dict(dequantize(load_artifact(path)[1]))

    hessian_s, hessians = timed_s(work.device, calibrate)
    solve_s, state = timed_s(work.device, solve)
    save = partial(save_artifact, path, state, run.config.model, {}, codec=quant.codec)
    with device_coding(work.device):  # as the stage does
        compress_s, sizes = timed_s(work.device, save)
        reload_s, _ = timed_s(work.device, reload)
    seconds = {"Hessians": hessian_s, "solve": solve_s, "compress": compress_s, "reload": reload_s}
    for name, value in seconds.items():
        probe.add(f"{label}: {name}", "s", [value])
    probe.add(f"{label}: all four", "s", [sum(seconds.values())])
    return state, sizes


def _compare_with_brotli(work: Workplace, state: QuantizedState, num_bytes: int) -> None:
    """Add the bytes of an artifact whose codes are one brotli-11 stream, and ours over them."""
    work.probe.report("one brotli-11 stream, for comparison", 0, None, {})
    path = work.run.workdir / "brotli.ssq"
    path.write_bytes(pack_artifact(state, work.config.model, {}, codec="brotli"))
    sizes = read_artifact_info(path).sizes
    codes = b"".join(weight.codes.cpu().contiguous().numpy().tobytes() for weight in state.matrices.values())
    single = sizes.total_bytes - sizes.codes_bytes + len(compress(codes))
    work.probe.add("model bytes with one brotli-11 stream", "bytes", [single])
    work.probe.add("more bytes than one brotli-11 stream", "%", [100 * (num_bytes / single - 1)], wanted="at most 0.1")


def measure_eval(request: dict[str, Any], probe: Probe) -> None:
    """Time plain evaluation: the first pass with everything it compiles, then passes without."""
    work = open_workplace(request, probe)
    validation, table = open_validation(work), byte_table(work)
    model = build_bench_model(work).requires_grad_(False)
    describe_model(work, model)

    scorer, config = RowScorer(model), work.config.evaluation

    def evaluate() -> Any:
        compile_kernels(work.run, work.ledger, "evaluate")
        return evaluate_plain(model, validation, table, config, work.run.dist, probe.report, scorer=scorer)

    with note_compilation(work, work.ledger):
        first_s, scores = timed_s(work.device, evaluate)
    probe.add("first pass, compilation included", "s", [first_s])
    probe.add("compilation in it", "s", [work.ledger.seconds(COMPILE)])
    later = [timed_s(work.device, evaluate)[0] for _ in range(NUM_EVAL_PASSES)]
    probe.add("later pass", "s", later)
    probe.add("later pass: rate", "tokens/s", [validation.num_targets / seconds for seconds in later])
    probe.add("targets", "tokens", [validation.num_targets])
    probe.add("score", "bpb", [scores.bpb])
    probe.add("peak memory", "GiB", [peak_memory_bytes(work.device) / 2**30])


def measure_ttt(request: dict[str, Any], probe: Probe) -> None:
    """Time test-time training: every document cold, a sample of documents after that, and one step of full windows."""
    work = open_workplace(request, probe)
    validation, table = open_validation(work), byte_table(work)
    model = build_bench_model(work)
    describe_model(work, model)
    with note_compilation(work, work.ledger):
        _add_pass(work, "all documents, cold", model, validation, table)
    probe.add("all documents, cold: compilation in it", "s", [work.ledger.seconds(COMPILE)])
    sample = sample_documents(validation, request["documents"])
    again = Ledger("sample")
    with note_compilation(work, again):
        _add_pass(work, "sample of documents", model, validation_of(validation, sample), table)
    probe.add("sample of documents: compilation in it", "s", [again.seconds(COMPILE)], wanted="0")
    probe.note(f"the sample is sorted(random.Random({SAMPLE_SEED}).sample(range(n), k)), n documents in stream order")
    probe.note("every pass builds its adapter slots anew, and on a GPU records its graphs anew: both are in its time")
    _measure_step(work, model, table)
    probe.add("peak memory", "GiB", [peak_memory_bytes(work.device) / 2**30])


def _adapt(work: Workplace, model: GPT, validation: ValidationSet, table: ByteTable) -> TTTResult:
    """Score and adapt every document of validation."""
    config, run = work.config, work.run
    compile_kernels(run, work.ledger, "ttt")
    return score_documents(model, validation, table, config.ttt, run.dist, run.report, seed=config.seed)


def _add_pass(work: Workplace, label: str, model: GPT, validation: ValidationSet, table: ByteTable) -> None:
    """Add seconds, useful window tokens a second, and what was scored."""
    seconds, result = timed_s(work.device, lambda: _adapt(work, model, validation, table))
    useful = window_tokens(result, work.config.ttt.window_tokens)
    work.probe.add(label, "s", [seconds])
    work.probe.add(f"{label}: useful window tokens", "tokens/s", [useful / seconds])
    work.probe.add(f"{label}: useful window tokens in all", "tokens", [useful])
    work.probe.add(f"{label}: documents", "", [(result.scores.tokens > 0).sum()])
    work.probe.add(f"{label}: targets", "tokens", [validation.num_targets])
    work.probe.add(f"{label}: score", "bpb", [result.scores.bpb])


def window_tokens(result: TTTResult, longest: int) -> int:
    """Return the tokens that the scored windows read, padding and repeats for further updates left out."""
    ends = choose_events(result.events, SCORE).column("end_prediction")
    return int(np.minimum(ends, longest).sum())


def sample_documents(validation: ValidationSet, count: int) -> list[int]:
    """Return the documents that the published code was timed on: a sorted sample, the same everywhere."""
    scored = int((np.diff(validation.document_ranges, axis=1)[:, 0] > 1).sum())  # a lone last BOS is none
    return sorted(random.Random(SAMPLE_SEED).sample(range(scored), min(count, scored)))


def validation_of(validation: ValidationSet, documents: list[int]) -> ValidationSet:
    """Return a stream of these documents only, each with the targets that it has in the whole stream."""
    parts = [validation.document(index) for index in documents]
    starts = np.array([part.size - 1 for part in parts]).cumsum()
    last = validation.num_documents - 1
    if documents[-1] == last:  # the stream's last document ends without another's BOS
        stream = np.concatenate([part[:-1] for part in parts[:-1]] + [parts[-1]])
        return ValidationSet(stream, np.concatenate(([0], starts[:-1])))
    stream = np.concatenate([part[:-1] for part in parts] + [parts[-1][-1:]])
    return ValidationSet(stream, np.concatenate(([0], starts)))


def _measure_step(work: Workplace, model: GPT, table: ByteTable) -> None:
    """Add one step of as many full windows as there are slots: forward, backward, update and bookkeeping.

    Two passes over equally long documents differ by a known number of such steps, whatever the engine does besides.
    """
    config, device = work.config.ttt, work.device
    chunks = STEP_CHUNKS[device.type]
    passes = [full_documents(work, count) for count in chunks]
    for validation in passes:
        _adapt(work, model, validation, table)
    sizes = [int(each.document_ranges[0][1]) - 1 for each in passes]  # predictions of each document
    fewer, more = (-(-n // chunk_length(n, config)) for n in sizes)
    num_steps = (more - fewer) * config.updates_per_chunk
    samples = []
    for _ in range(NUM_STEP_SAMPLES):
        shorter, longer = (timed_s(device, partial(_adapt, work, model, each, table))[0] for each in passes)
        samples.append(1000 * (longer - shorter) / num_steps)
    label = f"one step of {config.batch_documents} windows of {config.window_tokens}"
    work.probe.add(label, "ms", samples)
    work.probe.note(f"one step is the difference of two passes that differ by {num_steps} steps, over {num_steps}")


def full_documents(work: Workplace, num_chunks: int) -> ValidationSet:
    """Return made-up documents, one a slot, that end num_chunks chunks behind their first full window."""
    config = work.config.ttt
    length = config.window_tokens + num_chunks * config.chunk_tokens  # predictions of each
    tokens = made_up_tokens(config.batch_documents * length + 1, work.config.model.vocab_size, seed=2)
    tokens[tokens == BOS_ID] = BOS_ID + 1
    starts = np.arange(config.batch_documents + 1) * length
    tokens[starts] = BOS_ID
    return ValidationSet(tokens, starts)
