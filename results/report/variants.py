"""What a report shows of a sweep of variants: their tables and differences, and what sharing stages has saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from results.compare.sides import split_variant
from results.compare.variants import Ablation, ablation_of_rows, has_variants
from results.report.data import System, contradictions_of, find_mixtures, read_system
from results.schema import FINISHED
from results.store.announced import announced_variants
from results.store.reader import latest_attempts, read_runs

if TYPE_CHECKING:
    import pandas as pd

STAGE_SECONDS = {
    "train": ("warmup_s", "train_s"), "quantize": ("quantize_s",), "evaluate": ("evaluate_s",), "ttt": ("ttt_s",),
}  # fmt: skip


class Hours(NamedTuple):
    """GPU-hours (core-hours on CPU) of finished runs: computed by them, and of stages taken from other runs."""

    computed: float
    taken: float


class Variants(NamedTuple):
    """One run directory of several variants, read; runs: the finished rows of all of them."""

    name: str
    out: str
    ablation: Ablation
    runs: pd.DataFrame
    hours: dict[str, Hours]
    unit: str
    disagreements: list[str]

    @property
    def total(self) -> Hours:
        """The hours of all variants."""
        return Hours(sum(hours.computed for hours in self.hours.values()), sum(h.taken for h in self.hours.values()))


def read_view(spec: str) -> System | Variants:
    """Read what a report shows of a run directory, or of one variant of it (DIR#V).

    Raises FileNotFoundError or ValueError as the tables do.
    """
    out, variant = split_variant(spec)
    if variant is None:
        rows = latest_attempts(read_runs(out))
        if has_variants(rows):
            return view_of_ablation(out, ablation_of_rows(rows, announced_variants(out), shown=out))
    return read_system(out, variant)


def view_of_ablation(out: str, ablation: Ablation) -> Variants:
    """Return the view of variants that were read with every column of `runs`."""
    frame = ablation.rows.frame
    runs = frame[frame["state"] == FINISHED].reset_index(drop=True)
    has_gpus = bool(runs["num_gpus"].fillna(0).gt(0).any())
    devices = runs["num_gpus" if has_gpus else "num_cpus"].fillna(1)
    hours = {name: hours_of(runs[runs["variant"] == name], devices) for name in ablation.tables}
    disagreements = [f"{run['variant']}, {line}" for _, run in runs.iterrows() for line in contradictions_of(run, {})]
    mixtures = [f"{name}: {line}" for name in ablation.tables for line in find_mixtures(runs[runs["variant"] == name])]
    first = next(iter(ablation.tables.values()))
    return Variants(
        name=str(first.identity["sweep"] or Path(out).name),
        out=out,
        ablation=ablation,
        runs=runs,
        hours=hours,
        unit="GPU-hours" if has_gpus else "core-hours",
        disagreements=[*mixtures, *disagreements, *ablation.problems],
    )


def hours_of(runs: pd.DataFrame, devices: pd.Series) -> Hours:
    """Return the hours of some runs; a stage that another run computed counts as taken."""
    computed = taken = 0.0
    for (_, run), count in zip(runs.iterrows(), devices[runs.index]):
        reused = run["reused_stages"].split(",") if isinstance(run["reused_stages"], str) else []
        for stage, columns in STAGE_SECONDS.items():
            seconds = sum(float(run[name]) for name in columns if run[name] == run[name] and run[name] is not None)
            hours = seconds * float(count) / 3600
            computed, taken = (computed, taken + hours) if stage in reused else (computed + hours, taken)
    return Hours(computed, taken)
