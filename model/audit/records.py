"""Probes of what a run left behind: score ledger, exactly-once count, read separation, size and timing."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.audit.finished_run import RunFiles
from model.audit.verdicts import FAIL, PASS, Result, judge, not_run
from model.bundle.program import PACKED_NAME, READABLE_NAME
from model.config import SIZE_LIMIT_BYTES, TIME_LIMIT_S, TTTConfig
from model.data.shards import find_documents, open_shard
from model.data.validation import ValidationSet
from model.files.atomic import file_sha256
from model.files.ledger import covered_s
from model.ttt.ledger_reading import broken_chains, choose_events, times_scored
from model.ttt.score_ledger import SCORE, Events

TIMED_GPUS = 8
SUM_TOLERANCE = 1e-6  # relative; sums of the same float32 losses in another order
BEFORE_SCORING = ("prepare", "train", "quantize")
# kinds of files that a run reads
VALIDATION, TRAINING, TOKENIZER = "validation text", "a training shard", "the tokenizer"
OWN, FOREIGN = "the run's own", "neither data of this run nor its own"
# spans that have a figure of their own, which counts where it is the larger one: a resumed training has been timed in
# pieces, and the pieces may be lost
STATED_S = {"steps": "train_s", "hessians": "hessian_s", "sensitivity": "sensitivity_s", "post_ttt": "post_ttt_s"}
HASH_PHASE = "hash"  # of stage prepare: files are read whole to name and check them, nothing else sees them


def probe_score_ledger(files: RunFiles) -> Result:
    """Check the chain, the order of scores and updates in each document, and that the ledger gives the score."""
    events = files.events
    faults = [f"the chain of rank {rank} does not lead to its stored end" for rank in broken_chains(events)]
    faults += [f"document {d}: {what}" for d, what in find_misordered(events, files.config.ttt)]
    stated = files.metrics.get("score_chain")
    if stated != events.chain:
        faults.append(f"the stage record names chain {str(stated)[:12]}, the ledger's is {events.chain[:12]}")
    total, nats = float(events.loss_sum.sum()), float(files.metrics["post_ttt_nats"])
    sums = {
        "the record": nats,
        "the rows": float(files.adapted["nats_ttt"].sum()),
        "all targets": float(files.nll.sum(dtype=np.float64)),
    }
    faults += [
        f"the ledger's losses add up to {total:.6f} nats, {name} to {value:.6f}"
        for name, value in sums.items()
        if not abs(total - value) <= SUM_TOLERANCE * max(1.0, abs(value))
    ]
    faults += find_unexplained_losses(events, files)
    return Result(
        probe="score_ledger", rule="C3", result=FAIL if faults else PASS, measured=len(faults), limit=0, unit="faults",
        sample_size=len(events.rows), sample_of="events", detail=faults[0] if faults else f"chain {events.chain[:16]}",
        not_checked="whether the process that wrote the ledger told the truth: adapter_states and poisoned_update do",
    )  # fmt: skip


def find_misordered(events: Events, config: TTTConfig) -> Iterator[tuple[int, str]]:
    """Yield (document, fault) for every document whose events are not score, its updates, next score, ..."""
    place: dict[int, tuple[int, int, int]] = {}  # next first prediction, updates so far, updates since the score
    last: dict[int, tuple[int, int]] = {}
    for _, kind, document, first, end, num_updates in events.rows.tolist():
        begin, done, since = place.get(document, (0, 0, config.updates_per_chunk))
        if kind == SCORE:
            is_sound = first == begin and end > first and num_updates == done and since == config.updates_per_chunk
            place[document], last[document] = (end, done, 0), (first, end)
        else:
            is_sound = last.get(document) == (first, end) and num_updates == done and since < config.updates_per_chunk
            place[document] = (begin, done + 1, since + 1)
        if not is_sound:
            word = "score" if kind == SCORE else "update"
            yield document, f"a {word} of [{first}, {end}) after {num_updates} updates is out of turn"


def find_unexplained_losses(events: Events, files: RunFiles) -> list[str]:
    """Return a line if some event's loss sum is not that of the stored losses of its targets."""
    scores = choose_events(events, SCORE)
    starts = np.cumsum(np.concatenate(([0], files.adapted["tokens"])))[:-1]  # targets lie document after document
    begin = starts[scores.column("document")] + scores.column("first_prediction")
    stop = starts[scores.column("document")] + scores.column("end_prediction")
    totals = np.concatenate(([0.0], np.cumsum(files.nll, dtype=np.float64)))
    if stop.size and stop.max() >= totals.size:
        return ["an event names targets that have no loss"]
    gap = np.abs(totals[stop] - totals[begin] - scores.loss_sum)
    allowed = SUM_TOLERANCE * np.maximum(1.0, scores.loss_sum) + 1e-12 * abs(totals[-1])
    wrong = np.flatnonzero(~(gap <= allowed))
    if not wrong.size:
        return []
    document = int(scores.column("document")[wrong[0]])
    return [f"{wrong.size} events state a loss that their targets do not have, first in document {document}"]


