"""Figures with one row a variant: differences as a forest plot, what each stage costs or gains, hours and sharing.

They are narrower than the others and grow downwards, so that forty rows can be read on a phone and in print.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from results.compare.variants import BETTER, NOT_SHOWN, WORSE
from results.report.figures import WATERFALL, Drawn, color, drawn_of, new_figure
from results.report.variants import Variants
from results.tables import SeedTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 4.8  # at 360 pixels the text is still 11 pixels high
ROW_IN, LANES_IN, FRAME_IN = 0.27, 0.42, 1.1
LABEL_CHARS = 24
SHADES = {BETTER: "good", WORSE: "bad", NOT_SHOWN: "muted", "": "muted"}
STEPS = {"pre_ttt_bpb": ("quantized", "s2"), "ttt_lr0_bpb": ("longer context", "s3"), "post_ttt_bpb": ("adapted", "s1")}


def draw_variants(view: Variants) -> list[Drawn]:
    """Return every figure that the rows allow, in the order of the page."""
    return [drawn for maker in (forest, waterfalls, sharing) if (drawn := maker(view)) is not None]


def forest(view: Variants) -> Drawn | None:
    """The difference of each variant to the baseline with its interval, the best at the top."""
    tested = [(effect, effect.difference) for effect in view.ablation.effects if effect.difference is not None]
    if not tested:
        return None
    tested.sort(key=lambda entry: entry[1].mean)
    figure, axes = _rows([effect.variant for effect, _ in tested], ROW_IN)
    axes.axvline(0, color=color("ink"), linewidth=1.2)
    seen: set[str] = set()
    for place, (effect, difference) in enumerate(tested):
        shade, verdict = color(SHADES[effect.verdict]), effect.verdict or effect.why
        label = None if verdict in seen else verdict
        if difference.interval is not None:
            axes.hlines(place, difference.interval.low, difference.interval.high, color=shade, linewidth=2)
        is_open = effect.verdict in (NOT_SHOWN, "")
        axes.plot([difference.mean], [place], "o", color=shade, markersize=5.5, label=label,
                  markerfacecolor="none" if is_open else shade, linestyle="none")  # fmt: skip
        seen.add(verdict)
    axes.set_xlabel(f"bits per byte, minus {_short(view.ablation.baseline)}")
    _legend(axes)
    counts = ", ".join(
        f"{sum(effect.verdict == verdict for effect, _ in tested)} {verdict}" for verdict in (BETTER, WORSE, NOT_SHOWN)
    )
    caption = (
        f"Left of 0 is better. Bars: 95% intervals, uncorrected; colors: after correction for their number ({counts})."
    )
    return drawn_of("forest", "Differences to the baseline", caption, figure)


def waterfalls(view: Variants) -> Drawn | None:
    """What quantization costs and context and adaptation gain, a row a variant, mean over its seeds."""
    tables = {name: table for name, table in view.ablation.tables.items() if len(_levels(table)) > 1}
    if not tables:
        return None
    figure, axes = _rows(list(tables), LANES_IN)
    seen: set[str] = set()
    for place, table in enumerate(tables.values()):
        levels = _levels(table)
        for lane, ((_, before), (key, after)) in enumerate(itertools.pairwise(levels)):
            label, shade = STEPS[key]
            axes.barh(place + 0.25 * (lane - 1), after - before, 0.22, left=before, color=color(shade),
                      label=None if label in seen else label)  # fmt: skip
            seen.add(label)
        axes.vlines(levels[-1][1], place - 0.42, place + 0.42, color=color("ink"), linewidth=1.6)
    values = [value for table in tables.values() for _, value in _levels(table)]
    margin = 0.06 * ((max(values) - min(values)) or 1e-3)
    axes.set_xlim(min(values) - margin, max(values) + margin)
    axes.set_xlabel("bits per byte, mean")
    _legend(axes)
    caption = (
        "From the averaged weights: up by quantization, down by a longer context and by adaptation. Black: the result."
    )
    return drawn_of("waterfalls", "What each stage costs or gains", caption, figure)


def sharing(view: Variants) -> Drawn | None:
    """Hours that each variant computed, and hours of stages that it took from other runs."""
    total = view.total
    if not total.computed:
        return None
    figure, axes = _rows(list(view.hours), ROW_IN)
    for place, hours in enumerate(view.hours.values()):
        is_first = place == 0
        axes.barh(place, hours.computed, 0.62, color=color("s1"), label="computed" if is_first else None)
        axes.barh(place, hours.taken, 0.62, left=hours.computed, facecolor="none", edgecolor=color("muted"),
                  linestyle=":", label="taken from another run" if is_first else None)  # fmt: skip
    axes.set_xlabel(view.unit)
    _legend(axes)
    return drawn_of("sharing", "Time, and what sharing saved", describe_sharing(view), figure)


def describe_sharing(view: Variants) -> str:
    """Return the hours with and without sharing in words."""
    total = view.total
    whole = total.computed + total.taken
    saved = f"{100 * total.taken / whole:.0f} %" if whole else "0 %"
    return (
        f"{total.computed:.2f} {view.unit} computed by finished runs; without sharing {whole:.2f}, so "
        f"{total.taken:.2f} ({saved}) were saved."
    )


def _levels(table: SeedTable) -> list[tuple[str, float]]:
    """Return the mean after each stage that was measured, in order."""
    return [(key, mean) for key, _ in WATERFALL if (mean := table.summary[key].mean) is not None]


def _rows(names: list[str], row_in: float) -> tuple[Figure, Axes]:
    """Return a figure with one labelled row a name, the first at the top."""
    figure, (axes,) = new_figure(1, height=FRAME_IN + row_in * len(names), width=WIDTH_IN)
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.locator_params(axis="x", nbins=4)
    return figure, axes


def _legend(axes: Axes) -> None:
    axes.legend(
        frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.35, 1.0), labelcolor=color("ink")
    )


def _short(name: str) -> str:
    """Return a name that leaves room for the figure: its beginning and its end."""
    return name if len(name) <= LABEL_CHARS else f"{name[: LABEL_CHARS // 2 - 1]}\u2026{name[-LABEL_CHARS // 2 :]}"
