"""The report's figures, drawn with matplotlib: plain functions from rows to a figure.

Colors are the placeholders of PALETTE, so that a figure inside the page takes the page's colors (light, dark, print)
and a figure saved as a file takes the light ones.
"""

from __future__ import annotations

import importlib
import io
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from results.published.track import TIME_LIMIT_S
from results.report.data import LENGTH_EDGES, System
from results.schema import READS_TRAINING_S
from results.stats import summarize, t_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _load_matplotlib() -> ModuleType:
    """Import matplotlib as if MPLBACKEND were not set: a notebook's backend may not be there, and none is needed."""
    named = os.environ.pop("MPLBACKEND", None)
    try:
        return importlib.import_module("matplotlib")
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named


matplotlib = _load_matplotlib()
NOT_STYLE = ("backend", "interactive", "toolbar", "webagg", "tk.")  # settings that say where windows go
OWN_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "seedsweep", "font.size": 11}

# name -> (placeholder drawn, color in files); the page's style sheet defines --ink, --s1, ... for both schemes
PALETTE = {
    "ink": ("#010101", "#1f2328"), "muted": ("#020202", "#656d76"), "grid": ("#030303", "#d8dee4"),
    "s1": ("#040401", "#2a6fdb"), "s2": ("#040402", "#c2410c"), "s3": ("#040403", "#0f766e"),
    "s4": ("#040404", "#7c3aed"), "s5": ("#040405", "#a16207"), "s6": ("#040406", "#be185d"),
    "good": ("#050501", "#15803d"), "bad": ("#050502", "#b91c1c"),
}  # fmt: skip
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")
WATERFALL = (
    ("post_ema_bpb", "post-EMA"),
    ("pre_ttt_bpb", "quantized"),
    ("ttt_lr0_bpb", "lr 0"),
    ("post_ttt_bpb", "post-TTT"),
)
WIDTH_IN, HEIGHT_IN = 6.0, 3.7


class Drawn(NamedTuple):
    """A figure, its drawing in placeholder colors, and the sentence under it."""

    name: str
    title: str
    caption: str
    figure: Figure
    svg: str


@contextmanager
def own_style() -> Iterator[None]:
    """Draw by matplotlib's built-in defaults inside the block, whatever a matplotlibrc or the caller has set."""
    plain = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith(NOT_STYLE)}
    with matplotlib.rc_context(plain):
        yield


def color(name: str) -> str:
    """Return the placeholder of a palette name."""
    return PALETTE[name][0]


def draw_all(system: System) -> list[Drawn]:
    """Return every figure that a system's rows allow, in the order of the page."""
    if system.runs.empty:
        return []
    makers = (loss_curves, waterfall, gain_by_length, intervals, timing, artifact)
    return [drawn for maker in makers if (drawn := maker(system)) is not None]


def loss_curves(system: System) -> Drawn | None:
    """Training loss of each seed, with the learning rate below and a mark where looping turned on."""
    if not system.steps:
        return None
    figure, (top, bottom) = new_figure(2, [3, 1])
    for i, (seed, steps) in enumerate(system.steps.items()):
        shown = color(SERIES[i % len(SERIES)])
        top.plot(steps["step"], steps["loss"], color=shown, linewidth=1.2, label=f"seed {seed}")
        if steps["lr_factor"].notna().any():
            bottom.plot(steps["step"], steps["lr_factor"], color=shown, linewidth=1.2)
        looped = steps.loc[steps["is_looped"].eq(True), "step"]
        if len(looped):
            top.axvline(looped.iloc[0], color=shown, linewidth=1, linestyle=":")
    _robust_limits(top, np.concatenate([steps["loss"].to_numpy() for steps in system.steps.values()]))
    top.set_ylabel("training loss, nats")
    bottom.set_ylabel("LR / peak")
    bottom.set_xlabel("step")
    if len(system.steps) <= len(SERIES):
        top.legend(frameon=False, fontsize=10, labelcolor=color("ink"))
    last = summarize([float(steps["loss"].iloc[-1]) for steps in system.steps.values()])
    caption = f"Dotted: the step where the repeated layers turned on. Last step: mean loss {last.mean:.4f}."
    return drawn_of("loss", "Training loss and learning rate", caption, figure)