def probe_exactly_once(files: RunFiles, validation: ValidationSet) -> Result:
    """Count how often each validation target was scored: once, every one of them, plain and adapted alike."""
    counts = times_scored(files.events, validation.document_starts, validation.num_targets)
    wrong = int((counts != 1).sum())
    detail = f"{int((counts == 0).sum())} missed, {int((counts > 1).sum())} scored again"
    for name in ("pre_ttt_tokens", "ttt_lr0_tokens", "post_ttt_tokens"):
        if files.metrics[name] != validation.num_targets and files.config.evaluation.tail == "scored":
            wrong += abs(int(files.metrics[name]) - validation.num_targets)
            detail += f"; {name} is {files.metrics[name]}"
    return judge(
        "exactly_once", "C4", measured=wrong, limit=0, unit="targets not scored exactly once",
        sample_size=validation.num_targets, sample_of="validation targets (all)", detail=detail,
        not_checked="plain evaluation keeps no ledger: its number of targets is compared, and reload scores it again",
    )  # fmt: skip


def probe_separation(files: RunFiles, validation_shards: Iterable[Path]) -> Result:
    """Look at every data file that any stage read: training shards first, validation text after, nothing foreign ever.

    To name files by their contents, stage prepare reads them whole; that phase alone is left out.
    """
    faults: list[str] = []
    num_reads = 0
    places = {place for path in validation_shards for place in (os.path.abspath(path), str(path.resolve()))}
    for stage, ledger in files.ledgers.items():
        for read in ledger["reads"]:
            num_reads += 1
            if (stage, read["phase"]) == ("prepare", HASH_PHASE):
                continue
            kind = kind_of(read, files, places)
            allowed = (OWN, TRAINING) if stage in BEFORE_SCORING else (OWN, VALIDATION, TOKENIZER)
            if kind not in allowed:
                seen = "declared" if read["declared"] else "undeclared, seen by the interpreter's audit hook"
                faults.append(
                    f"{kind}: {read['file']} opened in {stage}, phase {read['phase']}, rank {read['rank']} ({seen})"
                )
    return judge(
        "separation", "R4", measured=len(faults), limit=0, unit="reads", sample_size=num_reads,
        sample_of="reads of all ranks in all stages", detail=faults[0] if faults else "training shards are read by "
        "train and quantize only, validation shards by evaluate and ttt only; prepare hashes both and counts tokens; "
        "warm-up runs on synthetic tokens",
        not_checked="files opened by C++ or Rust code without a word to the ledger; text copied into another file "
        "before the run (overlap looks for it in the training shards)",
    )  # fmt: skip


