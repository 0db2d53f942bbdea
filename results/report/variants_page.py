"""The section of the report about a sweep of variants: differences, a row a variant, what sharing saved."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from results.compare.variants import BETTER, NOT_SHOWN, WORSE, Effect
from results.compare.variants_text import explain
from results.render import fixed, signed
from results.report.audit import audit_section
from results.report.figures import Drawn
from results.report.html import as_list, draw_inline, make_cards, seed_rows, show_value
from results.report.variant_figures import describe_sharing
from results.report.variants import Variants
from results.schema import FINISHED

if TYPE_CHECKING:
    import pandas as pd

OPEN_RUNS = 60  # with more runs the rows of the seeds are folded away
MAX_NAMED = 12  # values of one fact
MARKS = {BETTER: "ok", WORSE: "mark"}
OVERVIEW = (
    ("post-TTT", "post_ttt_bpb", 5), ("pre-TTT", "pre_ttt_bpb", 5), ("context", "context_gain_bpb", None),
    ("adaptation", "adaptation_gain_bpb", None), ("artifact bytes", "artifact_bytes", 0), ("train s", "train_s", 1),
    ("TTT s", "ttt_s", 1),
)  # fmt: skip
FACTS = (
    "config_hash", "data_hash", "code_hash", "code_changed", "git_commit", "git_dirty", "torch_version", "ray_version",
    "gpu_model", "driver_version", "num_gpus", "num_cpus", "world_size", "attention_backend", "val_documents_hash",
    "tokenizer_hash", "source",
)  # fmt: skip


def variants_section(view: Variants, drawn: list[Drawn], prefix: str) -> list[str]:
    """Return cards, differences, figures, one row a variant, the seeds, disagreements, audit and provenance."""
    ablation = view.ablation
    runs = sum(len(table.seeds) for table in ablation.tables.values())
    is_open = " open" if runs <= OPEN_RUNS else ""
    errors = [
        f"variant {name} seed {row['seed']} {row['state']}: {row['error']}"
        for name, table in ablation.tables.items()
        for row in table.seeds
        if row["error"]
    ]
    return [
        _cards(view),
        f"<h3>Differences to {escape(ablation.baseline)}</h3>",
        _differences(ablation.effects),
        *(f'<p class="note">{escape(line)}</p>' for line in [*explain(ablation), *errors, *ablation.notes]),
        "<h3>Figures</h3>",
        '<div class="figures tall">',
        *(draw_inline(entry, f"{prefix}-{entry.name}") for entry in drawn),
        "</div>",
        "<h3>Variants</h3>",
        _overview(view),
        f'<p class="note">Means over seeds. {escape(describe_sharing(view))}</p>',
        "<h3>Seeds</h3>",
        *(
            f"<details{is_open}><summary>{escape(name)}: {sum(row['state'] == FINISHED for row in table.seeds)} of "
            f"{len(table.seeds)} runs finished</summary>{seed_rows(table)}</details>"
            for name, table in ablation.tables.items()
        ),
        "<h3>Disagreements</h3>",
        as_list(view.disagreements, "None found: the sums, sizes and hashes of the rows agree."),
        '<p class="note">Loss curves and the sums over documents of one variant: seedsweep report DIR#VARIANT.</p>',
        *audit_section(view.out, set(ablation.tables)),
        "<h3>Provenance</h3>",
        _provenance(view.runs),
    ]


def _cards(view: Variants) -> str:
    """Return the headline figures; no variant is singled out."""
    effects, total = view.ablation.effects, view.total
    counts = [(sum(effect.verdict == verdict for effect in effects), verdict) for verdict in (BETTER, WORSE, NOT_SHOWN)]
    base = view.ablation.tables[view.ablation.baseline].summary["post_ttt_bpb"]
    words = {BETTER: "shown to be better", WORSE: "shown to be worse", NOT_SHOWN: "not shown to differ"}
    return make_cards(
        [
            (fixed(base.mean, 5), f"post-TTT bits per byte of {view.ablation.baseline}, mean, n = {base.n}"),
            *((str(count), f"variants {words[verdict]}") for count, verdict in counts),
            (f"{total.computed:.2f}", f"{view.unit} computed"),
            (f"{total.taken:.2f}", f"{view.unit} saved by sharing stages"),
        ]
    )


def _differences(effects: list[Effect]) -> str:
    """Return one row a variant, the best first; every number carries its full-precision value in data-value."""
    ordered = sorted(effects, key=lambda effect: effect.difference.mean if effect.difference else float("inf"))
    heads = ("variant", "difference", "95% interval", "p", "p (Holm)", "seeds", "test", "verdict")
    rows = []
    for effect in ordered:
        difference = effect.difference
        interval = None if difference is None else difference.interval
        between = "-" if interval is None else f"{interval.low:+.5f} to {interval.high:+.5f}"
        full = "" if difference is None else repr(difference.mean)
        p, corrected = ("-" if p is None else f"{p:.3g}" for p in (effect.p_better, effect.p_better_holm))
        rows.append(
            f'<tr><td>{escape(effect.variant)}</td><td data-variant="{escape(effect.variant)}" data-value="{full}">'
            f"{escape(signed(difference.mean if difference else None))}</td><td>{between}</td><td>{p}</td>"
            f"<td>{corrected}</td><td>{len(effect.seeds)}</td><td>{escape(effect.method or '-')}</td>"
            f'<td class="{MARKS.get(effect.verdict, "")}">{escape(effect.words)}</td></tr>'
        )
    return _table(heads, rows)


def _overview(view: Variants) -> str:
    """Return one row a variant: n, scores with their spread, sizes, times, hours."""
    heads = ("variant", "n", "post-TTT", "std", *(head for head, _, _ in OVERVIEW[1:]), view.unit, "of these taken")
    rows = []
    for name, table in view.ablation.tables.items():
        score = table.summary["post_ttt_bpb"]
        spread = "no spread" if score.n == 1 else fixed(score.std_ddof1, 5)
        reused = {stage for row in table.seeds for stage in (row["reused_stages"] or "").split(",")}
        cells = [str(score.n), fixed(score.mean, 5), spread]
        for _, key, places in OVERVIEW[1:]:
            mean = table.summary[key].mean
            text = signed(mean) if places is None else fixed(mean, places)
            cells.append(text + ("*" if key.removesuffix("_s") in reused else ""))
        hours = view.hours[name]
        cells += [f"{hours.computed + hours.taken:.2f}", f"{hours.taken:.2f}"]
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return _table(heads, rows)


def _table(heads: tuple[str, ...], rows: list[str]) -> str:
    header = "".join(f"<th>{escape(head)}</th>" for head in heads)
    return (
        f'<div class="scroll"><table class="variants"><thead><tr>{header}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _provenance(runs: pd.DataFrame) -> str:
    """Return one row a fact: its one value, or that of each variant, or of each run where they differ inside one."""
    rows = []
    for name in FACTS:
        values = {(run["variant"], run["seed"]): show_value(run[name]) for _, run in runs.iterrows()}
        if not set(values.values()) - {"-"}:
            continue
        of_variant: dict[str, set[str]] = {}
        for (variant, _), value in values.items():
            of_variant.setdefault(variant, set()).add(value)
        if len(set(values.values())) == 1:
            said = [next(iter(values.values()))]
        elif all(len(found) == 1 for found in of_variant.values()):
            said = [f"{variant}: {next(iter(found))[:12]}" for variant, found in of_variant.items()]
        else:
            said = [f"{variant} {seed}: {value[:12]}" for (variant, seed), value in values.items()]
        more = f" and {len(said) - MAX_NAMED} more" if len(said) > MAX_NAMED else ""
        rows.append(f"<tr><th>{name}</th><td>{escape('; '.join(said[:MAX_NAMED]) + more)}</td></tr>")
    return f'<div class="scroll"><table class="facts"><tbody>{"".join(rows)}</tbody></table></div>'
