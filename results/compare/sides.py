"""What a comparison compares: a run directory, a published record or a submission folder, as scores by seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from results.published.records import (
    Record,
    find_record,
    one_run_a_seed,
    read_imported_record,
    recompute,
    record_number,
    text_bytes,
)
from results.schema import FINISHED, SCORES
from results.stats import bits_per_byte
from results.store.announced import rows_of_variant
from results.store.reader import latest_attempts, read_runs
from results.validation_text import Text

if TYPE_CHECKING:
    import pandas as pd

SAME_TOKENIZER_FRAC = 3e-4  # evaluators of one log differ by 7e-5 in bytes per token
COLUMNS = (
    "code_changed", "config_hash", "data_hash", "code_hash", "tokenizer_hash", "val_documents_hash", "val_bytes",
    "steps", "train_s",
    *(f"{name}_{figure}" for name in SCORES for figure in ("bpb", "nats_per_token", "tokens", "bytes", "s")),
)  # fmt: skip
HASHES = ("config_hash", "data_hash", "code_hash")


class Pace(NamedTuple):
    """How far and how long one seed went: steps, seconds of training and of the scoring pass; None: unknown."""

    steps: float | None
    train_s: float | None
    score_s: float | None


class Side(NamedTuple):
    """One side of a comparison: one score and pace a seed, and what must be known before it may be compared."""

    name: str
    stage: str
    bpb: dict[int, float]
    nats_per_token: dict[int, float]
    bytes_per_token: float | None
    tokenizer_hash: str | None
    text: Text
    notes: list[str]
    mixtures: list[str]
    pace: dict[int, Pace]
    out: str | None = None
    runs: pd.DataFrame | None = None


def open_side(spec: str, stage: str | None = None, seeds: list[int] | None = None) -> Side:
    """Return a side from "pr:N", a run directory (path or URI, `#V` for one of its variants), or a folder with logs.

    stage: a scoring pass of results.schema.SCORES; without it the last one that every seed has. seeds: only these.
    Raises ValueError or FileNotFoundError in one line for anything else.
    """
    if stage is not None and stage not in SCORES:
        raise ValueError(f"stage={stage} must be one of {', '.join(SCORES)}")
    if spec.lower().startswith("pr:"):
        return _only_seeds(side_of_record(find_record(spec), stage), seeds)
    spec, variant = split_variant(spec)
    folder = Path(spec)
    record = None if "://" in spec else read_imported_record(folder)
    if record is not None:  # as the folder it was imported from: logs round the size of their text differently
        return _only_seeds(side_of_record(record, stage), seeds)
    has_results = any((folder / name).is_dir() for name in ("results/runs", "runs"))
    if variant is not None and (record is not None or not (has_results or "://" in spec)):
        raise ValueError(f"{spec}#{variant}: no results here; only a run directory has variants")
    if "://" not in spec and folder.is_dir() and not has_results:
        from results.findings.importer import read_submission

        return _only_seeds(side_of_record(read_submission(folder).record, stage), seeds)
    return _only_seeds(side_of_runs(spec, stage, variant), seeds)


def split_variant(spec: str) -> tuple[str, str | None]:
    """Return the run directory and the variant that DIR#V names; None where it names none, or DIR#V is a folder."""
    out, mark, variant = spec.rpartition("#")
    return (out, variant) if mark and not Path(spec).is_dir() else (spec, None)


def side_of_runs(out: str, stage: str | None = None, variant: str | None = None) -> Side:
    """Return the side of a run directory, or of one of its variants: its finished seeds, repeats of a seed averaged."""
    rows = latest_attempts(read_runs(out, COLUMNS))
    if not rows.frame.empty:
        rows = rows_of_variant(rows, out, variant, fix=f"name one, such as {out}#")
    name = out if variant is None else f"{out}#{variant}"
    finished = rows.frame[rows.frame["state"] == FINISHED] if not rows.frame.empty else rows.frame
    if finished.empty:
        raise ValueError(f"{name}: no finished seed to compare{f' ({rows.problems[0]})' if rows.problems else ''}")
    chosen = stage or next((name for name in reversed(SCORES) if finished[f"{name}_bpb"].notna().all()), "post_ttt")
    scored = finished[finished[f"{chosen}_bpb"].map(math.isfinite)]
    if scored.empty:
        raise ValueError(f"{name}: no finished seed has {chosen}_bpb")
    notes = [*rows.notes, *rows.problems]
    left_out = sorted(set(rows.frame["seed"]) - set(scored["seed"]))
    if left_out:
        notes.append(f"left out, not finished or without {chosen}_bpb: seeds {', '.join(map(str, left_out))}")
    if scored["code_changed"].eq(True).any():
        notes.append("some seeds were continued under other code (code_changed)")
    ratio = (scored[f"{chosen}_bytes"] / scored[f"{chosen}_tokens"]).dropna()
    return Side(
        name=name,
        stage=chosen,
        bpb=_by_seed(scored, f"{chosen}_bpb"),
        nats_per_token=_by_seed(scored, f"{chosen}_nats_per_token"),
        bytes_per_token=float(ratio.iloc[0]) if len(ratio) else _ratio_of_scores(scored, chosen),
        tokenizer_hash=_only(scored["tokenizer_hash"]),
        text=_text_of_runs(scored, chosen),
        notes=notes,
        mixtures=[_mixture(scored, name) for name in HASHES if scored[name].nunique() > 1],
        pace=_pace_of_runs(scored, chosen),
        out=str(out),
        runs=scored,
    )


