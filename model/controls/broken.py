"""The list of negative controls: each breaks the micro run in one way and shows it to the probes that must object."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.audit.audit import Audit
from model.audit.byte_table import probe_bytes
from model.audit.causality import (
    probe_across_documents,
    probe_causality,
    probe_chunk_borders,
    probe_independence,
    probe_ttt_causality,
)
from model.audit.configuration import probe_configuration
from model.audit.dependence import probe_dependencies
from model.audit.distribution import probe_gold_swap, probe_normalization
from model.audit.files import probe_records
from model.audit.finished_run import RunFiles, load_run
from model.audit.forward import probe_target_gate, probe_two_forwards
from model.audit.records import (
    TIMED_GPUS,
    probe_exactly_once,
    probe_overlap,
    probe_score_ledger,
    probe_separation,
    probe_size,
    probe_timing,
)
from model.audit.reload import Fresh, judge_network, judge_scores, run_fresh
from model.audit.updates import probe_adapter_states, probe_frozen_updates, probe_order, probe_poisoned_update
from model.audit.verdicts import Result
from model.bundle.program import PACKED_NAME, READABLE_NAME
from model.config import SIZE_LIMIT_BYTES, config_hash
from model.controls.systems import (
    Gated,
    GatelessGPT,
    GoldPeekingGPT,
    HintedLongestFirst,
    HonestUpdateFirst,
    LongestFirst,
    NeighborGPT,
    Rescoring,
    Skipping,
    SmearingGPT,
    StaleSlots,
    UngatedHeadsGPT,
    UnnormalizedGPT,
    UnpackedGPT,
    UpdateFirst,
    alter,
    count_fallback_as_three,
    count_spaces_twice,
    leaking_mask,
    rebuild,
    record_events,
)
from model.corpus.shard_file import write_shard
from model.data.loader import SpanLoader
from model.data.shards import open_shard
from model.data.tokenizer import ByteTable
from model.files.checkpoint import write_json
from model.files.ledger import Ledger, join_ledgers
from model.quant.calibrate import draw_windows
from model.score.bpb import document_sums


class Control(NamedTuple):
    """One way to break a run. run yields the results of every probe that must fail."""

    name: str
    broken: str
    run: Callable[[Audit], Iterator[Result]]


def leak_through_mask(audit: Audit) -> Iterator[Result]:
    """The causal mask is off by one."""
    with leaking_mask():
        system = alter(audit.system)
        yield probe_causality(system)
        yield probe_chunk_borders(system)
        yield probe_ttt_causality(system)


def leak_through_batch(audit: Audit) -> Iterator[Result]:
    """Rows of a batch are mixed."""
    yield probe_across_documents(rebuild(audit.system, NeighborGPT))


def leak_through_row(audit: Audit) -> Iterator[Result]:
    """Documents of a packed row see each other."""
    yield probe_across_documents(rebuild(audit.system, UnpackedGPT))


def smear_across_documents(audit: Audit) -> Iterator[Result]:
    """The gate that adds the token before does so at a document's start."""
    yield probe_across_documents(rebuild(audit.system, SmearingGPT))


def unnormalized_head(audit: Audit) -> Iterator[Result]:
    """Probabilities add up to more than 1."""
    yield probe_normalization(rebuild(audit.system, UnnormalizedGPT))


def gold_peeking_head(audit: Audit) -> Iterator[Result]:
    """The distribution knows the token it is asked about."""
    yield probe_gold_swap(rebuild(audit.system, GoldPeekingGPT))


def update_before_score(audit: Audit) -> Iterator[Result]:
    """A chunk is learned from before it is scored; the ledger denies it."""
    system = alter(audit.system, pass_type=UpdateFirst)
    yield probe_adapter_states(system)
    yield probe_poisoned_update(system)
    yield probe_frozen_updates(system)


def update_before_score_in_ledger(audit: Audit) -> Iterator[Result]:
    """A chunk is learned from before it is scored; the ledger shows it."""
    events, nll = record_events(audit.system, HonestUpdateFirst)
    yield probe_score_ledger(replace_scores(audit.files, events=events, nll=nll))


