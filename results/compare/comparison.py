"""Comparing two sides: difference, interval, one-sided p against 0 and a margin, over seeds or documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from results.compare.power import minimum_detectable_gain
from results.compare.sides import Side, has_same_tokenizer
from results.stats import Difference, bits_per_byte, paired, paired_documents, summarize, welch
from results.store.reader import read_attempt
from results.validation_text import why_not_comparable

if TYPE_CHECKING:
    import pandas as pd

RECORD_MARGIN_NATS = 0.005  # what a new record must gain, per token
ALPHA = 0.01
DOCUMENT_COLUMNS = {"pre_ttt": "nats_plain", "ttt_lr0": "nats_lr0", "post_ttt": "nats_ttt"}


class Comparison(NamedTuple):
    """Side a against side b (negative differences: a is better), with everything that must be said about it.

    margins: nats per token -> one-sided p of "a is better by more than this", None without spread. The margin is
    turned into bpb where nats cannot be compared; unit says which of the two was tested.
    """

    a: Side
    b: Side
    method: str
    unit: str
    bpb: Difference
    nats: Difference | None
    margins: dict[float, float | None]
    nats_per_bpb: float | None
    equivalence: tuple[float, float | None] | None
    forced: list[str]
    notes: list[str]

    @property
    def tested(self) -> Difference:
        """The difference that the p values are about."""
        return self.nats if self.unit == "nats" and self.nats is not None else self.bpb


def compare(
    a: Side,
    b: Side,
    *,
    margin_nats: float | None = None,
    pairing: str | None = None,
    band_nats: float | None = None,
    is_forced: bool = False,
) -> Comparison:
    """Compare two sides; without margin_nats both 0 and the record margin are tested.

    pairing: "none" (Welch over seeds), "seeds" or "documents"; None: by seeds between variants of one sweep that share
    two seeds, as the sweep's table does, else none. band_nats asks for the equivalence test as well.
    Raises ValueError when the sides are not comparable, unless is_forced.
    """
    for name, value in (("margin-nats", margin_nats), ("equivalence-nats", band_nats)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value} must be a finite number, not negative")
    forced = _reasons_against(a, b)
    if forced and not is_forced:
        raise ValueError(f"not compared: {'; '.join(forced)} (--force compares anyway and labels every line)")
    notes = [f"{side.name}: {note}" for side in (a, b) for note in side.notes]
    if a.stage != b.stage:
        notes.append(f"the sides are scored on different stages: {a.stage} and {b.stage}")
    is_same = has_same_tokenizer(a, b) and bool(a.nats_per_token) and bool(b.nats_per_token)
    if not is_same:
        notes.append("mixed or unknown tokenizers: nats per token do not compare, so bits per byte only")
    bpb, nats, method = _differences(a, b, pairing, is_same, notes)
    ratio = b.bytes_per_token if b.bytes_per_token is not None else a.bytes_per_token
    to_bpb = None if ratio is None else bits_per_byte(1.0, ratio)
    tested, scale = (nats, 1.0) if nats is not None else (bpb, to_bpb)
    if nats is None and to_bpb is not None:
        notes.append(f"margins in nats are those of {b.name}'s tokenizer: 0.005 nats = {0.005 * to_bpb:.5f} bpb")
    if nats is None and to_bpb is None:
        notes.append("no bytes per token are known, so a margin in nats cannot be turned into bpb: only 0 is tested")
    margins = [0.0, RECORD_MARGIN_NATS] if margin_nats is None else [margin_nats]
    tests = {nats_: tested.p_better(nats_ * scale) for nats_ in margins if scale is not None} or {
        0.0: tested.p_better()
    }
    equivalence = None
    if band_nats is not None and scale is not None:
        equivalence = (band_nats, tested.p_equivalent(band_nats * scale))
    return Comparison(
        a, b, method, "bpb" if nats is None else "nats", bpb, nats, tests, to_bpb, equivalence, forced, notes
    )


def _reasons_against(a: Side, b: Side) -> list[str]:
    """Return why the sides should not be compared."""
    reasons = [f"{side.name}: {mixture}" for side in (a, b) for mixture in side.mixtures]
    text = why_not_comparable(a.text, b.text)
    return [*reasons, *([text] if text else [])]


def _differences(
    a: Side, b: Side, pairing: str | None, is_same_tokenizer: bool, notes: list[str]
) -> tuple[Difference, Difference | None, str]:
    """Return the differences in bpb and, for one tokenizer, in nats per token, and how they were tested."""
    if (
        pairing is None
        and a.out is not None
        and a.out == b.out
        and a.name != b.name
        and len(set(a.bpb) & set(b.bpb)) > 1
    ):
        pairing = "seeds"
    if pairing == "documents":
        return _document_differences(a, b, is_same_tokenizer, notes)
    if pairing == "seeds":
        shared = _shared_seeds(a, b, notes)
        bpb = paired([a.bpb[seed] for seed in shared], [b.bpb[seed] for seed in shared])
        nats = None
        if is_same_tokenizer:
            nats = paired([a.nats_per_token[seed] for seed in shared], [b.nats_per_token[seed] for seed in shared])
        return bpb, nats, f"paired t over {len(shared)} seeds"
    nats = welch(list(a.nats_per_token.values()), list(b.nats_per_token.values())) if is_same_tokenizer else None
    return welch(list(a.bpb.values()), list(b.bpb.values())), nats, "Welch t over seeds, one-sided"


def _shared_seeds(a: Side, b: Side, notes: list[str]) -> list[int]:
    shared = sorted(seed for seed in set(a.bpb) & set(b.bpb) if seed is not None)  # None: logs that name no seed
    if not shared:
        raise ValueError(f"--paired needs seeds that both sides have; {a.name} and {b.name} share none")
    alone = sorted(set(a.bpb) ^ set(b.bpb), key=str)
    if alone:
        notes.append(f"seeds on one side only are left out: {', '.join(map(str, alone))}")
    return shared


def _document_differences(
    a: Side, b: Side, is_same_tokenizer: bool, notes: list[str]
) -> tuple[Difference, Difference | None, str]:
    """Return the differences over documents, summed over the seeds that both sides have."""
    for side in (a, b):
        if side.out is None:
            raise ValueError(f"--paired documents needs per-document rows; {side.name} has none (use --paired seeds)")
        if side.stage not in DOCUMENT_COLUMNS:
            raise ValueError(f"--paired documents: stage {side.stage} has no per-document rows")
    shared = _shared_seeds(a, b, notes)
    if len(shared) == 1:
        notes.append("one seed: the interval is over documents only and says nothing about other seeds")
    else:
        notes.append("the interval is over documents, for these artifacts; it does not contain the spread over seeds")
    nats = [np.zeros(0), np.zeros(0)]
    sizes = np.zeros(0)
    tokens = np.zeros(0)
    for seed in shared:
        frames = [_documents(side, seed) for side in (a, b)]
        if not np.array_equal(frames[0]["index"], frames[1]["index"]):
            raise ValueError(f"seed={seed}: the two sides scored different documents; use --paired seeds")
        for i, frame in enumerate(frames):
            nats[i] = frame["nats"].to_numpy() + (nats[i] if nats[i].size else 0)
        sizes = frames[0]["bytes"].to_numpy() + (sizes if sizes.size else 0)
        tokens = frames[0]["tokens"].to_numpy() + (tokens if tokens.size else 0)
    if not np.array_equal(frames[0]["bytes"], frames[1]["bytes"]):
        notes.append("the sides count other bytes for some documents; those of the first side are used")
    bpb = paired_documents(nats[0], nats[1], sizes * math.log(2))
    per_token = paired_documents(nats[0], nats[1], tokens) if is_same_tokenizer else None
    return bpb, per_token, f"paired over {sizes.size:,} documents ({len(shared)} seeds summed)"


def _documents(side: Side, seed: int) -> pd.DataFrame:
    """Return index, bytes, tokens and nats of one seed's documents, the first repeat of it."""
    assert side.runs is not None, f"{side.name} is a run directory"
    run = side.runs[side.runs["seed"] == seed].sort_values("repeat").iloc[0]
    column = DOCUMENT_COLUMNS[side.stage]
    frame = read_attempt(side.out, "documents", run, ["index", "bytes", "tokens", column])
    if frame[column].isna().any():
        raise ValueError(f"{side.name} seed={seed}: {column} is missing or not a number for some documents")
    return frame.sort_values("index").rename(columns={column: "nats"})


def pooled_std(result: Comparison) -> float | None:
    """Return the std over seeds in the tested unit, pooled over both sides."""
    sides = [side.nats_per_token if result.unit == "nats" else side.bpb for side in (result.a, result.b)]
    return pooled_std_of([list(values.values()) for values in sides])


def pooled_std_of(sides: Sequence[Sequence[float]]) -> float | None:
    """Return the sample std inside the sides, pooled; None where no side has two values."""
    summaries = [summarize(values) for values in sides]
    freedom = sum(entry.n - 1 for entry in summaries)
    squares = sum((entry.n - 1) * (entry.std_ddof1 or 0.0) ** 2 for entry in summaries)
    return math.sqrt(squares / freedom) if freedom > 0 else None


def smallest_gain(result: Comparison) -> float | None:
    """Return the true gain (tested unit) that as many seeds would show with the usual power; Welch only."""
    std, counts = pooled_std(result), (len(result.a.bpb), len(result.b.bpb))
    if not std or min(counts) < 2 or not result.method.startswith("Welch"):
        return None
    return minimum_detectable_gain(std=std, n_a=counts[0], n_b=counts[1], alpha=ALPHA)
