"""The seed table: one row a seed and repeat, and the summary over seeds, computed from the `runs` Parquet alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from results.render import CPU, mixed_devices
from results.schema import FINISHED
from results.stats import Summary, population_std, summarize
from results.store.announced import announced_price
from results.store.reader import RUN, Rows, read_runs

INTEGERS = ("seed", "repeat", "attempts", "steps", "artifact_bytes")
SUMMARIZED = (
    "steps", "live_bpb", "post_ema_bpb", "pre_ttt_bpb", "ttt_lr0_bpb", "post_ttt_bpb", "artifact_bytes",
    "train_s", "quantize_s", "evaluate_s", "ttt_s",
)  # fmt: skip
SEED_KEYS = (
    "seed", "repeat", "state", "attempts", "steps", "live_bpb", "post_ema_bpb", "pre_ttt_bpb", "ttt_lr0_bpb",
    "post_ttt_bpb", "artifact_bytes", "within_limit", "train_s", "quantize_s", "evaluate_s", "ttt_s",
)  # fmt: skip
PROGRAM = "program"  # the source of rows that somebody else's program left
STEPS_TOLERANCE = 0.01  # of the median, before a seed is marked
MARK_COLUMNS = ("code_changed", "num_resumes", "is_slow", "attempt", "preemptions")
IDENTITY_COLUMNS = ("sweep", "data_hash", "config_hash", "code_hash", "val_documents_hash")
TABLE_COLUMNS = (
    *SEED_KEYS, *MARK_COLUMNS, *IDENTITY_COLUMNS, "sliding_bpb", "error", "order0_bpb", "code_bytes_convention",
    "variant", "reused_stages", "source", "provenance_json", "gpu_model", "num_gpus",
)  # fmt: skip

SPENT_COLUMNS = ("started_at", "ended_at", "num_gpus", "attempt", "attempts")
SPENT = ("gpu_hours", "cost")  # computed over all attempts of a run; None where no GPU was used, or no price is known

# heading, key, decimals (None: a difference of two keys, with sign)
SHOWN = (
    ("steps", "steps", 0), ("live", "live_bpb", 5), ("post-EMA", "post_ema_bpb", 5), ("pre-TTT", "pre_ttt_bpb", 5),
    ("sliding", "sliding_bpb", 5), ("lr-0", "ttt_lr0_bpb", 5), ("post-TTT", "post_ttt_bpb", 5),
    ("context", "context_gain_bpb", None),
    ("adaptation", "adaptation_gain_bpb", None), ("artifact bytes", "artifact_bytes", 0), ("train s", "train_s", 1),
    ("quantize s", "quantize_s", 1), ("evaluate s", "evaluate_s", 1), ("TTT s", "ttt_s", 1),
    ("GPU-hours", "gpu_hours", 3), ("cost", "cost", 2),
)  # fmt: skip


class SeedTable(NamedTuple):
    """Rows of the table as plain values (None: not measured), the summary over seeds, and everything to be said."""

    identity: dict[str, str | None]
    seeds: list[dict[str, Any]]
    summary: dict[str, Summary]
    std_ddof0: dict[str, float | None]
    same_seed: dict[str, Summary]
    order0_bpb: float | None
    problems: list[str]
    notes: list[str]
    schema_version: int

    @property
    def variants(self) -> list[str]:
        """The variants that its rows are of."""
        return list(dict.fromkeys(row["variant"] for row in self.seeds))

    @property
    def has_failures(self) -> bool:
        """Some seed did not finish, or some file could not be read."""
        return bool(self.problems) or any(row["state"] != FINISHED for row in self.seeds)


def read_spent(out: object, columns: Sequence[str]) -> Rows:
    """Return every committed attempt of a run directory, with what its run spent over all of its attempts.

    Two columns are added: gpu_hours, and cost where the sweep names its price. Raises as read_runs does.
    """
    return add_spent(read_runs(out, list(dict.fromkeys((*columns, *SPENT_COLUMNS)))), announced_price(out))


def add_spent(rows: Rows, price: float | None) -> Rows:
    """Return rows with gpu_hours and cost of each run, and a note where an attempt left no row: its time is unknown.

    A gang holds its GPUs from started_at to ended_at. What an attempt says of its start may be that of the one before,
    if it died too early to say anything, so it counts from the end of that one at the earliest.
    """
    frame, notes = rows.frame.sort_values([*RUN, "attempt"], kind="stable"), list(rows.notes)
    last_end = frame.groupby(RUN)["ended_at"].shift()
    began = frame["started_at"].where(~(frame["started_at"] < last_end), last_end)
    hours = (frame["ended_at"] - began).dt.total_seconds().clip(lower=0) / 3600
    frame["gpu_hours"] = hours * frame["num_gpus"].where(frame["num_gpus"] > 0)
    frame["gpu_hours"] = frame.groupby(RUN)["gpu_hours"].transform("sum", min_count=1)
    frame["cost"] = frame["gpu_hours"] * (float("nan") if price is None else price)
    known = frame.groupby(RUN)["attempt"].agg(["count", "max"])
    num_lost = int((known["max"] - known["count"]).clip(lower=0).sum())
    if num_lost and frame["gpu_hours"].notna().any():
        notes.append(f"GPU-hours lack {num_lost} attempt(s) that left no row, as when their driver is killed")
    return Rows(frame.sort_index(), rows.problems, notes)


def table_of_rows(rows: Rows, *, shown: str) -> SeedTable:
    """Return the seed table of rows that were already chosen; `shown` names them in errors."""
    if rows.frame.empty:
        reason = f": {rows.problems[0]}" if rows.problems else " (no committed attempt in results/runs)"
        raise ValueError(f"{shown}: nothing to show{reason}")
    names = [*TABLE_COLUMNS, *(name for name in SPENT if name in rows.frame)]
    columns = (rows.frame[name].tolist() for name in names)
    seeds = [_seed_row(dict(zip(names, values))) for values in zip(*columns)]
    identity, notes = _identity(seeds)
    devices = mixed_devices(devices_of(seeds))
    notes = [*rows.notes, *notes, *[devices] * bool(devices), *_unmeasured(seeds), *_said_of_programs(seeds)]
    finished = [row for row in seeds if row["state"] == FINISHED]
    _mark_other_steps(finished)
    order0 = [row["order0_bpb"] for row in finished if row["order0_bpb"] is not None]
    summarized = (*SUMMARIZED, "sliding_bpb", "context_gain_bpb", "adaptation_gain_bpb", *SPENT)
    means = {column: list(seed_means(finished, column).values()) for column in summarized}
    return SeedTable(
        identity=identity,
        seeds=seeds,
        summary={column: summarize(values) for column, values in means.items()},
        std_ddof0={column: population_std(values) for column, values in means.items()},
        same_seed={column: _same_seed_spread(finished, column) for column in summarized},
        order0_bpb=order0[0] if order0 else None,
        problems=rows.problems,
        notes=notes,
        schema_version=int(rows.frame["schema_version"].max()),
    )


def shown_columns(table: SeedTable) -> list[tuple[str, str, int | None]]:
    """Return heading, key and decimals of the columns to show: all of ours, `sliding` where an import has it."""
    rare = ("sliding_bpb", *SPENT)
    return [entry for entry in SHOWN if entry[1] not in rare or any(row[entry[1]] is not None for row in table.seeds)]


def spent_in_all(seeds: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return gpu_hours, and cost where a price is known, of all rows of a table together; {} where no GPU was used."""
    values = {name: [row[name] for row in seeds if row[name] is not None] for name in SPENT}
    return {name: math.fsum(known) for name, known in values.items() if known}