def rescored_chunk(audit: Audit) -> Iterator[Result]:
    """A chunk is scored again after the update."""
    events, nll = record_events(audit.system, Rescoring)
    files = replace_scores(audit.files, events=events, nll=nll)
    yield probe_exactly_once(files, audit.validation)
    yield probe_score_ledger(files)


def skipped_document(audit: Audit) -> Iterator[Result]:
    """A document is left out."""
    events, nll = record_events(audit.system, Skipping)
    yield probe_exactly_once(replace_scores(audit.files, events=events, nll=nll), audit.validation)


def altered_ledger(audit: Audit) -> Iterator[Result]:
    """A loss in the ledger is made smaller afterwards."""
    events = audit.files.events
    loss_sum = events.loss_sum.copy()
    loss_sum[0] *= 0.999
    yield probe_score_ledger(replace(audit.files, events=events._replace(loss_sum=loss_sum)))


def stale_adapters(audit: Audit) -> Iterator[Result]:
    """A document starts with the adapters of the one before."""
    system = alter(audit.system, slots_type=StaleSlots)
    yield probe_independence(system)
    yield probe_adapter_states(alter(system, sample=6))
    yield probe_order(system, audit.files.events, audit.files.nll)


def shared_longest_first(audit: Audit) -> Iterator[Result]:
    """Documents are adapted longest first in a state that they share."""
    yield probe_dependencies(alter(audit.system, pass_type=LongestFirst, slots_type=StaleSlots))


def hints_against_order(audit: Audit) -> Iterator[Result]:
    """Hints come from the stream's prefix, updates from the longest documents first."""
    yield probe_dependencies(alter(audit.system, pass_type=HintedLongestFirst, slots_type=StaleSlots))


def gate_on_target(audit: Audit) -> Iterator[Result]:
    """A score is mixed with another one where the realized token has been seen."""
    yield probe_target_gate(alter(audit.system, pass_type=Gated))


def second_forward(audit: Audit) -> Iterator[Result]:
    """The forward for adaptation lacks a gate."""
    yield probe_two_forwards(rebuild(audit.system, GatelessGPT))


def ungated_heads(audit: Audit) -> Iterator[Result]:
    """The forward for adaptation lacks the gates of the attention heads."""
    yield probe_two_forwards(rebuild(audit.system, UngatedHeadsGPT))


def double_counted_space(audit: Audit) -> Iterator[Result]:
    """A leading space counts twice."""
    yield probe_bytes_under(audit, count_spaces_twice(audit.tokenizer.byte_table))


def fallback_as_three(audit: Audit) -> Iterator[Result]:
    """A byte piece counts 3 bytes."""
    table = audit.tokenizer.byte_table
    byte_ids = [i for i in range(audit.tokenizer.vocab_size) if table.base_bytes[i] == 1 and i < 4 + 256]
    yield probe_bytes_under(audit, count_fallback_as_three(table, byte_ids))


def probe_bytes_under(audit: Audit, table: ByteTable) -> Result:
    """Return the byte probe of a run that counted by this table throughout."""
    validation, nll = audit.validation, audit.files.nll
    sums = document_sums(validation, table, nll, num_scored=validation.num_targets, seconds=0.0)
    return probe_bytes(audit.tokenizer, table, validation, sums.bytes.tolist())


def validation_in_warm_up(audit: Audit) -> Iterator[Result]:
    """Warm-up reads validation tokens and tells nobody."""
    ledger = Ledger("train")
    with ledger.listening(), ledger.span("warm_up"):
        open_shard(audit.validation_shards[0])[:64].sum()
    yield probe_separation(add_reads(audit.files, ledger), audit.validation_shards)


def training_in_evaluation(audit: Audit) -> Iterator[Result]:
    """Evaluation looks into a training shard and tells nobody."""
    ledger = Ledger("evaluate")
    with ledger.listening(), ledger.span("identify"):
        open_shard(audit.files.train_shards[0])[:64].sum()
    yield probe_separation(add_reads(audit.files, ledger), audit.validation_shards)


