"""The variants of one sweep against its baseline: over the seeds that both have, corrected for their number."""

from __future__ import annotations

from typing import NamedTuple

from results.compare.comparison import ALPHA, pooled_std_of
from results.compare.power import pairs_needed, seeds_needed
from results.compare.sides import text_of_rows
from results.render import MIXED, mixed_devices
from results.schema import BASE, FINISHED
from results.stats import Difference, holm, paired, welch
from results.store.announced import announced_variants, order_variants
from results.store.reader import Rows, latest_attempts
from results.tables import TABLE_COLUMNS, SeedTable, devices_of, read_spent, seed_means, table_of_rows
from results.validation_text import Text, why_not_comparable

TEXT_COLUMNS = ("val_bytes", "pre_ttt_bytes", "post_ttt_bytes")
SCORE = "post_ttt_bpb"
BETTER, WORSE, NOT_SHOWN = "better", "worse", "not shown"


class Effect(NamedTuple):
    """One variant against the baseline in bits per byte (negative: better), and what may be said of it.

    difference is None where none can be taken; `why` says so then. The p values are one-sided, *_holm corrected over
    all variants tested. seeds_needed: for the usual power at the first of Holm's limits, None where no number would do.
    """

    variant: str
    seeds: list[int]
    method: str
    difference: Difference | None
    why: str = ""
    p_better: float | None = None
    p_better_holm: float | None = None
    p_worse: float | None = None
    p_worse_holm: float | None = None
    seeds_needed: int | None = None

    @property
    def verdict(self) -> str:
        """Better, worse or not shown; empty where nothing was tested."""
        if self.p_better_holm is None or self.p_worse_holm is None:
            return ""
        return BETTER if self.p_better_holm < ALPHA else WORSE if self.p_worse_holm < ALPHA else NOT_SHOWN

    @property
    def words(self) -> str:
        """The verdict and what would have to be done where nothing is shown."""
        if self.verdict != NOT_SHOWN:
            return self.verdict or self.why
        if self.difference is None or self.difference.mean >= 0:
            return f"{NOT_SHOWN}, no gain seen"
        if self.seeds_needed is None:
            return f"{NOT_SHOWN}, no affordable number of seeds"
        return f"{NOT_SHOWN}, {self.seeds_needed} seeds needed"


class Ablation(NamedTuple):
    """A sweep of several variants: the seed table of each, in order, and every other one against the first."""

    baseline: str
    how_chosen: str
    tables: dict[str, SeedTable]
    effects: list[Effect]
    rows: Rows
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """A line for each file that could not be read."""
        return self.rows.problems

    @property
    def has_failures(self) -> bool:
        """Some run did not finish, or some file could not be read."""
        return bool(self.problems) or any(table.has_failures for table in self.tables.values())


def read_table(out: object) -> Ablation | SeedTable:
    """Return what a run directory (path or URI) holds: the seed table of a plain sweep, or its variants.

    Raises FileNotFoundError without a results folder and ValueError when no row of it could be read.
    """
    rows = latest_attempts(read_spent(out, (*TABLE_COLUMNS, *TEXT_COLUMNS)))
    if has_variants(rows):
        return ablation_of_rows(rows, announced_variants(out), shown=str(out))
    return table_of_rows(rows, shown=str(out))


def has_variants(rows: Rows) -> bool:
    """Return whether rows are of several variants, or of one that is not `base`."""
    return bool(set(rows.frame["variant"]) - {BASE})


def ablation_of_rows(rows: Rows, announced: list[str], *, shown: str) -> Ablation:
    """Return the variants among rows that were already chosen."""
    names = order_variants(rows.frame["variant"], announced)
    groups = {name: rows.frame[rows.frame["variant"] == name].reset_index(drop=True) for name in names}
    tables = {name: table_of_rows(Rows(frame, [], []), shown=shown) for name, frame in groups.items()}
    baseline = names[0]
    texts = {name: text_of_rows(frame[frame["state"] == FINISHED]) for name, frame in groups.items()}
    effects = [compare_variant(name, tables, baseline, texts) for name in names if name != baseline]
    how = "the first of the sweep" if baseline in announced else "by its name" if baseline == BASE else "first by name"
    notes = [*rows.notes, *_said_of_tables(tables)]
    missing = [name for name in announced if name not in names]
    if missing:
        notes.append(f"no run has ended yet of {', '.join(missing)}")
    return Ablation(baseline, how, tables, correct_effects(effects, baseline, tables), rows, notes)