def kind_of(read: Mapping[str, Any], files: RunFiles, validation: set[str]) -> str:
    """Return what a file that was read is, by its contents and by its place; validation: places of those shards."""
    data, found = files.run["data"], read_hash(read)
    if read["path"] in validation or found in set(data["val"].values()):
        return VALIDATION
    if read["path"] in {os.path.abspath(path) for path in files.train_shards} or found in set(data["train"].values()):
        return TRAINING
    if found == data["tokenizer"]:
        return TOKENIZER
    folders = Path(read["path"]).parts
    # a stage that was taken over from another run of the sweep tells of that one's folder
    own = {files.workdir.name, *(record.get("reused_from") for record in files.records.values())}
    is_own = any(name in own for name in folders) or "site-packages" in folders or "dist-packages" in folders
    return OWN if is_own else FOREIGN


def read_hash(read: Mapping[str, Any]) -> str:
    """Return the sha256 of a file that was read: as noted, else as it is now; nothing where it is gone."""
    if "sha256" in read:
        return str(read["sha256"])
    path = Path(read["path"])
    return file_sha256(path) if path.is_file() else ""


def probe_overlap(files: RunFiles, validation: ValidationSet) -> Result:
    """Hash every validation document and look for it among the documents of all training shards."""
    ours = {document_hash(validation.tokens[a:b]) for a, b in own_ranges(validation)}
    num_train, found = 0, Counter[str]()
    for path in files.train_shards:
        tokens = open_shard(path)
        starts = find_documents(tokens)
        for start, end in zip(starts, np.append(starts[1:], tokens.size), strict=True):
            num_train += 1
            if document_hash(tokens[start:end]) in ours:
                found[path.name] += 1
    return judge(
        "overlap", "R4", measured=sum(found.values()), limit=0, unit="training documents that are validation documents",
        sample_size=num_train, sample_of=f"training documents, against {len(ours)} validation documents (all)",
        detail="; ".join(f"{name}: {count}" for name, count in found.items()),
        not_checked="documents that are alike but not equal; a document that a shard's end or the validation cut short",
    )  # fmt: skip


def own_ranges(validation: ValidationSet) -> list[tuple[int, int]]:
    """Return each document's [first, end) without the next one's BOS, a lone BOS left out."""
    ends = np.append(validation.document_starts[1:], validation.tokens.size)
    return [(int(a), int(b)) for a, b in zip(validation.document_starts, ends, strict=True) if b - a > 1]


