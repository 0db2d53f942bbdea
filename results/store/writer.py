"""Committing one attempt: four Parquet files, each whole or absent, the one in `runs` last."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from results.schema import BASE, COLUMNS, KEYS, SCHEMA_VERSION, SCORES, TABLES, arrow_schema, column_names
from results.store.guard import note_sums
from results.store.location import open_location, write_whole
from results.store.names import attempt_file_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PACKAGE_COLUMNS = {"python": "python_version", "torch": "torch_version", "ray": "ray_version"}


def commit_attempt(
    out: object,
    *,
    run: Mapping[str, object],
    stages: Sequence[Mapping[str, object]] = (),
    steps: Mapping[str, np.ndarray] | None = None,
    documents: Mapping[str, np.ndarray] | None = None,
    aside_folder: str = "",
) -> str:
    """Write one attempt into OUT/results and return the file name; a second call replaces the first.

    out: run directory, a local path or a URI of pyarrow.fs.
    run: columns of the `runs` table (results.schema); seed, repeat, attempt, config_hash and state are required.
        variant: left out or empty in a sweep that names none, which is stored as base under names without a prefix.
        The `*_json` columns take mappings, times take datetime, ISO text or seconds since 1970. Metrics of the stage
        records that are columns of `runs` are filled in from `stages`; a value in `run` wins.
    stages: the stage records of the run directory (stage, seconds, metrics, outputs, hashes; identity and reused_from
        where they have them), in order.
    steps, documents: arrays of equal length by column name, key columns left out; empty for an attempt that has none.
    aside_folder: where files are written before they are moved into place, on the same local filesystem.
    Raises ValueError for an unknown or missing column, with the nearest name.
    """
    location = open_location(out)._replace(aside=aside_folder)
    row = _run_row(run, stages)
    name = _file_name(run)
    keys = {column.name: row[column.name] for column in KEYS}
    tables = {
        "documents": _array_table("documents", keys, documents or {}),
        "steps": _array_table("steps", keys, steps or {}),
        "stages": _table("stages", [_stage_row(keys, record) for record in stages]),
        "runs": _table("runs", [row]),
    }
    contents = {table: _parquet(tables[table]) for table in TABLES}
    note_sums(location, {f"{table}/{name}": content for table, content in contents.items()})
    for table in TABLES:
        write_whole(location, location.path("results", table, name), contents[table])
    return name


def _file_name(run: Mapping[str, Any]) -> str:
    """Return the file name of an attempt; without a variant in a sweep that names none."""
    seed, repeat, attempt = (run.get(name) for name in ("seed", "repeat", "attempt"))
    return attempt_file_name(run.get("variant") or "", seed, repeat, attempt)  # type: ignore[arg-type]


def _parquet(content: pa.Table) -> bytes:
    """Return a table as the bytes of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(content, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def _run_row(run: Mapping[str, object], stages: Sequence[Mapping[str, object]]) -> dict[str, Any]:
    """Return every column of the runs row, None where nothing was measured."""
    _refuse_unknown("runs", run)
    row: dict[str, Any] = dict.fromkeys(column_names("runs"))
    for record in stages:
        metrics = record.get("metrics")
        if isinstance(metrics, Mapping):
            peak = max(row["peak_memory_bytes"] or 0, metrics.get("peak_memory_bytes") or 0)
            row.update({name: value for name, value in metrics.items() if name in row})
            row["peak_memory_bytes"] = peak or None  # the run's is the largest of any stage
    row.update(run)
    row["schema_version"] = SCHEMA_VERSION
    row["run_id"] = row["run_id"] or _file_name(run).removesuffix(".parquet")
    row["variant"] = row["variant"] or BASE
    row["reused_stages"] = row["reused_stages"] or _reused(stages)
    versions = run.get("versions_json")
    if isinstance(versions, Mapping):
        for package, name in PACKAGE_COLUMNS.items():
            row[name] = versions.get(package) if row[name] is None else row[name]
    for score in SCORES:
        nats, tokens = row[f"{score}_nats"], row[f"{score}_tokens"]
        if row[f"{score}_nats_per_token"] is None and nats is not None and tokens:
            row[f"{score}_nats_per_token"] = nats / tokens
    for column in COLUMNS["runs"]:
        row[column.name] = _plain(column.name, column.type, row[column.name])
        if column.required and row[column.name] is None:
            raise ValueError(f"run.{column.name} is missing; every row of runs needs it")
    return row


def _stage_row(keys: Mapping[str, object], record: Mapping[str, object]) -> dict[str, Any]:
    """Return the stages row of one stage record."""
    if not record.get("stage"):
        raise ValueError("a stage record without the field 'stage' cannot be committed")
    return {
        **keys,
        "stage": record["stage"],
        "seconds": record.get("seconds"),
        "metrics_json": _json(record.get("metrics", {})),
        "outputs_json": _json(record.get("outputs", {})),
        "data_hash": record.get("data_hash"),
        "code_hash": record.get("code_hash"),
        "stage_identity": record.get("identity"),
        "reused_from": record.get("reused_from"),
    }


def _reused(stages: Sequence[Mapping[str, object]]) -> str | None:
    """Return the stages that another run computed, comma between; None where there are none."""
    return ",".join(str(record["stage"]) for record in stages if record.get("reused_from")) or None


def _table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, schema=arrow_schema(table))


