"""Reading committed attempts: only what has a file in `runs`, only the columns asked for, problems named not hidden."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from results.schema import (
    FINISHED,
    READABLE_VERSIONS,
    VERSION_KEY,
    absent_columns,
    arrow_schema,
    column_names,
    value_when_absent,
)
from results.store.footers import read_rows
from results.store.guard import find_faults, first_line
from results.store.location import Location, list_parquet, results_location
from results.store.names import name_of_row

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa


RUN = ["variant", "seed", "repeat"]  # what one run is, over its attempts


class Rows(NamedTuple):
    """Rows of one table, the files that could not be read (one line each), and what was decided (one line each)."""

    frame: pd.DataFrame
    problems: list[str]
    notes: list[str]


class OtherVersionError(ValueError):
    """A results file of another schema version."""


def read_runs(out: object, columns: Sequence[str] | None = None) -> Rows:
    """Return every committed attempt of a run directory; unreadable files are named in `problems`.

    columns: a subset of the runs columns (the key columns and state always come along).
    Raises FileNotFoundError when there is no results folder.
    """
    table, problems = read_run_table(out, columns)
    return Rows(table.to_pandas(), problems, [])


def read_run_table(out: object, columns: Sequence[str] | None = None) -> tuple[pa.Table, list[str]]:
    """Return what read_runs does, without pandas: the driver of a sweep does without its memory."""
    location = results_location(out)
    wanted = list(dict.fromkeys([*_keys(), "state", *(columns or column_names("runs"))]))
    return _read_files(location, "runs", list_parquet(location, "runs"), wanted)


def latest_attempts(rows: Rows) -> Rows:
    """Keep one row per (variant, seed, repeat): the latest finished attempt, or the latest one where none finished.

    Says so in `notes` wherever more than one finished attempt was there to choose from.
    """
    frame, notes = rows.frame, list(rows.notes)
    if frame.empty:
        return rows
    ordered = frame.assign(_finished=frame["state"].eq(FINISHED)).sort_values(
        [*RUN, "_finished", "attempt"], kind="stable"
    )
    finished = ordered[ordered["_finished"]]
    several = finished[finished.duplicated(RUN, keep=False)]
    has_variants = frame["variant"].nunique() > 1
    for (variant, seed, repeat), attempts in several.groupby(RUN, sort=True)["attempt"]:
        named = f"variant={variant} " if has_variants else ""
        notes.append(
            f"{named}seed={seed} repeat={repeat}: {len(attempts)} finished attempts "
            f"({', '.join(map(str, attempts))}); attempt {attempts.iloc[-1]}, the latest, is used"
        )
    kept = ordered.drop_duplicates(RUN, keep="last").drop(columns="_finished")
    return Rows(kept.reset_index(drop=True), rows.problems, notes)


def read_attempt(out: object, table: str, run: pd.Series | Mapping[str, Any], columns: Sequence[str]) -> pd.DataFrame:
    """Return chosen columns of the documents, steps or stages of one committed attempt.

    run: a row of `runs`. Raises ValueError naming the file when it is missing, damaged or of another version.
    """
    location = results_location(out)
    name = f"{name_of_row(run)}-attempt={run['attempt']}.parquet"
    if not location.filesystem.get_file_info(location.path(table, name)).is_file:
        raise ValueError(f"{location.path(table, name)}: missing, although the attempt is committed in runs")
    content, problems = _read_files(location, table, [name], list(columns))
    if problems:
        raise ValueError(problems[0])
    frame: pd.DataFrame = content.to_pandas()
    return frame


def load_table(out: object, table: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one table of every committed attempt as a DataFrame.

    Warns about files that cannot be read; raises ValueError for a file of another schema version.
    """
    location = results_location(out)
    committed = set(list_parquet(location, "runs"))
    names = [name for name in list_parquet(location, table) if name in committed]
    wanted = list(columns) if columns is not None else column_names(table)
    content, problems = _read_files(location, table, names, wanted)
    for problem in problems:
        if "schema version" in problem:
            raise OtherVersionError(problem)
        warnings.warn(problem, stacklevel=3)
    frame: pd.DataFrame = content.to_pandas()
    return frame


def _keys() -> list[str]:
    from results.schema import KEYS

    return [column.name for column in KEYS]