def waterfall(system: System) -> Drawn | None:
    """Mean bpb after each stage and what each step adds or takes."""
    present = [(key, label) for key, label in WATERFALL if system.runs[key].notna().all()]
    if len(present) < 2:
        return None
    figure, (axes,) = new_figure(1)
    means = [float(system.runs[key].mean()) for key, _ in present]
    spread = max(means) - min(means) or 1e-3
    for i, value in enumerate(means):
        before = means[i - 1] if i else value
        axes.hlines(value, i - 0.35, i + 0.35, color=color("ink"), linewidth=2)
        axes.annotate(f"{value:.4f}", (i, max(value, before)), (0, 6), ha="center", textcoords="offset points",
                      color=color("ink"), fontsize=10)  # fmt: skip
        if i:
            step = value - before
            axes.bar(i, step, 0.7, bottom=before, color=color("bad" if step > 0 else "good"), alpha=0.75)
            is_tall = abs(step) > 0.12 * spread  # a shorter bar has its label below
            place, offset = ((value + before) / 2, 0) if is_tall else (min(value, before), -11)
            axes.annotate(f"{step:+.4f}", (i, place), (0, offset), ha="center", va="center",
                          textcoords="offset points", fontsize=10, color=color("ink"))  # fmt: skip
    axes.set_xticks(range(len(present)), [label for _, label in present])
    axes.set_ylabel("bits per byte, mean")
    axes.set_ylim(min(means) - 0.2 * spread, max(means) + 0.25 * spread)
    steps = "; ".join(
        f"{label} {after - before:+.5f}" for (_, label), before, after in zip(present[1:], means, means[1:])
    )
    return drawn_of("waterfall", "What each stage costs or gains", f"Mean over seeds, bits per byte: {steps}.", figure)


def gain_by_length(system: System) -> Drawn | None:
    """Context effect and adaptation by document length, with intervals over documents."""
    if not system.bins:
        return None
    figure, (axes,) = new_figure(1)
    for offset, name, label in ((-0.12, "context", "context (lr 0 - plain)"), (0.12, "adaptation", "adaptation")):
        entries = [getattr(entry, name) for entry in system.bins]
        places = np.arange(len(entries)) + offset
        reach = [0.0 if entry.interval is None else entry.interval.high - entry.mean for entry in entries]
        shown = color("s1" if name == "context" else "s2")
        axes.errorbar(
            places, [entry.mean for entry in entries], yerr=reach, fmt="o", color=shown, capsize=3, label=label
        )
    axes.axhline(0, color=color("muted"), linewidth=1)
    labels = [f"{entry.low}+" if entry.high == LENGTH_EDGES[-1] else f"<{entry.high}" for entry in system.bins]
    axes.set_xticks(
        range(len(labels)), [f"{label}\n{entry.num_documents}" for label, entry in zip(labels, system.bins)]
    )
    axes.set_xlabel("document length, tokens (below: documents)")
    axes.set_ylabel("change, bits per byte")
    axes.legend(frameon=False, fontsize=10, labelcolor=color("ink"))
    caption = "Negative is better. Bars: 95% intervals over documents, seeds pooled; bins with one document have none."
    return drawn_of("ttt_by_length", "TTT gain against document length", caption, figure)


def intervals(system: System) -> Drawn | None:
    """Every seed's final score, the mean and its 95 % t interval."""
    return score_intervals([system])