def _said_of_tables(tables: dict[str, SeedTable]) -> list[str]:
    """Return the notes of all variants, and on what each run was computed, where that differs, once for all of them."""
    each = (devices_of(table.seeds, f"variant={name}-") for name, table in tables.items())
    devices = mixed_devices({run: device for found in each for run, device in found.items()})
    named = [(name, note) for name, table in tables.items() for note in table.notes if not note.startswith(MIXED)]
    return [*[devices] * bool(devices), *(f"{name}: {note}" for name, note in named)]


def scores_of(table: SeedTable) -> dict[int, float]:
    """Return the final score of each finished seed, repeats averaged."""
    return seed_means([row for row in table.seeds if row["state"] == FINISHED], SCORE)


def compare_variant(name: str, tables: dict[str, SeedTable], baseline: str, texts: dict[str, Text]) -> Effect:
    """Return one variant against the baseline, before anything is corrected.

    Paired over the seeds that both have where these are two or more; else Welch over all seeds of both.
    """
    ours, theirs = scores_of(tables[name]), scores_of(tables[baseline])
    shared = [seed for seed in ours if seed in theirs]
    if not ours or not theirs:
        return Effect(name, shared, "", None, "no finished seed" + ("" if theirs else f" of {baseline}"))
    other_text = why_not_comparable(texts[name], texts[baseline])
    if other_text:
        return Effect(name, shared, "", None, f"not compared: {other_text}")
    is_paired = len(shared) > 1 or (bool(shared) and min(len(ours), len(theirs)) == 1)
    if is_paired:
        difference = paired([ours[seed] for seed in shared], [theirs[seed] for seed in shared])
    else:
        difference = welch(list(ours.values()), list(theirs.values()))
    method = "paired" if is_paired else "Welch, other seeds"
    why = "no spread, n = 1" if difference.standard_error is None else ""
    p_better, p_worse = difference.p_better(), difference.p_worse()
    return Effect(name, shared, method, difference, why, p_better=p_better, p_worse=p_worse)


def correct_effects(effects: list[Effect], baseline: str, tables: dict[str, SeedTable]) -> list[Effect]:
    """Return the effects with p values corrected for their number and the seeds that each would need."""
    better, worse = (holm([getattr(effect, name) for effect in effects]) for name in ("p_better", "p_worse"))
    alpha = ALPHA / max(1, sum(effect.p_better is not None for effect in effects))
    corrected = [
        effect._replace(p_better_holm=p_better, p_worse_holm=p_worse)
        for effect, p_better, p_worse in zip(effects, better, worse)
    ]
    return [
        effect._replace(seeds_needed=_needed(effect, baseline, tables, alpha))
        if effect.verdict == NOT_SHOWN
        else effect
        for effect in corrected
    ]


def _needed(effect: Effect, baseline: str, tables: dict[str, SeedTable], alpha: float) -> int | None:
    """Return the seeds at which the observed gain and spread, taken for true, would be shown with the usual power."""
    assert effect.difference is not None, "only what was tested is not shown"
    gain, error = -effect.difference.mean, effect.difference.standard_error
    if gain <= 0 or not error:
        return None
    if effect.method == "paired":
        count = len(effect.seeds)
        needed = pairs_needed(gain=gain, std=error * count**0.5, alpha=alpha)
    else:
        sides = [list(scores_of(tables[name]).values()) for name in (effect.variant, baseline)]
        count = min(map(len, sides))
        needed = seeds_needed(gain=gain, std=pooled_std_of(sides) or error, alpha=alpha)
    return None if needed is None else max(needed, count + 1)