def side_of_record(record: Record, stage: str | None = None) -> Side:
    """Return the side of a published or imported record: the stage it is scored on, one run a seed."""
    summary = recompute(record)
    name = f"pr:{record_number(record)}" if record.get("pr") is not None else record["folder"]
    runs = one_run_a_seed(record)
    if summary is None:
        raise ValueError(f"{name}: no log has a final score to compare")
    key = {"pre_ttt": "post_quant", None: None}.get(stage, stage)
    scored = [run for run in runs if key is None or run.get(key)]
    if not scored:
        raise ValueError(f"{name}: no log has the stage {stage}")
    scores = {run["seed"]: run[key] if key else {"val_bpb": run["final_bpb"], "val_loss_nats": run["final_nats"]}
              for run in scored}  # fmt: skip
    first = next(iter(scores.values()))
    hashes = {run.get("val_documents_hash") for run in scored}
    notes = []
    if len({str(run.get("code_bytes_printed")) for run in scored}) > 1:
        notes.append("its seeds printed different code sizes: not one revision of the script")
    return Side(
        name=name,
        stage=stage or summary.stage.replace("post_quant", "pre_ttt"),
        bpb={seed: score["val_bpb"] for seed, score in scores.items()},
        nats_per_token={seed: score["val_loss_nats"] for seed, score in scores.items() if score["val_loss_nats"]},
        bytes_per_token=bits_per_byte(first["val_loss_nats"], first["val_bpb"]) if first["val_loss_nats"] else None,
        tokenizer_hash=None,
        text=Text(
            hashes.pop() if len(hashes) == 1 else None,
            text_bytes(scored),
        ),
        notes=notes,
        mixtures=[],
        pace={
            run["seed"]: Pace(
                run.get("steps"), run.get("train_seconds"), (run.get(key or run["scored_stage"]) or {}).get("seconds")
            )
            for run in scored
        },
    )


def _only_seeds(side: Side, seeds: list[int] | None) -> Side:
    """Return a side reduced to some of its seeds. Raises ValueError naming one that it does not have."""
    if seeds is None:
        return side
    unknown = [seed for seed in seeds if seed not in side.bpb]
    if unknown:
        raise ValueError(f"seeds: {side.name} has no finished seed {unknown[0]}")
    return side._replace(
        bpb={seed: side.bpb[seed] for seed in seeds},
        nats_per_token={seed: side.nats_per_token[seed] for seed in seeds if seed in side.nats_per_token},
    )


def has_same_tokenizer(a: Side, b: Side) -> bool:
    """Return whether nats per token may be compared; tokenizers are told apart by hash, else by bytes per token."""
    if a.tokenizer_hash and b.tokenizer_hash:
        return a.tokenizer_hash == b.tokenizer_hash
    if a.bytes_per_token is None or b.bytes_per_token is None:
        return False
    return math.isclose(a.bytes_per_token, b.bytes_per_token, rel_tol=SAME_TOKENIZER_FRAC)


def text_of_runs(out: object) -> Text:
    """Return the validation text of a run directory's finished seeds."""
    frame = latest_attempts(
        read_runs(out, ["val_documents_hash", "val_bytes", "pre_ttt_bytes", "post_ttt_bytes"])
    ).frame
    finished = frame[frame["state"] == FINISHED] if not frame.empty else frame
    return text_of_rows(finished)


def text_of_rows(finished: pd.DataFrame) -> Text:
    """Return the validation text of finished rows."""
    return Text(None, None) if finished.empty else _text_of_runs(finished, "post_ttt")


def _text_of_runs(runs: pd.DataFrame, stage: str) -> Text:
    sizes = [_only(runs[name]) for name in ("val_bytes", f"{stage}_bytes") if name in runs]
    size = next((float(value) for value in sizes if value is not None), None)
    return Text(_only(runs["val_documents_hash"]), size)


def _by_seed(runs: pd.DataFrame, column: str) -> dict[int, float]:
    """Return each seed's mean over its repeats; seeds without the figure are left out."""
    kept = runs.dropna(subset=[column])
    return {int(seed): float(kept.loc[kept["seed"] == seed, column].mean()) for seed in sorted(kept["seed"].unique())}


def _pace_of_runs(runs: pd.DataFrame, stage: str) -> dict[int, Pace]:
    """Return each seed's steps and seconds, the means of its repeats."""
    columns = [_by_seed(runs, name) for name in ("steps", "train_s", f"{stage}_s")]
    return {seed: Pace(*(column.get(seed) for column in columns)) for seed in _by_seed(runs, f"{stage}_bpb")}


def _only(column: pd.Series) -> str | None:
    """Return the one value of a column, None when it has none or several."""
    values = column.dropna().unique()
    return values[0] if len(values) == 1 else None


def _ratio_of_scores(runs: pd.DataFrame, stage: str) -> float | None:
    """Return bytes per token from nats per token and bpb, for figures imported from logs."""
    both = runs.dropna(subset=[f"{stage}_nats_per_token", f"{stage}_bpb"])
    if both.empty:
        return None
    row = both.iloc[0]
    return bits_per_byte(row[f"{stage}_nats_per_token"], row[f"{stage}_bpb"])


def _mixture(runs: pd.DataFrame, name: str) -> str:
    seeds = {value: runs.loc[runs[name] == value, "seed"].tolist() for value in runs[name].dropna().unique()}
    parts = [f"{value[:12]} (seeds {', '.join(map(str, group))})" for value, group in seeds.items()]
    return f"{name} differs inside it: {'; '.join(parts)}"