def calibration_on_validation(audit: Audit) -> Iterator[Result]:
    """Hessians are taken over validation text."""
    config, ledger = audit.files.config, Ledger("quantize")
    with ledger.span("hessians"):
        loader = SpanLoader(
            audit.validation_shards, micro_batch_tokens=64, span_group=1, vocab_size=config.model.vocab_size,
            on_open=ledger.opened,
        )  # fmt: skip
        draw_windows(loader, config.quant, seed=config.seed, batch=0)
    yield probe_separation(add_reads(audit.files, ledger), audit.validation_shards)


def validation_in_training(audit: Audit) -> Iterator[Result]:
    """A validation document is among the training documents."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-control-") as name:
        shard = Path(name) / "mixed_train_000000.bin"
        write_shard(shard, np.concatenate([open_shard(audit.files.train_shards[0]), audit.validation.document(1)]))
        yield probe_overlap(replace(audit.files, train_shards=[shard]), audit.validation)


def two_configurations(audit: Audit) -> Iterator[Result]:
    """A second seed ran under another learning rate, and nobody announced it."""
    config = replace(audit.files.config, seed=8, ttt=replace(audit.files.config.ttt, lr=0.02))
    with tempfile.TemporaryDirectory(prefix="seedsweep-control-") as name:
        other = Path(name) / "seed=8-repeat=0"
        run = {**audit.files.run, "seed": 8, "config_hash": config_hash(config, world_size=1)}
        write_json(other / "run.json", run)
        yield probe_configuration(audit.out, [audit.files.workdir, other])


def oversized(audit: Audit) -> Iterator[Result]:
    """The readable code takes the total over the limit."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-control-") as name:
        for source in (audit.files.artifact.name, PACKED_NAME, READABLE_NAME):
            (Path(name) / source).symlink_to(audit.files.workdir / source)
        readable = Path(name) / READABLE_NAME
        readable.unlink()
        with readable.open("wb") as file:
            file.truncate(SIZE_LIMIT_BYTES)  # no data: a file that is all hole
        records = copy.deepcopy(dict(audit.files.records))
        records["quantize"]["metrics"]["code_bytes_readable"] = SIZE_LIMIT_BYTES
        yield probe_size(replace(audit.files, workdir=Path(name), records=records))


def too_slow(audit: Audit) -> Iterator[Result]:
    """Steps and Hessians took 601 s together on 8 GPUs."""
    ledgers = dict(audit.files.ledgers)
    for stage, name, seconds in (("train", "steps", 589.0), ("quantize", "hessians", 12.0)):
        spans = [{"name": name, "rank": rank, "start_s": 0.0, "end_s": seconds} for rank in range(TIMED_GPUS)]
        ledgers[stage] = {**ledgers[stage], "spans": spans}
    run = {**audit.files.run, "device": "NVIDIA H100 80GB HBM3", "world_size": TIMED_GPUS}
    yield probe_timing(replace(audit.files, run=run, ledgers=ledgers))


def untimed_attempt(audit: Audit) -> Iterator[Result]:
    """A resumed training took 601 s, of which the ledger shows the last attempt's steps only."""
    records = copy.deepcopy(dict(audit.files.records))
    records["train"]["metrics"]["train_s"] = 601.0
    run = {**audit.files.run, "device": "NVIDIA H100 80GB HBM3", "world_size": TIMED_GPUS}
    yield probe_timing(replace(audit.files, run=run, records=records))


def needs_training_data(audit: Audit) -> Iterator[Result]:
    """The program looks into a training shard when it scores."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-control-") as name:
        program = Path(name) / "train_gpt.py"
        shard = audit.files.train_shards[0]
        program.write_text(f"open({str(shard)!r}, 'rb').read(4)\n" + (audit.files.workdir / READABLE_NAME).read_text())
        fresh = run_fresh(program, audit.files, audit.validation_shards, Path(audit.files.config.data.tokenizer))
        yield judge_scores(audit.files, fresh)


def other_score(audit: Audit) -> Iterator[Result]:
    """The fresh process scores 0.0001 bpb worse than the run says."""
    metrics = audit.files.metrics
    scores = {**metrics, "post_ttt_bpb": metrics["post_ttt_bpb"] + 1e-4}
    yield judge_scores(audit.files, Fresh({"exit": 0, "refused": []}, scores, "", ""))


def altered_file(audit: Audit) -> Iterator[Result]:
    """A document's score is changed in the rows, and the record is left as it was."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-control-") as name:
        workdir = Path(shutil.copytree(audit.files.workdir, Path(name) / "run"))
        arrays = {**audit.files.adapted, "nats_ttt": audit.files.adapted["nats_ttt"] * (1 - 1e-6)}
        np.savez(workdir / "ttt.npz", allow_pickle=False, **arrays)
        yield probe_records(load_run(workdir))