def _seed_row(row: dict[Any, Any]) -> dict[str, Any]:
    """Return one row with plain values, its gains and its marks."""
    plain = {name: _plain(name, row.get(name)) for name in (*TABLE_COLUMNS, *SPENT)}
    plain["attempts"] = plain["attempts"] or plain["attempt"]
    plain["context_gain_bpb"] = _difference(plain["ttt_lr0_bpb"], plain["pre_ttt_bpb"])
    plain["adaptation_gain_bpb"] = _difference(plain["post_ttt_bpb"], plain["ttt_lr0_bpb"])
    plain["marks"] = _marks(plain)
    return plain


def _plain(name: str, value: Any) -> Any:
    """Return None for null, NaN and infinity, and whole numbers as int."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if hasattr(value, "item"):
        value = value.item()
    return int(value) if name in (*INTEGERS, "attempt", "num_resumes", "preemptions") else value


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _marks(row: dict[str, Any]) -> list[str]:
    """Return what a reader of the row must know besides its figures."""
    marks = []
    if row["state"] != FINISHED:
        marks.append(str(row["state"]))
    if row["within_limit"] is False:
        marks.append("over limit")
    if row["code_changed"]:
        marks.append("code changed")
    if row["num_resumes"]:
        marks.append(f"resumed x{row['num_resumes']}")
    if row["is_slow"]:
        marks.append("slow")
    if (row["attempts"] or 1) > 1:
        marks.append(f"{row['attempts']} attempts")
    if row["preemptions"]:
        marks.append(f"preempted x{row['preemptions']}")
    if row["reused_stages"]:
        marks.append(f"{row['reused_stages'].replace(',', '+')} of another run")
    return marks


def _mark_other_steps(finished: list[dict[str, Any]]) -> None:
    """Mark seeds whose steps differ from the median: under a wall-clock budget a slow node is a worse score."""
    steps = [row["steps"] for row in finished if row["steps"] is not None]
    middle = statistics.median(steps) if steps else 0
    for row in finished:
        if row["steps"] is not None and abs(row["steps"] - middle) > STEPS_TOLERANCE * middle:
            row["marks"].append(f"steps {100 * (row['steps'] / middle - 1):+.1f} % off the median")


def _identity(seeds: list[dict[str, Any]]) -> tuple[dict[str, str | None], list[str]]:
    """Return what all rows have in common, None where they differ, and a note for every difference."""
    identity: dict[str, str | None] = {}
    notes = []
    for column in IDENTITY_COLUMNS:
        values = sorted({row[column] for row in seeds if row[column] is not None})
        identity[column] = values[0] if len(values) == 1 else None
        if len(values) > 1:
            listed = ", ".join(value[:12] for value in values)
            notes.append(f"{column} differs between rows ({listed}): the summary mixes them")
    return identity, notes


def devices_of(seeds: list[dict[str, Any]], prefix: str = "") -> dict[str, str]:
    """Return what each finished run was computed on: the model of its GPUs, or CPU; "" where its row does not say."""
    return {
        f"{prefix}seed={row['seed']}" + f"-repeat={row['repeat']}" * bool(row["repeat"]): row["gpu_model"]
        or CPU * (row["num_gpus"] == 0)
        for row in seeds
        if row["state"] == FINISHED
    }


def _unmeasured(seeds: list[dict[str, Any]]) -> list[str]:
    """Return a note for every finished row that lacks its final score; a program's may be of another stage."""
    return [
        f"seed={row['seed']} repeat={row['repeat']}: DONE, but post_ttt_bpb is missing or not a number; "
        "left out of its summary"
        for row in seeds
        if row["state"] == FINISHED and row["post_ttt_bpb"] is None and row["source"] != PROGRAM
    ]