def _array_table(table: str, keys: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> pa.Table:
    """Return a table of arrays with the key columns repeated beside them."""
    import numpy as np
    import pyarrow as pa

    _refuse_unknown(table, arrays)
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{table}: arrays differ in length: {lengths}")
    num_rows = next(iter(lengths.values()), 0)
    columns = []
    for column, field in zip(COLUMNS[table], arrow_schema(table)):
        if column.name in keys:
            columns.append(pa.repeat(pa.scalar(keys[column.name], field.type), num_rows))
        elif column.name in arrays:
            columns.append(pa.array(np.asarray(arrays[column.name]), from_pandas=False).cast(field.type))
        elif column.required and num_rows:
            raise ValueError(f"{table}.{column.name} is missing; every row of {table} needs it")
        else:
            columns.append(pa.nulls(num_rows, field.type))
    return pa.Table.from_arrays(columns, schema=arrow_schema(table))


def _refuse_unknown(table: str, given: Mapping[str, object]) -> None:
    """Raise ValueError for a column that the schema does not have, with the nearest name."""
    for name in given:
        if name not in column_names(table):
            nearest = difflib.get_close_matches(name, column_names(table), n=1)
            hint = f"; nearest: {nearest[0]}" if nearest else ""
            raise ValueError(f"{table} has no column {name!r}{hint} (see docs/schema.md)")


def _plain(name: str, type_name: str, value: object) -> Any:
    """Return value as the plain Python value that its column's type wants."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if value is None:
        return None
    if type_name == "timestamp":
        return _utc(name, value)
    if type_name == "list_int64" and isinstance(value, Sequence | set) and not isinstance(value, str):
        return [int(entry) for entry in value]
    if type_name == "string" and not isinstance(value, str):
        return _json(value) if name.endswith("_json") else str(value)
    return value


def _utc(name: str, value: object) -> datetime:
    """Return a time as an aware UTC datetime; naive times are taken as UTC."""
    if isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC)
    time = datetime.fromisoformat(value) if isinstance(value, str) else value
    if not isinstance(time, datetime):
        raise ValueError(f"{name}={value!r} must be a datetime, ISO text or seconds since 1970")
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _json(value: object) -> str:
    """Return JSON with sorted keys; paths and numbers of numpy become text and plain numbers."""
    return json.dumps(
        value, sort_keys=True, default=lambda thing: thing.item() if hasattr(thing, "item") else str(thing)
    )
