"""The table of speed, out of reports in the format of `seedsweep bench`: published, before, now, wanted.

Pure functions. A row that was not measured stands there with a dash, so that a call that was cut off makes a table too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jobs.bench.figures import Figure, Report
from results.render import MISSING, text_table

HEADER = ("row", "published", "before", "now", "before to now", "wanted", "samples")


class Line(NamedTuple):
    """One row of the table: the figure it shows (a pattern of its name), how it is written, and what is known of it."""

    words: str
    figure: str
    form: str  # "M": millions, else a unit
    published: Mapping[str, float]  # by GPU: docs/performance.md and the published code's own measurements
    wanted: str = ""
    is_rate: bool = False  # more is better


LINES = (
    Line("train tokens/s, 11 layers", r"train: \d+ layers: rate", "M", {"H200": 1.0088e6, "H100": 0.915e6},
         "x1.25, stretch x1.6", True),
    Line("train tokens/s, 17 visits", r"train: \d+ visits: rate", "M", {"H200": 0.6697e6, "H100": 0.603e6},
         "x1.25, stretch x1.6", True),
    Line("micro-batch, 17 visits", r"train: \d+ visits: micro-batch", "ms", {}),
    Line("train tokens/s, run average", r"train: run average.*", "M", {}, "", True),
    Line("compiled while timed", r"train: \d+ visits: compiled while timed", "s", {}, "0"),
    Line("peak, 98,304-token micro-batch", r"train: \d+ visits: peak memory", "GiB", {"H200": 40.3, "H100": 40.3},
         "30, stretch 20"),
    Line("one TTT step of 64 x 2,048", "ttt: step", "ms", {"H200": 200.2}, "150, stretch 110"),
    Line("its peak, 64 documents at work", "ttt: step: peak memory", "GiB", {"H200": 44.9}),
    Line("TTT of the sample of 192 documents", "ttt: sample", "s", {"H200": 56.9}, "12, stretch 7.5"),
    Line("the same, useful window tokens/s", "ttt: sample: useful window tokens", "M", {"H200": 0.119e6}, "0.57 M",
         True),
    Line("plain evaluation, recorded, tokens/s", "eval: later pass: rate", "M", {"H200": 1.89e6},
         "2.6 M, stretch 3.6 M", True),
    Line("plain evaluation, first pass", "eval: first pass.*", "s", {"H200": 45.1}, "20, stretch 8"),
    Line("Hessians, solve, compress, reload, warm", "gptq: second pass: all four", "s", {"H200": 109.0},
         "10, stretch 4"),
    *(Line(f"of it {part}", f"gptq: second pass: {part}", "s", {}) for part in
      ("Hessians", "solve", "compress", "reload")),
    Line("a seed outside training clock and TTT, warm", "outside: outside the clock and TTT", "s", {}),
    *(Line(f"of it {part}", f"outside: {part}", "s", {}) for part in
      ("start", "train, outside the clock", "quantize", "evaluate", "commit")),
    Line("warm-up, in train outside the clock", "outside: warm-up", "s", {}),
    Line("a rank's share of 50,000 documents", "share: both passes", "s", {}),
    Line("the same, window tokens/s", "share: window tokens a second.*", "M", {}, "", True),
)  # fmt: skip


def find_figure(report: Mapping[str, Any] | None, pattern: str) -> Mapping[str, Any] | None:
    """Return the first figure of a report whose whole name fits, None where there is none."""
    figures = report["figures"] if report else []
    return next((figure for figure in figures if re.fullmatch(pattern, figure["name"])), None)


def show(value: float | None, form: str) -> str:
    """Return a value as the table writes it."""
    if value is None:
        return MISSING
    if form == "M":
        return f"{value / 1e6:.3f} M"
    return f"{value:.1f} {form}" if value >= 10 else f"{value:.2f} {form}"


def cells(line: Line, now: Mapping[str, Any], before: Mapping[str, Any] | None) -> list[str]:
    """Return one row of the table."""
    gpu = str(now["environment"].get("gpu_model") or "")
    kind = next((kind for kind in line.published if kind in gpu), next(iter(line.published), ""))
    known = line.published.get(kind)
    published = show(known, line.form) + (f" ({kind})" if kind and kind not in gpu else "")
    ours, theirs = find_figure(now, line.figure), find_figure(before, line.figure)
    new, old = (None if figure is None else float(figure["median"]) for figure in (ours, theirs))
    shown = show(new, line.form)
    if new and known and kind in gpu:
        shown += f" (x{faster(line, known, new):.2f})"
    change = f"x{faster(line, old, new):.3f}" if new and old else MISSING
    counts = f"{ours['num_samples']} of {ours['num_processes']}" if ours else MISSING
    return [line.words, published, show(old, line.form), shown, change, line.wanted or MISSING, counts]


def faster(line: Line, old: float, new: float) -> float:
    """Return how many times better new is than old."""
    return new / old if line.is_rate else old / new


def as_text(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """Return what was measured where, the table, and the remarks on both sides."""
    parts = [describe("now", now), *([describe("before", before)] if before else [])]
    table = text_table(HEADER, [cells(line, now, before) for line in LINES], is_words=True)
    notes = [f"note: {note}" for note in now["notes"]]
    notes += [f"before: {note}" for note in (before["notes"] if before else []) if note not in now["notes"]]
    return "\n".join([*parts, "", table, *notes, ""])


def describe(name: str, report: Mapping[str, Any]) -> str:
    """Return which sources a report is of, and the machine."""
    found, settings = report["environment"], report["settings"]
    return (
        f"{name}: {found.get('gpu_model') or found['cpu_model']}, torch {found['torch']}, triton {found['triton']}, "
        f"{settings['preset']}, commit {str(found['git_commit'])[:12]}, code {str(found['code_hash'])[:12]}, "
        f"took {settings.get('took_s', '?')} s"
    )


def join_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return reports of one tree, measured apart on GPUs of one kind, as one; equal figures keep all their samples.

    Raises ValueError where they are of different sources or GPUs.
    """
    for name in ("code_hash", "gpu_model"):
        found = {str(report["environment"].get(name)) for report in reports}
        if len(found) > 1:
            raise ValueError(f"reports of different {name} cannot be joined: {', '.join(sorted(found))}")
    first = reports[0]
    whole = Report(first["mode"], dict(first["settings"]), dict(first["environment"]))
    for report in reports:
        for figure in report["figures"]:
            kept = whole.figures.setdefault(figure["name"], Figure(figure["name"], figure["unit"], figure["wanted"]))
            kept.samples += figure["samples"]
        for note in report["notes"]:
            whole.note(note)
    return whole.as_json()