def score_intervals(systems: list[System]) -> Drawn | None:
    """One line a system: a dot a seed, the mean, and the 95 % t interval where n allows one."""
    rows = [(system.name, system.runs["post_ttt_bpb"].dropna().tolist(), system) for system in systems]
    rows = [row for row in rows if row[1]]
    if not rows:
        return None
    figure, (axes,) = new_figure(1, height=max(2.2, 0.7 + 0.9 * len(rows)))
    said = []
    for place, (name, scores, system) in enumerate(rows):
        interval = t_interval(scores)
        mean = float(np.mean(scores))
        if interval is not None:
            axes.hlines(place, interval.low, interval.high, color=color("s1"), linewidth=6, alpha=0.35)
        axes.plot([mean], [place], "|", color=color("ink"), markersize=22, markeredgewidth=2)
        axes.plot(scores, [place] * len(scores), "o", color=color("s2"), markersize=6)
        for seed, score in zip(system.runs["seed"], scores) if len(scores) <= 5 else ():
            axes.annotate(str(seed), (score, place), (0, 10), textcoords="offset points", ha="center", fontsize=9,
                          color=color("muted"))  # fmt: skip
        spread = "no spread (n = 1)" if interval is None else f"95% interval {interval.low:.5f} to {interval.high:.5f}"
        said.append(f"{name}: mean {mean:.5f}, {spread}, n = {len(scores)}")
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.set_xlabel("post-TTT bits per byte")
    axes.locator_params(axis="x", nbins=5)
    return drawn_of("intervals", "Scores of the seeds", "; ".join(said) + ". Dots are seeds.", figure)


def timing(system: System) -> Drawn | None:
    """Seconds of training and evaluation against the two budgets of 600 s."""
    runs = system.runs
    if runs["train_s"].isna().all():
        return None
    figure, (axes,) = new_figure(1, height=max(2.6, 0.9 + 0.62 * 2 * min(len(runs), 6)))
    groups = (READS_TRAINING_S, ("evaluate_s", "ttt_s"))
    labels: list[str] = []
    shades = {"train_s": "s1", "hessian_s": "s4", "sensitivity_s": "s5", "evaluate_s": "s3", "ttt_s": "s2"}
    seen: set[str] = set()
    for _, run in runs.head(6).iterrows():
        for group, budget in zip(groups, ("train", "eval")):
            left = 0.0
            for name in group:
                seconds = float(run[name]) if math.isfinite(run[name]) else 0.0
                label = None if name in seen or not seconds else name.removesuffix("_s").replace("ttt", "TTT")
                axes.barh(len(labels), seconds, 0.6, left=left, color=color(shades[name]), label=label)
                seen |= {name} if label else set()
                left += seconds
            labels.append(f"{run['seed']} {budget}")
    axes.axvline(TIME_LIMIT_S, color=color("bad"), linewidth=1.5, linestyle="--")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds; dashed: the limit of {TIME_LIMIT_S:.0f}")
    axes.legend(
        frameon=False, fontsize=9, labelcolor=color("ink"), ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0)
    )
    return drawn_of(
        "timing", f"Time against {TIME_LIMIT_S:.0f} s + {TIME_LIMIT_S:.0f} s", _timing_caption(runs), figure
    )