def _read_files(location: Location, table: str, names: list[str], columns: list[str]) -> tuple[pa.Table, list[str]]:
    """Return the chosen columns of many files in one table, and a line for every file that had to be left out."""
    import pyarrow as pa

    unknown = [name for name in columns if name not in column_names(table)]
    if unknown:
        raise ValueError(f"{table} has no column {unknown[0]!r} (see docs/schema.md)")
    schema = pa.schema([arrow_schema(table).field(name) for name in columns])
    faults = find_faults(location, table, names)
    problems = [
        f"{location.path(table, name)}: not readable as Parquet (half-written or damaged): {reason}"
        for name, reason in faults.items()
    ]
    names = [name for name in names if name not in faults]
    together = _read_together(location, table, names, schema)
    if together is not None:
        return together, problems
    parts = []
    for name in names:
        try:
            parts.append(_read_one(location, table, name, schema))
        except (OSError, ValueError) as error:
            problems.append(str(error))
    return pa.concat_tables(parts) if parts else schema.empty_table(), problems


def _read_together(location: Location, table: str, names: list[str], schema: pa.Schema) -> pa.Table | None:
    """Read healthy files in one threaded scan; None when any of them needs a closer look."""
    import pyarrow as pa
    import pyarrow.dataset as ds

    if not names:
        return schema.empty_table()
    paths = [location.path(table, name) for name in names]
    if table == "runs":
        rows = read_rows(location, paths, schema)
        if rows is not None:
            return rows
    try:
        dataset = ds.dataset(paths, schema=arrow_schema(table), format="parquet", filesystem=location.filesystem)
        for fragment in dataset.get_fragments():
            found = fragment.physical_schema
            version = _version_in(found.metadata)
            if version not in READABLE_VERSIONS or not set(schema.names) <= {
                *found.names,
                *absent_columns(table, version),
            }:
                return None
        return _fill_absent(dataset.to_table(columns=schema.names)).cast(schema)
    except (pa.ArrowException, OSError):
        return None


def _fill_absent(content: pa.Table) -> pa.Table:
    """Return a scan in which columns that older files lack, read as null, have the value that stands for it."""
    for place, name in enumerate(content.column_names):
        value = value_when_absent(name)
        if value is not None:
            content = content.set_column(place, name, content.column(name).fill_null(value))
    return content


def _version_in(metadata: dict[bytes, bytes] | None) -> int | None:
    """Return the schema version in a file's metadata, None where there is none."""
    text = (metadata or {}).get(VERSION_KEY)
    return int(text) if text is not None and text.isdigit() else None


def _read_one(location: Location, table: str, name: str, schema: pa.Schema) -> pa.Table:
    """Return one file's columns, or raise ValueError with the one line that says what is wrong with it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = location.path(table, name)
    try:
        file = pq.ParquetFile(path, filesystem=location.filesystem)
        found = file.schema_arrow
        version = _version_in(found.metadata)
        if "schema_version" in found.names:
            versions = _distinct(file.read(columns=["schema_version"]).column(0))
            version = next((entry for entry in versions if entry not in READABLE_VERSIONS), max(versions, default=None))
        if version not in READABLE_VERSIONS:
            said = "no schema version" if version is None else f"schema version {version}"
            known = " and ".join(map(str, READABLE_VERSIONS))
            raise OtherVersionError(f"{path}: has {said}; this program reads versions {known}")
        absent = absent_columns(table, version) - set(found.names)
        missing = [name for name in schema.names if name not in found.names and name not in absent]
        if missing:
            raise ValueError(f"{path}: missing columns: {', '.join(missing)}; left out")
        content = file.read(columns=[name for name in schema.names if name not in absent])
        for name in schema.names:
            if name in absent:
                values = pa.array([value_when_absent(name)] * content.num_rows, schema.field(name).type)
                content = content.append_column(name, values)
        content = content.select(schema.names)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not readable as Parquet (half-written or damaged): {first_line(error)}") from error
    return _cast(path, content, schema)


def _cast(path: str, content: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return content in the schema's types; other programs may have widened them."""
    import pyarrow as pa

    columns = []
    for field in schema:
        try:
            columns.append(content.column(field.name).cast(field.type))
        except pa.ArrowException as error:
            found = content.schema.field(field.name).type
            raise ValueError(f"{path}: column {field.name} is {found} instead of {field.type}; left out") from error
    return pa.Table.from_arrays(columns, schema=schema)


def _distinct(column: Any) -> Iterable[Any]:
    values: list[Any] = column.unique().to_pylist()
    return values
