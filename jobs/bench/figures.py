"""What a benchmark found: raw samples by figure and process, their percentiles, and the machine they were taken on.

Written as a table for people, and as JSON or Parquet with every raw sample in it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from results.render import MISSING, text_table

FORMAT = 1
SUFFIXES = (".json", ".parquet")
HEADER = ("figure", "unit", "median", "p10", "p90", "samples", "processes", "wanted")
GROUPED_FROM = 1000  # numbers from here on are whole and grouped by thousands
REPORT_EVERY_S = 2.0
MIN_SPREAD = 3  # samples below which no percentile but the median is given


class Spread(NamedTuple):
    """Percentiles of some samples; p10 and p90 are None for fewer than three."""

    median: float
    p10: float | None
    p90: float | None


def spread(values: Iterable[float]) -> Spread:
    """Return median, p10 and p90 with linear interpolation between samples."""
    ordered = sorted(values)
    assert ordered, "no sample"
    if len(ordered) < MIN_SPREAD:
        return Spread(statistics.median(ordered), None, None)
    tenths = statistics.quantiles(ordered, n=10, method="inclusive")
    return Spread(statistics.median(ordered), tenths[0], tenths[-1])


@dataclass(slots=True)
class Figure:
    """One thing that was measured; samples holds a list for each process."""

    name: str
    unit: str
    wanted: str = ""  # the bar, in words
    samples: list[list[float]] = field(default_factory=list)

    @property
    def values(self) -> list[float]:
        """All samples, process after process."""
        return [value for process in self.samples for value in process]

    def as_json(self) -> dict[str, Any]:
        """Return the figure with its percentiles and every raw sample."""
        return {
            "name": self.name, "unit": self.unit, "wanted": self.wanted, **spread(self.values)._asdict(),
            "num_samples": len(self.values), "num_processes": len(self.samples), "samples": self.samples,
        }  # fmt: skip


@dataclass(slots=True)
class Report:
    """Everything that one benchmark found, with what it ran and where."""

    mode: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    figures: dict[str, Figure] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, unit: str, values: Iterable[float], *, wanted: str = "") -> None:
        """Add one process's samples of a figure; no samples, no figure."""
        samples = [float(value) for value in values]
        if not samples:
            return
        figure = self.figures.setdefault(name, Figure(name, unit, wanted))
        assert figure.unit == unit, f"{name} in {figure.unit} and in {unit}"
        figure.samples.append(samples)

    def note(self, text: str) -> None:
        """Add a line to print below the table, once."""
        if text not in self.notes:
            self.notes.append(text)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "format": FORMAT, "mode": self.mode, "settings": self.settings, "environment": self.environment,
            "figures": [figure.as_json() for figure in self.figures.values()], "notes": self.notes,
        }  # fmt: skip

    def as_text(self) -> str:
        """Return settings, machine and the table."""
        lines = [f"bench {self.mode}: {describe_values(self.settings)}", describe_values(self.environment)]
        rows = [figure_cells(figure) for figure in self.figures.values()]
        return "\n".join([*lines, "", text_table(HEADER, rows), *(f"note: {note}" for note in self.notes)])


@dataclass(slots=True)
class Probe:
    """What one measuring process found."""

    label: str
    figures: list[tuple[str, str, list[float], str]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_main: bool = True  # the rank that speaks
    reported_at: float = field(default_factory=time.monotonic)

    def add(self, name: str, unit: str, values: Iterable[float], *, wanted: str = "") -> None:
        """Add samples of a figure."""
        self.figures.append((name, unit, [float(value) for value in values], wanted))

    def note(self, text: str) -> None:
        """Add a remark to print below the table."""
        self.notes.append(text)

    def report(self, phase: str, step: int, total: int | None, metrics: dict[str, Any]) -> None:
        """Print progress, at most one line every two seconds; stages call this."""
        now = time.monotonic()
        if not self.is_main or now - self.reported_at < REPORT_EVERY_S:
            return
        self.reported_at = now
        values = " ".join(f"{name}={value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
        print(f"[{self.label}] {phase} {step}/{total or '?'} {values}".rstrip(), file=sys.stderr, flush=True)


def describe_values(values: Mapping[str, Any]) -> str:
    """Return key=value pairs, hashes cut short, what is not known left out."""
    pairs = []
    for name, value in values.items():
        if value is None or value == "" or isinstance(value, dict | list):
            continue
        is_hash = name.endswith(("_hash", "_commit"))
        pairs.append(f"{name}={str(value)[:12] if is_hash else value}")
    return ", ".join(pairs)


def figure_cells(figure: Figure) -> list[str]:
    """Return one row of the table."""
    percentiles = [number(value) for value in spread(figure.values)]
    counts = [str(len(figure.values)), str(len(figure.samples))]
    return [figure.name, figure.unit, *percentiles, *counts, figure.wanted or MISSING]


def number(value: float | None) -> str:
    """Return four significant digits, or a whole number with its thousands apart."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if abs(value) >= GROUPED_FROM else f"{value:.4g}"


def describe_environment() -> dict[str, Any]:
    """Return machine, versions and source of this process; what needs torch is the measuring process's to say."""
    from importlib import metadata

    from model.data.cpus import usable_cpus
    from runner.provenance import code_hash, git_state, machine, package_versions

    host, git = machine(), git_state()
    versions = package_versions()
    triton = [dist.version for dist in metadata.distributions(name="triton")]
    return {
        "gpu_model": None,
        "cpu_model": host["cpu_model"],
        "num_cpus": usable_cpus(),
        "memory_bytes": host["memory_bytes"],
        "load_average": os.getloadavg()[0],  # above num_cpus the machine was busy with other work
        "python": versions["python"],
        "torch": versions["torch"],
        "triton": triton[0] if triton else "missing",
        "ray": versions["ray"],
        "git_commit": git.commit,
        "git_dirty": git.is_dirty,
        "code_hash": code_hash(),
    }


def check_out(path: Path | None) -> None:
    """Raise ValueError or FileNotFoundError unless a report can be written to path, before anything is measured."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--out {path} must end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out {path}: folder {path.parent} does not exist; make it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--out {path} is not writable")


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON, or as Parquet with one row a sample; path is complete or what it was."""
    from model.files.atomic import replace_file

    with replace_file(path) as file:
        if path.suffix == ".json":
            file.write(json.dumps(report.as_json(), indent=1).encode() + b"\n")
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(sample_rows(report)), file)


def sample_rows(report: Report) -> list[dict[str, Any]]:
    """Return one row a raw sample, with its figure's percentiles and what was run where."""
    shared = {
        "format": FORMAT, "mode": report.mode, "settings_json": json.dumps(report.settings, sort_keys=True),
        "environment_json": json.dumps(report.environment, sort_keys=True), "notes": "; ".join(report.notes),
    }  # fmt: skip
    return [
        {
            **shared, "figure": figure.name, "unit": figure.unit, "wanted": figure.wanted,
            **spread(figure.values)._asdict(), "process": process, "sample": index, "value": value,
        }
        for figure in report.figures.values()
        for process, values in enumerate(figure.samples)
        for index, value in enumerate(values)
    ]  # fmt: skip