def document_hash(tokens: np.ndarray) -> bytes:
    """Return 16 bytes that name a document's tokens."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, dtype="<u2").tobytes(), digest_size=16).digest()


def probe_size(files: RunFiles) -> Result:
    """Add model and code bytes as they are on disk, the code counted as committed and as the loader counts it."""
    sizes = {"model_bytes": files.artifact, "code_bytes": files.workdir / PACKED_NAME,
             "code_bytes_readable": files.workdir / READABLE_NAME}  # fmt: skip
    missing = [path.name for path in sizes.values() if not path.is_file()]
    if missing:
        return not_run("size", "R1", f"{', '.join(missing)} is not in the run directory: nothing to weigh")
    found = {name: path.stat().st_size for name, path in sizes.items()}
    model_bytes = found["model_bytes"]
    totals = {
        "as counted": model_bytes + found["code_bytes"],
        "as committed": model_bytes + found["code_bytes_readable"],
    }
    detail = "; ".join(f"code {name}: {total:,} in all" for name, total in totals.items()) + f"; model {model_bytes:,}"
    wrong = [name for name, size in found.items() if size != files.metrics[name]]
    if wrong:
        detail += f"; the record says {wrong[0]} {files.metrics[wrong[0]]:,}, the file has {found[wrong[0]]:,}"
    measured = max(totals.values())
    return Result(
        probe="size", rule="R1", result=FAIL if wrong or measured > SIZE_LIMIT_BYTES else PASS, measured=measured,
        limit=SIZE_LIMIT_BYTES, unit="bytes, the larger of both conventions", sample_size=2, sample_of="conventions",
        detail=detail, not_checked="libraries that are installed beside the code",
    )  # fmt: skip


def probe_timing(files: RunFiles) -> Result:
    """Add up the timing ledger's spans against the limits of 600 s for training and 600 s for evaluation."""
    # everything that reads training data; "fit" measures on it what each group's rounding costs
    train = {"train": ("load", "steps"), "quantize": ("load", "hessians", "sensitivity")}
    score = {"ttt": ("load", "post_ttt")}
    totals = {"training": longest(files, train), "evaluation": longest(files, score)}
    warm_up = {
        "training": longest(files, {"train": ("warm_up",), "quantize": ("warm_up",)}),
        "evaluation": longest(files, {"ttt": ("warm_up",)}),
    }
    detail = "; ".join(
        f"{name} {total:.1f} s, without compile {total - sum_compilation(name, files):.1f} s, with warm-up "
        f"{total + warm_up[name]:.1f} s"
        for name, total in totals.items()
    )
    measured = round(max(totals.values()), 3)
    facts: dict[str, Any] = {
        "limit": TIME_LIMIT_S, "unit": "s, the longer of training and evaluation", "sample_size": 2,
        "sample_of": "totals over the slowest rank's spans, attempts before a resume included",
        "not_checked": "time between the stages; the diagnostic passes (live, post_ema, pre_ttt, learning rate 0)",
    }  # fmt: skip
    device, world_size = str(files.run.get("device", "cpu")), int(files.run["world_size"])
    if device == "cpu" or world_size != TIMED_GPUS:
        why = f"the limits are for {TIMED_GPUS} GPUs; this run had {world_size} x {device}"
        return not_run("timing", "R2/R3", f"{why}: {detail}", measured=measured, **facts)
    return judge("timing", "R2/R3", measured=measured, detail=detail, **facts)


def longest(files: RunFiles, phases: Mapping[str, tuple[str, ...]]) -> float:
    """Return the seconds of the given phases by stage, of the rank for which they took longest.

    Attempts before a resume count up to the checkpoint that was resumed from. Where a stage states more seconds for a
    phase than its spans show, those it states count.
    """
    total = 0.0
    for stage, names in phases.items():
        ledger, metrics = files.ledgers[stage], files.records[stage]["metrics"]
        earlier = [span for attempt in ledger.get("earlier", []) for span in attempt["spans"]]
        total += longest_rank(ledger["spans"], names) + longest_rank(earlier, names)
        for name in STATED_S.keys() & set(names):
            shown = longest_rank(ledger["spans"], (name,)) + longest_rank(earlier, (name,))
            total += max(0.0, float(metrics.get(STATED_S[name], 0.0)) - shown)
    return total


def longest_rank(spans: Iterable[Mapping[str, Any]], names: tuple[str, ...]) -> float:
    """Return the seconds of the named spans, of the rank for which they took longest."""
    by_rank: Counter[int] = Counter()
    for span in spans:
        if span["name"] in names:
            by_rank[int(span.get("rank", 0))] += span["end_s"] - span["start_s"]
    return max(by_rank.values(), default=0.0)


def sum_compilation(name: str, files: RunFiles) -> float:
    """Return the seconds of compilation that fell into the counted phases; warm-up does not count."""
    stages = {"training": ("train", "quantize"), "evaluation": ("ttt",)}[name]
    total = 0.0
    for stage in stages:
        spans = [span for span in files.ledgers[stage]["spans"] if span.get("rank", 0) == 0]
        warm = [(span["start_s"], span["end_s"]) for span in spans if span["name"] == "warm_up"]
        total += covered_s(
            span
            for span in spans
            if span["name"] == "compile" and not any(a <= span["start_s"] and span["end_s"] <= b for a, b in warm)
        )
    return total
