"""What a report shows of one run directory: rows, curves, documents by length, and where its figures contradict."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from results.findings.findings import Finding
from results.schema import FINISHED
from results.stats import bits_per_byte, paired_documents
from results.store.announced import announced_price, rows_of_variant
from results.store.reader import latest_attempts, read_attempt, read_runs
from results.tables import SeedTable, add_spent, table_of_rows

if TYPE_CHECKING:
    from results.stats import Difference

RELATIVE_TOLERANCE = 1e-9  # sums of float64 in another order
LENGTH_EDGES = (1, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 1 << 30)
DOCUMENT_NATS = {"nats_plain": "pre_ttt", "nats_lr0": "ttt_lr0", "nats_ttt": "post_ttt"}


class LengthBin(NamedTuple):
    """Documents of one range of lengths (tokens), all seeds together: the two parts of the TTT gain, bpb."""

    low: int
    high: int
    num_documents: int
    context: Difference | None
    adaptation: Difference | None


class System(NamedTuple):
    """One run directory, read."""

    name: str
    out: str
    table: SeedTable
    runs: pd.DataFrame
    steps: dict[int, pd.DataFrame]
    bins: list[LengthBin]
    disagreements: list[str]


def read_system(out: str, variant: str | None = None) -> System:
    """Read everything a report needs of one run directory, or of one variant of it.

    Raises FileNotFoundError or ValueError as the seed table does.
    """
    rows = latest_attempts(add_spent(read_runs(out), announced_price(out)))
    if not rows.frame.empty:
        rows = rows_of_variant(rows, out, variant, fix=f"name one, such as {out}#")
    table = table_of_rows(rows, shown=out)
    finished = rows.frame[rows.frame["state"] == FINISHED].sort_values(["seed", "repeat"]).drop_duplicates("seed")
    steps = _read_steps(out, finished)
    documents, problems = _read_documents(out, finished)
    contradictions = [line for _, run in finished.iterrows() for line in contradictions_of(run, documents)]
    return System(
        name=str(table.identity["sweep"] or Path(out).name) + (f" {variant}" if variant is not None else ""),
        out=out,
        table=table,
        runs=finished.reset_index(drop=True),
        steps=steps,
        bins=length_bins(documents),
        disagreements=[
            *find_mixtures(rows.frame[rows.frame["state"] == FINISHED]),
            *contradictions,
            *problems,
            *_imported(out),
        ],
    )


def contradictions_of(run: pd.Series, documents: dict[int, pd.DataFrame]) -> list[str]:
    """Return where one row's figures do not follow from each other or from its document rows."""
    lines = []
    seed = f"seed {run['seed']}"
    parts = run["model_bytes"] + run["code_bytes"]
    if math.isfinite(parts) and run["artifact_bytes"] != parts:
        lines.append(f"{seed}: artifact_bytes {run['artifact_bytes']:.0f}, but model + code is {parts:.0f}")
    for stage in ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt"):
        nats, size, bpb = (run[f"{stage}_{name}"] for name in ("nats", "bytes", "bpb"))
        if math.isfinite(nats) and size > 0 and not _is_same(bits_per_byte(nats, size), bpb):
            lines.append(f"{seed}: {stage}_bpb {bpb:.8f}, but its nats and bytes give {bits_per_byte(nats, size):.8f}")
    frame = documents.get(run["seed"])
    for column, stage in DOCUMENT_NATS.items():
        if frame is not None and frame[column].notna().all() and len(frame) and math.isfinite(run[f"{stage}_nats"]):
            total = float(frame[column].sum())
            if not _is_same(total, run[f"{stage}_nats"]):
                row = run[f"{stage}_nats"]
                lines.append(f"{seed}: {stage}_nats {row:.6f}, but its document rows sum to {total:.6f}")
    return lines


def length_bins(documents: dict[int, pd.DataFrame]) -> list[LengthBin]:
    """Return the context and adaptation effects by document length, seeds pooled, intervals over documents."""
    whole = [frame for frame in documents.values() if not frame[list(DOCUMENT_NATS)].isna().any().any()]
    if not whole:
        return []
    grouped = pd.concat(whole).groupby("index").sum()
    lengths = grouped["tokens"] / len(whole)
    bins = []
    for low, high in itertools.pairwise(LENGTH_EDGES):
        part = grouped[(lengths >= low) & (lengths < high) & (grouped["bytes"] > 0)]
        if part.empty:
            continue
        weights = part["bytes"].to_numpy() * math.log(2)
        context = paired_documents(part["nats_lr0"], part["nats_plain"], weights)
        adaptation = paired_documents(part["nats_ttt"], part["nats_lr0"], weights)
        bins.append(LengthBin(low, high, len(part), context, adaptation))
    return bins


def _is_same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE)


def _read_steps(out: str, runs: pd.DataFrame) -> dict[int, pd.DataFrame]:
    columns = ["step", "loss", "lr_factor", "is_looped"]
    frames = {int(run["seed"]): read_attempt(out, "steps", run, columns) for _, run in runs.iterrows()}
    return {seed: frame.sort_values("step") for seed, frame in frames.items() if len(frame)}


def _read_documents(out: str, runs: pd.DataFrame) -> tuple[dict[int, pd.DataFrame], list[str]]:
    """Return document rows by seed, and a line for every seed whose documents are not those of the others."""
    columns = ["index", "tokens", "bytes", *DOCUMENT_NATS]
    frames = {int(run["seed"]): read_attempt(out, "documents", run, columns) for _, run in runs.iterrows()}
    frames = {seed: frame for seed, frame in frames.items() if len(frame)}
    kept: dict[int, pd.DataFrame] = {}
    problems = []
    for seed, frame in frames.items():
        first = next(iter(kept.values()), frame)
        if len(first) != len(frame) or not np.array_equal(first["bytes"], frame["bytes"]):
            problems.append(f"seed {seed}: its documents differ from the other seeds' (number or bytes)")
        else:
            kept[seed] = frame
    return kept, problems


def find_mixtures(done: pd.DataFrame) -> list[str]:
    """Return the hashes that differ between finished seeds."""
    names = ("config_hash", "data_hash", "code_hash", "val_documents_hash", "git_commit")
    return [f"{name} differs between seeds: not one configuration" for name in names if done[name].nunique() > 1]


def _imported(out: str) -> list[str]:
    """Return the disagreements that an import found; none for runs of our own."""
    path = Path(out) / "record.json"
    if "://" in out or not path.is_file():
        return []
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return [str(Finding(**entry)) for entry in content["disagreements"]]