def artifact(system: System) -> Drawn | None:
    """Model and code bytes against 16,000,000."""
    runs = system.runs[system.runs["artifact_bytes"].notna()]
    if runs.empty:
        return None
    limit = float(runs["size_limit_bytes"].dropna().iloc[0]) if runs["size_limit_bytes"].notna().any() else 16e6
    figure, (axes,) = new_figure(1, height=max(2.2, 0.9 + 0.4 * len(runs)))
    model = runs["model_bytes"].fillna(runs["artifact_bytes"]) / 1e6
    places = np.arange(len(runs))
    axes.barh(places, model, 0.6, color=color("s1"), label="model")
    axes.barh(places, runs["artifact_bytes"] / 1e6 - model, 0.6, left=model, color=color("s2"), label="code")
    axes.axvline(limit / 1e6, color=color("bad"), linewidth=1.5, linestyle="--")
    axes.set_yticks(places, [str(seed) for seed in runs["seed"]])
    axes.invert_yaxis()
    axes.set_xlabel(f"MB; dashed: the limit of {limit:,.0f} bytes")
    axes.legend(
        frameon=False, fontsize=9, labelcolor=color("ink"), ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    largest = int(runs["artifact_bytes"].max())
    room = limit - largest
    caption = (
        f"Largest artifact: {largest:,} bytes, {abs(room):,.0f} bytes {'below' if room >= 0 else 'OVER'} the limit."
    )
    return drawn_of("artifact", "Artifact size", caption, figure)


def inline_svg(drawn: Drawn, prefix: str) -> str:
    """Return the figure as SVG for inside a page: page colors, page font, ids that cannot clash."""
    svg = drawn.svg[drawn.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    for name, (placeholder, _) in PALETTE.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{drawn.title}"', 1)


def save_files(drawn: Drawn, folder: Path, stem: str) -> list[Path]:
    """Write the figure as SVG and PNG in light colors; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    svg = drawn.svg
    for placeholder, shown in PALETTE.values():
        svg = svg.replace(placeholder, shown)
    paths = [folder / f"{stem}.svg", folder / f"{stem}.png"]
    paths[0].write_text(svg, encoding="utf-8")
    _recolor(drawn.figure)
    drawn.figure.savefig(paths[1], dpi=144, facecolor="white")
    return paths


def new_figure(
    num_rows: int, ratios: list[int] | None = None, height: float = HEIGHT_IN, width: float = WIDTH_IN
) -> tuple[Figure, list[Axes]]:
    """Return a figure with axes below each other, sharing x, in the placeholder colors."""
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(OWN_STYLE)
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    made = figure.subplots(num_rows, 1, sharex=True, squeeze=False, height_ratios=ratios)
    for axes in made[:, 0]:
        axes.set_facecolor("none")
        axes.grid(visible=True, color=color("grid"), linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=color("muted"), labelcolor=color("ink"), labelsize=10)
        axes.xaxis.label.set_color(color("ink"))
        axes.yaxis.label.set_color(color("ink"))
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(color("muted"))
    return figure, list(made[:, 0])


def drawn_of(name: str, title: str, caption: str, figure: Figure) -> Drawn:
    """Return the finished figure; its layout is settled here, once, because that is most of the drawing time."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    figure.set_layout_engine("none")
    return Drawn(name, title, caption, figure, buffer.getvalue())


def _recolor(figure: Figure) -> None:
    """Turn every placeholder of a figure into its light color, for pixel formats."""
    from matplotlib.colors import to_hex, to_rgba

    shown = dict(PALETTE.values())
    for artist in figure.findobj():
        for kind in ("color", "facecolor", "edgecolor", "markerfacecolor", "markeredgecolor"):
            getter, setter = getattr(artist, f"get_{kind}", None), getattr(artist, f"set_{kind}", None)
            if getter is None or setter is None:
                continue
            value = getter()
            if isinstance(value, np.ndarray) and value.ndim == 2:
                new = [to_rgba(shown.get(to_hex(row), to_hex(row)), row[3]) for row in value]
                if len(new):
                    setter(new)
            elif isinstance(value, str | tuple):
                plain = to_hex(value) if value != "none" else value
                if plain in shown:
                    setter(to_rgba(shown[plain], to_rgba(value)[3]))


def _robust_limits(axes: Axes, values: np.ndarray) -> None:
    """Cut the first steps' high losses off, so that the rest of the curve can be seen."""
    values = values[np.isfinite(values)]
    if values.size > 20:
        low, high = float(values.min()), float(np.quantile(values, 0.97))
        axes.set_ylim(low - 0.05 * (high - low + 1e-6), high + 0.05 * (high - low + 1e-6))


def _timing_caption(runs: pd.DataFrame) -> str:
    train = runs[list(READS_TRAINING_S)].fillna(0.0).sum(axis=1).where(runs["train_s"].notna()).max()
    evaluation = (runs["evaluate_s"].fillna(0.0) + runs["ttt_s"].fillna(0.0)).max()
    parts = []
    for name, seconds, limit in (
        ("Training with all that reads its data", train, TIME_LIMIT_S),
        ("evaluation", evaluation, TIME_LIMIT_S),
    ):
        if math.isfinite(seconds):
            parts.append(f"{name}: at most {seconds:.1f} s ({'within' if seconds <= limit else 'OVER'} {limit:.0f} s)")
    hidden = f" Shown: the first 6 of {len(runs)} seeds." if len(runs) > 6 else ""
    return "; ".join(parts) + f" on this machine.{hidden}"