def open_network(audit: Audit) -> Iterator[Result]:
    """The fresh process has a network interface."""
    yield judge_network(Fresh({"interfaces": ["lo", "eth0"]}, audit.files.metrics, "", ""))


def replace_scores(files: RunFiles, **scores: Any) -> RunFiles:
    """Return the run with another score ledger."""
    return replace(files, **scores)


def add_reads(files: RunFiles, ledger: Ledger) -> RunFiles:
    """Return the run with the reads of a ledger added to those of its stage."""
    stage = ledger.stage
    joined = join_ledgers([{"stage": stage, "spans": [], "reads": files.ledgers[stage]["reads"]}, ledger.as_json()], {})
    return replace(files, ledgers={**files.ledgers, stage: joined})


CONTROLS: Sequence[Control] = (
    Control("leak_through_mask", "the causal mask lets each token see the next one", leak_through_mask),
    Control("leak_through_batch", "hidden states of neighbors in the batch are mixed in", leak_through_batch),
    Control("leak_through_row", "documents of a packed row see each other", leak_through_row),
    Control("smear_across_documents", "a document's first token takes from the one before it", smear_across_documents),
    Control("unnormalized_head", "0.05 of probability is added for a repeated token", unnormalized_head),
    Control("gold_peeking_head", "the realized token's logit is raised by 0.05", gold_peeking_head),
    Control("update_before_score", "a chunk is learned from first, and the ledger denies it", update_before_score),
    Control(
        "update_in_ledger", "a chunk is learned from first, and the ledger shows it", update_before_score_in_ledger
    ),
    Control("rescored_chunk", "every chunk is scored again after its update", rescored_chunk),
    Control("skipped_document", "one document is never scored", skipped_document),
    Control("altered_ledger", "one loss of the ledger is made 0.1 % smaller afterwards", altered_ledger),
    Control("stale_adapters", "a document starts with the adapters of the one before", stale_adapters),
    Control("shared_longest_first", "documents adapt one state, the longest first", shared_longest_first),
    Control("hints_against_order", "that, with hints from the documents before in the stream", hints_against_order),
    Control("gate_on_target", "mixed with a second score where the realized token was seen before", gate_on_target),
    Control("second_forward", "adaptation's forward lacks the gates of the skip connections", second_forward),
    Control("ungated_heads", "adaptation's forward lacks the gates of the attention heads", ungated_heads),
    Control("double_counted_space", "a leading space is counted twice", double_counted_space),
    Control("fallback_as_three", "a byte piece counts as 3 bytes", fallback_as_three),
    Control("validation_in_warm_up", "warm-up reads a validation shard undeclared", validation_in_warm_up),
    Control("training_in_evaluation", "evaluation reads a training shard undeclared", training_in_evaluation),
    Control("calibration_on_validation", "Hessians are taken over validation text", calibration_on_validation),
    Control("validation_in_training", "a validation document is in a training shard", validation_in_training),
    Control("two_configurations", "a second, unannounced seed has another learning rate", two_configurations),
    Control("oversized", "model and readable code exceed 16,000,000 bytes", oversized),
    Control("too_slow", "steps and Hessians take 601 s on 8 GPUs", too_slow),
    Control("untimed_attempt", "a resumed training shows the spans of its last attempt only", untimed_attempt),
    Control("needs_training_data", "the program opens a training shard when it scores", needs_training_data),
    Control("other_score", "the fresh process scores 0.0001 bpb worse than the run says", other_score),
    Control("altered_file", "the document rows are made 0.0001 % better", altered_file),
    Control("open_network", "the fresh process has a network interface", open_network),
)