def _said_of_programs(seeds: list[dict[str, Any]]) -> list[str]:
    """Return what was found in, and what is missing from, the logs of somebody else's program, equal words once."""
    said: dict[str, list[str]] = {}
    for row in seeds:
        if row["state"] != FINISHED or row["source"] != PROGRAM:
            continue
        name = f"{row['seed']}" + f" (repeat {row['repeat']})" * bool(row["repeat"])
        if row["post_ttt_bpb"] is None:
            said.setdefault("no post-TTT score; it is left out of that summary", []).append(name)
        provenance = json.loads(row["provenance_json"] or "{}")
        for line in (*provenance.get("findings", ()), *provenance.get("notes", ())):
            said.setdefault(line, []).append(name)
    return [f"seed{'s' * (len(names) > 1)} {', '.join(names)}: {line}" for line, names in said.items()]


def seed_means(finished: list[dict[str, Any]], column: str) -> dict[int, float]:
    """Return each seed's mean over its repeats, so that a repeated seed counts once."""
    values: dict[int, list[float]] = {}
    for row in finished:
        if row[column] is not None:
            values.setdefault(row["seed"], []).append(row[column])
    return {seed: math.fsum(entries) / len(entries) for seed, entries in values.items()}


def _same_seed_spread(finished: list[dict[str, Any]], column: str) -> Summary:
    """Return the spread between repeats of one seed, pooled over seeds; n is its degrees of freedom, 0 for none."""
    groups: dict[int, list[float]] = {}
    for row in finished:
        if row[column] is not None:
            groups.setdefault(row["seed"], []).append(row[column])
    freedom = sum(len(values) - 1 for values in groups.values())
    if freedom == 0:
        return Summary(0, None, None)
    spreads = [(summarize(values).std_ddof1 or 0.0) ** 2 * (len(values) - 1) for values in groups.values()]
    return Summary(freedom, None, math.sqrt(math.fsum(spreads) / freedom))
